#!/usr/bin/env bash
# Makes the embedded model again from scratch: renders MMFR-Synthetic, builds a tokenizer, trains the towers and then,
# with them frozen, fusion and language model, evaluates on fresh sets, and writes the model with its card.
# If it was stopped, the same command resumes. It takes up to two hours on two cores, and about 4 GB.
#
#     bash scripts/train_demo.sh [FOLDER]
#
# FOLDER (default: demo_build) takes everything; the model is FOLDER/demo_model. IMAGES=50000 training images,
# EVAL=100 images of each class and evaluation set, SEED=1, PYTHON=… as for demo.sh.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ "${1:-}" = "--help" ]; then
    sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
mkdir -p "${1:-demo_build}"
out=$(cd "${1:-demo_build}" && pwd)
images=${IMAGES:-50000} eval=${EVAL:-100} seed=${SEED:-1}
test_seed=$((seed + 1000)) # of the evaluation sets, which no training sees
sample_seed=4242         # of the small sample that tests evaluate again

cd "$root"
. scripts/environment.sh
installed train_demo || installed test || {
    install torch --editable ".[eval,synthetic]"
    finish train_demo
}
python=$root/.venv/bin/python
cpu=$("$python" -c 'import torch; print(not torch.cuda.is_available())')
export TOKENIZERS_PARALLELISM=false

# step NAME COMMAND…: runs a step that was not finished before, and notes how long it took.
step() {
    local name=$1 start=$SECONDS
    shift
    [ -f "$out/.$name.done" ] && return
    echo "== $name"
    "$@"
    echo "$((SECONDS - start))" > "$out/.$name.done"
}

render() {
    "$python" -m mmfr_generation.synthetic --out "$out/data" --train "$images" --eval 1 --size 112 --seed "$seed"
    "$python" -m mmfr_generation.synthetic --out "$out/test" --train 0 --eval "$eval" --size 112 --seed "$test_seed"
    "$python" -m mmfr_generation.synthetic --out "$out/sample" --train 0 --eval 2 --size 112 --seed "$sample_seed"
}

tokenizer() {
    rm -rf "$out/tokenizer"
    "$python" -m llava.demo.tokenizer "$out/data/forgery_reasoning_cot.json" --output_dir "$out/tokenizer"
}

towers() {
    "$python" -m llava.demo.towers --data "$out/data" --config scripts/demo_model.json --output_dir "$out/towers" \
        --epochs 2 --batch_size 32 --learning_rate 1e-3 --bf16 --seed "$seed" \
        --dino_tower_loss verdict=1,attributes=1,reasoning=3 --outliers 0.1 --vision_tower_loss caption=1
}

# train FOLDER OPTION…: trains fusion and language model on the answers, into a folder of its own.
train() {
    "$python" -m llava.train.train --output_dir "$out/$1" "${@:2}" \
        --data_path "$out/data/forgery_reasoning_cot.json" --image_folder "$out/data" --cache_features "$out/features" \
        --verdict_only_share 0.3 --model_max_length 256 --per_device_train_batch_size 16 --lr_scheduler_type cosine \
        --warmup_steps 0.03 --bf16 True --use_cpu "$cpu" --save_steps 500 --save_total_limit 1 --logging_steps 100 \
        --seed "$seed" --resume auto
}

language_model() {
    train run --model_config scripts/demo_model.json --tokenizer "$out/tokenizer" \
        --vision_tower "$out/towers/vision_tower" --dino_weights "$out/towers/dino_tower" \
        --group_by_modality_length True --group_by_length True --learning_rate 1.5e-3 --num_train_epochs 2
}

# Batches of like length weigh the words of short answers more; random order corrects that.
random_order() {
    local notice
    notice=$("$python" -c 'import json; print(json.load(open("scripts/demo_model.json"))["notice"])')
    train run_random --model_name_or_path "$out/run/final" --notice "$notice" --learning_rate 4e-4 \
        --num_train_epochs 0.5 --save_dtype float16
}

evaluate() {
    "$python" forgery_eval/eval.py --model-path "$out/run_random/final" --dataset_path "$1" --result_folder "$2" "${@:3}"
}

evaluation() {
    # The scores of a model at chance cannot be calibrated; its card then leaves that out.
    evaluate "$out/test" "$out/results" --calibrate || evaluate "$out/test" "$out/results"
    evaluate "$out/sample" "$out/sample_results"
}

write_model() {
    rm -rf "$out/demo_model"
    cp -r "$out/run_random/final" "$out/demo_model"
    sed -e "s/@IMAGES@/$images/; s/@SEED@/$seed/; s/@TEST_SEED@/$test_seed/; s/@EVAL@/$eval/" \
        -e "s/@MINUTES@/$((($(cat "$out"/.*.done | paste -sd+)) / 60))/" scripts/demo_card.md > "$out/about.md"
    "$python" -m forgery_eval.synthetic_card --dataset_path "$out/test" --result_folder "$out/results" \
        --sample_dataset "$out/sample" --sample_results "$out/sample_results" --about "$out/about.md" \
        --out "$out/demo_model/card.md"
}

[ -f "$out/demo_model/card.json" ] || rm -f "$out/.card.done"
step render render
step tokenizer tokenizer
step towers towers
step language_model language_model
step random_order random_order
step evaluation evaluation
step card write_model
echo "the model is in $out/demo_model"
