"""The embedded model's making, from rendering to the card, at a size of seconds."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from llava import ForgeryDetector
from llava.assets import SAMPLES
from tests.mmfr_generation.test_forge import picture

ROOT = Path(__file__).parents[1]


def make(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the script, whose environment is the one of the tests."""
    return subprocess.run(
        ["bash", "scripts/train_demo.sh", str(folder)],
        cwd=ROOT,
        env={**os.environ, "IMAGES": "96", "EVAL": "1", "GRID": "jpeg:50", **environment},
        capture_output=True,
        text=True,
        timeout=1500,
    )


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".venv" / "installed-test").exists(), reason="scripts/test.sh makes the environment")
def test_a_small_model_is_made_from_nothing_and_not_twice(tmp_path):
    folder, photographs = tmp_path / "a build", tmp_path / "my photographs"
    photographs.mkdir()
    for number in range(6):
        picture(number).save(photographs / f"{number}.png")
    made = make(folder, PHOTOS=str(photographs))
    assert made.returncode == 0, made.stderr[-2000:]
    model = folder / "demo_model"
    files = {file.name for file in model.iterdir()}
    assert {"card.md", "card.json", "config.json", "model.safetensors", "tokenizer.json"} <= files
    assert json.loads((model / "card.json").read_text("utf-8"))["images"] == 44
    assert "@" not in (model / "card.md").read_text("utf-8")
    report = ForgeryDetector.from_pretrained(model).analyze(SAMPLES / "02_real_people.jpg", max_new_tokens=4)
    assert report.score_source == "prompt" and not report.off_distribution
    again = make(folder, PHOTOS=str(photographs))
    assert again.returncode == 0 and "==" not in again.stdout


def test_a_folder_of_photographs_that_is_none_is_named(tmp_path):
    made = make(tmp_path / "build", PHOTOS=str(tmp_path / "nowhere"))
    assert made.returncode == 1 and f"PHOTOS={tmp_path / 'nowhere'} is no folder" in made.stderr
    assert not (tmp_path / "build").exists()
