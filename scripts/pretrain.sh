#!/usr/bin/env bash
# Stage 1: projector, newline token and ProxyV modules learn; vision tower and LLM are frozen.
#
#   bash scripts/pretrain.sh [preset] [overrides]      presets are the folders under configs/
#   bash scripts/pretrain.sh tiny optim.lr=5e-4        an override is section.name=value
#   bash scripts/pretrain.sh vicuna-7b --dry-run       shows what would run
stage=pretrain
. "$(dirname "$0")/stage.sh"
