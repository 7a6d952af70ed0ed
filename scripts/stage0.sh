#!/usr/bin/env bash
# Train the backbones of the preset tiny, and the projector between them, from scratch (hours on two
# cores) into data/tiny. A run that was stopped goes on where it was. Arguments go to every part
# but the projector.
#
#   bash scripts/stage0.sh
#   bash scripts/stage0.sh --device cuda --batch 256 --workers 14      the same on a GPU
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh
show_help "$@"
ensure_env train synthetic

say "language model: answers about pages given as characters"
python -m proxyv.train.stage0 language --run runs/stage0/language "$@"
say "vision tower: reads characters, and says how the language model knows them"
python -m proxyv.train.stage0 tower --run runs/stage0/tower "$@"
say "projector: between the two, where stage 1 starts"
python -m proxyv.train.stage0 projector --run runs/stage0/projector
say "all three together, on pages as pictures"
python -m proxyv.train.stage0 pair --run runs/stage0/pair "$@"
