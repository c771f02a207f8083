"""Ablations: statistics on made-up runs, what is kept and refused, and the smallest whole setting."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from forgery_eval.benchmarks import Sample
from llava.errors import DataError, OptionError, UserError
from scripts.ablation import __main__ as command
from scripts.ablation import page, probe, results, runs
from scripts.ablation.results import Outcome, compare, judge
from scripts.ablation.runs import BASE, DONE, TOWER_STAGES, VARIANTS, Plan, Workplace

ROOT = Path(__file__).parents[1]


def made_up(labels: np.ndarray, skill: float, seed: int) -> Outcome:
    """A run whose scores rise with the class by ``skill``."""
    rng = np.random.default_rng(seed)
    scores = 1 / (1 + np.exp(-(skill * (2 * labels - 1) + rng.normal(size=len(labels)))))
    verdicts = (scores >= 0.5).astype(int)
    return Outcome(scores, scores.round(), verdicts == labels, verdicts, np.where(labels == 1, 0.5, np.nan))


def test_auroc_is_scikit_learns_with_ties_and_without_a_class():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 200), rng.integers(0, 9, 200) / 9
    assert results.auroc(labels, scores) == pytest.approx(roc_auc_score(labels, scores))
    assert np.isnan(results.auroc(np.ones(3), np.arange(3.0)))


def test_what_a_claim_is_judged_by():
    draws = {seed: np.full(results.DRAWS, 0.1 * seed) for seed in (1, 2, 3)}
    better = compare({1: 0.1, 2: 0.2, 3: 0.3}, draws)
    assert better.mean == pytest.approx(0.2) and 0.1 <= better.low + 1e-9 < 0.2 < better.high <= 0.3 + 1e-9
    assert better.effect == pytest.approx(2.0) and judge(better) == "holds"
    worse = compare({seed: -0.1 * seed for seed in draws}, {seed: -values for seed, values in draws.items()})
    assert judge(worse).startswith("does not hold")
    noise = {seed: np.random.default_rng(seed).normal(size=results.DRAWS) for seed in draws}
    assert judge(compare(dict.fromkeys(draws, 0.0), noise)).startswith("cannot be told: the interval")
    assert judge(compare({1: 0.1, 2: 0.2}, {1: draws[1], 2: draws[2]})) == "cannot be told: fewer than three seeds"
    assert compare({}, {}) is None and judge(None) == "not run"


def test_pairs_share_their_draws_so_that_equal_runs_differ_by_nothing():
    labels = np.arange(60) % 2
    first = made_up(labels, 1.0, 0)
    drawn = results.bootstrap({"a": {1: first}, "b": {1: first}}, labels)
    assert drawn["a"][1] == drawn["b"][1]
    values = {draw["auroc"] for draw in drawn["a"][1]}
    assert len(values) > 20  # the draws themselves differ


def test_every_variant_has_its_towers_and_stages_of_equal_length():
    assert {variant.towers for variant in VARIANTS.values()} <= set(TOWER_STAGES)
    lengths = {kind: sum(share for share, _ in stages) for kind, stages in TOWER_STAGES.items()}
    assert lengths.pop("random") == 0 and set(lengths.values()) == {1.0}
    assert {worse for _, _, worse in results.CLAIMS} | {better for _, better, _ in results.CLAIMS} <= set(VARIANTS)


def test_a_plan_is_kept_and_another_refused(tmp_path):
    runs.keep_plan(Plan(images=5), tmp_path)
    runs.keep_plan(Plan(images=5), tmp_path)
    with pytest.raises(OptionError, match="images was 5, is 6"):
        runs.keep_plan(Plan(images=6), tmp_path)


def test_a_step_is_done_once_and_again_after_it_failed(tmp_path):
    done = []

    def fails():
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="full"):
        runs.once(tmp_path / "run", fails)
    for _ in range(2):
        assert runs.once(tmp_path / "run", lambda: done.append(1))
    assert done == [1] and "seconds" in json.loads((tmp_path / "run" / DONE).read_text())


def test_a_run_that_another_process_works_at_is_passed_over(tmp_path):
    hold = (
        "import sys; from pathlib import Path; from scripts.ablation.runs import once\n"
        f"once(Path({str(tmp_path / 'run')!r}), lambda: (print('held', flush=True), sys.stdin.read()))"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", hold], cwd=ROOT, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        assert not runs.once(tmp_path / "run", lambda: pytest.fail("it is held"))
        other.communicate("")
    assert (tmp_path / "run" / DONE).is_file()


def test_without_a_finished_run_there_is_no_table(tmp_path, capsys):
    (tmp_path / "test" / "0_real").mkdir(parents=True)
    assert command.main(["--out", str(tmp_path), "--table", "--test", str(tmp_path)]) == 1
    assert "error:" in capsys.readouterr().err


def test_towers_come_before_what_stands_on_them():
    options = command.build_parser().parse_args(["--out", "x", "--variants", "facl", "clip", "--seeds", "7", "--probe"])
    first, last = command.tasks(options)
    assert {kind for _, kind, _ in first} == {"facl", "plain", *probe.KINDS}
    assert ("run", "clip", 7) in last and ("probe", "facl_alone", 7) in last
    with pytest.raises(OptionError, match="not trained yet"):
        runs.train_and_evaluate(Workplace(Path("nowhere"), Path("x"), Path("x"), Plan()), "clip", 1)


@pytest.fixture
def found() -> dict:
    """Results as ``summarise`` makes them, of one row and one that is missing."""
    metrics = {"auroc": 0.75, "accuracy": 0.5, "ece": 0.1, "attributes": float("nan")}
    against = {"mean": 0.1, "low": -0.1, "high": 0.3, "effect": None, "seeds": 1}
    done = [{"seconds": 90, "date": "2026-01-02T03:04", "machine": "a machine"}]
    row = {"title": "A & B", "seeds": [1], "metrics": metrics, "by_seed": {1: metrics}, "done": done}
    return {
        "images": 4,
        "rows": {BASE: {**row, "against": {}}, "clip": {**row, "against": {"auroc": against}}},
        "missing": {"dino": "DINO only"},
        "claims": [{"claim": "x helps", "difference": None, "verdict": "not run"}],
        "scores": [{"way": "after", "auroc": 0.9, "ece": 0.1, "unsure": 0.2, "as_text": 1.0}],
        "mapper": [],
        "probes": [],
    }


def test_the_table_marks_what_is_not_run_and_the_page_escapes(found, tmp_path, monkeypatch):
    text = page.as_text(found)
    assert "| A & B | 1 | 0.750 | 0.500 | 0.100 | – | +0.100 (-0.100 to +0.300) | – | 1.5 |" in text
    assert "| DINO only | not run |" in text and "| x helps | – | – | not run |" in text
    assert "a machine; 2026-01-02." in text
    monkeypatch.setattr(page, "pictures", lambda place, seeds: [])
    html = page.as_page(Workplace(tmp_path, tmp_path, tmp_path, Plan()), [1], found)
    assert "A &amp; B" in html and html.count("<svg") == 2
    found["rows"]["clip"]["against"] = {"auroc": {"mean": -0.4, "low": -0.5, "high": -0.3, "effect": None, "seeds": 1}}
    close = {"auroc": {"mean": 0.01, "low": -0.01, "high": 0.02, "effect": None, "seeds": 1}}
    found["rows"]["dino"] = {**found["rows"]["clip"], "title": "close", "against": close}
    beside = page.as_page(Workplace(tmp_path, tmp_path, tmp_path, Plan()), [1], found)
    assert beside.count("<svg") == 3  # a row at chance does not squeeze those that are close


def test_random_towers_choose_no_pictures(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    samples = [Sample(f"{index}", tmp_path / "a.png", 1, f"set {index}") for index in range(2)]

    def run(*scores: float) -> dict[int, SimpleNamespace]:
        return {1: SimpleNamespace(scores=np.array(scores))}

    scored = {BASE: run(0.5, 0.9), "dino": run(0.5, 0.1), "random_towers": run(1.0, 0.5)}
    monkeypatch.setattr(page, "collect", lambda place, seeds: (samples, scored))
    shown = page.pictures(Workplace(tmp_path, tmp_path, tmp_path, Plan()), [1])
    assert [one["set"] for one in shown] == ["set 1", "set 0"]
    assert all("frozen random towers" not in one["said"] for one in shown)


def test_equal_differences_have_no_effect_size():
    drawn = {seed: np.zeros(results.DRAWS) for seed in (1, 2, 3)}
    assert compare({1: 0.9 - 0.8, 2: 0.5 - 0.4, 3: 0.1}, drawn).effect is None


def test_attributes_of_fake_images_are_read_from_the_manifest(tmp_path):
    def line(image: str, label: str, split: str) -> str:
        return json.dumps({"image": image, "label": label, "split": split, "attributes": {"Low Image Quality": "x"}})

    lines = [line("a/1.png", "fake", "train"), line("a/2.png", "real", "train"), line("b/3.png", "fake", "evaluation")]
    lines.append(line("b/4.png", "fake", "evaluation"))
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    assert probe.fake_images(tmp_path, "train") == [("a/1.png", [False, False, False, True, False])]
    assert [name for name, _ in probe.fake_images(tmp_path, "eval", most=1)] == ["b/3.png"]
    (tmp_path / "manifest.jsonl").write_text(lines[1])
    with pytest.raises(DataError, match="no fake train image"):
        probe.fake_images(tmp_path, "train")


SMALLEST = ("--images", "48", "--evaluated", "1", "--sampled", "1", "--epochs", "1", "--tower_epochs", "1")


@pytest.mark.slow
def test_the_smallest_setting_ends_in_a_table_and_resumes(tmp_path, capsys):
    given = ["--out", str(tmp_path), *SMALLEST, "--new_tokens", "4", "--seeds", "1", "--threads", "1"]
    given += ["--variants", BASE, "facl", "clip"]  # of two towers, of others, and of one
    assert command.main(given) == 0
    table = (tmp_path / "table.md").read_text()
    assert all(f"| {row} | 1 |" in table for row in ("forgery-aware fusion", "with FACL", "CLIP only"))
    assert "| DINO only | not run |" in table
    assert "cannot be told: fewer than three seeds" in table
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["images"] == 44 and len(found["scores"]) == 3 and found["mapper"][0]["seeds"] == 1
    assert (tmp_path / "page.html").read_text().count("data:image/jpeg") == 6
    log = json.loads((tmp_path / "runs" / "facl_1" / "model" / "log.json").read_text())
    assert any("facl_cross_loss" in entry for entry in log)
    before = (tmp_path / "runs" / "facl_1" / DONE).read_text()
    assert command.main([*given, "--probe"]) == 0
    assert (tmp_path / "runs" / "facl_1" / DONE).read_text() == before
    rows = json.loads((tmp_path / "results.json").read_text())["probes"]
    assert {row["other"] for row in rows} == {"before", "plain cross-entropy"} and len(rows) == 4
    assert command.main([*given, "--epochs", "2"]) == 1
    assert "another plan" in capsys.readouterr().err
