"""Command lines that version 0.1.0 documented are still read as they were, and the cheap ones still run."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llava.assets import SAMPLES
from llava.data import show_samples
from llava.systems.fakereasoning import answer as words
from mmfr_generation import get_jsonl, validate
from mmfr_generation.synthetic.__main__ import main as synthetic
from tests.commands import parse_command

ROOT = Path(__file__).parents[1]
GOLDENS = ROOT / "tests" / "data" / "goldens"

INFERENCE, EVAL = "python forgery_eval/inference.py", "python forgery_eval/eval.py"
COMMANDS = {
    f"{INFERENCE} --model-path FakeReasoning --img_path photo.jpg": {
        "model_path": "FakeReasoning",
        "img_path": [Path("photo.jpg")],
    },
    f"{INFERENCE} --model-path path/to/model --img_path photos --json answers.jsonl --attention-map maps": {
        "json": Path("answers.jsonl"),
        "attention_map": Path("maps"),
    },
    f"{INFERENCE} --img_path photo.jpg": {"img_path": [Path("photo.jpg")]},
    f"{EVAL} --model-path path/to/model --dataset_path MMFR-Dataset/dataset --result_folder results "
    "--clip_path openai/clip-vit-large-patch14-336": {
        "dataset_path": Path("MMFR-Dataset/dataset"),
        "result_folder": Path("results"),
        "clip_path": "openai/clip-vit-large-patch14-336",
    },
    f"{EVAL} --model-path path/to/model --dataset_path photos --result_folder first --max_sample 5": {"max_sample": 5},
    f"{EVAL} --dataset_path MMFR-Dataset/dataset --result_folder results --rescore": {"rescore": True},
    f"{EVAL} --dataset_path synthetic --result_folder demo-results --score prompt --calibrate": {
        "score": "prompt",
        "calibrate": True,
    },
    "python -m llava.data.show_samples train.json -n 3 --model_name_or_path path/to/base": {
        "n": 3,
        "model_name_or_path": "path/to/base",
    },
    "python -m llava.train.train --model_name_or_path path/to/base --data_path train.json --image_folder images "
    "--lora_enable True --bits 4 --output_dir run": {"lora_enable": True, "bits": 4, "output_dir": "run"},
    "python scripts/merge_lora_weights.py --model-path path/to/lora --model-base path/to/base "
    "--save-model-path merged": {"model_base": "path/to/base", "save_model_path": Path("merged")},
    "python scripts/merge_lora_weights.py --model-path path/to/model --save-model-path merged --layout published": {
        "layout": "published"
    },
    "python scripts/merge_lora_weights.py --model-path path/to/model --save-model-path merged --layout ours": {
        "layout": "native"
    },
    "python -m mmfr_generation.synthetic --out synthetic --train 10000 --eval 100 --size 112 --seed 11": {
        "train": 10000,
        "eval": 100,
        "size": 112,
        "seed": 11,
    },
    "python scripts/baseline_synthetic.py --data synthetic --epochs 3.5": {"epochs": 3.5},
    "python -m mmfr_generation.get_jsonl --image-folder photos/fake --set-name photos/fake --label fake --dry-run": {
        "image_folder": Path("photos/fake"),
        "dry_run": True,
    },
    "python -m mmfr_generation.download --parts eval --output-folder MMFR-Dataset": {
        "output_folder": Path("MMFR-Dataset")
    },
    "python -m mmfr_generation.validate train.json --image-folder photos": {"image_folder": Path("photos")},
    "python -m llava.data.build_tokenizer train.json --output_dir tokenizer": {"output_dir": Path("tokenizer")},
    "python -m llava.train.towers --data records --config config.json --output_dir towers --strangers 0.1": {
        "outliers": 0.1
    },
    "python scripts/bench_inference.py --size mid --images 16 --new-tokens 64 --batch-sizes 1 16": {
        "batch_sizes": [1, 16]
    },
    "python -m scripts.bench_eval --size mid --images 64": {"images": 64},
    "python scripts/bench_training.py --size 13b --batch-size 8": {"size": "13b", "batch_size": 8},
}
FLAGS = {
    f"{INFERENCE} --img_path photo.jpg": [
        "--vision-tower openai/clip-vit-large-patch14-336 --dino-weights dinov2_vitl14_pretrain.pth",
        "--samples 8 --temperature 1",
        "--score prompt",
        "--score answer",
        "--score-only",
        "--score_only",
        "--force-summary",
        "--temperature 0 --seed 1",
    ],
    f"{EVAL} --dataset_path data --result_folder results": [
        "--score-only",
        "--rescore predictions.jsonl",
        "--calibration calibration.json",
        "--paper-protocol",
    ],
    "python -m llava.train.train --model_name_or_path path/to/base --data_path train.json --image_folder images "
    "--output_dir run": [
        "--drop_invalid True",
        "--tune_mm_mlp_adapter True",
        "--unfreeze_towers True",
        "--lora_enable True --bits 8",
        "--init fusion,dino_mm_projector",
        "--loss_average micro_batch",
        "--cpm_search predictions",
        "--cpm_search labels",
        f"--eval_data_path {GOLDENS / 'train.json'} --eval_strategy steps",
        "--validation_share 0.1 --eval_strategy steps",
        "--group_by_modality_length True --alike_lengths True",
        "--resume auto",
        "--save_layout merged",
        "--lora_enable True --save_layout published",
        "--cache_features features",
        "--verdict_only_share 0.3",
    ],
    "python -m llava.train.train --data_path train.json --image_folder images --output_dir run": [
        f"--model_config {ROOT / 'scripts' / 'demo_model.json'} --tokenizer own --vision_tower towers/vision_tower "
        "--dino_weights towers/dino_tower"
    ],
}
NEEDED = "--data_path train.json --image_folder images --model_name_or_path"
SHELL = {
    f"DRY_RUN=1 bash scripts/finetune_task_lora.sh {NEEDED} path/to/base --vision_tower "
    "openai/clip-vit-large-patch14-336 --dino_weights dinov2_vitl14_pretrain.pth --output_dir run": (
        2,
        8,
        "--output_dir run",
    ),
    f"DRY_RUN=1 NUM_GPUS=4 bash scripts/finetune_task_lora.sh {NEEDED} path/to/base": (4, 4, "--lora_r 128"),
    f"DRY_RUN=1 DEVICE=cpu NUM_GPUS=2 ZERO=2 bash scripts/finetune_task_lora.sh {NEEDED} path/to/small "
    "--max_steps 10": (8, 2, "--max_steps 10"),
}
"""Command lines and what they plan: accumulation, processes, and a part of the launch line."""


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_read_as_they_were(command):
    parsed = parse_command(shlex.split(command))
    expected = COMMANDS[command]
    assert {name: parsed[name] for name in expected} == expected


@pytest.mark.parametrize("command", [f"{start} {flags}" for start, each in FLAGS.items() for flags in each])
def test_flags_named_in_the_text_are_read(command):
    parse_command(shlex.split(command))


@pytest.mark.parametrize("script", ["demo.sh", "test.sh", "train_demo.sh", "finetune_task_lora.sh"])
def test_scripts_explain_themselves(script):
    command, environment = ["bash", ROOT / "scripts" / script, "--help"], {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


@pytest.mark.parametrize("command", SHELL)
def test_launches_are_planned_as_they_were(command):
    *variables, _, script = command.split(" --")[0].split()
    accumulation, processes, part = SHELL[command]
    given = dict(variable.split("=") for variable in variables)
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "PYTHON": sys.executable, **given}
    arguments = shlex.split(command.split(f"bash {script} ")[1])
    run = subprocess.run(["bash", script, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    batch, line = run.stdout.splitlines()
    per_device, found, ranks, whole = map(int, re.findall(r"\d+", batch))
    assert (found, ranks) == (accumulation, processes) and per_device * found * ranks == whole == 128
    assert part in line and "llava.train.train" in line


# --- run


@pytest.fixture
def world(tmp_path, monkeypatch) -> Path:
    """The files that the commands name, in the current folder."""
    (tmp_path / "photos" / "fake").mkdir(parents=True)
    shutil.copy(SAMPLES / "09_fake_block_walsh.jpg", tmp_path / "photos" / "fake" / "a.jpg")
    shutil.copy(SAMPLES / "02_real_people.jpg", tmp_path / "photo.jpg")
    name = words.ATTRIBUTES["fake"][0]
    reasoning = words.write_reasoning("fake", {name: "It is so."})
    answer = words.write_answer("fake", caption="A pattern.", reasoning=reasoning)
    turns = [{"from": "human", "value": f"<image>\n{words.QUESTION}"}, {"from": "gpt", "value": answer}]
    (tmp_path / "train.json").write_text(json.dumps([{"image": "fake/a.jpg", "conversations": turns}]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_image_is_analysed_by_the_embedded_model(world):
    script = ROOT / "forgery_eval" / "inference.py"
    command = [sys.executable, script, "--img_path", "photo.jpg", "--json", "answers.jsonl"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (record,) = map(json.loads, (world / "answers.jsonl").read_text(encoding="utf-8").splitlines())
    assert record["label"] and {"SUMMARY", "CAPTION", "REASONING", "CONCLUSION"} <= set(record["stages"])


def test_samples_are_shown(world, capsys):
    arguments = shlex.split(f"train.json -n 3 --model_name_or_path {GOLDENS / 'base'}")
    show_samples.run(show_samples.build_parser().parse_args(arguments))
    assert "1 of 1 records shown; verdicts of all: 1 fake" in capsys.readouterr().out


def test_requests_are_counted_and_a_training_file_is_checked(world, capsys):
    arguments = shlex.split("--image-folder photos/fake --set-name photos/fake --label fake --dry-run")
    assert get_jsonl.main(arguments) == 0
    assert validate.main(["train.json", "--image-folder", "photos"]) == 0
    assert not (world / "requests").exists() and capsys.readouterr().out


def test_the_benchmark_is_rendered(world):
    assert synthetic(shlex.split("--out synthetic --train 2 --eval 1 --size 112 --seed 11 --workers 1")) == 0
    assert (world / "synthetic" / "forgery_reasoning_cot.json").is_file()
