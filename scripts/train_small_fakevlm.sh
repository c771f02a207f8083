#!/usr/bin/env bash
# Trains a small FakeVLM on MMFR-Synthetic on a CPU, by the recipe fakevlm: renders the data, writes them in FakeVLM's
# words, builds a tokenizer, trains the CLIP tower by itself, then tower, projector and language model on the answers,
# and evaluates on fresh sets. If it was stopped, the same command resumes. It takes about an hour and a half on a core.
#
#     bash scripts/train_small_fakevlm.sh [FOLDER]
#
# FOLDER (default: small_fakevlm) takes everything; the model is FOLDER/run/final. IMAGES=24000 training images,
# EVAL=100 images of each class and evaluation set, SEED=1.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ "${1:-}" = "--help" ]; then
    sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
mkdir -p "${1:-small_fakevlm}"
out=$(cd "${1:-small_fakevlm}" && pwd)
images=${IMAGES:-24000} eval=${EVAL:-100} seed=${SEED:-1}
python=${PYTHON:-$root/.venv/bin/python}
cd "$root"
export TOKENIZERS_PARALLELISM=false

. scripts/steps.sh

render() {
    "$python" -m mmfr_generation.synthetic --out "$out/data" --train "$images" --eval 1 --size 112 --seed "$seed" \
        --delivery none
    "$python" -m mmfr_generation.synthetic --out "$out/test" --train 0 --eval "$eval" --size 112 \
        --seed "$((seed + 1000))" --delivery none
}

words() {
    "$python" -m llava data convert "$out/data/forgery_reasoning_cot.json" --to fakevlm --out "$out/train.json"
    rm -rf "$out/tokenizer"
    "$python" -m llava data tokenizer "$out/train.json" --image_token --output_dir "$out/tokenizer"
}

# tower FOLDER PASSES OPTION…: trains the tower for some passes over the images.
tower() {
    "$python" -m llava.demo.towers --data "$out/data" --config scripts/fakevlm_small.json --output_dir "$out/$1" \
        --epochs "$2" --batch_size 32 --bf16 --dino_tower_loss none "${@:3}"
}

towers() {
    tower tower_1 1 --learning_rate 1e-3 --seed "$seed" --vision_tower_loss verdict=1,attributes=1,reasoning=3
    tower tower_2 1 --learning_rate 7e-4 --seed "$((seed + 1))" --vision_tower_loss verdict=2,attributes=1,reasoning=1 \
        --start "$out/tower_1"
    tower tower_3 2 --learning_rate 7e-4 --seed "$((seed + 2))" --vision_tower_loss verdict=2,attributes=1,reasoning=1 \
        --start "$out/tower_2"
}

# train FOLDER OPTION…: the recipe in this process, at rates for a model that starts from nothing.
train() {
    "$python" -m llava.train.train --recipe fakevlm --output_dir "$out/$1" "${@:2}" \
        --data_path "$out/train.json" --image_folder "$out/data" --model_max_length 400 --use_cpu True --bf16 True \
        --gradient_checkpointing False --dataloader_num_workers 0 --per_device_train_batch_size 16 \
        --verdict_only_share 0.7 --save_dtype float32 --save_steps 200 --logging_steps 20 --resume auto
}

# The tower is frozen and its outputs are kept on disk, so that the language model learns to write in minutes.
language_model() {
    train start --model_config scripts/fakevlm_small.json --tokenizer "$out/tokenizer" \
        --vision_tower "$out/tower_3/vision_tower" --unfreeze_towers False --cache_features "$out/features" \
        --save_layout merged --learning_rate 1.5e-3 --num_train_epochs 0.8
}

whole() {
    train run --model_name_or_path "$out/start/final" --learning_rate 2e-4 --num_train_epochs 0.2
}

evaluate() {
    "$python" -m llava eval --model-path "$out/run/final" --dataset_path "$out/test" --result_folder "$out/results" \
        --max_new_tokens 96
}

step render render
step words words
step towers towers
step language_model language_model
step whole whole
step evaluate evaluate
echo "the model is in $out/run/final, its metrics in $out/results"
