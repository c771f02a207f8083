"""Every metric against an independent computation, and what is undefined."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from forgery_eval.metrics.detection import (
    Outcomes,
    bootstrap,
    confusion,
    detection_metrics,
    interval,
    macro,
    weighted_metrics,
)

AUTHORS = json.loads((Path(__file__).parents[1] / "data" / "metrics.json").read_text())


def outcomes(labels, verdicts, scores, strata=None) -> Outcomes:
    strata = np.zeros(len(labels), int) if strata is None else np.asarray(strata)
    return Outcomes(np.asarray(labels, int), np.asarray(verdicts, int), np.asarray(scores, float), strata)


@st.composite
def cases(draw) -> Outcomes:
    size = draw(st.integers(1, 40))
    labels = draw(st.lists(st.integers(0, 1), min_size=size, max_size=size))
    verdicts = draw(st.lists(st.integers(-1, 1), min_size=size, max_size=size))
    score = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0, math.nan]), st.floats(0, 1))
    return outcomes(labels, verdicts, draw(st.lists(score, min_size=size, max_size=size)))


@pytest.mark.parametrize("case", AUTHORS["acc"], ids=lambda case: f"{len(case['y_true'])} images")
def test_accuracies_are_those_of_the_authors(case):
    predicted = np.asarray(case["y_pred"]) > case["thres"]
    metrics, _ = detection_metrics(outcomes(case["y_true"], predicted, np.full(len(predicted), np.nan)))
    found = [metrics[name] for name in ("text_real_accuracy", "text_fake_accuracy", "text_accuracy")]
    assert found == case["r_f_acc_sklearn_1_2_2"]


@given(cases())
@settings(max_examples=150, deadline=None)
def test_metrics_equal_counts_made_by_hand(case):
    metrics, reasons = detection_metrics(case)
    rows = list(zip(case.labels, case.verdicts, case.scores, strict=True))
    assert metrics["text_accuracy"] == pytest.approx(sum(y == v for y, v, _ in rows) / len(rows))
    by_score = [(y, -1 if math.isnan(p) else int(p >= 0.5)) for y, _, p in rows]
    assert metrics["score_accuracy"] == pytest.approx(sum(y == v for y, v in by_score) / len(rows))
    assert metrics["failure_rate"] == pytest.approx(sum(v == -1 for _, v, _ in rows) / len(rows))
    for number, name in enumerate(("real", "fake")):
        hit = sum(y == v == number for y, v, _ in rows)
        missed = sum(y == number != v for y, v, _ in rows)
        false = sum(v == number != y for y, v, _ in rows)
        assert metrics[f"text_f1_{name}"] == (
            pytest.approx(2 * hit / (2 * hit + missed + false)) if hit + missed + false else None
        )
        assert metrics[f"text_{name}_accuracy"] == (pytest.approx(hit / (hit + missed)) if hit + missed else None)
    reals = [p for y, _, p in rows if y == 0 and not math.isnan(p)]
    fakes = [p for y, _, p in rows if y == 1 and not math.isnan(p)]
    if reals and fakes:
        wins = [1.0 if f > r else 0.5 if f == r else 0.0 for f in fakes for r in reals]
        assert metrics["auroc"] == pytest.approx(np.mean(wins))
        best = [
            sum(f >= t for f in fakes) / len(fakes)
            for t in [*fakes, 2.0]
            if sum(r >= t for r in reals) <= 0.05 * len(reals)
        ]
        assert metrics["tpr_at_5_fpr"] == pytest.approx(max(best))
    scored = [(y, p) for y, _, p in rows if not math.isnan(p)]
    if scored:
        y, p = map(np.asarray, zip(*scored, strict=True))
        assert metrics["brier"] == pytest.approx(sk.brier_score_loss(y, p, pos_label=1))
        assert metrics["ece"] == pytest.approx(slow_ece(y, p))
    assert all((value is None) == (name in reasons) for name, value in metrics.items())


def slow_ece(labels, scores) -> float:
    total = 0.0
    for index in range(15):
        inside = [i for i, p in enumerate(scores) if min(int(p * 15), 14) == index]
        if inside:
            gap = abs(np.mean([scores[i] for i in inside]) - np.mean([labels[i] for i in inside]))
            total += gap * len(inside) / len(labels)
    return total


@given(cases())
@settings(max_examples=150, deadline=None)
def test_metrics_of_draws_with_weight_one_are_the_metrics(case):
    metrics, _ = detection_metrics(case)
    for name, values in weighted_metrics(case, np.ones((2, len(case.labels)))).items():
        wanted = math.nan if metrics[name] is None else metrics[name]
        assert values == pytest.approx([wanted, wanted], nan_ok=True, abs=1e-12), name


@given(cases(), st.randoms())
@settings(max_examples=100, deadline=None)
def test_a_weight_is_a_repetition(case, random):
    weights = np.array([random.randint(0, 3) for _ in case.labels])
    repeated = case[np.repeat(np.arange(len(weights)), weights)]
    metrics, _ = detection_metrics(repeated)
    for name, values in weighted_metrics(case, weights[None].astype(float)).items():
        wanted = math.nan if metrics[name] is None else metrics[name]
        assert values[0] == pytest.approx(wanted, nan_ok=True, abs=1e-12), name


def test_ece_is_that_of_the_calibration_curve():
    rng = np.random.default_rng(0)
    scores = rng.uniform(size=5000)
    labels = (rng.uniform(size=5000) < scores**2).astype(int)
    true, predicted = calibration_curve(labels, scores, n_bins=15)
    counts = np.histogram(scores, bins=15, range=(0, 1))[0]
    metrics, _ = detection_metrics(outcomes(labels, labels, scores))
    assert metrics["ece"] == pytest.approx((np.abs(true - predicted) * counts).sum() / 5000)


@pytest.mark.parametrize(
    ("case", "undefined"),
    [
        (
            outcomes([1], [1], [0.9]),
            {"auroc", "average_precision", "tpr_at_1_fpr", "text_real_accuracy"},
        ),
        (outcomes([0, 1], [-1, -1], [math.nan] * 2), {"auroc", "ece", "nll", "brier", "disagreement"}),
        (outcomes([], [], []), {"text_accuracy", "auroc", "failure_rate", "nll"}),
    ],
    ids=["a set of one", "all failed", "none"],
)
def test_what_is_undefined_is_null_with_its_reason(case, undefined):
    metrics, reasons = detection_metrics(case)
    assert all(metrics[name] is None and reasons[name] for name in undefined)
    assert not any(isinstance(value, float) and math.isnan(value) for value in metrics.values())
    json.dumps([metrics, reasons], allow_nan=False)


def test_answers_without_a_verdict_are_wrong_and_have_their_column():
    metrics, _ = detection_metrics(outcomes([0, 0, 1, 1], [0, -1, -1, 1], [0.1, 0.2, 0.8, 0.9]))
    assert metrics["text_accuracy"] == 0.5 and metrics["score_accuracy"] == 1 and metrics["failure_rate"] == 0.5
    assert metrics["text_f1_fake"] == pytest.approx(2 / 3)
    assert confusion(np.array([0, 0, 1, 1]), np.array([0, -1, -1, 1])) == {
        "real": {"real": 1, "fake": 0, "none": 1},
        "fake": {"real": 0, "fake": 1, "none": 1},
    }


def test_the_bootstrap_is_seeded_stratified_and_covers():
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1], [300, 100])
    scores = np.clip(rng.normal(0.4 + 0.2 * labels, 0.2), 0, 1)
    case = outcomes(labels, scores >= 0.5, scores, np.tile([0, 1], 200))
    draws = bootstrap(case, "all")
    assert all(np.array_equal(draws[name], values) for name, values in bootstrap(case, "all").items())
    assert not np.array_equal(draws["auroc"], bootstrap(case, "all", seed=1)["auroc"])
    assert draws["auroc"].shape == (1000,) and not np.isnan(draws["auroc"]).any()
    metrics, _ = detection_metrics(case)
    low, high = interval(draws["text_accuracy"])
    spread = math.sqrt(metrics["text_accuracy"] * (1 - metrics["text_accuracy"]) / 400)
    assert low < metrics["text_accuracy"] < high
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.2)


def test_macro_is_the_mean_over_the_sets_where_a_metric_is_defined():
    one = outcomes([0, 1], [0, 1], [0.2, 0.9])
    two = outcomes([1, 1], [1, 0], [0.7, 0.1])
    parts = [(detection_metrics(case)[0], bootstrap(case, "x", draws=50)) for case in (one, two)]
    means, intervals = macro(parts)
    assert means["text_accuracy"] == 0.75 and means["auroc"] == 1.0 and means["text_real_accuracy"] == 1.0
    assert intervals["auroc"] == [1.0, 1.0]
