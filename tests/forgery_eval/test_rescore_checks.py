"""What --rescore takes: answers of inference, and nothing that contradicts the data set."""

import json
from pathlib import Path

import pytest

from forgery_eval.eval import run
from forgery_eval.inference import run as infer
from tests.trained import picture


@pytest.fixture
def dataset(tmp_path) -> Path:
    for label in ("real", "fake"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for index in range(2):
            picture(index).save(tmp_path / "data" / label / f"{index}.png")
    return tmp_path / "data"


def rescore(dataset: Path, file: Path) -> tuple[int, dict]:
    results = dataset.parent / "results"
    status = run(["--rescore", str(file), "--dataset_path", str(dataset), "--result_folder", str(results)])
    written = results / "metrics.json"
    return status, json.loads(written.read_text()) if written.is_file() else {}


def write(folder: Path, *lines: dict) -> Path:
    file = folder / "predictions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def every(dataset: Path, **changes: dict) -> list[dict]:
    """A right prediction of each image, one changed by each argument (its number after an underscore)."""
    images = sorted(dataset.rglob("*.png"))
    lines = [{"image": str(path), "label": path.parent.name, "fake_probability": 0.5} for path in images]
    for name, change in changes.items():
        lines[int(name.strip("_"))] |= change
    return lines


def test_answers_of_inference_are_read(trained, dataset, tmp_path, capsys):
    answers = tmp_path / "answers.jsonl"
    command = ["--model-path", str(trained), "--img_path", str(dataset), "--json", str(answers)]
    assert infer([*command, "--max_new_tokens", "3", "--device", "cpu"]) == 0
    status, metrics = rescore(dataset, answers)
    assert status == 0, capsys.readouterr().err
    assert metrics["detection"]["all"]["metrics"]["scored"] == 4


def test_a_score_that_is_no_number_is_a_failure_and_the_rest_is_computed(dataset, tmp_path):
    status, metrics = rescore(dataset, write(tmp_path, *every(dataset, _1={"fake_probability": float("nan")})))
    assert status == 3
    found = metrics["detection"]["all"]["metrics"]
    assert (found["images"], found["scored"], found["auroc"]) == (4, 3, 0.5)


@pytest.mark.parametrize("unknown", ["other.png", "/elsewhere/0.png", "fake/9.png"])
def test_ids_that_the_data_set_lacks_are_named(dataset, tmp_path, capsys, unknown):
    status, _ = rescore(dataset, write(tmp_path, *every(dataset), {"id": unknown, "fake_probability": 0.5}))
    said = capsys.readouterr().err
    assert status == 0 and unknown in said and "1 predictions are of no image" in said


@pytest.mark.parametrize("label", [1, "fake", "Fake"])
def test_labels_that_contradict_the_data_set_are_refused(dataset, tmp_path, capsys, label):
    real = next(path for path in sorted(dataset.rglob("*.png")) if path.parent.name == "real")
    lines = [line for line in every(dataset) if line["image"] != str(real)]
    status, _ = rescore(dataset, write(tmp_path, *lines, {"id": str(real), "label": label, "fake_probability": 0.5}))
    assert status == 1 and "is labelled fake, but in the data set it is real" in capsys.readouterr().err


def test_answers_of_two_models_are_not_mixed(dataset, tmp_path, capsys):
    lines = [{**line, "run": "a" if index < 2 else "b"} for index, line in enumerate(every(dataset))]
    assert rescore(dataset, write(tmp_path, *lines))[0] == 1
    assert "line 3: this is an answer of another model" in capsys.readouterr().err


def test_two_predictions_of_one_image_are_named(dataset, tmp_path, capsys):
    lines = every(dataset)
    lines.append({**lines[0], "image": str(Path(lines[0]["image"]).relative_to(dataset.parent))})
    assert rescore(dataset, write(tmp_path, *lines))[0] == 1
    assert "two predictions of" in capsys.readouterr().err
