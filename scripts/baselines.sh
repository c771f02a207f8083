#!/usr/bin/env bash
# Puts baselines beside the embedded model on MMFR-Synthetic: a linear probe on its towers (or on CLIP), and a small CNN,
# trained on delivered images and evaluated on fresh ones, as they are and under every step of delivery. If it was
# stopped, the same command resumes. It takes about an hour on two cores.
#
#     bash scripts/baselines.sh [FOLDER]
#
# FOLDER (default: baselines) takes everything; FOLDER/table.md is the result. IMAGES=6000 training images, EVAL=8 images
# of each class and evaluation set, STEPS=1200 of the CNN, GRID=steps of eval.py --perturb (default: all), BACKBONE=CLIP
# folder, hub id or timm:<name> for a further probe, SEED=1, PYTHON=.venv/bin/python.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ "${1:-}" = "--help" ]; then
    sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
mkdir -p "${1:-baselines}"
out=$(cd "${1:-baselines}" && pwd)
images=${IMAGES:-6000} eval=${EVAL:-8} steps=${STEPS:-1200} seed=${SEED:-1}
cd "$root"
python=${PYTHON:-$root/.venv/bin/python}
export PYTHONPATH=$root

. scripts/steps.sh

# The seeds are not those of the embedded model's training or calibration.
render() {
    "$python" -m mmfr_generation.synthetic --out "$out/train" --train "$images" --eval 1 --size 112 \
        --seed $((seed + 3000)) --delivery mixed
    "$python" -m mmfr_generation.synthetic --out "$out/test" --train 0 --eval "$eval" --size 112 \
        --seed $((seed + 4000)) --delivery none
}

# evaluate NAME OPTION…: scores of the test images, as they are and perturbed.
evaluate() {
    "$python" -m llava eval "${@:2}" --dataset_path "$out/test" --result_folder "$out/results/$1" --score-only \
        --no-abstain --perturb ${GRID:-}
}

embedded() {
    evaluate embedded
}

probe() {
    evaluate probe --backend probe --backbone llava/assets/demo_model --train-data "$out/train"
}

further_probe() {
    evaluate further_probe --backend probe --backbone "$BACKBONE" --train-data "$out/train"
}

cnn() {
    "$python" -m llava.train.networks --network baseline:cnn --data_path "$out/train" --output_dir "$out/cnn" \
        --max_steps "$steps" --per_device_train_batch_size 32 --learning_rate 2e-3 --lr_scheduler_type cosine \
        --warmup_steps 0.05 --validation_share 0.1 --eval_strategy steps --eval_steps 300 --save_steps 300 --logging_steps 50 \
        --dataloader_num_workers 0 --use_cpu "$("$python" -c 'import torch; print(not torch.cuda.is_available())')" \
        --seed "$seed" --resume auto
    evaluate cnn --model-path "$out/cnn/final"
}

table() {
    "$python" scripts/baselines_table.py "embedded model=$out/results/embedded" \
        "linear probe on its towers=$out/results/probe" "small CNN=$out/results/cnn" \
        ${BACKBONE:+"linear probe on $BACKBONE=$out/results/further_probe"} > "$out/table.md"
}

step render render
step embedded embedded
step probe probe
[ -z "${BACKBONE:-}" ] || step further_probe further_probe
step cnn cnn
table
cat "$out/table.md"
