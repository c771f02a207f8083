#!/usr/bin/env bash
# Makes a small M2F2-Det from rendered images on a CPU: CLIP tower, detector (stage 1), a language model that takes the
# detector's token, the token's projector anew (stage 2), LoRA (stage 3), and evaluates detector and answers on fresh
# images. If it was stopped, the same command resumes.
#
#     bash scripts/train_m2f2det_small.sh [FOLDER]
#
# FOLDER (default: m2f2det_build) takes everything. IMAGES=16000 training images, EVAL=20 of each class and evaluation
# set, STEPS=2000 of stage 1, SEED=1, PYTHON=.venv/bin/python.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ "${1:-}" = "--help" ]; then
    sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
mkdir -p "${1:-m2f2det_build}"
out=$(cd "${1:-m2f2det_build}" && pwd)
images=${IMAGES:-16000} eval=${EVAL:-20} steps=${STEPS:-2000} seed=${SEED:-1}
cd "$root"
python=${PYTHON:-$root/.venv/bin/python}
export PYTHONPATH=$root TOKENIZERS_PARALLELISM=false

. scripts/steps.sh

render() {
    "$python" -m mmfr_generation.synthetic --out "$out/data" --train "$images" --eval 1 --size 112 --seed "$seed" \
        --delivery none
    "$python" -m mmfr_generation.synthetic --out "$out/test" --train 0 --eval "$eval" --size 112 --seed $((seed + 1000)) \
        --delivery none
}

words() {
    rm -rf "$out/records.json" "$out/tokenizer"
    "$python" -m llava.data.convert "$out/data/forgery_reasoning_cot.json" --to m2f2det --out "$out/records.json"
    "$python" -m llava.demo.tokenizer "$out/records.json" --output_dir "$out/tokenizer"
}

tower() {
    "$python" -m llava.demo.towers --data "$out/data" --config scripts/m2f2det_small_model.json --output_dir "$out/towers" \
        --dino_tower_loss none --vision_tower_loss caption=1 --max_steps 200 --batch_size 32 --seed "$seed"
}

detector() {
    "$python" - "$out" <<'PYTHON'
import json, sys
settings = json.load(open("scripts/m2f2det_small.json"))
settings["vision_tower"] = f"{sys.argv[1]}/towers/vision_tower"
json.dump(settings, open(f"{sys.argv[1]}/detector.json", "w"))
PYTHON
    "$python" -m llava.train.networks --recipe m2f2det_stage1 --use_cpu --bf16 True --model_config "$out/detector.json" \
        --data_path "$out/data" --validation_share 0.02 --output_dir "$out/stage1" --max_steps "$steps" \
        --per_device_train_batch_size 32 --learning_rate 2e-3 --lr_scheduler_type cosine --lr_scheduler_kwargs '{}' \
        --warmup_steps 0.05 --eval_steps 350 --save_steps 350 --logging_steps 50 --dataloader_num_workers 0 \
        --seed "$seed" --resume auto
}

# train FOLDER OPTION…: trains a language model on the records, into a folder of its own.
train() {
    "$python" -m llava.train.train --output_dir "$out/$1" "${@:2}" --use_cpu --data_path "$out/records.json" \
        --image_folder "$out/data" --model_max_length 256 --per_device_train_batch_size 16 --lr_scheduler_type cosine \
        --warmup_steps 0.05 --gradient_checkpointing False --dataloader_num_workers 0 --save_strategy steps \
        --save_steps 100 --save_total_limit 1 --logging_steps 25 --seed "$seed" --resume auto
}

base() {
    train base --model_config scripts/m2f2det_small_model.json --tokenizer "$out/tokenizer" --version v1 \
        --vision_tower "$out/towers/vision_tower" --detector "$out/stage1/final" --learning_rate 2e-3 \
        --max_steps "${BASE_STEPS:-500}"
}

stage2() {
    train stage2 --recipe m2f2det_stage2 --model_name_or_path "$out/base/final" --learning_rate 1e-2 \
        --max_steps "${STAGE2_STEPS:-100}"
}

stage3() {
    train stage3 --recipe m2f2det_stage3 --model_name_or_path "$out/stage2/final" --lora_r 16 --lora_alpha 32 \
        --learning_rate 1e-3 --max_steps "${STAGE3_STEPS:-100}"
}

evaluate() {
    "$python" -m llava eval --model-path "$out/stage1/final" --dataset_path "$out/test" --result_folder "$out/results_detector"
    "$python" -m llava eval --model-path "$out/stage3/final" --dataset_path "$out/test" \
        --result_folder "$out/results" --max_new_tokens 64
}

step render render
step words words
step tower tower
step detector detector
step base base
step stage2 stage2
step stage3 stage3
step evaluate evaluate
echo "the model is in $out/stage3/final, its evaluation in $out/results"
