#!/usr/bin/env bash
# Every check of the project: lint, format, types, tests. Makes its environment if none is active.
#
#   bash scripts/test.sh              what must always pass (about five minutes on two cores)
#   bash scripts/test.sh -m slow      the long tests
#   bash scripts/test.sh tests/test_masks.py -k left
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh
show_help "$@"
ensure_env dev

say "ruff"
ruff check .
ruff format --check .
say "mypy"
mypy
say "pytest"
# Two workers on two cores: more threads within each would only get in each other's way.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ $# -eq 0 ]; then
    set -- -m "not slow and not gpu and not network"
fi
exec python -m pytest -n "${PYTEST_WORKERS:-2}" --dist loadfile "$@"
