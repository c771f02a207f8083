"""Predictions of endpoints, of probes and of other programs, evaluated as any other run."""

import json
import math

import pytest

from forgery_eval.eval import run
from llava import ForgeryDetector
from llava.endpoints import Endpoint, EndpointDownError, EndpointError, TokenChoice
from llava.errors import OptionError
from llava.systems.endpoint import answer
from llava.systems.endpoint.scores import verdict_probability
from tests.conftest import GOLDENS
from tests.forgery_eval.faulty_endpoint import completion, faulty, forwarded
from tests.serve.running import running
from tests.trained import picture

GOOD = ("Verdict:", " fake", "\nWhy: it is too smooth.")


@pytest.fixture
def photos(tmp_path):
    for label, folder in enumerate(("real", "fake")):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for index in range(4):
            picture(2 * index + label).save(tmp_path / "data" / folder / f"{index}.png")
    return tmp_path / "data"


def good(body: dict) -> dict:
    top = [{"token": word, "logprob": math.log(p), "bytes": None} for word, p in ((" fake", 0.6), (" real", 0.2))]
    tokens = [
        {"token": text, "logprob": 0.0, "bytes": None, "top_logprobs": top if text == " fake" else []} for text in GOOD
    ]
    return completion("".join(GOOD), logprobs={"content": tokens} if "logprobs" in body else None)


def server(script: list[str], always: str = "good"):
    return faulty(script, good, always)


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("fault", ["429", "500", "hang", "cut", "no logprobs"])
def test_a_fault_is_overcome(fault):
    with server([fault], always=fault if fault == "no logprobs" else "good") as (url, requests):
        endpoint = Endpoint(url, "m", timeout=0.5, first_pause=0.01)
        reply = endpoint.ask([{"role": "user", "content": "?"}], logprobs=True)
    assert reply.text == "".join(GOOD) and reply.completion_tokens == 10
    assert len(requests) == 2 and bool(reply.tokens) == (fault != "no logprobs")
    assert fault != "429" or requests[1]["time"] - requests[0]["time"] > 0.25


def test_what_no_repetition_mends_is_said_at_once():
    with server([], always="401") as (url, requests), pytest.raises(EndpointDownError, match="OPENAI_API_KEY"):
        Endpoint(url, "m").ask([])
    assert len(requests) == 1
    with server([], always="422") as (url, requests), pytest.raises(EndpointError, match="refuses the question"):
        Endpoint(url, "m").ask([])
    for wrong in ("localhost:8000", "http://me:secret@host/v1"):
        with pytest.raises(OptionError):
            Endpoint(wrong, "m")


def test_p_fake_is_that_of_the_verdicts_token():
    top = {" fa": math.log(0.6), " real": math.log(0.2), " I": math.log(0.1)}
    tokens = [TokenChoice("Verdict:", {}), TokenChoice(" fa", top), TokenChoice("ke", {"ke": 0.0})]
    found = verdict_probability("Verdict: fake", tokens, answer.FORMAT)
    assert found == pytest.approx(0.75)
    only = [TokenChoice("Verdict:", {}), TokenChoice(" fake", {" fake": math.log(0.9), " I": math.log(0.06)})]
    assert verdict_probability("Verdict: fake", only, answer.FORMAT) == pytest.approx(0.9 / 0.94)
    assert verdict_probability("Verdict: fake", [], answer.FORMAT) is None


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("**Verdict:** Real\nWhy: grain.", "real"),
        ("Fake. The hands melt.", "fake"),
        ("The image is not real.", "fake"),
        ("This image appears to be AI-generated.", "fake"),
        ("Verdict: real ... Verdict: fake", None),
        ("Real or fake is hard to say.", None),
    ],
)
def test_plain_answers_are_read(text, verdict):
    assert answer.parse(text).verdict == verdict


def test_an_endpoint_is_evaluated_resumed_and_counted(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("OWN_KEY", "a-secret")
    results = tmp_path / "r"
    with server(["422", "500", "good"]) as (url, requests):
        given = ["--dataset_path", str(photos), "--result_folder", str(results), "--backend", "openai"]
        given += ["--base-url", url, "--model", "m", "--api-key-env", "OWN_KEY", "--price", "1", "2"]
        given += ["--concurrency", "1"]
        assert run(given) == 3  # one question was refused
        assert run(given) == 0 and len(requests) == 10  # it alone is asked again; one was repeated before
        assert run(given) == 0 and len(requests) == 10
    found = metrics_of(results)
    assert found["usage"]["prompt_tokens"] == 800 and found["usage"]["cost"] == pytest.approx(960e-6)
    assert found["detection"]["all"]["metrics"]["text_accuracy"] == 0.5
    (file,) = (results / "predictions").glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert [row["fake_probability"] for row in rows] == pytest.approx([0.75] * 8)
    assert requests[0]["key"] == "Bearer a-secret"
    assert not any(b"a-secret" in f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())


def test_an_endpoint_that_is_down_ends_the_run(photos, tmp_path, capsys):
    with server([], always="422") as (url, _):
        given = ["--dataset_path", str(photos), "--result_folder", str(tmp_path / "r"), "--backend", "openai"]
        assert run([*given, "--base-url", url, "--model", "m"]) == 1
    assert "images in a row" in capsys.readouterr().err


def test_a_real_model_behind_our_server(photos, tmp_path, trained):
    detector = ForgeryDetector.from_pretrained(trained, device="cpu")
    with running(detector) as served:
        given = ["--dataset_path", str(photos), "--result_folder", str(tmp_path / "r"), "--backend", "openai"]
        given += ["--base-url", f"{served.url}/v1", "--model", "model", "--system", "fakereasoning"]
        assert run([*given, "--max_new_tokens", "200"]) in (0, 3)
    (file,) = (tmp_path / "r" / "predictions").glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    own = ForgeryDetector.from_pretrained(trained, device="cpu")
    for row in rows:
        report = own.analyze(photos / row["id"].split("/")[-2] / row["id"].split("/")[-1], max_new_tokens=200)
        assert row["verdict"] == report.label and row["text"] == report.text
        if report.label:
            assert row["fake_probability"] == pytest.approx(report.fake_probability, abs=1e-4)


def predictions_of(results) -> dict[str, dict]:
    (file,) = (results / "predictions").glob("*.jsonl")
    return {row["id"]: row for row in map(json.loads, file.read_text().splitlines()[1:])}


@pytest.fixture(scope="module")
def served(trained):
    """A small model behind this project's server."""
    with running(ForgeryDetector.from_pretrained(trained, device="cpu")) as opened:
        yield f"{opened.url}/v1"


@pytest.fixture
def by_itself(photos, tmp_path, trained) -> dict[str, dict]:
    """What the same model says without a server."""
    given = ["--dataset_path", str(photos), "--result_folder", str(tmp_path / "own"), "--device", "cpu"]
    assert run([*given, "--model-path", str(trained), "--max_new_tokens", "200"]) == 0
    return predictions_of(tmp_path / "own")


@pytest.mark.parametrize("logprobs", [True, False], ids=["logprobs", "no logprobs"])
def test_a_real_model_behind_a_faulty_line_is_evaluated_as_by_itself(photos, tmp_path, served, by_itself, logprobs):
    """429, 500, 503, a hang and a cut body are on the way; in the end every answer is there, once."""
    script = ["good", "429", "500", "good", "hang", "cut", "503", "good", "429"]
    results = tmp_path / "r"
    given = ["--dataset_path", str(photos), "--result_folder", str(results), "--backend", "openai", "--model", "model"]
    given += ["--system", "fakereasoning", "--max_new_tokens", "200", "--timeout", "2.5", "--concurrency", "2"]
    with faulty([*script], forwarded(served), "good" if logprobs else "no logprobs", hang=3.5) as (url, came):
        assert run([*given, "--base-url", url]) == 0
        asked = len(came)
        assert [one["step"] for one in came[:9]] == script and asked >= 8 + 6
        assert run([*given, "--base-url", url]) == 0 and len(came) == asked  # nothing is paid for twice
    found = predictions_of(results)
    assert set(found) == set(by_itself) and any(row["verdict"] for row in found.values())
    for name, row in found.items():
        own = by_itself[name]
        assert (row["verdict"], row["text"], row["attributes"]) == (own["verdict"], own["text"], own["attributes"])
        if row["details"]["score"] == "logprobs":
            assert row["fake_probability"] == pytest.approx(own["fake_probability"], abs=1e-4)
        elif row["verdict"]:
            assert not logprobs and row["fake_probability"] == float(row["verdict"] == "fake")
    sources = {row["details"]["score"] for row in found.values() if row["verdict"]}
    assert "logprobs" in sources and ("verdict" in sources) is not logprobs
    metrics, own = metrics_of(results)["detection"]["all"], metrics_of(tmp_path / "own")["detection"]["all"]
    assert metrics["metrics"]["text_accuracy"] == own["metrics"]["text_accuracy"]


def test_a_probe_is_fitted_cached_and_evaluated(photos, tmp_path, monkeypatch):
    results = tmp_path / "r"
    given = ["--dataset_path", str(photos), "--result_folder", str(results), "--backend", "probe", "--device", "cpu"]
    given += ["--backbone", str(GOLDENS / "clip"), "--train-data", str(photos)]
    assert run(given) == 0
    before = metrics_of(results)
    assert before["detection"]["all"]["metrics"]["scored"] == 8
    assert before["settings"]["fitted_on"]["images"] == 8
    monkeypatch.setattr("llava.systems.baseline.probe._compute", None)  # features and probe are there
    (results / "backend" / "probe" / "probe.safetensors").unlink()
    assert run(given) == 0 and metrics_of(results) == before
    report = ForgeryDetector.from_pretrained(results / "backend" / "probe", device="cpu").analyze(photos / "real/0.png")
    assert report.system == "baseline" and 0 < report.fake_probability < 1


def test_foreign_predictions_are_replayed(photos, tmp_path, capsys):
    file = tmp_path / "theirs.jsonl"
    lines = [{"id": str(path), "text": "Verdict: fake\nWhy: so."} for path in sorted(photos.rglob("*.png"))]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ["--dataset_path", str(photos), "--result_folder", str(tmp_path / "r"), "--backend", "replay"]
    with pytest.raises(SystemExit):
        run([*given, "--predictions", str(file)])
    assert "--answer-format" in capsys.readouterr().err
    assert run([*given, "--predictions", str(file), "--answer-format", "endpoint"]) == 0
    found = metrics_of(tmp_path / "r")
    assert found["detection"]["all"]["metrics"]["text_fake_accuracy"] == 1.0
    assert len(list((tmp_path / "r" / "predictions").glob("*.jsonl"))) == 1
