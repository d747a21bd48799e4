#!/usr/bin/env bash
# All that needs a GPU, in at most 8 minutes: tests, the cost of a guided step, and what tensor cores save.
#
#     bash tests/scripts/gpu.sh [folder]
#
# On a machine without a GPU it runs the same on the CPU at tiny sizes, to see that it runs.
set -uo pipefail
out=${1:-outputs/gpu}
python=${PYTHON:-python}
mkdir -p "$out"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
status=0

if $python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    row=256/224/2048 measuring=(--rounds 3 --steps 3 --skip_paper --bf16) text=(--per_device_train_batch_size 16 --length 512) rounds=20
    small='n_embd=768, n_layer=12, n_head=12' medium='n_embd=1024, n_layer=24, n_head=16'
else
    row=8/32/16 measuring=(--rounds 1 --steps 1 --batches 1 --skip_paper --use_cpu) text=(--per_device_train_batch_size 4 --length 16) rounds=1
    small='n_embd=16, n_layer=2, n_head=2' medium='n_embd=32, n_layer=2, n_head=2'
fi

run() { # name, limit in seconds, command
    local name=$1 limit=$2
    shift 2
    local began=$SECONDS
    timeout "$limit" "$@" >"$out/$name.txt" 2>&1
    local code=$?
    echo "$name: exit $code after $((SECONDS - began)) s"
    grep -E '^\| |passed|failed|saves' "$out/$name.txt"
    [ $code -eq 0 ] || { status=1; tail -5 "$out/$name.txt"; }
}

run tests 120 $python -m pytest -q -m gpu tests/test_gpu.py
for guide in resnet18 resnet50 vit_base_patch16_224; do
    for compiled in false true; do
        layers=()
        [ $guide = vit_base_patch16_224 ] && layers=(--guide_layers 'timm_model.blocks.*')
        run "cost-$guide-compile_$compiled" 90 $python recipes/guidance_cost.py --rows $row --guide timm/$guide \
            "${measuring[@]}" --torch_compile $compiled "${layers[@]}" --output_dir "$out/$guide-$compiled"
    done
done
$python - "$out" <<PY
import sys
from transformers import GPT2Config
GPT2Config($small).save_pretrained(f"{sys.argv[1]}/small")
GPT2Config($medium).save_pretrained(f"{sys.argv[1]}/medium")
PY
for measure in debiased_cka ridge_loo; do
    run "cost-text-$measure" 60 $python recipes/guidance_cost.py --target "$out/small" --guide "$out/medium" --sample_axis token \
        --measure $measure "${text[@]}" "${measuring[@]}" --output_dir "$out/text-$measure"
done
run ablation 60 $python tests/scripts/ablation.py $rounds
exit $status
