"""What comes with the package: the default model, the samples, and how commands use them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from forgery_eval import eval as evaluation
from forgery_eval import inference
from llava import ForgeryDetector, assets
from llava.errors import CheckpointError, UserError
from llava.labels import LABELS
from llava.systems.fakereasoning.answer import ATTRIBUTES
from mmfr_generation.forge.sample import METHODS
from mmfr_generation.synthetic.generators import GENERATORS
from mmfr_generation.synthetic.showcase import LIST, write_showcase
from tests.trained import NOTICE, change_config, picture

ROOT = Path(__file__).parents[1]
SAMPLES = json.loads((assets.SAMPLES / LIST).read_text(encoding="utf-8"))["samples"]
PHOTOGRAPHS = [entry for entry in SAMPLES if "credit" in entry]
RENDERED = [entry for entry in SAMPLES if entry["label"] and "credit" not in entry]


@pytest.fixture
def few(tmp_path) -> Path:
    for label, name in enumerate(LABELS):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(2):
            picture(2 * index + label).save(tmp_path / "pictures" / name / f"{index}.png")
    return tmp_path / "pictures"


def test_without_a_path_the_embedded_model_is_opened(default_model):
    detector = ForgeryDetector.from_pretrained(device="cpu")
    assert detector.notice == NOTICE
    report = detector.analyze(picture(1), score_only=True)
    assert report.notice == report.to_dict()["notice"] == NOTICE


def test_the_notice_is_said_once_a_process(default_model, capsys):
    detector = ForgeryDetector.from_pretrained(device="cpu")
    assert "note: " not in capsys.readouterr().err
    for _ in range(2):
        detector.analyze(picture(1), score_only=True)
    list(ForgeryDetector.from_pretrained(device="cpu").analyze_many([picture(2)], score_only=True))
    assert capsys.readouterr().err.count(f"note: {NOTICE}") == 1


def test_two_models_each_say_their_notice(default_model, trained, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    change_config(other, notice="Another one.")
    for path in (None, other, None, other):
        ForgeryDetector.from_pretrained(path, device="cpu").analyze(picture(1), score_only=True)
    said = capsys.readouterr().err
    assert (said.count(f"note: {NOTICE}"), said.count("note: Another one.")) == (1, 1)


def test_a_model_without_a_notice_says_none(trained, capsys):
    report = ForgeryDetector.from_pretrained(trained, device="cpu").analyze(picture(1), score_only=True)
    assert report.notice == "" and "note: " not in capsys.readouterr().err


def test_a_quiet_command_keeps_the_notice_in_its_answers(default_model, few, tmp_path, capsys):
    given = ["--img_path", str(few), "--device", "cpu", "--score-only", "--quiet", "--json", str(tmp_path / "o.jsonl")]
    assert inference.run(given) == 0
    assert NOTICE not in capsys.readouterr().err
    assert all(json.loads(line)["notice"] == NOTICE for line in (tmp_path / "o.jsonl").read_text().splitlines())


def test_a_stripped_installation_says_how_to_get_a_model(few, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(assets, "DEMO_MODEL", tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"no model is named, and .*hf download AnnaGao/FakeReasoning"):
        ForgeryDetector.from_pretrained()
    assert inference.run(["--img_path", str(few)]) == 1
    assert evaluation.run(["--dataset_path", str(few), "--result_folder", str(tmp_path / "r")]) == 1
    assert capsys.readouterr().err.count("hf download AnnaGao/FakeReasoning") == 2


def test_inference_takes_it_and_says_once_what_it_is(default_model, few, tmp_path, capsys):
    given = ["--img_path", str(few), "--device", "cpu", "--score-only", "--json", str(tmp_path / "out.jsonl")]
    assert inference.run(given) == 0
    said = capsys.readouterr()
    assert said.err.count(NOTICE) == 1 and NOTICE not in said.out
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert len(lines) == 4 and all(json.loads(line)["notice"] == NOTICE for line in lines)
    (tmp_path / "out.jsonl").write_text("\n".join(lines[:2]) + "\n")
    assert inference.run(given) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 4
    change_config(default_model, notice="")
    assert inference.run(given) == 1
    assert "another model or other settings" in capsys.readouterr().err


def test_evaluation_takes_it_and_its_report_says_what_it_is(default_model, few, tmp_path, capsys, monkeypatch):
    results = tmp_path / "r"
    given = ["--dataset_path", str(few), "--result_folder", str(results), "--device", "cpu", "--max_new_tokens", "60"]
    assert evaluation.run(given) == 0
    assert capsys.readouterr().err.count(NOTICE) == 1
    metrics = (results / "metrics.json").read_bytes()
    assert json.loads(metrics)["settings"]["notice"] == NOTICE
    assert "This is a stand-in &amp; &lt;nothing&gt; else." in (results / "report.html").read_text()
    monkeypatch.setattr("llava.detector.ForgeryDetector.analyze_prepared", None)
    assert evaluation.run(given) == 0
    assert (results / "metrics.json").read_bytes() == metrics


def test_a_named_model_goes_before_it(default_model, trained, few, capsys):
    assert inference.run(["--model-path", str(trained), "--img_path", str(few), "--score-only"]) == 0
    assert "note:" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"), [({"default_score": "both"}, "default_score"), ({"notice": 3}, "notice")]
)
def test_a_config_that_cannot_be_is_explained(default_model, few, capsys, fields, message):
    change_config(default_model, **fields)
    assert inference.run(["--img_path", str(few)]) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0]


def test_half_precision_as_on_a_gpu_says_the_same():
    files = [assets.SAMPLES / entry["image"] for entry in SAMPLES]
    whole, half = (
        list(ForgeryDetector.from_pretrained(device="cpu", dtype=dtype).analyze_many(files, score_only=True))
        for dtype in ("float32", "float16")
    )
    assert [report.error for report in half] == [""] * len(files)
    for exact, rounded in zip(whole, half, strict=True):
        assert rounded.fake_probability == pytest.approx(exact.fake_probability, abs=0.02)


def test_naming_it_loads_no_torch():
    code = "import sys, llava.assets as a; a.demo_model_folder(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_all_of_it_is_in_an_installed_package():
    (patterns,) = re.findall(r'^"llava\.assets" = (\[.*\])$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    folder = Path(assets.__file__).parent
    packed = {file for pattern in json.loads(patterns) for file in folder.glob(pattern)}
    held = {file for file in folder.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert packed == held


def test_samples_are_of_every_kind_with_their_truth():
    assert {entry["label"] for entry in SAMPLES} == {*LABELS, None}
    assert {entry["role"] for entry in RENDERED} == {None, *(generator.role for generator in GENERATORS.values())}
    assert len(SAMPLES) <= 18 and sum(entry["mask"] is not None for entry in SAMPLES) >= 3
    assert {entry["label"] for entry in RENDERED if entry["delivery"]} == set(LABELS)
    assert {entry["label"] for entry in PHOTOGRAPHS} == set(LABELS) and all("CC" in e["credit"] for e in PHOTOGRAPHS)
    for entry in RENDERED + PHOTOGRAPHS:
        assert (entry["generator"] is None) == (entry["label"] == "real")
        assert entry["generator"] is None or entry["role"] == {**GENERATORS, **METHODS}[entry["generator"]].role
        assert entry["attributes"] and set(entry["attributes"]) <= set(ATTRIBUTES[entry["label"]])
        with Image.open(assets.SAMPLES / entry["image"]) as image:
            size = image.size
        assert entry in PHOTOGRAPHS or entry["delivery"] or size == (112, 112)
        if entry["mask"]:
            with Image.open(assets.SAMPLES / entry["mask"]) as mask:
                assert mask.size == size and 0 < np.asarray(mask).mean() < 0.5
    named = {name for entry in SAMPLES for name in (entry["image"], entry["mask"]) if name}
    assert {file.name for file in assets.SAMPLES.iterdir()} == {LIST, *named}
    assert sum(file.stat().st_size for file in assets.SAMPLES.iterdir()) < 150_000


def test_samples_come_again_from_their_command(tmp_path):
    write_showcase(tmp_path / "again")
    again = json.loads((tmp_path / "again" / LIST).read_text(encoding="utf-8"))["samples"]
    assert again == [entry for entry in SAMPLES if "credit" not in entry]
    for entry in RENDERED:
        with (
            Image.open(assets.SAMPLES / entry["image"]) as kept,
            Image.open(tmp_path / "again" / entry["image"]) as again,
        ):
            gap = np.abs(np.asarray(kept, dtype=int) - np.asarray(again, dtype=int))
        assert gap.mean() < 0.5
    with pytest.raises(UserError, match="is not empty"):
        write_showcase(tmp_path / "again")


def test_an_analysis_waits_for_no_library_of_adapters():
    """They take seconds to import, and only adapters and training need them."""
    code = (
        "import sys, llava; llava.ForgeryDetector.from_pretrained(device='cpu'); "
        "found = {'peft', 'bitsandbytes', 'deepspeed', 'datasets'} & {name.split('.')[0] for name in sys.modules}; "
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
