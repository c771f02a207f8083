"""Baselines: the set is neither solved by simple statistics nor out of a small network's reach."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from mmfr_generation.synthetic.__main__ import main as generate
from mmfr_generation.synthetic.generators import GENERATORS

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "baseline_synthetic.py"


@pytest.fixture(scope="module")
def baseline() -> ModuleType:
    spec = importlib.util.spec_from_file_location("baseline_synthetic", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_script_runs_on_any_size_and_ends_in_one_json_line(baseline, tmp_path, capsys):
    out = tmp_path / "d"
    assert generate(["--out", str(out), "--train", "60", "--eval", "1", "--size", "67", "--workers", "1"]) == 0
    baseline.main(["--data", str(out), "--epochs", "1", "--threads", "1"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["train"] == 60 and result["test"] == 2 * len(GENERATORS)
    for detector in ("linear", "trees", "network"):
        assert set(result[detector]["generator"]) == set(GENERATORS)
        assert set(result[detector]["role"]) == {g.role for g in GENERATORS.values()}


def test_missing_data_is_one_clear_sentence(tmp_path):
    done = subprocess.run([sys.executable, str(SCRIPT), "--data", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and "manifest.jsonl is missing" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_balanced_accuracy_is_the_mean_over_the_classes(baseline):
    records = [{"set": "halo", "split_role": "seen", "strength": None}] * 6
    records += [{"set": "halo", "split_role": "seen", "strength": 1.0}] * 2
    fake = np.asarray([False] * 6 + [True] * 2)
    images = baseline.Images(np.zeros((8, 64, 64, 3), np.uint8), fake, np.ones(8), records)
    metrics = baseline.report(images, np.asarray([0.1, 0.1, 0.1, 0.9, 0.9, 0.9, 0.9, 0.2]))
    assert metrics["all"] == metrics["strength"]["1"] == metrics["generator"]["halo"] == 0.5
    assert metrics["strength"]["0.2-0.4"] is None
    all_fake = baseline.report(images, np.ones(8))
    assert all_fake["all"] == 0.5 and all_fake["reals"] == 0.0


@pytest.mark.slow
def test_the_set_is_neither_trivial_nor_impossible(baseline, tmp_path):
    out = tmp_path / "d"
    assert generate(["--out", str(out), "--train", "4000", "--eval", "12", "--seed", "21", "--workers", "2"]) == 0
    result = baseline.main(["--data", str(out), "--epochs", "5"])
    assert result["linear"]["unseen"] <= 0.85
    assert result["linear"]["role"]["seen"] <= 0.85
    assert result["trees"]["role"]["seen"] >= 0.85
    network = result["network"]
    assert network["strength"]["1"] >= 0.90
    assert network["full_strength_by_role"]["seen"] >= 0.90
    assert network["strength"]["1"] > network["strength"]["0.2-0.4"]
