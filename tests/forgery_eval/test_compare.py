"""Runs side by side: every metric of each, and what they do not share."""

import json
import re
from pathlib import Path

import pytest

from forgery_eval.benchmarks import Sample
from forgery_eval.metrics.calibration import is_for_fitting
from forgery_eval.pages.comparison import MOST_IMAGES, MOST_LISTED, _disagreements
from llava.__main__ import main as forgery
from tests.trained import picture


def write_run(folder: Path, images: str, **metrics) -> Path:
    folder.mkdir(parents=True)
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


# --- on the same images

NAMES = [f"{'real' if number % 2 == 0 else 'fake'}/{number:02}.png" for number in range(20)]
GOOD = dict(zip(NAMES, [0.1, 0.9] * 8 + [0.7, 0.3, 0.6, 0.9], strict=True))
WEAK = dict(zip(NAMES, [0.2, 0.8] * 4 + [0.9, 0.1] * 3 + [0.3, 0.7] * 3, strict=True))


def label_of(name: str) -> int:
    return int(name.startswith("fake"))


def store(folder: Path, scores: dict[str, float | None], lines: dict[str, dict] | None = None, **metrics) -> Path:
    """A result folder with metrics, and a prediction of each image, whose verdict is what its score says."""
    given = [score for score in scores.values() if score is not None]
    balanced = {"text_accuracy": 0.5, "auroc": 0.5, "scored": len(given)}
    write_run(folder, "digest", **balanced)
    content = json.loads((folder / "metrics.json").read_text())
    content["detection"]["all"]["metrics"]["images"] = len(scores)
    (folder / "metrics.json").write_text(json.dumps({**content, "run": "key", **metrics}))
    rows = [{"settings": {}, "chosen": {}, "batch_size": 8}]
    for name, score in scores.items():
        verdict = None if score is None else ("real", "fake")[score >= 0.5]
        row = {"id": name, "label": label_of(name), "fake_probability": score, "verdict": verdict}
        rows.append({**row, **(lines or {}).get(name, {})})
    (folder / "predictions").mkdir()
    (folder / "predictions" / "key.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def compared(tmp_path: Path, *runs: Path, more: tuple[str, ...] = ()) -> dict:
    """What the command finds."""
    out = tmp_path / "out.json"
    out.unlink(missing_ok=True)
    assert forgery(["compare", *map(str, runs), "--json", str(out), "--resamples", "50", *more]) == 0
    return json.loads(out.read_text())


def test_images_are_matched_by_their_ids_in_any_order(tmp_path, capsys):
    good = store(tmp_path / "good", GOOD)
    found = compared(tmp_path, good, store(tmp_path / "weak", WEAK))
    shuffled = dict(sorted(WEAK.items(), key=lambda item: hash(item[1]) % 7))
    assert list(shuffled) != NAMES
    assert compared(tmp_path, good, store(tmp_path / "other" / "weak", shuffled)) == found
    (pair,) = found["clean"]["pairs"]
    # The first is wrong on 16, 17 and 18, the second on 8 to 13; a run matched by its order would be wrong elsewhere.
    assert (pair["only_first_right"], pair["only_second_right"], pair["images"]) == (6, 3, 20)
    assert pair["metrics"]["accuracy"] == pytest.approx(-3 / 20)
    (disagreements,) = found["disagreements"]
    assert {entry["id"] for entry in disagreements["only_first_right"]} == set(NAMES[8:14])
    assert {entry["id"] for entry in disagreements["only_second_right"]} == set(NAMES[16:19])
    assert disagreements["counts"]["label"]["real"] == {"images": 10, "only_first_right": 3, "only_second_right": 2}
    assert "20 images are common to all runs, 10 real and 10 fake" in capsys.readouterr().out


def test_rows_that_one_run_lacks_are_counted_and_left_out(tmp_path, capsys):
    fewer = {name: score for name, score in WEAK.items() if name not in NAMES[8:12]}
    runs = store(tmp_path / "good", GOOD), store(tmp_path / "weak", {**fewer, "real/new.png": 0.2})
    found = compared(tmp_path, *runs)
    printed = capsys.readouterr().out
    assert found["clean"]["images"] == 16 and found["clean"]["pairs"][0]["only_first_right"] == 2
    assert "good: 20 images, 4 of them in no other run" in printed
    assert "weak: 17 images, 1 of them in no other run" in printed


def test_numbers_are_repeated_with_the_seed_and_printed_in_lines(tmp_path, capsys):
    runs = store(tmp_path / "good", GOOD), store(tmp_path / "weak", WEAK)
    assert compared(tmp_path, *runs) == compared(tmp_path, *runs)
    first, other = (compared(tmp_path, *runs, more=("--seed", seed))["clean"] for seed in ("0", "9"))
    assert first["pairs"][0]["intervals"] != other["pairs"][0]["intervals"]
    assert first["pairs"][0]["metrics"] == other["pairs"][0]["metrics"]
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if line.startswith("weak − good"))
    assert [line.split()[k] for k in (-6, -5, -4, -3)] == ["6,", "3", "0.508", "0.508"]  # 2 * (1 + 9 + 36 + 84) / 512


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {NAMES[0]: {"label": 1}},
            "the labels disagree, so these are not the same images: real/00.png is real in good",
        ),
        ({name: {"id": f"x{name}"} for name in NAMES}, "no image is common to all runs"),
        (None, "is named twice"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path, capsys, change, said):
    good = store(tmp_path / "good", GOOD)
    other = good / "metrics.json" if change is None else store(tmp_path / "weak", WEAK, change)
    assert forgery(["compare", str(good), str(other)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and said in err and len(err.splitlines()) == 1


def test_files_need_predictions_and_labels(tmp_path, capsys):
    good = store(tmp_path / "good", GOOD)
    plain = write_run(tmp_path / "plain", "digest", auroc=0.5)
    assert forgery(["compare", str(good), str(plain)]) == 0
    assert "only the metrics are compared" in capsys.readouterr().err
    assert forgery(["compare", str(good), str(plain), "--html", str(tmp_path / "page.html")]) == 1
    assert "there is no file or folder" in capsys.readouterr().err and not (tmp_path / "page.html").exists()
    nameless = {name: {"label": None} for name in NAMES}
    runs = [store(tmp_path / name, scores, nameless) for name, scores in (("a", GOOD), ("b", WEAK))]
    assert forgery(["compare", *map(str, runs)]) == 1
    assert "no run says whether real/00.png is real or fake; name the data set" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        forgery(["compare", *map(str, runs), "--seed", "-1"])


def test_verdicts_that_are_not_given_are_left_out_and_counted(tmp_path, capsys):
    withheld = {"abstention": {"withheld": {"unlike": [NAMES[8], NAMES[9]], "inconclusive": [NAMES[10]]}}}
    lines = {NAMES[16]: {"error": "broken"}, NAMES[17]: {"abstained": True}, NAMES[18]: {"verdict": None}}
    runs = store(tmp_path / "good", GOOD, lines), store(tmp_path / "weak", WEAK, **withheld)
    found = compared(tmp_path, *runs)
    good, weak = found["clean"]["runs"]
    assert good["without_verdict"] == {"could not be analysed": 1, "declined": 1, "no verdict found": 1}
    assert weak["without_verdict"] == {"unlike": 2, "inconclusive": 1}
    assert [run["verdicts_by"] for run in found["runs"]] == ["text", "rule"]
    (pair,) = found["clean"]["pairs"]
    assert (pair["images"], pair["only_first_right"], pair["only_second_right"]) == (14, 3, 0)
    assert pair["scored"] == 20  # what is withheld still has a score
    assert "3 common ones without a verdict (unlike 2, inconclusive 1)" in capsys.readouterr().out


def test_a_calibrated_run_is_compared_by_its_scores_on_what_it_was_not_fitted_on(tmp_path, capsys):
    calibration = {"temperature": 1.0, "bias": 3.0, "score": None, "fitted_here": True, "share": 0.4}
    reported = [name for name in NAMES if not is_for_fitting(name, 0.4)]
    assert 0 < len(reported) < 20
    runs = [store(tmp_path / "good", GOOD), store(tmp_path / "weak", WEAK, calibration=calibration)]
    for run in runs:
        content = json.loads((run / "metrics.json").read_text())
        content["detection"]["all"]["metrics"]["text_accuracy"] = None
        (run / "metrics.json").write_text(json.dumps(content))
    found = compared(tmp_path, *runs)
    assert found["clean"]["images"] == len(reported) and found["runs"][1]["calibrated_on"] == 20 - len(reported)
    assert found["clean"]["runs"][1]["metrics"]["balanced_accuracy"] == 0.5  # a bias of 3 calls all of them fake
    raw = [0.5 + 0.5 * (label_of(n) * 2 - 1) * (WEAK[n] * 2 - 1) for n in reported]
    assert any(value < 0.5 for value in raw) and 0 < found["clean"]["runs"][1]["metrics"]["auroc"] < 1
    assert f"{20 - len(reported)} more left out, which it was calibrated on" in capsys.readouterr().out


def test_masks_are_compared_where_runs_have_them(tmp_path, capsys):
    def images(*values: float) -> dict:
        return {"localization": {"images": [{"id": NAMES[2 * k + 1], "iou": v} for k, v in enumerate(values)]}}

    runs = [store(tmp_path / "good", GOOD, **images(0.2, 0.4)), store(tmp_path / "weak", WEAK, **images(0.4, 0.8))]
    found = compared(tmp_path, *runs)
    assert [run["metrics"]["iou"] for run in found["clean"]["runs"]] == pytest.approx([0.3, 0.6])
    assert found["clean"]["pairs"][0]["metrics"]["iou"] == pytest.approx(0.3)
    assert "IoU" in capsys.readouterr().out
    plain = [store(tmp_path / "plain" / name, scores) for name, scores in (("good", GOOD), ("weak", WEAK))]
    assert "iou" not in compared(tmp_path, *plain)["clean"]["runs"][0]["metrics"]
    assert "IoU" not in capsys.readouterr().out


# --- the page

HOSTILE = "<img src=x onerror=alert(1)>"


def data_set(folder: Path) -> Path:
    """A manifest of the images, whose names and generators are hostile."""
    folder.mkdir()
    rows = ["id,image,label,set,generator"]
    for number, name in enumerate(NAMES):
        picture(number).save(folder / f"{number}.png")
        rows.append(
            f"{name}{HOSTILE},{number}.png,{('real', 'fake')[label_of(name)]},one,{'ab'[number % 3 == 0]}{HOSTILE}"
        )
    (folder / "all.csv").write_text("\n".join(rows) + "\n")
    return folder / "all.csv"


@pytest.fixture
def hostile_page(tmp_path) -> str:
    source = {"source": {"data": str(data_set(tmp_path / "data"))}}
    runs = []
    for name, scores in (("good", GOOD), ("weak", WEAK), (f"odd $x_1$ {HOSTILE}", dict.fromkeys(NAMES, 0.4))):
        renamed = {f"{image}{HOSTILE}": score for image, score in scores.items()}
        runs.append(str(store(tmp_path / name, renamed, **source)))
    page = tmp_path / "page.html"
    assert forgery(["compare", *runs, "--html", str(page), "--resamples", "50"]) == 0
    return page.read_text(encoding="utf-8")


def test_the_page_escapes_what_comes_from_outside(hostile_page):
    assert "<img src=x" not in hostile_page and "onerror=alert(1)&gt;" in hostile_page
    assert hostile_page.count("<script") == 1 and "Content-Security-Policy" in hostile_page
    assert "odd $x_1$" in hostile_page  # no formula


def test_the_page_shows_images_groups_and_no_column_of_dashes(hostile_page):
    shown = hostile_page.count('src="data:image/jpeg;base64,')
    assert 0 < shown <= MOST_IMAGES and hostile_page.count("<svg") == 2
    assert "generator" in hostile_page and "Difference to good" in hostile_page
    assert "IoU" not in hostile_page and "perturbation" not in hostile_page.lower()
    for table in re.findall(r"<table.*?</table>", hostile_page, re.S):
        rows = [re.findall(r"<td.*?>(.*?)</td>", row, re.S) for row in re.findall(r"<tr>.*?</tr>", table, re.S)]
        for column in zip(*filter(None, rows), strict=True):
            assert any(re.sub(r"<.*?>|\s", "", cell) != "–" for cell in column), table


def test_few_images_are_shown_of_many_pairs(tmp_path):
    pairs = [
        {
            "first": "a",
            "second": f"b{number}",
            "counts": {},
            "only_first_right": [entry(tmp_path, k) for k in range(40)],
            "only_second_right": [entry(tmp_path, k) for k in range(60)],
        }
        for number in range(6)
    ]
    samples = {f"{k}": Sample(f"{k}", tmp_path / f"{k}.png", 0, "set") for k in range(60)}
    found = list(_disagreements(pairs, samples))
    assert sum(len(side["cards"]) for pair in found for side in pair["sides"]) == MOST_IMAGES
    assert len(found[0]["sides"][1]["table"].rows) == MOST_LISTED
    assert found[0]["sides"][1]["table"].left_out.startswith("10 more")
    lost = list(_disagreements(pairs, {}))
    assert not any(side["cards"] for pair in lost for side in pair["sides"])


def entry(folder: Path, number: int) -> dict:
    file = folder / f"{number}.png"
    if not file.exists():
        picture(number).save(file)
    return {
        "id": f"{number}",
        "groups": {"label": "real"},
        "verdicts": ["real", "fake"],
        "fake_probabilities": [0.1, None],
    }


def evaluated(root: Path, name: str, scores: dict[str, float], *more: str, prefix: str = "data/") -> Path:
    """Evaluates foreign predictions that lie outside of the result folder; the images are written first."""
    for number, image in enumerate(NAMES):
        (root / "data" / image).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(root / "data" / image)
    lines = [{"id": prefix + image, "fake_probability": score} for image, score in reversed(scores.items())]
    (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ["--dataset_path", str(root / "data"), "--result_folder", str(root / name), *more]
    assert forgery(["eval", *given, "--rescore", str(root / f"{name}.jsonl")]) == 0
    return root / name


def metrics_of(results: Path) -> dict:
    return json.loads((results / "metrics.json").read_text())


def test_evaluations_say_where_a_comparison_finds_what_it_needs(tmp_path):
    """One run names the images by their ids, the other by their files."""
    runs = evaluated(tmp_path, "good", GOOD), evaluated(tmp_path, "weak", WEAK, prefix=f"{tmp_path}/data/")
    found = compared(tmp_path, *runs, more=("--html", str(tmp_path / "page.html")))
    assert found["clean"]["pairs"][0]["only_first_right"] == 6 and found["clean"]["pairs"][0]["images"] == 20
    assert "data:image/jpeg" in (tmp_path / "page.html").read_text()
    for run, part in zip(runs, found["clean"]["runs"], strict=True):
        own = metrics_of(run)["detection"]["all"]["metrics"]
        assert part["metrics"]["balanced_accuracy"] == pytest.approx(own["score_balanced_accuracy"])
        assert part["metrics"]["auroc"] == pytest.approx(own["auroc"])


def test_what_a_rule_withholds_is_no_verdict(tmp_path):
    rule = {"low": 0.25, "high": 0.75, "error_level": 0.1, "confidence": 0.9, "known_share": 0.95, "deliveries": 0}
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps({"temperature": 1.0, "bias": 0.0, "abstention": rule}))
    runs = [evaluated(tmp_path, "good", GOOD), evaluated(tmp_path, "weak", WEAK, "--calibration", str(file))]
    measured = metrics_of(runs[1])["abstention"]
    withheld = {f"data/{name}" for name in NAMES[14:]}
    assert set(measured["withheld"]["inconclusive"]) == withheld and not measured["withheld"]["unlike"]
    assert {name: len(ids) for name, ids in measured["withheld"].items()} == measured["all"]["no_verdict"]
    found = compared(tmp_path, *runs)
    part = found["clean"]["runs"][1]
    assert part["with_verdict"] == measured["all"]["given"] == 14 and part["without_verdict"] == {"inconclusive": 6}
    assert part["metrics"]["accuracy"] == pytest.approx(1 - measured["all"]["error_among_given"])
    assert part["metrics"]["balanced_accuracy"] == pytest.approx(measured["all"]["balanced_accuracy_of_given"])
    assert part["metrics"]["strict_balanced_accuracy"] == pytest.approx(8 / 20)
    assert found["clean"]["pairs"][0]["images"] == 14
