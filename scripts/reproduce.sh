#!/usr/bin/env bash
# The paper in miniature: trains and evaluates every arm of its tables at small scale, then writes
# the report. An arm that is done is skipped; one that was stopped goes on where it was.
#
#   bash scripts/reproduce.sh                      tier 1 of the preset tiny: two CPU cores
#   bash scripts/reproduce.sh smol                 the same of the preset smol: one GPU
#   bash scripts/reproduce.sh tiny --tiers 1,2,3   every arm, ablations too
#   bash scripts/reproduce.sh tiny --arms proxyv-early --seeds 2
#   python -m proxyv.reproduce status --preset tiny
#   OMP_NUM_THREADS=1 bash scripts/reproduce.sh    in each of two terminals, the second once the first one trains: runs
#                                                  beside each other share the arms
#
# Result files: docs/results/reproduction/PRESET; report: docs/results/reproduction.md.
# The exit code is that of the run: 1 where an arm failed, 2 for a mistake, 143 where SIGTERM made it stop.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh
show_help "$@"
ensure_env train eval synthetic profiling

preset=tiny
case "${1:-}" in
    '' | -*) ;;
    *)
        preset=$1
        shift
        ;;
esac
code=0
python -m proxyv.reproduce run --preset "$preset" "$@" || code=$?
[ "$code" -ne 2 ] || exit 2 # a mistake: nothing was run
python -m proxyv.reproduce report
exit $code
