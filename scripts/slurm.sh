#!/usr/bin/env bash
# Both stages on SLURM, four nodes of eight GPUs; an example to copy.
#
#   sbatch scripts/slurm.sh pretrain vicuna-7b [overrides]
#   sbatch scripts/slurm.sh finetune vicuna-7b
#
# One task a node starts a rank for each GPU. Five minutes before the end, and when the nodes are
# taken back, the run gets SIGTERM: it saves, ends with 143, is queued again, and goes on.
#SBATCH --job-name=proxyv
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
case " $* " in *" -h "* | *" --help "*) sed -n '/^#SBATCH/q; 2,$s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
[ $# -ge 2 ] || { echo "usage: sbatch scripts/slurm.sh pretrain|finetune PRESET [overrides]" >&2; exit 2; }
stage=$1
shift
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
. scripts/env.sh
ensure_env train # once, before every node would

# Since Slurm 22.05 srun does not take over the number of cores: all ranks of a node would share one.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
srun --kill-on-bad-exit=1 bash "scripts/$stage.sh" "$@"
code=$?
if [ "$code" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
