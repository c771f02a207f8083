"""The robustness grid, and abstention in evaluation, as their user runs them."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from forgery_eval.benchmarks import Sample
from forgery_eval.eval import run
from forgery_eval.inference import run as detect
from forgery_eval.metrics.robustness import clean_threshold, error_rates
from forgery_eval.perturbations import GRID, Perturbation, choose_perturbations
from forgery_eval.store import Prediction
from forgery_eval.verdicts import Evidence, FitSettings, Judgement
from llava.__main__ import main as forgery
from llava.cli import SOME_FAILED
from llava.errors import OptionError
from llava.image_operations import Step
from tests.conftest import GOLDENS
from tests.trained import trained_folder

COUNT = 60


def textured(seed: int, fake: bool) -> Image.Image:
    """A smooth field; fakes are brighter."""
    rng = np.random.default_rng(seed)
    pixels = rng.normal(150 if fake else 90, 25, (4, 4, 3)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels).resize((40, 36), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for label, name in enumerate(("real", "fake")):
        (root / name).mkdir()
        for number in range(COUNT):
            textured(2 * number + label, bool(label)).save(root / name / f"{number:03}.png")
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A small model that has learnt what is bright here."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    return trained_folder(folder, GOLDENS / "base", pictures=lambda index, label: textured(index, label == "fake"))


@pytest.fixture(scope="module")
def model(trained) -> list[str]:
    return ["--model-path", str(trained), "--device", "cpu", "--score-only"]


@pytest.fixture(scope="module")
def evaluated(model, data, tmp_path_factory) -> Path:
    results = tmp_path_factory.mktemp("results")
    given = ["--dataset_path", str(data), "--result_folder", str(results), *model]
    kept = ["--perturbed-images", str(results / "kept")]
    assert run([*given, "--perturb", "jpeg:50", "blur", "chain:2", *kept]) == 0
    return results


def metrics_of(results: Path) -> dict:
    return json.loads((results / "metrics.json").read_text("utf-8"))


def test_each_condition_is_measured_and_the_worst_comes_first(evaluated):
    found = metrics_of(evaluated)["robustness"]
    cells = [(condition["step"], condition["strength"]) for condition in found["conditions"]]
    assert sorted(cells) == [("blur", "0.5"), ("blur", "1.0"), ("blur", "2.0"), ("chain", "2"), ("jpeg", "50")]
    accuracies = [condition["metrics"]["score_balanced_accuracy"] for condition in found["conditions"]]
    assert accuracies == sorted(accuracies)
    assert found["clean"]["metrics"]["auroc"] == metrics_of(evaluated)["detection"]["all"]["metrics"]["auroc"]
    for condition in found["conditions"]:
        assert condition["metrics"]["images"] == 2 * COUNT and condition["intervals"]["auroc"]
        assert 0 <= condition["reals_called_fake"] <= 1
        assert set(condition["at_clean_threshold"]) == {"reals_called_fake", "fakes_called_real"}
    rows = list(csv.DictReader((evaluated / "metrics.csv").read_text("utf-8").splitlines()))
    assert {row["name"] for row in rows if row["part"] == "robustness"} == {" ".join(cell) for cell in cells}
    assert {"auroc", "reals_called_fake"} <= {row["metric"] for row in rows if row["part"] == "robustness"}


def test_the_predictions_are_those_of_the_perturbed_images(evaluated, model, data, tmp_path):
    """Evaluating the images that were written gives the condition's own scores."""
    folder = tmp_path / "written"
    for file in sorted((evaluated / "kept" / "jpeg_50").rglob("*.png")):
        inside = file.relative_to(evaluated / "kept" / "jpeg_50" / data.name)
        (folder / inside).parent.mkdir(parents=True, exist_ok=True)
        (folder / inside).write_bytes(file.read_bytes())
    assert run(["--dataset_path", str(folder), "--result_folder", str(tmp_path / "r"), *model]) == 0
    (condition,) = [c for c in metrics_of(evaluated)["robustness"]["conditions"] if c["step"] == "jpeg"]
    again = metrics_of(tmp_path / "r")["detection"]["all"]["metrics"]
    for name in ("auroc", "brier", "score_accuracy"):
        assert again[name] == pytest.approx(condition["metrics"][name], abs=1e-6)
    assert again["brier"] != pytest.approx(metrics_of(evaluated)["detection"]["all"]["metrics"]["brier"], abs=1e-9)


def test_a_second_run_analyses_nothing_and_rescoring_needs_no_model(evaluated, model, data, monkeypatch):
    before = {name: (evaluated / name).read_bytes() for name in ("metrics.json", "report.html", "metrics.csv")}
    given = ["--dataset_path", str(data), "--result_folder", str(evaluated), "--perturb", "jpeg:50", "blur", "chain:2"]
    monkeypatch.setattr("llava.detector.ForgeryDetector._reports", None)
    assert run([*given, *model]) == 0
    assert {name: (evaluated / name).read_bytes() for name in before} == before
    monkeypatch.setattr("forgery_eval.eval.open_detector", None)
    assert run([*given, "--rescore"]) == 0
    assert {name: (evaluated / name).read_bytes() for name in before} == before


def compared(folder: Path, *runs: Path) -> dict:
    out = folder / "compared.json"
    assert forgery(["compare", *map(str, runs), "--json", str(out), "--resamples", "20"]) == 0
    return json.loads(out.read_text("utf-8"))


def test_perturbed_images_are_compared_alike_with_alike(evaluated, data, tmp_path, capsys):
    shutil.copytree(evaluated, tmp_path / "other")
    # The other run says the opposite of every image after jpeg:50, and has not all of the conditions.
    (file,) = (tmp_path / "other" / "predictions" / "perturbed" / "jpeg_50").glob("*.jsonl")
    header, *lines = file.read_text("utf-8").splitlines()
    turned = [{**(row := json.loads(line)), "fake_probability": 1 - row["fake_probability"]} for line in lines]
    file.write_text("".join(f"{line}\n" for line in (header, *map(json.dumps, turned))), "utf-8")
    given = ["--dataset_path", str(data), "--result_folder", str(tmp_path / "other"), "--rescore"]
    assert run([*given, "--perturb", "jpeg:50", "blur:1.0"]) == 0
    found = compared(tmp_path, evaluated, tmp_path / "other")
    assert set(found["perturbed"]) == {"jpeg:50", "blur:1.0"}
    assert set(found["perturbed_in_some_only"]) == {"blur:0.5", "blur:2.0", "chain:2"}
    assert found["clean"]["pairs"][0]["agreement"] == found["perturbed"]["blur:1.0"]["pairs"][0]["agreement"] == 1
    one, other = found["perturbed"]["jpeg:50"]["runs"]
    (condition,) = [c for c in metrics_of(evaluated)["robustness"]["conditions"] if c["step"] == "jpeg"]
    assert one["metrics"]["auroc"] == pytest.approx(condition["metrics"]["auroc"])
    assert other["metrics"]["auroc"] == pytest.approx(1 - condition["metrics"]["auroc"])
    pairs = [part["pairs"][0] for part in found["perturbed"].values()]
    assert min(pair["p_holm"] for pair in pairs) == pytest.approx(min(1, 2 * min(pair["p"] for pair in pairs)))
    assert "after perturbations, alike:" in capsys.readouterr().out
    page = tmp_path / "page.html"
    assert forgery(["compare", str(evaluated), str(tmp_path / "other"), "--html", str(page), "--resamples", "20"]) == 0
    text = page.read_text("utf-8")
    assert "Under perturbations" in text and "Not compared, since not every run has it: blur:0.5" in text


def test_what_was_not_predicted_cannot_be_rescored(evaluated, data, capsys):
    given = ["--dataset_path", str(data), "--result_folder", str(evaluated), "--rescore", "--perturb", "webp"]
    assert run(given) == 1
    assert "holds no predictions of webp:80; run without --rescore first" in capsys.readouterr().err


def test_perturbed_images_do_not_touch_the_disk_unless_asked(model, data, tmp_path):
    given = ["--dataset_path", str(data), "--result_folder", str(tmp_path / "r"), "--max_sample", "2", *model]
    assert run([*given, "--perturb", "crop"]) == 0
    assert not list(tmp_path.rglob("*.png"))


def test_the_page_has_the_table_and_the_curves(evaluated):
    page = (evaluated / "report.html").read_text("utf-8")
    section = page[page.index("<h2>Robustness</h2>") :]
    section = section[: section.index("<h2>", 4)]
    assert section.index(">clean<") < section.index(">jpeg 50<")
    assert section.count("<svg") >= 3


def test_a_broken_image_fails_in_every_condition(model, data, tmp_path):
    folder = tmp_path / "data"
    for label, name in enumerate(("real", "fake")):
        (folder / name).mkdir(parents=True)
        for number in range(2):
            textured(number, bool(label)).save(folder / name / f"{number}.png")
    (folder / "real" / "0.png").write_text("no image")
    given = ["--dataset_path", str(folder), "--result_folder", str(tmp_path / "r"), *model]
    assert run([*given, "--perturb", "jpeg:90"]) == SOME_FAILED
    (condition,) = metrics_of(tmp_path / "r")["robustness"]["conditions"]
    assert condition["metrics"]["images"] == 4 and condition["metrics"]["scored"] == 3


# --- the grid


def test_names_choose_cells():
    assert choose_perturbations(None) == [] and choose_perturbations([]) == list(GRID)
    assert [cell.name for cell in choose_perturbations(["jpeg"])] == ["jpeg:95", "jpeg:90", "jpeg:75", "jpeg:50"]
    assert [cell.name for cell in choose_perturbations(["chain:3", "webp"])] == ["webp:80", "chain:3"]
    with pytest.raises(OptionError, match="there is no 'jpeg:33'; its strengths are jpeg:95"):
        choose_perturbations(["jpeg:33"])
    with pytest.raises(OptionError, match="there is no 'smudge'; known: jpeg, webp, blur"):
        choose_perturbations(["smudge"])
    assert len({cell.folder for cell in GRID}) == len(GRID)
    assert {"same-format", "screenshot", "letterbox", "chain"} <= {cell.step for cell in GRID}


@pytest.mark.parametrize("cell", GRID, ids=lambda cell: cell.name)
def test_every_cell_changes_an_image_and_always_in_the_same_way(cell):
    sample = Sample("set/real/a.png", Path("a.png"), 0, "set")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3)).astype(np.uint8))
    first, second = cell(sample, image), cell(sample, image)
    assert np.array_equal(np.asarray(first), np.asarray(second)) and first.mode == "RGB"
    assert first.size != image.size or not np.array_equal(np.asarray(first), np.asarray(image))


def test_a_chain_depends_on_the_image_and_has_its_length():
    three = Perturbation("chain", "3")
    chains = {tuple(step.name for step in three.steps(f"image {number}")) for number in range(40)}
    assert len(chains) > 20 and {len(chain) for chain in chains} == {3}
    assert all(len(set(chain)) == 3 for chain in chains)


def test_noise_is_drawn_for_each_image():
    (noise,) = choose_perturbations(["noise:4.0"])
    (first,), (second,), (again,) = (noise.steps(name) for name in ("a", "b", "a"))
    assert first != second and first == again and isinstance(first, Step)


def test_the_clean_threshold_lets_few_reals_through():
    rng = np.random.default_rng(0)
    labels, scores = np.repeat([0, 1], 200), np.concatenate([rng.random(200) * 0.6, 0.4 + rng.random(200) * 0.6])
    threshold = clean_threshold(labels, scores)
    assert error_rates(labels, scores, threshold)["reals_called_fake"] == 0.05
    assert clean_threshold(np.array([1]), np.array([0.5])) is None
    ties = np.full(100, 0.5)
    assert error_rates(np.zeros(100), ties, clean_threshold(np.zeros(100), ties))["reals_called_fake"] == 0


# --- abstention


@pytest.fixture(scope="module")
def calibrated(model, tmp_path_factory) -> tuple[Path, Path]:
    """A data set that is large enough to calibrate on, and its results."""
    root = tmp_path_factory.mktemp("calibration")
    for label, name in enumerate(("real", "fake")):
        (root / "data" / name).mkdir(parents=True)
        for number in range(360):
            textured(5000 + 2 * number + label, bool(label)).save(root / "data" / name / f"{number:03}.png")
    given = ["--dataset_path", str(root / "data"), "--result_folder", str(root / "r"), *model]
    more = ["--error-level", "0.45", "--known-share", "0.9", "--stability", "1", "--perturb", "jpeg:75"]
    assert run([*given, "--calibrate", *more]) == 0
    return root / "data", root / "r"


def test_calibrating_fits_and_measures_a_rule(calibrated):
    _, results = calibrated
    found = metrics_of(results)["abstention"]
    assert found["fitted_here"] and found["rule"]["has_statistics"] and found["rule"]["deliveries"] == 1
    everything = found["all"]
    assert everything["given"] + sum(everything["no_verdict"].values()) == everything["images"] > 500
    assert everything["coverage"] == pytest.approx(everything["given"] / everything["images"])
    assert everything["risk_coverage"][-1][0] == 1.0 and 0 <= everything["risk_coverage_area"] <= 1
    assert everything["no_verdict"]["unlike"] / everything["images"] < 0.25
    (condition,) = metrics_of(results)["robustness"]["conditions"]
    assert "coverage" in condition["abstention"] and "risk_coverage" not in condition["abstention"]
    names = {file.name for file in results.iterdir() if file.is_file()}
    assert {"calibration.json", "calibration.safetensors"} <= names
    page = (results / "report.html").read_text("utf-8")
    assert "Given verdicts" in page and "error among given" in page
    rows = list(csv.DictReader((results / "metrics.csv").read_text("utf-8").splitlines()))
    assert any(row["part"] == "abstention" and row["metric"] == "coverage" for row in rows)


def test_the_rule_is_applied_to_other_data_and_can_be_left_out(calibrated, model, data, tmp_path):
    file = calibrated[1] / "calibration.json"
    given = ["--dataset_path", str(data), "--result_folder", str(tmp_path / "r"), *model, "--calibration", str(file)]
    assert run(given) == 0
    assert metrics_of(tmp_path / "r")["abstention"]["fitted_here"] is False
    assert run([*given, "--no-abstain"]) == 0
    found = metrics_of(tmp_path / "r")
    assert "abstention" not in found and found["calibration"] is not None


def test_no_abstain_fits_no_rule(calibrated, model, tmp_path):
    given = ["--dataset_path", str(calibrated[0]), "--result_folder", str(tmp_path / "r"), *model]
    assert run([*given, "--calibrate", "--no-abstain", "--max_sample", "60"]) == 0
    assert "abstention" not in json.loads((tmp_path / "r" / "calibration.json").read_text())


def test_detection_gives_no_verdict_on_another_world(calibrated, model, data, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 2, (40, 40, 1)).repeat(3, axis=2) * 255
    Image.fromarray(noise.astype(np.uint8)).save(folder / "noise.png")
    file = calibrated[1] / "calibration.json"
    given = ["--img_path", str(folder), *model]
    assert detect([*given, "--calibration", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "no verdict: unlike anything this model knows" in printed and "P(fake)" not in printed
    answers = tmp_path / "answers.jsonl"
    assert detect([*given, "--calibration", str(file), "--json", str(answers)]) == 0
    (line,) = [json.loads(line) for line in answers.read_text("utf-8").splitlines()]
    assert line["abstained"] and line["label"] is None and line["fake_probability"] is None
    assert re.match(r"unlike anything this model knows \(distance", line["abstained_because"])
    assert line["details"]["withheld"]["label"] in ("real", "fake")
    assert detect([*given, "--calibration", str(file), "--no-abstain"]) == 0
    assert "P(fake)" in capsys.readouterr().out


def test_a_rule_in_the_models_folder_is_found_by_itself(calibrated, trained, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(trained, folder)
    for name in ("calibration.json", "calibration.safetensors"):
        shutil.copy(calibrated[1] / name, folder / name)
    noise = np.random.default_rng(0).integers(0, 2, (40, 40, 1)).repeat(3, axis=2) * 255
    Image.fromarray(noise.astype(np.uint8)).save(tmp_path / "noise.png")
    given = ["--img_path", str(tmp_path / "noise.png"), "--model-path", str(folder), "--device", "cpu", "--score-only"]
    assert detect(given) == 0
    assert "no verdict: unlike" in capsys.readouterr().out
    assert detect([*given, "--no-abstain"]) == 0
    assert "no verdict" not in capsys.readouterr().out
    plain = ["--model-path", str(trained), *given[4:]]
    assert detect([*given[:2], *plain]) == 0
    assert "no verdict" not in capsys.readouterr().out
    data = ["--dataset_path", str(calibrated[0]), "--max_sample", "4", "--result_folder", str(tmp_path / "r")]
    assert run([*data, *given[2:]]) == 0
    assert metrics_of(tmp_path / "r")["abstention"]["fitted_here"] is False
    changed = json.loads((folder / "calibration.json").read_text())
    changed["abstention"]["error_level"] = 0.34
    (folder / "calibration.json").write_text(json.dumps(changed))
    monkeypatch.setattr("llava.detector.ForgeryDetector.analyze_prepared", None)  # predictions do not depend on it
    assert run([*data, *given[2:]]) == 0
    assert metrics_of(tmp_path / "r")["abstention"]["rule"]["error_level"] == 0.34


def test_any_programs_predictions_get_a_band(tmp_path, data, capsys):
    rng = np.random.default_rng(0)
    lines = []
    for file in sorted(data.rglob("*.png")):
        fake = file.parent.name == "fake"
        name = f"{data.name}/{file.parent.name}/{file.name}"
        lines.append({"id": name, "fake_probability": float(np.clip(fake * 0.9 + rng.random() * 0.1, 0, 1))})
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = [
        "--dataset_path",
        str(data),
        "--result_folder",
        str(tmp_path / "r"),
        "--rescore",
        str(tmp_path / "p.jsonl"),
    ]
    assert run([*given, "--calibrate", "--error-level", "0.5"]) == 0
    assert "no features of these images" in capsys.readouterr().err
    found = metrics_of(tmp_path / "r")["abstention"]
    assert not found["rule"]["has_statistics"] and found["all"]["coverage"] == 1.0
    assert run([*given, "--calibrate", "--error-level", "0.01"]) == 0
    assert "no verdict real and fake can be given with an error of at most 0.01" in capsys.readouterr().err
    assert metrics_of(tmp_path / "r")["abstention"]["all"]["given"] == 0
    assert "Given verdicts" in (tmp_path / "r" / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--stability", "2"], "--stability says how a rule of abstention is fitted; it needs --calibrate"),
        (["--error-level", "0.1", "--calibrate", "--no-abstain"], "--error-level says how"),
        (["--known-share", "2", "--calibrate"], "must be between 0 and 1"),
        (["--stability", "9", "--calibrate"], "invalid choice"),
        (["--perturbed-images", "f"], "--perturbed-images needs --perturb"),
        (["--calibrate-perturbed", "--calibrate"], "--calibrate-perturbed needs --perturb"),
    ],
)
def test_options_that_would_do_nothing_are_refused(model, data, tmp_path, capsys, given, message):
    with pytest.raises(SystemExit) as ended:
        run(["--dataset_path", str(data), "--result_folder", str(tmp_path), *model, *given])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def scores_of(samples: list[Sample], shift: float, seed: int) -> list[Prediction]:
    """Predictions whose logits are moved towards fake."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1, len(samples)) + 3 * np.array([2 * sample.label - 1 for sample in samples]) + shift
    return [
        Prediction(s.id, s.label, fake_probability=float(1 / (1 + np.exp(-x))))
        for s, x in zip(samples, logits, strict=True)
    ]


def test_a_rule_that_knew_the_conditions_holds_under_them():
    """Half of the images call all reals fake after the perturbation: only the rule that saw it says nothing then."""
    samples = [Sample(f"s/{number}", Path("x"), number % 2, "s") for number in range(6000)]
    clean, under = scores_of(samples, 0.0, 1), Evidence(predictions=scores_of(samples, 4.0, 2))
    fresh = [Sample(f"f/{number}", Path("x"), number % 2, "f") for number in range(4000)]
    errors = {}
    for mixed in (False, True):
        rule = Judgement(fit=FitSettings(0.1, 0.95, 0, mixed)).fitted(samples, clean, None, [under]).rule
        wrong, given = 0, 0
        for sample, prediction in zip(fresh * 2, [*scores_of(fresh, 0, 3), *scores_of(fresh, 4, 4)], strict=True):
            if not rule.decide(prediction.fake_probability).abstains:
                given += 1
                wrong += (prediction.fake_probability >= 0.5) != sample.label
        errors[mixed] = wrong / max(1, given)
    assert errors[False] > 0.15 and errors[True] <= 0.1


def test_a_calibration_without_a_rule_is_named(model, data, tmp_path, capsys):
    file = tmp_path / "calibration.json"
    file.write_text('{"temperature": 1.5, "bias": 0.0, "score": "prompt"}')
    assert detect(["--img_path", str(next(data.rglob("*.png"))), *model, "--calibration", str(file)]) == 1
    assert "says nothing of when no verdict is given" in capsys.readouterr().err
    given = ["--dataset_path", str(data), "--result_folder", str(tmp_path / "r"), *model, "--calibration", str(file)]
    assert run([*given, "--max_sample", "3"]) == 0
    assert "abstention" not in metrics_of(tmp_path / "r")
