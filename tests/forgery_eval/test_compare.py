"""Runs side by side: every metric of each, and what they do not share."""

import json
from pathlib import Path

from llava.__main__ import main as forgery


def write_run(folder: Path, images: str, **metrics) -> Path:
    folder.mkdir()
    content = {
        "data": "synthetic",
        "settings": {"system": folder.name, "images": images},
        "detection": {"all": {"metrics": {"images": 4, "confusion_text": {"real": {}}, **metrics}}},
        "reasoning": {"all": {"all": {"metrics": {"rouge_l": None}}}},
    }
    (folder / "metrics.json").write_text(json.dumps(content))
    return folder


def test_a_column_a_run_and_a_row_a_metric(tmp_path, capsys):
    one = write_run(tmp_path / "one", "a", auroc=0.5)
    other = write_run(tmp_path / "other", "a", auroc=0.91234, ece=0.1)
    assert forgery(["compare", str(one), str(other / "metrics.json")]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]}
    assert rows["system"] == ["one", "other"] and rows["data"] == ["synthetic", "synthetic"]
    assert rows["images"] == ["4", "4"] and rows["auroc"] == ["0.5000", "0.9123"]
    assert rows["ece"] == ["–", "0.1000"] and rows["rouge_l"] == ["–", "–"]
    assert "confusion_text" not in rows


def test_other_images_are_said_and_odd_files_named(tmp_path, capsys):
    runs = [str(write_run(tmp_path / name, name, auroc=0.5)) for name in ("one", "other")]
    assert forgery(["compare", *runs]) == 0
    assert "not on the same images" in capsys.readouterr().err
    assert forgery(["compare", runs[0]]) == 1
    (tmp_path / "one" / "metrics.json").write_text("{}")
    assert forgery(["compare", *runs]) == 1
    assert "is no evaluation's" in capsys.readouterr().err
