#!/usr/bin/env bash
# The whole job on a machine without a GPU: render the small world, train the tiny ProxyV model in
# two stages with DeepSpeed, evaluate it on documents and charts, ask it a question.
#
#   bash scripts/quickstart.sh                          ProxyV from layer 3 of 8
#   bash scripts/quickstart.sh model.start_layer=null   the same model without ProxyV
#
# Arguments are overrides for both stages. Results land in runs/quickstart, those of the model without
# ProxyV in runs/quickstart-baseline (RUNS changes the place, WORLD that of the pages).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh
show_help "$@"
for word in "$@"; do
    case $word in
        [a-z]*.[a-z]*=*) ;;
        *) mistake "'$word' is no override; write section.name=value, as in model.start_layer=null" ;;
    esac
done
ensure_env train eval synthetic

case " $* " in
    *" model.start_layer="[nN~]*) runs=${RUNS:-runs/quickstart-baseline} ;;
    *) runs=${RUNS:-runs/quickstart} ;;
esac
world=${WORLD:-data/generated}
began=$SECONDS
stamp() { say "$(printf '[%d:%02d] %s' $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60)) "$*")"; }

# A world that other code has drawn is drawn again.
drawn_by=$(cat proxyv/synthetic/*.py | cksum)
if [ "$(cat "$world/complete" 2>/dev/null)" = "$drawn_by" ]; then
    stamp "1/5 the small world is already in $world"
else
    stamp "1/5 rendering documents and charts into $world"
    python -m proxyv.synthetic --out "$world"
    printf '%s' "$drawn_by" >"$world/complete"
fi

stamp "2/5 stage 1: projector, newline token and ProxyV modules learn to connect tower and LLM"
bash scripts/pretrain.sh tiny "data.annotations=$world/sharegpt4v/captions.json" "data.images=$world" \
    "run.output_dir=$runs/pretrain" run.overwrite=true "$@"

stamp "3/5 stage 2: the language model learns along"
bash scripts/finetune.sh tiny "data.annotations=$world/llava_next/conversations.json" "data.images=$world" \
    "model.init_from=$runs/pretrain" "run.output_dir=$runs/finetune" run.overwrite=true "$@"

stamp "4/5 evaluation on pages, typefaces and layouts that training never showed"
python -m proxyv.eval --model "$runs/finetune" --tasks docvqa,chartqa --data "$world" \
    --output "$runs/eval" --overwrite
for control in shuffled-images blank-images question-only; do
    python -m proxyv.eval --model "$runs/finetune" --tasks docvqa,chartqa --data "$world" \
        --control "$control" --output "$runs/eval-$control" --overwrite
done

stamp "5/5 ask it something"
python -m proxyv.chat --model "$runs/finetune" --image data/sample/invoice.png \
    --question "What is the invoice number?"
say "written there is HPH95722; data/sample/questions.json has more questions and their answers"
stamp "done: model in $runs/finetune, scores in $runs/eval/results.json"
