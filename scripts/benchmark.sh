#!/usr/bin/env bash
# Time and memory of ProxyV against stock LlamaModel with sdpa, interleaved in one process each.
#
#   bash scripts/benchmark.sh                 about 40 minutes on two CPU cores
#   OUTPUT=/tmp/bench REPEATS=9 bash scripts/benchmark.sh
#   SHAPE=layers=4,width=64,heads=4,ffn=128,side=8 STARTS=2,1 LARGE=6 bash scripts/benchmark.sh
#
# What it should show on two CPU cores, as ratios to the stock model (in brackets those of the FLOPs):
#   prefill with cache   from layer 8 at most 0.64 (0.61), from layer 6 at most 0.53 (0.52)
#   forward + backward   from layer 8 at most 0.66
#   decoding step        at most 1.02
#   peak above weights   prefill at most 1.0, training without checkpointing at most 0.75
#   40 crops             prefill from layer 8 at most 0.60, from layer 6 at most 0.48, in 12 GB
# Environment: SHAPE, STARTS, CROPS, TEXT, LARGE (crops of the long prefill), REPEATS, LARGE_REPEATS,
#   THREADS, DTYPE, DEVICE, ATTN, OUTPUT (tables as JSON and PNG; default runs/benchmark).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh
ensure_env profiling

export OMP_NUM_THREADS=${THREADS:-${OMP_NUM_THREADS:-2}}
shape=${SHAPE:-layers=16,width=1024,heads=16,ffn=2752,side=24}
output=${OUTPUT:-runs/benchmark}
common=(--shape "$shape" --start-layers "${STARTS:-8,6}" --attn "${ATTN:-sdpa}"
    --dtype "${DTYPE:-float32}" --device "${DEVICE:-cpu}")
rows=(--crops "${CROPS:-5}" --text "${TEXT:-50}")

profile() {
    say "$1"
    python -m proxyv.profiling "$@" "${common[@]}"
}

profile latency "${rows[@]}" --repeats "${REPEATS:-7}" --output "$output"
profile memory "${rows[@]}" --output "$output"
profile breakdown "${rows[@]}" --repeats "${LARGE_REPEATS:-3}" --output "$output"
profile scaling --crops "${LARGE:-40}" --text-lengths "${TEXT:-50}" \
    --repeats "${LARGE_REPEATS:-3}" --output "$output/large"
say "written to $output"
