#!/usr/bin/env bash
# Makes a small FakeShield from rendered images on a CPU, by its three recipes: renders the data, trains the tagger, the
# explainer (its CLIP tower first, by itself) and the segmenter, puts them together, and evaluates verdicts and masks on
# fresh images at full strength. If it was stopped, the same command resumes. It takes about an hour on a core.
#
#     bash scripts/train_small_fakeshield.sh [FOLDER]
#
# FOLDER (default: small_fakeshield) takes everything; the system is FOLDER/system. IMAGES=24000 rendered images, of
# which those with a local fault are taken, REGIONS=6400 with a small region beside them and as many real ones, and
# REGIONS with a large region for the segmenter; EVAL=100 fresh fakes of each of three kinds; TAGGER_STEPS=100; STEPS=1000
# of the segmenter on large regions and LAST_STEPS=400 on all; SEED=1, PYTHON=.venv/bin/python.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ "${1:-}" = "--help" ]; then
    sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
mkdir -p "${1:-small_fakeshield}"
out=$(cd "${1:-small_fakeshield}" && pwd)
images=${IMAGES:-24000} regions=${REGIONS:-6400} eval=${EVAL:-100} seed=${SEED:-1}
tagger_steps=${TAGGER_STEPS:-100} steps=${STEPS:-1000} last_steps=${LAST_STEPS:-400}
cd "$root"
python=${PYTHON:-$root/.venv/bin/python}
export PYTHONPATH=$root TOKENIZERS_PARALLELISM=false

. scripts/steps.sh

render() {
    "$python" -m mmfr_generation.synthetic --out "$out/data" --train "$images" --eval 1 --size 112 --seed "$seed" \
        --delivery none
    "$python" scripts/fakeshield_small_data.py train "$out" --regions "$regions" --seed "$seed"
    "$python" scripts/fakeshield_small_data.py fresh "$out" --count "$eval" --seed "$((seed + 1000))"
}

tower() {
    "$python" -m llava.demo.towers --data "$out/data" --config scripts/fakeshield_small_explainer.json \
        --output_dir "$out/tower" --epochs 1 --batch_size 32 --learning_rate 1e-3 --bf16 --seed "$seed" \
        --dino_tower_loss none --vision_tower_loss verdict=1,attributes=1,reasoning=3
}

# network FOLDER OPTION…: a recipe without a language model in front, at rates for a network that starts from nothing.
network() {
    "$python" -m llava.train.networks --output_dir "$out/$1" "${@:2}" --use_cpu True --bf16 False --warmup_steps 20 \
        --per_device_train_batch_size 16 --gradient_accumulation_steps 1 --learning_rate 1e-3 --seed "$seed" \
        --dataloader_num_workers 0 --logging_steps 20 --save_steps 100 --resume auto
}

tagger() {
    echo '{"depths": [1, 1, 1, 1]}' > "$out/tagger.json"
    network tagger --recipe fakeshield_dtg --model_config "$out/tagger.json" --data_path "$out/domains.jsonl" \
        --max_steps "$tagger_steps"
}

# The tower is frozen and its outputs are kept on disk, so that the language model learns to write in minutes.
explainer() {
    rm -rf "$out/tokenizer"
    "$python" -m llava data tokenizer "$out/explainer.json" --image_token --output_dir "$out/tokenizer"
    "$python" -m llava.train.train --recipe fakeshield_dte_fdm --output_dir "$out/explainer" --lora_enable False \
        --save_layout merged --model_config scripts/fakeshield_small_explainer.json --tokenizer "$out/tokenizer" \
        --vision_tower "$out/tower/vision_tower" --unfreeze_towers False --cache_features "$out/features" \
        --data_path "$out/explainer.json" --image_folder "$out" --model_max_length 512 --verdict_only_share 0.3 \
        --learning_rate 1.5e-3 --mm_projector_lr 1.5e-3 --num_train_epochs 0.8 --per_device_train_batch_size 16 \
        --use_cpu True --bf16 True --tf32 False --gradient_checkpointing False --dataloader_num_workers 0 \
        --save_dtype float32 --logging_steps 20 --save_steps 100 --resume auto
}

# First on large regions alone: of masks of all sizes from the first step on it learns masks that are too small.
segmenter() {
    "$python" - "$out" <<'PYTHON'
import json, sys
out, settings = sys.argv[1], json.load(open("scripts/fakeshield_small.json"))
settings |= {"tower": f"{out}/tower/vision_tower", "tokenizer": f"{out}/tokenizer"}
json.dump(settings, open(f"{out}/segmenter_large.json", "w"))
json.dump({name: settings[name] for name in ("trained", "mask_above")}, open(f"{out}/segmenter.json", "w"))
PYTHON
    network segmenter_large --recipe fakeshield_mflm --model_config "$out/segmenter_large.json" \
        --data_path "$out/segmenter_large.jsonl" --max_steps "$steps"
    network segmenter --recipe fakeshield_mflm --model_config "$out/segmenter.json" \
        --model_name_or_path "$out/segmenter_large/final" --data_path "$out/segmenter.jsonl" --max_steps "$last_steps"
}

together() {
    rm -rf "$out/system"
    mkdir "$out/system"
    cp "$out/tagger/final/DTG.pth" "$out/system"
    cp -r "$out/explainer/final" "$out/system/DTE-FDM"
    cp -r "$out/segmenter/final" "$out/system/MFLM"
}

evaluate() {
    "$python" -m llava eval --model-path "$out/system" --dataset_path "$out/fresh.jsonl" --soft-mask \
        --max_new_tokens 160 --result_folder "$out/results"
}

step render render
step tower tower
step tagger tagger
step explainer explainer
step segmenter segmenter
step together together
step evaluate evaluate
echo "the system is in $out/system, its metrics in $out/results"
