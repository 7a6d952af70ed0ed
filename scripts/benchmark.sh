#!/usr/bin/env bash
# Time and memory of ProxyV against the stock model with the same attention, interleaved.
#
#   bash scripts/benchmark.sh                 quick, large and rest: about 40 minutes on two CPU cores
#   bash scripts/benchmark.sh quick           prefill, training, decode, memory: about 8 minutes
#   bash scripts/benchmark.sh large           a prefill of 40 crops: about 9 minutes
#   bash scripts/benchmark.sh rest            flops, answer, breakdown, levers, loss, scaling by crops and by
#                                             text, training with checkpointing, token reduction
#   bash scripts/benchmark.sh gpu             Vicuna-7B, Llama3-8B, Qwen2-7B shapes, random bf16 weights
#   AGAIN=1 bash scripts/benchmark.sh prefill measured again; otherwise a part that is done is left
#   OUTPUT=runs/small SHAPE=layers=4,width=64,heads=4,ffn=128,side=8 STARTS=2,1 LARGE=6 \
#       DROPS=[1,2,3] ZIP=30,contextual=4 KEPT=16 bash scripts/benchmark.sh      everything, in a small model
#
# Parts may be named one by one. The last table says what was measured beside what it should be
# (proxyv/profiling/limits.py has the numbers) and never fails; a part that fails does.
# Environment: OUTPUT (default runs/benchmark; docs/results holds what was measured so), SHAPE, STARTS, CROPS, TEXT, LARGE (crops), REPEATS,
#   LARGE_REPEATS, THREADS (default 2), DTYPE, DEVICE, ATTN; for gpu PRESETS, BATCHES, ATTENTIONS;
#   for reduction DROPS (layers of pyramiddrop), KEPT (tokens of a crop that prumerge and random
#   dropping leave), ZIP (dominant tokens of visionzip and its other options).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh
show_help "$@"
ensure_env profiling

export OMP_NUM_THREADS=${THREADS:-${OMP_NUM_THREADS:-2}}
export COLUMNS=${COLUMNS:-140}
output=${OUTPUT:-runs/benchmark}
start=${STARTS:-8}
start=${start%%,*}
rows=(--crops "${CROPS:-5}" --text "${TEXT:-50}")
failed=()

# measure NAME COMMAND OPTION...: one report, unless it is there.
measure() {
    local name=$1
    shift
    if [ -e "$output/$name.json" ] && [ -z "${AGAIN:-}" ]; then
        say "$name: already in $output (AGAIN=1 measures it again)"
        return
    fi
    say "$name"
    rm -f "$output/$name.json"
    python -m proxyv.profiling "$@" --output "$output" --name "$name" || failed+=("$name")
}

cpu() {
    local name=cpu-$1
    shift
    measure "$name" "$@" --device "${DEVICE:-cpu}" --dtype "${DTYPE:-float32}" --attn "${ATTN:-sdpa}" \
        --shape "${SHAPE:-layers=16,width=1024,heads=16,ffn=2752,side=24}" --start-layers "${STARTS:-8,6}"
}

# gpu NAME COMMAND OPTION...: of one preset, or of SHAPE in its place.
gpu() {
    local preset=$1 name=gpu-$1-$2
    shift 2
    local model=(--preset "$preset")
    [ -z "${SHAPE:-}" ] || model=(--shape "$SHAPE")
    [ -z "${STARTS:-}" ] || model+=(--start-layers "$STARTS")
    measure "$name" "$@" "${model[@]}" --device "${DEVICE:-cuda}" --dtype "${DTYPE:-bfloat16}"
}

gpu_tables() {
    local preset attention batch
    local runs=(--operations prefill,decode --repeats "${REPEATS:-10}" --warmup 3)
    for preset in ${PRESETS:-vicuna-7b llama3-8b qwen2-7b}; do
        for attention in ${ATTENTIONS:-sdpa eager flash_attention_2 flex_attention}; do
            if [ "$attention" = flash_attention_2 ] && ! python -c 'import flash_attn' 2>/dev/null; then
                say "gpu-$preset-$attention: flash-attn is not installed (extra 'flash')"
                continue
            fi
            for batch in ${BATCHES:-1 8}; do
                gpu "$preset" "$attention-b$batch" latency "${rows[@]}" "${runs[@]}" \
                    --attn "$attention" --batch "$batch"
            done
        done
        gpu "$preset" sdpa-compiled-b1 latency "${rows[@]}" "${runs[@]}" --compile
        gpu "$preset" memory-b1 memory "${rows[@]}" --operations prefill
        gpu "$preset" breakdown-b1 breakdown "${rows[@]}" --repeats "${REPEATS:-10}"
    done
    gpu vicuna-7b training-b1 latency "${rows[@]}" --operations training --checkpointing \
        --repeats "${LARGE_REPEATS:-5}"
    gpu vicuna-7b scaling scaling --crops "1,2,5,10,20,${LARGE:-40}" --text-lengths "${TEXT:-50}" \
        --repeats "${LARGE_REPEATS:-5}"
}

# set_methods LAYERS: token reduction, alone and under ProxyV with learned proxies; the paper's
# settings of VisionZip and PyramidDrop (which drops after LAYERS), PruMerge+ at a quarter.
set_methods() {
    methods=(--proxy-kind learned --kept "${KEPT:-144}"
        --reduction "method=visionzip,dominant=${ZIP:-360,contextual=40}"
        --reduction "{\"method\": \"pyramiddrop\", \"layers\": $1}"
        --reduction method=fastv --reduction method=prumerge
        --reduction "method=random_drop,tokens=${KEPT:-144}" --reduction method=average_pool)
}

part() {
    case $1 in
    quick) for name in prefill training decode memory; do part $name; done ;;
    rest) for name in flops answer breakdown levers loss checkpointing text scaling reduction; do part $name; done ;;
    prefill) cpu prefill latency "${rows[@]}" --operations prefill --repeats "${REPEATS:-7}" ;;
    decode) cpu decode latency "${rows[@]}" --operations decode --repeats "${REPEATS:-7}" ;;
    training) cpu training latency "${rows[@]}" --operations training --repeats "${LARGE_REPEATS:-3}" ;;
    memory) cpu memory memory "${rows[@]}" ;;
    answer) cpu answer latency "${rows[@]}" --operations answer --repeats "${LARGE_REPEATS:-3}" ;;
    breakdown) cpu breakdown breakdown "${rows[@]}" --repeats "${LARGE_REPEATS:-3}" ;;
    scaling) cpu scaling scaling --crops 1,2,5,10,20 --text-lengths "${TEXT:-50}" --repeats "${LARGE_REPEATS:-2}" ;;
    checkpointing) cpu checkpointing latency "${rows[@]}" --operations training --checkpointing \
        --repeats "${LARGE_REPEATS:-3}" ;;
    levers) STARTS=$start cpu levers levers "${rows[@]}" --repeats "${LARGE_REPEATS:-5}" ;;
    text) cpu text scaling --crops "${CROPS:-5}" --text-lengths 50,500,2000 --repeats "${LARGE_REPEATS:-3}" ;;
    loss) cpu loss loss "${rows[@]}" --repeats "${LARGE_REPEATS:-5}" ;;
    large) cpu large scaling --crops "${LARGE:-40}" --text-lengths "${TEXT:-50}" --warmup 0 --no-memory \
        --repeats "${LARGE_REPEATS:-2}" ;;
    flops)
        measure flops flops "${rows[@]}"
        set_methods "[12,20,26]"
        measure flops-reduction flops "${rows[@]}" "${methods[@]}" --preset vicuna-7b --start-layers 12
        ;;
    reduction)
        set_methods "${DROPS:-[6,10,13]}"
        STARTS=$start cpu reduction latency "${rows[@]}" "${methods[@]}" \
            --operations prefill,decode --repeats "${LARGE_REPEATS:-3}"
        STARTS=$start cpu reduction-memory memory "${rows[@]}" "${methods[@]}" --operations prefill
        ;;
    gpu) gpu_tables ;;
    *) mistake "unknown part '$1': quick, large, rest, gpu, prefill, training, decode, memory, flops, answer, breakdown, levers, loss, checkpointing, text, scaling or reduction" ;;
    esac
}

if [ $# -eq 0 ]; then set -- quick large rest; fi
for chosen in "$@"; do part "$chosen"; done
say "tables in $output; against what they should be:"
python -m proxyv.profiling limits "$output" --output "$output"
[ ${#failed[@]} -eq 0 ] || fail "failed: ${failed[*]}"
