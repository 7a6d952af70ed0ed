#!/usr/bin/env bash
# Stage 2: the LLM learns too, from the stage-1 run of the same preset (model.init_from=FOLDER for
# another one).
#
#   bash scripts/finetune.sh [preset] [overrides]      presets are the folders under configs/
#   bash scripts/finetune.sh tiny model.start_layer=null
stage=finetune
. "$(dirname "$0")/stage.sh"
