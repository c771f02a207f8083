"""A system that lives only here goes through every command by its entry point, with no line of it elsewhere.

It tells fakes by a mark that the tests paint: pixels that are purely red. Its answers, its checkpoint, its score and
its mask are its own, and it needs no torch.
"""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from llava.cli import SOME_FAILED
from llava.systems import registry

ROOT = Path(__file__).parents[1]

MODULE = '''
import dataclasses
import json
from pathlib import Path

import numpy as np

from llava.cli import option
from llava.errors import CheckpointError, OptionError
from llava.report import ForgeryReport
from llava.systems.base import AnalyzeOptions, ParsedAnswer, SystemSpec


class Words:
    """``VERDICT=fake;WHY=...``; without ``explains`` there is no reason."""

    question = "Forged?"
    attributes = {"real": (), "fake": ()}
    verdict_prefix = "VERDICT="
    verdict_words = ("real", "fake")

    def __init__(self, explains):
        self.stages = ("VERDICT", "WHY") if explains else ("VERDICT",)
        self.explanation = "WHY" if explains else None

    def parse(self, text, *, tolerant=False):
        stages = dict(part.split("=", 1) for part in text.split(";") if "=" in part)
        stages = {name: stages[name] for name in self.stages if name in stages}
        verdict = stages.get("VERDICT")
        known = verdict in self.verdict_words
        return ParsedAnswer(stages, verdict if known else None, problem="" if known else "there is no VERDICT")

    def is_complete(self, text):
        return "WHY=" in text

    def complete_to_verdict(self, answer):
        return self.verdict_prefix

    def parse_training(self, answers):
        return self.parse(answers[0])

    def shorten(self, answer):
        return answer.split(";")[0]

    def attribute_name(self, name):
        return None


@dataclasses.dataclass(frozen=True)
class ToyOptions(AnalyzeOptions):
    threshold: float = option(0.05, "share of red pixels from which an image is fake")
    crash: str = ""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.threshold < 1:
            raise OptionError(f"threshold must be between 0 and 1, not {self.threshold}")


class Toy:
    name = "Toy"
    options = ToyOptions
    answer_format = Words(explains=True)

    def __init__(self, gain, notice, crash):
        self.gain, self.notice, self.crash = gain, notice, crash

    @classmethod
    def load(cls, path, **options):
        content = json.loads((Path(path) / "config.json").read_text())
        if "gain" not in content:
            raise CheckpointError(f"{path}: a toy needs its gain")
        return cls(content["gain"], content.get("notice", ""), content.get("crash", ""))

    def prepare(self, image):
        pixels = np.asarray(image).astype(int)
        return (pixels == (255, 0, 0)).all(axis=-1)

    def batch_size(self, options):
        return 3

    def describe(self, options):
        return {"gain": self.gain, "notice": self.notice}

    def analyze_batch(self, prepared, options):
        if self.crash:
            raise {"runtime": RuntimeError, "value": ValueError, "os": OSError}[self.crash]("a bug in the toy")
        return [self._report(red, options) for red in prepared]

    def _report(self, red, options):
        share = float(red.mean())
        score = min(1.0, 0.5 * share / options.threshold * self.gain)
        word = "fake" if share >= options.threshold else "real"
        text = "" if options.score_only else f"VERDICT={word};WHY=<script>{int(red.sum())}</script> pixels are red"
        if share > 0.9:  # too much: it gives no verdict
            word, text = None, "VERDICT=unsure;WHY=it is all red"
        return ForgeryReport(
            label=word,
            fake_probability=score,
            score_source="detector",
            stages=Words(explains=True).parse(text).stages,
            text=text,
            system=self.name,
            mask=red if self.gain < 2 else red * 0.5,
            tag="painted",
            details={"red": int(red.sum())},
            abstained=word is None,
            abstained_because="it is all red" if word is None else "",
            notice=self.notice,
        )


class Silent(Toy):
    name = "Silent toy"
    answer_format = None

    def _report(self, red, options):
        report = super()._report(red, options)
        return dataclasses.replace(report, text="", stages={}, mask=None, tag="", details={})


class Scoreless(Toy):
    name = "Scoreless toy"
    answer_format = Words(explains=False)

    def _report(self, red, options):
        report = super()._report(red, options)
        text = report.text.split(";")[0]
        stages = self.answer_format.parse(text).stages
        return dataclasses.replace(report, fake_probability=None, score_source=None, text=text, stages=stages)


def spec(cls, kind, words):
    def identify(files):
        return files.config.get("model_type") == kind

    title = cls.name
    return SystemSpec(kind, title, identify, cls, cls.options, words)


TOY = spec(Toy, "toy", Toy.answer_format)
SILENT = spec(Silent, "silent", None)
SCORELESS = spec(Scoreless, "scoreless", Scoreless.answer_format)
'''


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A folder as an installed third party's package looks."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "toy_forensics.py").write_text(MODULE)
    info = folder / "toy_forensics-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-forensics\nVersion: 1.0\n")
    entries = "\n".join(f"{name} = toy_forensics:{name.upper()}" for name in ("toy", "silent", "scoreless"))
    (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{entries}\n")
    return folder


@pytest.fixture
def installed(package, monkeypatch):
    """The package is importable, and the registry sees it, in this process alone."""
    monkeypatch.syspath_prepend(str(package))
    registry.specs.cache_clear()
    yield
    registry.specs.cache_clear()
    sys.modules.pop("toy_forensics", None)


def checkpoint(folder: Path, kind: str = "toy", **fields: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "gain": 1.0, **fields}))
    return folder


def paint(file: Path, red_rows: int, seed: int, size: tuple[int, int] = (30, 20)) -> None:
    """A grey image whose first rows are red."""
    pixels = np.random.default_rng(seed).integers(40, 60, (size[1], size[0], 3), dtype=np.uint8)
    pixels[:red_rows] = (255, 0, 0)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


RED_ROWS = {"real/0.png": 0, "real/1.png": 0, "real/2.png": 3, "fake/0.png": 4, "fake/1.png": 6, "fake/2.png": 0}
"""Of 20 rows: one real image is called fake, and one fake real."""


@pytest.fixture
def photos(tmp_path) -> Path:
    for seed, (name, rows) in enumerate(RED_ROWS.items()):
        paint(tmp_path / "photos" / name, rows, seed)
    return tmp_path / "photos"


def command(package: Path, script: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a script as its user does, from another folder, with the package installed; torch must not be imported."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), str(ROOT)])}
    words = [sys.executable, "-X", "importtime", str(ROOT / "forgery_eval" / script), *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, cwd="/", env=environment)
    assert "| torch\n" not in done.stderr
    done.stderr = "".join(line for line in done.stderr.splitlines(True) if not line.startswith("import time:"))
    assert done.returncode == 0 or not check, done.stderr
    return done


def true_mask(rows: int) -> np.ndarray:
    mask = np.zeros((20, 30), np.uint8)
    mask[:rows] = 255
    return mask


def test_the_detector_opens_it_by_its_files(installed, photos, tmp_path):
    from llava import ForgeryDetector

    detector = ForgeryDetector.from_pretrained(checkpoint(tmp_path / "model"))
    report = detector.analyze(photos / "fake/0.png")
    assert (report.label, report.score_source, report.system) == ("fake", "detector", "Toy")
    assert report.fake_probability == 1.0 and report.mask.sum() == 4 * 30
    plain = report.to_dict()
    assert (plain["tag"], plain["details"], plain["abstained"]) == ("painted", {"red": 120}, False)
    assert "mask" not in plain and json.dumps(plain)
    assert ForgeryDetector.from_pretrained(tmp_path / "model", system="TOY").system.name == "Toy"


def test_inference_writes_its_answers_and_masks(package, photos, tmp_path):
    model, out = checkpoint(tmp_path / "model", notice="A toy."), tmp_path / "out" / "answers.jsonl"
    given = ["--model-path", model, "--img_path", photos, "--json", out]
    done = command(package, "inference.py", *given)
    assert done.stderr.count("note: A toy.") == 1
    answers = {Path(entry["image"]): entry for entry in map(json.loads, out.read_text().splitlines())}
    assert list(answers) == sorted(photos / name for name in RED_ROWS)
    for name, rows in RED_ROWS.items():
        answer = answers[photos / name]
        assert answer["label"] == ("fake" if rows else "real")
        assert answer["stages"] == {"VERDICT": answer["label"], "WHY": f"<script>{30 * rows}</script> pixels are red"}
        with Image.open(out.parent / answer["mask"]) as mask:
            assert mask.mode == "L" and np.array_equal(np.asarray(mask), true_mask(rows))
    before = out.read_bytes()
    command(package, "inference.py", *given)
    assert out.read_bytes() == before
    lines = before.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:2]) + lines[2][:50])
    command(package, "inference.py", *given)
    assert out.read_bytes() == before
    printed = command(package, "inference.py", *given[:4]).stdout
    assert "  why         <script>120</script> pixels are red" in printed and "  mask        20.0 % of" in printed
    assert "  tag         painted" in printed


def test_half_a_mask_is_half_grey(package, photos, tmp_path):
    out = tmp_path / "answers.jsonl"
    model = checkpoint(tmp_path / "model", gain=2.0)
    command(package, "inference.py", "--model-path", model, "--img_path", photos / "fake/1.png", "--json", out)
    with Image.open(tmp_path / json.loads(out.read_text())["mask"]) as mask:
        assert np.unique(np.asarray(mask)).tolist() == [0, 128]


def test_evaluation_has_its_metrics_masks_and_report(package, photos, tmp_path):
    model, results = checkpoint(tmp_path / "model", notice="<b>A toy.</b>"), tmp_path / "r"
    given = ["--dataset_path", photos, "--result_folder", results]
    command(package, "eval.py", "--model-path", model, *given)
    metrics = json.loads((results / "metrics.json").read_text())
    assert metrics["settings"]["system"] == "toy" and metrics["settings"]["threshold"] == 0.05
    found = metrics["detection"]["all"]
    labels = [0, 0, 0, 1, 1, 1]
    scores = [min(1.0, 0.5 * rows / 20 / 0.05) for rows in RED_ROWS.values()]
    assert found["metrics"]["text_accuracy"] == found["metrics"]["score_accuracy"] == pytest.approx(4 / 6)
    assert found["metrics"]["auroc"] == pytest.approx(roc_auc_score(labels, scores))
    assert found["metrics"]["failure_rate"] == 0 and metrics["failures"] == []
    reasoning = metrics["reasoning"]["all"]["all"]
    assert reasoning["metrics"]["attribute_f1"] is None and reasoning["metrics"]["bleu_1"] is None
    assert reasoning["undefined"]["attribute_f1"] == "answers of Toy name no attributes"
    assert reasoning["undefined"]["bleu_1"] == "no image has both an answer and a reference text"
    (file,) = (results / "predictions").glob("*.jsonl")
    header, *predictions = map(json.loads, file.read_text().splitlines())
    assert header["batch_size"] == 3
    for (name, rows), prediction in zip(RED_ROWS.items(), predictions, strict=True):
        assert prediction["id"] == f"photos/{name}" and prediction["tag"] == "painted"
        with Image.open(file.parent / prediction["mask"]) as mask:
            assert np.array_equal(np.asarray(mask), true_mask(rows))
    report = (results / "report.html").read_text()
    assert report.count('<img alt="predicted mask" src="data:image/jpeg;base64,') == 2
    assert report.count("<script>") == 1 and "&lt;script&gt;90&lt;/script&gt; pixels are red" in report
    assert "&lt;b&gt;A toy.&lt;/b&gt;" in report and "published" not in report.split("</style>")[1]
    before = {name: (results / name).read_bytes() for name in ("metrics.json", "metrics.csv", "report.html")}
    for more in ([], ["--answer-format", "toy"]):
        for name in before:
            (results / name).unlink()
        command(package, "eval.py", *given, "--rescore", *more)
        assert {name: (results / name).read_bytes() for name in before} == before


def test_a_resumed_evaluation_keeps_whole_batches(package, photos, tmp_path):
    model, results = checkpoint(tmp_path / "model"), tmp_path / "r"
    given = ["--model-path", model, "--dataset_path", photos, "--result_folder", results]
    command(package, "eval.py", *given)
    (file,) = (results / "predictions").glob("*.jsonl")
    lines = without_times(file)
    masks = sorted((results / "predictions" / "masks").rglob("*.png"))
    assert [mask.relative_to(results / "predictions" / "masks" / file.stem).as_posix() for mask in masks] == sorted(
        f"photos/{name}.png" for name in RED_ROWS
    )
    kept = file.read_bytes().splitlines(keepends=True)[:6]
    file.write_bytes(b"".join(kept) + b'{"id": "pho')
    for mask in masks:
        if "fake" in mask.parts:  # the second batch, which is analysed again
            mask.unlink()
    command(package, "eval.py", *given)
    assert without_times(file) == lines and all(mask.is_file() for mask in masks)


def without_times(file: Path) -> list[str]:
    return [re.sub(r'"seconds": [\d.e-]+', "", line) for line in file.read_text().splitlines()]


def test_references_are_compared_with_its_explanation(package, photos, tmp_path):
    rows = [
        {"image": str(photos / name), "label": name.split("/")[0], "reference": "120 pixels are red", "id": name}
        for name in RED_ROWS
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"id": "fake/0.png", "text": "VERDICT=fake;WHY=120 pixels are red"}]
    texts += [{"id": name, "text": "nothing"} for name in list(RED_ROWS)[:2]]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    given = ["--dataset_path", tmp_path / "d.jsonl", "--result_folder", tmp_path / "r", "--rescore"]
    done = command(package, "eval.py", *given, tmp_path / "p.jsonl", "--answer-format", "toy", check=False)
    assert done.returncode == SOME_FAILED  # three images have no prediction
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    parsed = metrics["reasoning"]["all"]["parsed"]["metrics"]
    assert (parsed["texts"], parsed["bleu_4"]) == (1, 1.0)
    assert metrics["detection"]["all"]["metrics"]["text_accuracy"] == pytest.approx(1 / 6)
    wrong = command(package, "eval.py", *given, tmp_path / "p.jsonl", "--answer-format", "toy2", check=False)
    assert wrong.returncode == 1 and "unknown system 'toy2'; known: " in wrong.stderr


def test_without_answers_metrics_of_texts_are_null_with_the_reason(package, photos, tmp_path):
    paint(photos / "fake/3.png", 20, 9)
    model, results = checkpoint(tmp_path / "model", "silent"), tmp_path / "r"
    command(package, "eval.py", "--model-path", model, "--dataset_path", photos, "--result_folder", results)
    metrics = json.loads((results / "metrics.json").read_text())
    found, reasoning = metrics["detection"]["all"], metrics["reasoning"]["all"]["all"]
    for name in ("text_accuracy", "text_f1_macro", "confusion_text", "disagreement"):
        assert found["metrics"][name] is None and found["undefined"][name] == "Silent toy gives no answers"
    assert set(reasoning["metrics"].values()) == {None}
    assert set(reasoning["undefined"].values()) == {"Silent toy gives no answers"}
    assert metrics["detection"]["macro"]["undefined"]["text_accuracy"] == "Silent toy gives no answers"
    assert found["metrics"]["score_accuracy"] == pytest.approx(5 / 7)
    assert found["metrics"]["failure_rate"] == 0 and metrics["failures"] == []
    rows = list(csv.DictReader((results / "metrics.csv").read_text().splitlines()))
    assert any(row["metric"] == "text_accuracy" and row["undefined"] == "Silent toy gives no answers" for row in rows)


def test_without_scores_and_explanations_theirs_are_null_with_the_reason(package, photos, tmp_path):
    paint(photos / "fake/3.png", 20, 9)
    model, results = checkpoint(tmp_path / "model", "scoreless"), tmp_path / "r"
    command(package, "eval.py", "--model-path", model, "--dataset_path", photos, "--result_folder", results)
    metrics = json.loads((results / "metrics.json").read_text())
    found, reasoning = metrics["detection"]["all"], metrics["reasoning"]["all"]["all"]
    for name in ("score_accuracy", "score_f1_fake", "auroc", "ece", "nll", "brier", "confusion_score", "disagreement"):
        assert found["metrics"][name] is None and found["undefined"][name] == "no image has a score"
    assert found["metrics"]["text_accuracy"] == pytest.approx(4 / 7)
    assert reasoning["undefined"]["bleu_1"] == "answers of Scoreless toy have no explanation"
    assert metrics["failures"] == [{"id": "photos/fake/3.png", "reason": "it is all red"}]
    assert "No image has a score." in (results / "report.html").read_text()


def test_scores_alone_have_no_metrics_of_texts(package, photos, tmp_path):
    model, results = checkpoint(tmp_path / "model"), tmp_path / "r"
    given = ["--model-path", model, "--dataset_path", photos, "--result_folder", results, "--score-only"]
    command(package, "eval.py", *given)
    found = json.loads((results / "metrics.json").read_text())["detection"]["all"]
    assert found["undefined"]["text_accuracy"] == "only scores were asked for"
    assert found["metrics"]["score_accuracy"] == pytest.approx(4 / 6)


def test_its_options_are_the_commands_own(package, photos, tmp_path):
    model, out = checkpoint(tmp_path / "model"), tmp_path / "o.jsonl"
    for script, needed in (("inference.py", []), ("eval.py", [])):
        text = command(package, script, *needed, "--model-path", model, "--help").stdout
        assert "answers of Toy" in text and "--threshold" in text and "--score-only" in text
        assert "--force-summary" not in text and "--crash" not in text
        assert "--force-summary" in command(package, script, "--system", "FakeReasoning", "--help").stdout
    given = ["--img_path", photos, "--json", out]
    command(package, "inference.py", "--model-path", model, *given, "--threshold", "0.25")
    assert {json.loads(line)["label"] for line in out.read_text().splitlines()[:2]} == {"fake", "real"}
    refused = {
        ("--model-path", model, "--force-summary"): (
            2,
            "Toy has no option --force-summary, which is one of Fake",
        ),
        ("--model-path", model, "--treshold", "1"): (2, "did you mean --threshold?"),
        ("--model-path", model, "--threshold", "2"): (1, "threshold must be between 0 and 1"),
        ("--model-path", model, "--system", "nothing"): (2, "unknown system 'nothing'"),
        ("--system", "FakeReasoning", "--threshold", "2"): (2, "FakeReasoning has no option --threshold"),
    }
    for more, (status, message) in refused.items():
        done = command(package, "inference.py", *more, "--img_path", photos, check=False)
        assert done.returncode == status and message in done.stderr
        assert len(done.stderr.splitlines()) == 1
    given = ["--dataset_path", photos, "--result_folder", tmp_path / "r", "--paper-protocol"]
    done = command(package, "eval.py", "--model-path", model, *given, check=False)
    assert done.returncode == 1 and "--paper-protocol: Toy has no evaluation protocol" in done.stderr


@pytest.mark.parametrize(("kind", "name"), [("runtime", "RuntimeError"), ("value", "ValueError"), ("os", "OSError")])
def test_a_bug_keeps_its_traceback_and_a_mistake_is_one_line(package, photos, tmp_path, kind, name):
    model, broken = checkpoint(tmp_path / "model", crash=kind), tmp_path / "broken"
    checkpoint(broken)
    (broken / "config.json").write_text('{"model_type": "toy"}')
    commands = {
        "inference.py": ["--img_path", photos],
        "eval.py": ["--dataset_path", photos, "--result_folder", tmp_path / "r"],
    }
    for script, given in commands.items():
        bug = command(package, script, *given, "--model-path", model, check=False)
        assert bug.returncode == 1 and "Traceback (most recent call last)" in bug.stderr
        assert bug.stderr.rstrip().endswith(f"{name}: a bug in the toy")
        mistake = command(package, script, *given, "--model-path", broken, check=False)
        assert mistake.returncode == 1
        assert mistake.stderr.splitlines()[-1] == f"error: {broken}: a toy needs its gain"
        assert mistake.stderr.count("error") == 1 and "Traceback" not in mistake.stderr
