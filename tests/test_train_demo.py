"""The embedded model's making, from rendering to the card, at a size of seconds."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from llava import ForgeryDetector
from llava.assets import SAMPLES

ROOT = Path(__file__).parents[1]


def make(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the script, whose environment is the one of the tests."""
    return subprocess.run(
        ["bash", "scripts/train_demo.sh", str(folder)],
        cwd=ROOT,
        env={**os.environ, "IMAGES": "96", "EVAL": "2", **environment},
        capture_output=True,
        text=True,
        timeout=1500,
    )


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".venv" / "installed-test").exists(), reason="scripts/test.sh makes the environment")
def test_a_small_model_is_made_from_nothing_and_not_twice(tmp_path):
    folder = tmp_path / "a build"
    made = make(folder)
    assert made.returncode == 0, made.stderr[-2000:]
    model = folder / "demo_model"
    files = {file.name for file in model.iterdir()}
    assert {"card.md", "card.json", "config.json", "model.safetensors", "tokenizer.json"} <= files
    assert json.loads((model / "card.json").read_text("utf-8"))["images"] == 88
    assert "@" not in (model / "card.md").read_text("utf-8")
    report = ForgeryDetector.from_pretrained(model).analyze(SAMPLES / "02_real_people.jpg", max_new_tokens=4)
    assert report.score_source == "prompt" and not report.off_distribution
    again = make(folder)
    assert again.returncode == 0 and "==" not in again.stdout
