#!/usr/bin/env bash
# Makes the embedded model again from scratch: renders MMFR-Synthetic, forges photographs, builds a tokenizer, trains
# the towers and then, with them frozen, fusion and language model, fits when it gives no verdict, evaluates on fresh
# sets, and writes the model with its card. If it was stopped, the same command resumes. It takes one to two hours on
# two cores, and about 12 GB.
#
#     PHOTOS=folder bash scripts/train_demo.sh [FOLDER]
#
# FOLDER (default: demo_build) takes everything; the model is FOLDER/demo_model. PHOTOS is a folder of photographs, three
# or more, such as scripts/photographs.sh gathers; without it the model learns from rendered scenes alone. IMAGES=56000
# training images, EVAL=10 images of each class and evaluation set, GRID=steps of eval.py --perturb (default: all),
# SEED=1, PYTHON=… as for demo.sh.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ "${1:-}" = "--help" ]; then
    sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
photos=${PHOTOS:-}
if [ -n "$photos" ]; then
    [ -d "$photos" ] || { echo "error: PHOTOS=$photos is no folder" >&2; exit 1; }
    photos=$(cd "$photos" && pwd)
fi
mkdir -p "${1:-demo_build}"
out=$(cd "${1:-demo_build}" && pwd)
images=${IMAGES:-56000} eval=${EVAL:-10} seed=${SEED:-1}
calibration_seed=$((seed + 500)) # of the images that say when a verdict is given
test_seed=$((seed + 1000))       # of the evaluation sets; no training and no calibration sees them
sample_seed=4242                 # of the small sample that tests evaluate again

cd "$root"
. scripts/environment.sh
installed train_demo || installed test || {
    install torch --editable ".[eval,synthetic]"
    finish train_demo
}
python=$root/.venv/bin/python
cpu=$("$python" -c 'import torch; print(not torch.cuda.is_available())')
export TOKENIZERS_PARALLELISM=false

. scripts/steps.sh

# render NAME TRAIN EVAL SIZE SEED DELIVERY: a data set of rendered scenes.
render() {
    "$python" -m mmfr_generation.synthetic --out "$out/$1" --train "$2" --eval "$3" --size "$4" --seed "$5" --delivery "$6"
}

# forge NAME TRAIN EVAL SIZE DELIVERY OPTION…: one of photographs.
forge() {
    "$python" -m mmfr_generation.forge --images "$photos" --out "$out/$1" --train "$2" --eval "$3" --size "$4" \
        --seed "$seed" --delivery "$5" "${@:6}"
}

# forge_known NAME TRAIN EVAL SIZE: of photographs that are not for the last evaluation, to train on and to calibrate
# on. All such sets are split alike, since one seed splits them.
forge_known() {
    forge "$@" mixed --without "$out/test_photographs" --eval-share 0.17
}

training_data() {
    if [ -n "$photos" ]; then
        render rendered_112 $((images * 12 / 28)) 1 112 $((seed + 10)) mixed
        render rendered_160 $((images * 6 / 28)) 1 160 $((seed + 11)) mixed
        forge test_photographs 0 "$eval" 200 none --eval-share 0.1
        forge_known photographs_256 $((images * 4 / 28)) $((eval * 3)) 256
        forge_known photographs_144 $((images * 4 / 28)) $((eval * 2)) 144
        forge_known photographs_512 $((images * 2 / 28)) 1 512
        folders="rendered_112 rendered_160 photographs_256 photographs_144 photographs_512"
    else
        render rendered_112 $((images * 2 / 3)) 1 112 $((seed + 10)) mixed
        render rendered_160 $((images / 3)) 1 160 $((seed + 11)) mixed
        folders="rendered_112 rendered_160"
    fi
    # The towers learn from most images; the language model from some of these, and last from some, of photographs too,
    # that no tower has seen, on which it learns how far the towers can be trusted.
    (cd "$out" && PYTHONPATH=$root "$python" -m llava.demo.join $folders --out records.json --seed "$seed" \
        --part towers.json=0.5 --part both.json=0.25 --part answers.json=0.25) # $folders: words apart
    echo "$folders" > "$out/folders"
}

# gather NAME FOLDER…: one tree of real and fake images, whose sets are those of several data sets.
gather() {
    local tree=$out/$1 folder set
    shift
    rm -rf "$tree"
    for folder in "$@"; do
        for set in "$out/$folder"/evaluation_sets/*/; do
            mkdir -p "$tree/${folder}_$(basename "$set")"
            ln -s "${set}0_real" "$tree/${folder}_$(basename "$set")/real"
            ln -s "${set}1_fake" "$tree/${folder}_$(basename "$set")/fake"
        done
    done
}

evaluation_data() {
    render calibration_112 0 $((eval * 4)) 112 "$calibration_seed" mixed
    render calibration_160 0 $((eval * 3)) 160 $((calibration_seed + 1)) mixed
    render test 0 "$eval" 112 "$test_seed" none
    render sample 0 2 112 "$sample_seed" none
    gather calibration calibration_112 calibration_160 ${photos:+photographs_256 photographs_144}
}

tokenizer() {
    rm -rf "$out/tokenizer"
    "$python" -m llava.demo.tokenizer "$out/records.json" --output_dir "$out/tokenizer"
}

towers() {
    "$python" -m llava.demo.towers --data "$out/towers.json" "$out/both.json" --config scripts/demo_model.json \
        --output_dir "$out/towers" --summary_epochs 20 --epochs 1 --batch_size 32 --learning_rate 1e-3 --bf16 \
        --seed "$seed" --dino_tower_loss verdict=2,attributes=1,reasoning=2 --vision_tower_loss caption=1
    rm -rf "$out/towers/inputs"
}

# train FOLDER RECORDS OPTION…: trains fusion and language model on the answers, into a folder of its own.
train() {
    "$python" -m llava.train.train --output_dir "$out/$1" --data_path "$out/$2.json" --image_folder "$out" \
        --cache_features "$out/features_$2" "${@:3}" --model_max_length 256 --per_device_train_batch_size 16 \
        --lr_scheduler_type cosine --warmup_steps 0.03 --bf16 True --use_cpu "$cpu" --save_steps 500 \
        --save_total_limit 1 --logging_steps 100 --seed "$seed" --resume auto
}

language_model() {
    train run both --model_config scripts/demo_model.json --tokenizer "$out/tokenizer" \
        --vision_tower "$out/towers/vision_tower" --dino_weights "$out/towers/dino_tower" --verdict_only_share 0.3 \
        --group_by_modality_length True --group_by_length True --learning_rate 1.5e-3 --num_train_epochs 2
}

# On images that were not learnt by heart, and in random order: batches of like length weigh short answers' words more.
random_order() {
    local notice
    notice=$("$python" -c 'import json; print(json.load(open("scripts/demo_model.json"))["notice"])')
    train run_random answers --model_name_or_path "$out/run/final" --notice "$notice" --verdict_only_share 0.5 \
        --learning_rate 5e-4 --num_train_epochs 1 --save_dtype float16
}

evaluate() {
    "$python" forgery_eval/eval.py --model-path "$out/run_random/final" --dataset_path "$out/$1" \
        --result_folder "$out/results/$1" "${@:2}"
}

# The rule is fitted on four fifths of these images; what it is worth is measured on others. A model at chance gets none.
rule() {
    rm -f "$out/run_random/final"/calibration.*
    evaluate calibration --score-only --calibrate --calibration-share 0.8 --known-share 0.95 --error-level 0.1 || return 0
    cp "$out/results/calibration"/calibration.* "$out/run_random/final"
}

evaluation() {
    local name
    # The scores of a model at chance cannot be calibrated; its card then leaves that out.
    evaluate test --calibrate --no-abstain || evaluate test --no-abstain
    evaluate sample --no-abstain
    [ -f "$out/run_random/final/calibration.json" ] || return 0
    for name in test ${photos:+test_photographs}; do
        "$python" forgery_eval/eval.py --model-path "$out/run_random/final" --dataset_path "$out/$name" \
            --result_folder "$out/results/${name}_perturbed" --score-only --perturb ${GRID:-}
    done
}

write_model() {
    local name robustness=()
    local -A titles=([test]="rendered scenes" [test_photographs]="photographs")
    for name in test test_photographs; do
        [ -f "$out/results/${name}_perturbed/metrics.json" ] || continue
        robustness+=(--robustness "${titles[$name]}=$out/results/${name}_perturbed")
    done
    rm -rf "$out/demo_model"
    cp -r "$out/run_random/final" "$out/demo_model"
    sed -e "s/@IMAGES@/$images/; s/@SEED@/$seed/; s/@TEST_SEED@/$test_seed/; s/@EVAL@/$eval/" \
        -e "s/@MINUTES@/$((($(cat "$out"/.*.done | paste -sd+)) / 60))/" scripts/demo_card.md > "$out/about.md"
    "$python" -m forgery_eval.synthetic_card --dataset_path "$out/test" --result_folder "$out/results/test" \
        --sample_dataset "$out/sample" --sample_results "$out/results/sample" --about "$out/about.md" \
        "${robustness[@]}" --out "$out/demo_model/card.md"
}

[ -f "$out/demo_model/card.json" ] || rm -f "$out/.card.done"
step training_data training_data
step evaluation_data evaluation_data
step tokenizer tokenizer
step towers towers
step language_model language_model
step random_order random_order
step rule rule
step evaluation evaluation
step card write_model
echo "the model is in $out/demo_model"
