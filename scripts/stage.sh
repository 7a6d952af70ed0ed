# Sourced by pretrain.sh and finetune.sh, which set stage: finds the preset and the ranks, and runs.
#
# Arguments: [preset] [section.name=value ...] [--dry-run], or --help for all settings
# Environment: NPROC, the number of ranks here (default: the visible GPUs, or 1 without one and for the
#   small model); for
#   several machines NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT, or what srun sets (slurm.sh).
#   Under torchrun (torchrun --no-python ... bash scripts/pretrain.sh PRESET) it is one of the ranks.
# The exit code is that of the run: 0, 2 for a mistake, 143 when SIGTERM made it save and stop.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

visible_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        # As CUDA reads it: what follows a negative number is not visible either.
        echo "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | sed '/^[[:space:]]*-/,$d' | grep -c '[^[:space:]]' || true
    else
        { nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU ' || true
    fi
}

gpus=$(visible_gpus)
case "${1:-}" in
    -h | --help)
        . scripts/env.sh
        ensure_env train
        exec python -m proxyv.train "$@"
        ;;
    '' | -* | *=*)
        if [ "$gpus" -gt 0 ]; then
            {
                echo "error: $gpus GPU(s) visible, and no preset named. The paper's run, and the small one:"
                echo "  bash scripts/$stage.sh vicuna-7b"
                echo "  bash scripts/$stage.sh tiny"
            } >&2
            exit 2
        fi
        preset=tiny
        ;;
    *)
        preset=$1
        shift
        ;;
esac

ranks=$((gpus > 0 ? gpus : 1))
case $preset in tiny | tiny-*) ranks=1 ;; esac # a step of it is one micro-batch

. scripts/env.sh
ensure_env train
exec python -m proxyv.train --preset "$preset" --stage "$stage" \
    --nproc "${NPROC:-$ranks}" "$@"
