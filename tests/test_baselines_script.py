"""Baselines beside the embedded model: the tables, and the whole script at its smallest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import baselines_table

ROOT = Path(__file__).parents[1]


def result(folder: Path, auroc: float | None, images: int = 4, steps: dict[str, float] | None = None) -> str:
    def part(auroc, reals=0.75):
        metrics = {"images": images, "auroc": auroc, "score_balanced_accuracy": 0.8, "score_real_accuracy": reals}
        metrics |= {"tpr_at_5_fpr": 0.5, "ece": 0.1}
        interval = None if auroc is None else [auroc - 0.1, auroc + 0.1]
        return {"metrics": metrics, "intervals": {"auroc": interval}}

    conditions = [{"step": "jpeg", "strength": name, **part(value)} for name, value in (steps or {}).items()]
    folder.mkdir()
    metrics = {"detection": {"all": part(auroc)}, "robustness": {"conditions": conditions}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return str(folder)


def test_runs_stand_side_by_side_with_intervals_and_steps(tmp_path, capsys):
    first = result(tmp_path / "a", 0.9, steps={"50": 0.6, "75": 0.7})
    second = result(tmp_path / "b", None, steps={"50": 0.8})
    assert baselines_table.main([f"CNN={first}", f"probe={second}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| CNN | 0.900 (0.800–1.000) | 0.800 | 0.500 | 0.100 |" in lines
    assert "| probe | – | 0.800 | 0.500 | 0.100 |" in lines
    assert "| jpeg 50 | 0.600 (0.500–0.700); 25 % | 0.800 (0.700–0.900); 25 % |" in lines
    assert "| jpeg 75 | 0.700 (0.600–0.800); 25 % | – |" in lines


def test_other_images_and_missing_results_are_named(tmp_path, capsys):
    first, second = result(tmp_path / "a", 0.9), result(tmp_path / "b", 0.9, images=5)
    assert baselines_table.main([f"CNN={first}", f"probe={second}"]) == 1
    assert "not of the same images: {'CNN': 4, 'probe': 5}" in capsys.readouterr().err
    assert baselines_table.main([f"CNN={tmp_path}"]) == 1
    assert "evaluate CNN into it first" in capsys.readouterr().err


@pytest.mark.slow
def test_the_script_runs_from_rendering_to_its_table_and_does_nothing_twice(tmp_path):
    sizes = {"IMAGES": "48", "EVAL": "1", "STEPS": "3", "GRID": "jpeg:50", "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "scripts" / "baselines.sh"), str(tmp_path / "out")]
    done = subprocess.run(command, env={**os.environ, **sizes}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    table = (tmp_path / "out" / "table.md").read_text()
    assert all(f"| {name} |" in table for name in ("embedded model", "linear probe on its towers", "small CNN"))
    assert "| jpeg 50 |" in table
    again = subprocess.run(command, env={**os.environ, **sizes}, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and "==" not in again.stdout and again.stdout.strip() == table.strip()
