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


def photographs_of(dataset: Path) -> dict[str, set[str]]:
    """Returns what each split of a forged data set shows."""
    lines = [json.loads(line) for line in (dataset / "manifest.jsonl").read_text("utf-8").splitlines()]
    return {
        split: {line["photograph"] for line in lines if line["split"] == split} for split in ("train", "evaluation")
    }


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
    shown = {name: photographs_of(folder / name) for name in ("test_photographs", "photographs_256")}
    known = shown["photographs_256"]
    assert known == photographs_of(folder / "photographs_144")
    assert known["train"] and known["evaluation"] and not known["train"] & known["evaluation"]
    assert not shown["test_photographs"]["evaluation"] & (known["train"] | known["evaluation"])
    again = make(folder, PHOTOS=str(photographs))
    assert again.returncode == 0 and "==" not in again.stdout


def test_a_folder_of_photographs_that_is_none_is_named(tmp_path):
    made = make(tmp_path / "build", PHOTOS=str(tmp_path / "nowhere"))
    assert made.returncode == 1 and f"PHOTOS={tmp_path / 'nowhere'} is no folder" in made.stderr
    assert not (tmp_path / "build").exists()
