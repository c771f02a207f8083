"""The launch script really trains: rendered images, a small checkpoint, two processes that share one model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava.model.builder import load_pretrained_model
from mmfr_generation.synthetic.__main__ import main as render
from tests.test_finetune_script import OWN_VARIABLES, SCRIPT
from tests.training_runs import steps


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rendered")
    assert render(["--out", str(folder), "--train", "64", "--eval", "2", "--size", "64", "--workers", "1"]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_the_script_trains_on_rendered_images(trained, rendered, tmp_path, stage):
    pytest.importorskip("deepspeed")
    arguments = ["--data_path", rendered / "forgery_reasoning_cot.json", "--image_folder", rendered]
    arguments += ["--model_name_or_path", trained, "--output_dir", tmp_path / "run", "--lora_r", 8, "--lora_alpha", 16]
    arguments += ["--max_steps", 12, "--learning_rate", "3e-3", "--mm_projector_lr", "3e-3", "--save_steps", 6]
    arguments += ["--dataloader_num_workers", 0]
    clean = {name: value for name, value in os.environ.items() if name not in OWN_VARIABLES}
    own = {"PYTHON": sys.executable, "DEVICE": "cpu", "NUM_GPUS": "2", "ZERO": str(stage), "GLOBAL_BATCH": "16"}
    done = subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        cwd=tmp_path,
        env={**clean, **own, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    losses = steps(tmp_path / "run" / "final", "lm_loss")
    assert len(losses) == 12 and sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["global_batch"] == 16
    assert [path.name for path in sorted((tmp_path / "run").glob("checkpoint-*"))] == ["checkpoint-12", "checkpoint-6"]
    assert load_pretrained_model(tmp_path / "run" / "final", device="cpu")
