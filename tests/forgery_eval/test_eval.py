"""The evaluation command as its user runs it."""

import base64
import csv
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from forgery_eval.benchmarks import open_benchmark
from forgery_eval.eval import parse_arguments, run
from forgery_eval.fingerprints import images_digest, weight_locations, weights_digest
from forgery_eval.masks import read_mask, write_mask
from forgery_eval.store import Prediction, Run, RunStore, read_run
from llava.cli import SOME_FAILED
from llava.errors import DataError, FileError
from llava.labels import LABELS
from llava.systems.fakereasoning.answer import ATTRIBUTES, write_answer
from tests.trained import picture

SCRIPT = Path(__file__).parents[2] / "forgery_eval" / "eval.py"
SORT_SCRIPT = SCRIPT.parent / "pages" / "templates" / "sort.js"
CLIP = Path(__file__).parents[1] / "data" / "clip_full"


def write_set(root: Path, name: str, reals: int, fakes: int, first: int = 0) -> None:
    """A set in the MMFR layout; images from 0 to 23 are those that the small model has learnt."""
    reasoning = {}
    for label, (folder, count) in enumerate((("0_real", reals), ("1_fake", fakes))):
        (root / name / folder).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            inside = f"{folder}/{index:03}.png"
            picture(first + 2 * index + label).save(root / name / inside)
            attribute = ATTRIBUTES[LABELS[label]][index % 5]
            reasoning[f"{name}/{inside}"] = {attribute: "it is so."}
    (root / name / f"{name}_reasoning.json").write_text(json.dumps(reasoning))


@pytest.fixture
def sets(tmp_path) -> Path:
    root = tmp_path / "evaluation_sets"
    write_set(root, "flux", 5, 7)
    write_set(root, "other", 3, 2, first=12)
    return root


def arguments(model: Path, data: Path, results: Path, *more: object) -> list[str]:
    given = ["--model-path", model, "--dataset_path", data, "--result_folder", results, "--device", "cpu"]
    return [*map(str, given), "--max_new_tokens", "200", "--batch-size", "4", *map(str, more)]


def metrics_of(results: Path) -> dict:
    return json.loads((results / "metrics.json").read_text(encoding="utf-8"))


def predictions_of(results: Path) -> list[str]:
    """Lines of the one run's file without their timings."""
    (file,) = (results / "predictions").glob("*.jsonl")
    return [re.sub(r', "seconds": [\d.e-]+', "", line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_complete_evaluation(trained, sets, tmp_path, capsys):
    results = tmp_path / "r"
    (sets / "flux/1_fake/006.png").write_text("no image")
    (sets / "flux/0_real/004.png").unlink()
    assert run(arguments(trained, sets, results, "--clip_path", CLIP)) == SOME_FAILED
    printed = capsys.readouterr()
    assert "2 images could not be analysed" in printed.err and "no image in a known format" in printed.err
    metrics = metrics_of(results)
    assert metrics["protocol"].startswith("default")
    flux = metrics["detection"]["sets"]["flux"]
    assert flux["metrics"]["images"] == 12 and flux["metrics"]["scored"] == 10
    assert flux["metrics"]["failure_rate"] >= 2 / 12
    assert {failure["id"] for failure in metrics["failures"]} >= {"flux/1_fake/006.png", "flux/0_real/004.png"}
    assert "auroc" in flux["metrics"] and flux["intervals"]["auroc"]
    sets_accuracy = [metrics["detection"]["sets"][name]["metrics"]["text_accuracy"] for name in ("flux", "other")]
    assert metrics["detection"]["macro"]["metrics"]["text_accuracy"] == pytest.approx(sum(sets_accuracy) / 2)
    reasoning = metrics["reasoning"]["all"]
    assert 0 < reasoning["parsed"]["metrics"]["bleu_1"] <= 1 and 0 < reasoning["all"]["metrics"]["css"] <= 1
    assert reasoning["all"]["metrics"]["texts"] == 17
    assert reasoning["parsed"]["metrics"]["attribute_f1"] is not None
    rows = list(csv.DictReader((results / "metrics.csv").read_text().splitlines()))
    assert {"detection", "reasoning, all answers"} <= {row["part"] for row in rows}
    found = next(r for r in rows if (r["part"], r["name"], r["metric"]) == ("detection", "flux", "auroc"))
    assert float(found["value"]) == flux["metrics"]["auroc"]
    assert sorted(file.name for file in results.iterdir()) == [
        "metrics.csv",
        "metrics.json",
        "predictions",
        "report.html",
    ]


def test_a_second_run_analyses_nothing_and_writes_the_same(trained, sets, tmp_path, monkeypatch):
    results = tmp_path / "r"
    assert run(arguments(trained, sets, results)) == 0
    before = {file.name: file.read_bytes() for file in results.iterdir() if file.is_file()}
    lines = predictions_of(results)
    monkeypatch.setattr("llava.detector.ForgeryDetector._reports", None)
    assert run(arguments(trained, sets, results)) == 0
    assert {file.name: file.read_bytes() for file in results.iterdir() if file.is_file()} == before
    assert predictions_of(results) == lines
    for name in before:
        (results / name).unlink()
    monkeypatch.setattr("forgery_eval.eval.open_detector", None)
    assert run(["--dataset_path", str(sets), "--result_folder", str(results), "--rescore"]) == 0
    assert {name: (results / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("cut", [1, 3, 5, 9, 17], ids=lambda cut: f"{cut} lines left")
def test_a_torn_file_resumes_to_the_same_bytes(trained, sets, tmp_path, cut):
    results = tmp_path / "r"
    given = arguments(trained, sets, results)
    assert run(given) == 0
    wanted, metrics = predictions_of(results), (results / "metrics.json").read_bytes()
    (file,) = (results / "predictions").glob("*.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:cut]) + lines[cut][:30])
    assert run(given) == 0
    assert predictions_of(results) == wanted
    assert (results / "metrics.json").read_bytes() == metrics


def test_anything_changed_starts_again(trained, sets, tmp_path):
    results, model = tmp_path / "r", tmp_path / "model"
    shutil.copytree(trained, model)

    def runs() -> int:
        return len(list((results / "predictions").glob("*.jsonl")))

    short = ["--max_sample", "1", "--score-only"]
    run(arguments(model, sets, results, *short))
    run(arguments(model, sets, results, *short))
    assert runs() == 1
    moved = model.rename(tmp_path / "moved")
    run(arguments(moved, sets, results, *short))
    assert runs() == 1
    weights = moved / "model.safetensors"
    stamp, content = weights.stat(), bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert (weights.stat().st_size, weights.stat().st_mtime_ns) == (stamp.st_size, stamp.st_mtime_ns)
    run(arguments(moved, sets, results, *short))
    assert runs() == 2
    run(arguments(moved, sets, results, *short, "--question", "Real?"))
    assert runs() == 3
    picture(99).save(sets / "flux/0_real/000.png")
    run(arguments(moved, sets, results, *short))
    assert runs() == 4


def test_a_pipe_among_the_images_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "file.png").write_bytes(b"x")
    images = [tmp_path / name for name in ("pipe.png", "file.png", "absent.png")]
    for contents in (False, True):
        digest = images_digest(["a", "b", "c"], images, contents=contents)
        assert images_digest(["a", "b", "d"], images, contents=contents) != digest
        os.utime(tmp_path / "file.png", ns=(1, 10**18))  # another time alone is another image only without contents
        assert (images_digest(["a", "b", "c"], images, contents=contents) == digest) == contents
    (tmp_path / "file.png").write_bytes(b"y")
    os.utime(tmp_path / "file.png", ns=(1, 10**18))
    assert images_digest(["a", "b", "c"], images, contents=True) != digest


def test_the_digest_of_weights_is_of_contents_and_names(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "w").write_bytes(b"one")
    first = weights_digest([str(tmp_path / "a"), None])
    assert weights_digest([str(tmp_path / "b"), None]) == first != weights_digest([None, str(tmp_path / "b")])
    (tmp_path / "b" / "w").write_bytes(b"two")
    assert weights_digest([str(tmp_path / "b"), None]) != first
    assert weights_digest(["owner/name"]) != weights_digest(["owner/other"])


def test_no_two_runs_write_one_store(tmp_path):
    work = Run({"x": 1}, {}, 2)
    store = RunStore(tmp_path, work, ["a", "b"])
    with pytest.raises(FileError, match="another process is writing"):
        RunStore(tmp_path, work, ["a", "b"])
    RunStore(tmp_path, Run({"x": 2}, {}, 2), ["a", "b"]).close()
    store.write([Prediction("a", 0), Prediction("b", 1)])
    store.close()
    again = RunStore(tmp_path, work, ["a", "b"])
    assert again.done == 2
    again.close()


def test_a_store_of_another_order_is_refused(tmp_path):
    work = Run({"x": 1}, {}, 2)
    store = RunStore(tmp_path, work, ["a", "b", "c"])
    store.write([Prediction("a", 0), Prediction("b", 1)])
    store.close()
    with pytest.raises(DataError, match="remove it to start again"):
        RunStore(tmp_path, work, ["b", "a", "c"])
    again = RunStore(tmp_path, Run({"x": 1}, {}, 8), ["a", "b", "c"])
    assert (again.done, again.batch_size) == (2, 2)
    again.close()


def test_foreign_predictions_are_scored(sets, tmp_path):
    samples = open_benchmark(sets)
    right = [{"id": s.id, "text": write_answer(LABELS[s.label], reasoning="r", caption="c")} for s in samples[:-1]]
    right[0] = {"id": samples[0].id, "fake_probability": 0.9}
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in right))
    given = [
        "--dataset_path",
        str(sets),
        "--result_folder",
        str(tmp_path / "r"),
        "--rescore",
        str(tmp_path / "p.jsonl"),
    ]
    assert run(given) == SOME_FAILED
    metrics = metrics_of(tmp_path / "r")
    found = metrics["detection"]["all"]["metrics"]
    assert found["text_accuracy"] == pytest.approx(15 / 17) and found["scored"] == 1
    assert metrics["detection"]["all"]["undefined"]["auroc"] == "both classes are needed"
    assert metrics["failures"][-1] == {"id": samples[-1].id, "reason": "there is no prediction"}


def test_every_file_that_weights_come_from_makes_the_run(tmp_path, monkeypatch):
    names = ("vision_tower", "dino_tower", "base", "given_vision", "given_dino.pth", "from_environment.pth")
    for name in names:
        (tmp_path / name).write_text("0")
    model = tmp_path / "model"
    model.mkdir()
    towers = {f"mm_{name}": str(tmp_path / name) for name in names[:2]}
    (model / "config.json").write_text(json.dumps({**towers, "_name_or_path": str(tmp_path), "model_type": "x"}))
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "base")}))
    monkeypatch.setenv("DINO_WEIGHT", str(tmp_path / "from_environment.pth"))

    def digest() -> str:
        given = [str(tmp_path / "given_vision"), None, str(tmp_path / "given_dino.pth")]
        return weights_digest(weight_locations(model, given))

    found = {digest()}
    for name in names:
        (tmp_path / name).write_text("1")
        found.add(digest())
    assert len(found) == 1 + len(names)
    (tmp_path / "unrelated").write_text("1")
    assert digest() in found


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", "needs an id"),
        ('{"id": "a"}', "needs one of"),
        ('{"id": "a", "fake_probability": 1.5}', "from 0 to 1"),
        ('{"id": "a", "text": "", "answer_probability": -1}', "answer_probability must be from 0 to 1"),
        ('{"id": "a", "verdict": "maybe"}', "the verdict must be"),
        ('{"id": "a", "text": 3}', "must be texts"),
        ('{"id": "a", "fake_probability": 0.5, "score_source": ["verdict"]}', "must be texts"),
        ('{"id": "a", "fake_probability": 0.5, "seconds": "long"}', "seconds must be a number"),
        ('{"id": "a", "text": "", "stages": []}', "object of texts"),
        ("hello", "not JSON"),
        ('{"id": "a", "text": ""}\n{"id": "a", "text": ""}', "more than once"),
        ('{"id": "a", "text": ""}', "no prediction has the id"),
    ],
)
def test_wrong_predictions_are_explained(sets, tmp_path, capsys, line, message):
    (tmp_path / "p.jsonl").write_text(line + "\n")
    given = [
        "--dataset_path",
        str(sets),
        "--result_folder",
        str(tmp_path / "r"),
        "--rescore",
        str(tmp_path / "p.jsonl"),
    ]
    assert run(given) == 1
    assert message in capsys.readouterr().err


def test_a_torn_last_line_of_predictions_is_left_out(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"id": "a", "verdict": "real"}\n{"id": "b", "ver')
    assert list(read_run(tmp_path / "p.jsonl")[1]) == ["a"]


@pytest.mark.parametrize("own", [True, False], ids=["our answers", "foreign ones"])
def test_scores_alone_have_no_metrics_of_texts(trained, sets, tmp_path, own):
    results, samples = tmp_path / "r", open_benchmark(sets)
    if own:
        assert run(arguments(trained, sets, results, "--score-only")) == 0
    else:
        predictions = [{"id": s.id, "fake_probability": 0.2 + 0.5 * s.label} for s in samples]
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in predictions))
        given = ["--dataset_path", sets, "--result_folder", results, "--rescore", tmp_path / "p.jsonl"]
        assert run([*map(str, given)]) == 0
    metrics = metrics_of(results)
    found = metrics["detection"]["all"]
    assert found["metrics"]["text_accuracy"] is None and found["metrics"]["confusion_text"] is None
    assert found["undefined"]["text_accuracy"] == found["undefined"]["disagreement"] == "only scores were asked for"
    assert found["metrics"]["failure_rate"] == 0 and found["intervals"]["score_accuracy"]
    assert metrics["failures"] == [] and metrics["reasoning"]["all"]["all"]["metrics"]["bleu_1"] is None


def test_the_papers_protocol(trained, sets, tmp_path):
    results = tmp_path / "r"
    parsed = parse_arguments(arguments(trained, sets, results, "--paper_protocol"))
    assert (parsed.temperature, parsed.max_sample) == (0.2, 10)
    assert parse_arguments(arguments(trained, sets, results, "--paper-protocol", "--max-sample", "2")).max_sample == 2
    assert run(arguments(trained, sets, results, "--paper-protocol", "--clip_path", CLIP)) == 0
    metrics = metrics_of(results)
    assert metrics["protocol"].startswith("paper") and metrics["settings"]["temperature"] == 0.2
    assert not metrics["settings"]["orientation"]
    assert (metrics["settings"]["dtype"], metrics["settings"]["dtype_is_automatic"]) == ("float32", True)
    lines = (results / "metric.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["flux", "other"]
    assert f"acc: {metrics['paper']['flux']['acc']:.4f}" in lines[0]
    assert "<h2>By the paper's protocol</h2>" in (results / "report.html").read_text()


def test_calibration_reports_on_the_rest_and_is_used_again(tmp_path, capsys):
    rows = [{"image": f"{i}.png", "label": i % 2} for i in range(200)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    predictions = [
        {"id": r["image"], "fake_probability": 0.6 + 0.3 * (r["label"] ^ (i % 5 == 0))} for i, r in enumerate(rows)
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in predictions))
    given = ["--dataset_path", tmp_path / "d.jsonl", "--rescore", tmp_path / "p.jsonl", "--result_folder"]
    given = [*map(str, given)]
    assert run([*given, str(tmp_path / "r"), "--calibrate"]) == 0
    metrics = metrics_of(tmp_path / "r")
    found, before = metrics["detection"]["all"]["metrics"], metrics["calibration"]["before"]["metrics"]
    assert 100 < found["images"] < 200 and found["images"] == before["images"]
    assert found["nll"] < before["nll"] and found["score_accuracy"] > before["score_accuracy"]
    saved = str(tmp_path / "r" / "calibration.json")
    assert run([*given, str(tmp_path / "again"), "--calibration", saved]) == 0
    assert metrics_of(tmp_path / "again")["calibration"]["temperature"] == metrics["calibration"]["temperature"]
    (tmp_path / "one.jsonl").write_text(json.dumps(rows[0]) + "\n")
    given[1] = str(tmp_path / "one.jsonl")
    assert run([*given, str(tmp_path / "r"), "--calibrate"]) == 1
    assert "calibrate on more images" in capsys.readouterr().err


def test_a_calibration_of_another_score_is_refused(tmp_path, capsys):
    rows = [{"image": f"{i}.png", "label": i % 2} for i in range(200)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {"answer": ["verdict", "forced"], "prompt": ["prompt"], "unknown": [None]}
    for kind, names in sources.items():
        predictions = [
            {"id": row["image"], "fake_probability": 0.3 + 0.4 * row["label"], "score_source": names[i % len(names)]}
            for i, row in enumerate(rows)
        ]
        (tmp_path / f"{kind}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in predictions))

    def evaluated(kind: str, *more: object) -> int:
        given = ["--dataset_path", tmp_path / "d.jsonl", "--rescore", tmp_path / f"{kind}.jsonl"]
        return run([str(part) for part in (*given, "--result_folder", tmp_path / kind, *more)])

    assert evaluated("answer", "--calibrate") == 0
    saved = tmp_path / "answer" / "calibration.json"
    assert json.loads(saved.read_text())["score"] == "answer"
    assert evaluated("answer", "--calibration", saved) == evaluated("unknown", "--calibration", saved) == 0
    assert evaluated("prompt", "--calibration", saved) == 1
    assert "for the 'answer' score, but these scores are 'prompt': ask the model for the score" in (
        capsys.readouterr().err
    )


def test_both_scores_have_metrics_before_and_after_calibration(tmp_path):
    rows = [{"image": f"{i}.png", "label": i % 2} for i in range(200)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    predictions = []
    for i, row in enumerate(rows):
        text = write_answer(LABELS[row["label"] ^ (i % 8 == 0)], reasoning="r", caption="c")
        of_answer = 0.999 if "This image is fake" in text.split("<CONCLUSION>")[1] else 0.001
        score = 0.3 + 0.4 * (row["label"] ^ (i % 9 == 0)) + i % 7 / 100
        entry = {"id": row["image"], "text": text, "score_source": "prompt"}
        predictions.append({**entry, "fake_probability": score, "answer_probability": of_answer})
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in predictions))
    given = ["--dataset_path", tmp_path / "d.jsonl", "--rescore", tmp_path / "p.jsonl", "--result_folder"]
    given = [*map(str, given)]
    assert run([*given, str(tmp_path / "plain")]) == 0
    plain = metrics_of(tmp_path / "plain")
    assert plain["calibration"] is None and plain["answer_score"]["calibration"] is None
    assert plain["answer_score"]["metrics"]["disagreement"] == 0 < plain["detection"]["all"]["metrics"]["disagreement"]
    labels = [row["label"] for row in rows]
    wanted = roc_auc_score(labels, [entry["answer_probability"] for entry in predictions])
    assert plain["answer_score"]["metrics"]["auroc"] == pytest.approx(wanted)
    assert run([*given, str(tmp_path / "fitted"), "--calibrate"]) == 0
    fitted = metrics_of(tmp_path / "fitted")
    for found in (fitted["answer_score"], {**fitted["detection"]["all"], "calibration": fitted["calibration"]}):
        before = found["calibration"]["before"]["metrics"]
        assert found["metrics"]["nll"] < before["nll"] and found["metrics"]["images"] == before["images"] < 200
    assert fitted["answer_score"]["calibration"]["temperature"] != fitted["calibration"]["temperature"]
    assert (fitted["calibration"]["score"], fitted["answer_score"]["calibration"]["score"]) == ("prompt", "answer")
    table = (
        (tmp_path / "fitted" / "report.html").read_text().split("With and without the answer")[-1].split("</table>")[0]
    )
    for name in ("ece", "nll"):
        assert f"{fitted['answer_score']['metrics'][name]:.3f}" in table
        assert f"{fitted['calibration']['before']['metrics'][name]:.3f}" in table
    assert 'detection,"all, score of the answer",auroc' in (tmp_path / "fitted" / "metrics.csv").read_text()


def test_an_evaluation_writes_both_scores(trained, sets, tmp_path):
    assert run(arguments(trained, sets, tmp_path / "r", "--score", "prompt")) == 0
    first = json.loads(predictions_of(tmp_path / "r")[1])
    assert first["score_source"] == "prompt" and 0 <= first["answer_probability"] <= 1
    assert metrics_of(tmp_path / "r")["answer_score"]["metrics"]["scored"] == 17
    assert run(arguments(trained, sets, tmp_path / "s")) == 0
    assert "answer_score" not in metrics_of(tmp_path / "s")
    assert "With and without" not in (tmp_path / "s" / "report.html").read_text()


class Page(HTMLParser):
    """Collects tags and what a page loads from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.scripts: list[str] = []
        self.policy = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href") and tag != "use"]
        if tag == "meta" and dict(attrs).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attrs)["content"]

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script" and data.strip():
            self.scripts.append(data)

    def handle_endtag(self, tag):
        if tag == "script":
            self.tags.append("/script")


def test_the_report_is_self_contained_and_escaped(sets, tmp_path):
    samples = open_benchmark(sets)
    reasoning = "<REASONING> <script>alert(1)</script> <img src=x onerror=y> </REASONING>"
    text = reasoning + " <CONCLUSION> This image is {}. </CONCLUSION>"
    predictions = [
        {"id": s.id, "fake_probability": round(i / 17, 3), "text": text.format(LABELS[i % 2])}
        for i, s in enumerate(samples)
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in predictions))
    (sets / "flux/0_real/001.png").write_text("broken")
    given = [
        "--dataset_path",
        str(sets),
        "--result_folder",
        str(tmp_path / "r"),
        "--rescore",
        str(tmp_path / "p.jsonl"),
    ]
    assert run(given) == 0
    report = (tmp_path / "r" / "report.html").read_text()
    page = Page(report)
    assert page.tags.count("svg") == 5
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert page.policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert "&lt;img src=x onerror=y&gt;" in report
    assert page.sources and all(source.startswith(("data:image/jpeg;base64,", "#")) for source in page.sources)
    assert "published 0.872" in report and "cannot be shown" in report
    words = ("ROC", "Reliability", "Risk and coverage", "Worst groups", "Confusion", "Worst mistakes", "Protocol")
    assert all(word in report for word in words)
    assert report.index("balanced accuracy") < report.index("<svg") < report.index("<table")


def test_hostile_names_and_notices_are_only_text(tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    rows = [{"image": "a.png", "id": f"{evil}{i}", "label": i, "set": evil, evil: evil} for i in (0, 1)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    header = {"settings": {"notice": evil}, "chosen": {}, "batch_size": 1}
    predictions = [
        {"id": rows[0]["id"], "verdict": "fake", "text": evil, "fake_probability": 0.9, "mask": f"../{evil}"},
        {"id": rows[1]["id"], "verdict": None, "error": evil},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (header, *predictions)))
    given = ["--dataset_path", tmp_path / "d.jsonl", "--result_folder", tmp_path / "r", "--rescore"]
    assert run([*map(str, given), str(tmp_path / "p.jsonl")]) == SOME_FAILED
    report = (tmp_path / "r" / "report.html").read_text()
    page = Page(report)
    assert page.scripts == [SORT_SCRIPT.read_text()] and "img" not in page.tags
    assert report.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 8


def test_masks_have_names_that_stay_in_their_folder(tmp_path):
    mask = np.zeros((3, 4), bool)
    mask[1, 2] = True
    names = ["a.png", "a/b.png", "/data/a.png", "../../a.png", "a//b.png", "x" * 300, "a\0b", "\ud800.png", "a:b", ""]
    written = [write_mask(tmp_path / "p", "run", name, mask) for name in names]
    assert written[:3] == ["masks/run/a.png.png", "masks/run/a/b.png.png", "masks/run/root/data/a.png.png"]
    assert len(set(written)) == len(names)
    for path in written:
        assert (tmp_path / "p" / path).resolve().is_relative_to(tmp_path / "p" / "masks" / "run")
        assert np.array_equal(np.asarray(read_mask(tmp_path / "p", path)), mask * 255)
    (tmp_path / "outside.png").write_bytes((tmp_path / "p" / written[0]).read_bytes())
    assert read_mask(tmp_path / "p", "../outside.png") is None and read_mask(tmp_path / "p", "absent.png") is None
    for wrong in (mask[0], mask + 1.5, np.full((2, 2), np.nan)):
        with pytest.raises(ValueError, match="a mask must have two dimensions"):
            write_mask(tmp_path, "run", "a", wrong)


@pytest.mark.parametrize(
    "more",
    [
        ["--max_sample", "0"],
        ["--batch-size", "x"],
        ["--no-such-flag"],
        ["--calibrate", "--calibration", "c.json"],
        ["--answer-format", "fakereasoning"],
        ["--system", "nothing"],
    ],
)
def test_wrong_flags_end_with_the_usage(trained, sets, tmp_path, more):
    with pytest.raises(SystemExit) as stopped:
        run(arguments(trained, sets, tmp_path / "r", *more))
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sets", "nowhere"], "no set nowhere; it has flux, other"),
        (["--samples", "2"], "need a temperature"),
        (["--clip_path", "/nowhere"], "/nowhere cannot be opened as a CLIP model"),
        (["--calibration", "/nowhere.json"], "/nowhere.json"),
        (["--rescore"], "must hold the predictions of one run"),
        (["--rescore", "/nowhere.jsonl"], "no file /nowhere.jsonl"),
        (["--model-path", "/nowhere"], "no folder /nowhere"),
        (["--dataset_path", "/nowhere"], "no file or folder /nowhere"),
    ],
)
def test_wrong_settings_are_one_clear_line(trained, sets, tmp_path, capsys, more, message):
    assert run(arguments(trained, sets, tmp_path / "r", *more)) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0]


def test_what_is_not_installed_is_named(trained, sets, tmp_path, capsys, monkeypatch):
    for module in ("forgery_eval.results", "forgery_eval.metrics.scoring", "forgery_eval.metrics.reasoning"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.delattr("forgery_eval.results", raising=False)  # a package keeps what was imported from it
    monkeypatch.setitem(sys.modules, "nltk.translate.bleu_score", None)
    assert run(arguments(trained, sets, tmp_path / "r")) == 1
    assert "pip install 'fakereasoning[eval]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "forgery_eval.results", None)
    with pytest.raises(ModuleNotFoundError):
        run(arguments(trained, sets, tmp_path / "r"))


def test_help_and_rescore_need_no_torch(sets, tmp_path):
    samples = open_benchmark(sets)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"id": s.id, "verdict": "real"}) + "\n" for s in samples))
    rescore = [
        "--dataset_path",
        str(sets),
        "--result_folder",
        str(tmp_path / "r"),
        "--rescore",
        str(tmp_path / "p.jsonl"),
    ]
    for more, status in ((["--help"], 0), (rescore, 0), ([*rescore, "--no-such-flag"], 2)):
        command = [sys.executable, "-X", "importtime", str(SCRIPT), *more]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/")
        assert done.returncode == status and "| torch\n" not in done.stderr


@pytest.mark.slow
def test_twenty_kills_change_nothing(trained, tmp_path):
    sets = tmp_path / "evaluation_sets"
    write_set(sets, "flux", 60, 50)
    write_set(sets, "other", 30, 40, first=5)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = {"env": environment, "cwd": "/", "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

    def command(results: Path) -> list[str]:
        return [sys.executable, str(SCRIPT), *arguments(trained, sets, results)]

    start = time.monotonic()
    subprocess.run(command(tmp_path / "unbroken"), check=True, **quiet)
    took = time.monotonic() - start
    choice, kills = random.Random(0), 0
    while kills < 20:
        process = subprocess.Popen(command(tmp_path / "killed"), **quiet)
        before = lines_in(tmp_path / "killed")
        # Half of the kills wait until a batch has been written, so that the run advances.
        wanted = before + choice.randint(1, 12) if kills % 2 else None
        deadline = time.monotonic() + (3 * took if wanted else choice.uniform(0, took))
        while process.poll() is None and time.monotonic() < deadline:
            if wanted is not None and lines_in(tmp_path / "killed") >= wanted:
                break
            time.sleep(choice.uniform(0, 0.01))
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            shutil.rmtree(tmp_path / "killed")  # it had ended: start again until twenty runs were killed
        else:
            kills += 1
    subprocess.run(command(tmp_path / "killed"), check=True, **quiet)
    found = predictions_of(tmp_path / "killed")
    assert found == predictions_of(tmp_path / "unbroken")
    ids = [json.loads(line)["id"] for line in found[1:]]
    assert ids == [sample.id for sample in open_benchmark(sets)]
    for name in ("metrics.json", "metrics.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()


def lines_in(results: Path) -> int:
    return sum(file.read_bytes().count(b"\n") for file in (results / "predictions").glob("*.jsonl"))
