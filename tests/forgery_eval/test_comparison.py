"""Statistics of runs on the same images: hand-made values, and what a comparison that is not paired would give."""

import math
import zlib

import numpy as np
import pytest
from sklearn import metrics as sk

from forgery_eval.metrics.comparison import Judged, compare_runs, disagreements, holm, kappa, mcnemar, shown_metrics
from forgery_eval.metrics.detection import NO_ANSWER, Outcomes, draw_weights

NONE = NO_ANSWER


def judged(name: str, scores, verdicts=None, **overlaps) -> Judged:
    scores = np.array(scores, float)
    by_score = np.where(np.isnan(scores), NONE, scores >= 0.5).astype(int)
    verdicts = by_score if verdicts is None else np.array(verdicts)
    return Judged(name, verdicts, scores, scores, {key: np.array(values, float) for key, values in overlaps.items()})


def alike(count: int = 400) -> tuple[np.ndarray, Judged, Judged]:
    """Two runs that say nearly the same of each image, and are often wrong together."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, count)
    shared = labels - 0.5 + rng.normal(size=count)
    one, other = (1 / (1 + np.exp(-(shared + rng.normal(0, 0.1, count)))) for _ in range(2))
    return labels, judged("one", one), judged("other", other)


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        (0, 0, 1.0),
        (3, 3, 1.0),
        (0, 5, 2 / 32),
        (6, 1, 2 * (1 + 7) / 128),
        (2, 10, 2 * (1 + 12 + 66) / 4096),
        (10, 2, 2 * (1 + 12 + 66) / 4096),
    ],
)
def test_mcnemar_is_the_exact_binomial_test(first, second, p):
    assert mcnemar(first, second) == pytest.approx(p)
    total = sum(math.comb(first + second, k) for k in range(min(first, second) + 1))
    assert mcnemar(first, second) == pytest.approx(min(1, 2 * total / 2 ** (first + second)))


def test_holm_multiplies_and_never_falls():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.01, None, 0.04]) == [0.02, None, 0.04]
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_kappa_is_agreement_beyond_chance():
    first = np.repeat([1, 1, 0, 0], [20, 5, 10, 15])
    second = np.repeat([1, 0, 1, 0], [20, 5, 10, 15])
    assert kappa(first, second) == pytest.approx(0.4)  # (0.7 - 0.5) / (1 - 0.5)
    assert kappa(first, second) == pytest.approx(sk.cohen_kappa_score(first, second))
    assert kappa(first, first) == 1 and kappa(first, 1 - first) < 0
    assert kappa(np.ones(3, int), np.ones(3, int)) is None and kappa(first[:0], second[:0]) is None


def test_every_draw_takes_the_same_images_for_both():
    labels, one, other = alike(60)
    found = compare_runs(labels, [one, other], draws=100, seed=5)["pairs"][0]
    # The same draws, each written out as a list of images for scikit-learn.
    rng = np.random.default_rng([5, zlib.crc32(b"comparison")])
    outcomes = Outcomes(labels, labels, labels, np.zeros(len(labels), int))
    weights = np.concatenate(list(draw_weights(outcomes, 100, rng))).astype(int)
    drawn = [np.repeat(np.arange(len(labels)), row) for row in weights]
    assert all((labels[images] == 0).sum() == (labels == 0).sum() for images in drawn)
    functions = {"accuracy": sk.accuracy_score, "balanced_accuracy": sk.balanced_accuracy_score}
    for name, function in functions.items():
        gaps = [function(labels[k], other.verdicts[k]) - function(labels[k], one.verdicts[k]) for k in drawn]
        assert found["intervals"][name] == pytest.approx(np.percentile(gaps, (2.5, 97.5)))
    gaps = [sk.roc_auc_score(labels[k], other.scores[k]) - sk.roc_auc_score(labels[k], one.scores[k]) for k in drawn]
    assert found["intervals"]["auroc"] == pytest.approx(np.percentile(gaps, (2.5, 97.5)))
    assert found["metrics"]["auroc"] == pytest.approx(
        sk.roc_auc_score(labels, other.scores) - sk.roc_auc_score(labels, one.scores)
    )


def test_a_comparison_that_is_not_paired_would_be_far_wider():
    labels, one, other = alike()
    paired = compare_runs(labels, [one, other], draws=400)["pairs"][0]["intervals"]
    # Each run drawn for itself: the spread of the difference is that of two independent values.
    apart = [compare_runs(labels, [run, run], draws=400, seed=seed)["runs"][0] for seed, run in enumerate((one, other))]
    for name in ("accuracy", "balanced_accuracy", "auroc"):
        unpaired = math.hypot(*(high - low for low, high in (run["intervals"][name] for run in apart)))
        low, high = paired[name]
        assert high - low < unpaired / 3
    same = compare_runs(labels, [one, one], draws=50)["pairs"][0]
    assert all(bounds == [0, 0] for bounds in same["intervals"].values()) and same["p"] == same["kappa"] == 1


def test_a_seed_is_repeated_and_another_one_draws_otherwise():
    labels, one, other = alike(80)
    found = [compare_runs(labels, [one, other], draws=60, seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert found[0]["pairs"][0]["metrics"] == found[2]["pairs"][0]["metrics"]


def test_verdicts_are_compared_where_both_give_one():
    labels = np.array([0, 0, 0, 1, 1, 1])
    one = judged("one", [0.1, 0.9, 0.2, 0.9, 0.8, 0.1], [0, 1, NONE, 1, 1, 0])
    other = judged("other", [0.2, 0.3, 0.1, 0.7, math.nan, 0.9], [0, 0, 1, NONE, NONE, 1])
    found = compare_runs(labels, [one, other], draws=20)
    first, second = found["runs"]
    assert (first["with_verdict"], second["with_verdict"]) == (5, 4)
    assert first["metrics"]["accuracy"] == pytest.approx(3 / 5)
    assert first["metrics"]["strict_balanced_accuracy"] == pytest.approx((1 / 3 + 2 / 3) / 2)
    (pair,) = found["pairs"]
    # Both give a verdict on the images 0, 1 and 5; the first is right on one, the second on all three.
    assert pair["images"] == 3 and pair["metrics"]["accuracy"] == pytest.approx(2 / 3)
    assert pair["metrics"]["balanced_accuracy"] == pytest.approx(1 - 1 / 4)
    assert (pair["only_first_right"], pair["only_second_right"], pair["p"]) == (0, 2, 0.5)
    assert pair["agreement"] == pytest.approx(1 / 3)
    assert pair["verdict_of_first_only"] == 2 and pair["verdict_of_second_only"] == 1 and not pair["verdict_of_neither"]
    # The fifth image has no score from the second run, so both are ranked without it.
    assert pair["scored"] == 5 and pair["metrics"]["auroc"] == pytest.approx(1 - 3 / 6)


def test_what_no_run_can_have_is_left_out_and_the_rest_says_why():
    labels = np.array([0, 0, 1])
    blank = [math.nan] * 3
    found = compare_runs(labels, [judged("a", blank, [0, 1, 1]), judged("b", blank, [0, 0, NONE])], draws=10)
    assert set(found["runs"][0]["metrics"]) == {"accuracy", "balanced_accuracy", "strict_balanced_accuracy"}
    assert found["runs"][1]["undefined"] == {"balanced_accuracy": "both classes are needed"}
    assert found["pairs"][0]["metrics"]["balanced_accuracy"] is None
    whole = compare_runs(labels, [judged("a", [0.1, 0.2, 0.9]), judged("b", [0.1, 0.7, 0.9])], draws=10)
    assert list(shown_metrics(whole["runs"])) == ["balanced_accuracy", "accuracy", "auroc"]
    apart = [judged("a", blank, [0, NONE, NONE]), judged("b", blank, [NONE, 0, 1])]
    (pair,) = compare_runs(labels, apart, draws=10)["pairs"]
    assert pair["p"] is pair["p_holm"] is pair["agreement"] is pair["kappa"] is None and pair["images"] == 0
    assert pair["undefined"]["accuracy"] == "no image has a verdict from both"


def test_masks_are_compared_on_the_images_that_both_have():
    labels = np.array([0, 1, 1, 1, 1])
    nan = math.nan
    one = judged("one", [0.1, 0.9, 0.9, 0.9, 0.9], iou=[nan, 0.2, 0.4, 0.6, nan])
    other = judged("other", [0.1, 0.9, 0.9, 0.9, 0.9], iou=[nan, 0.5, 0.5, nan, 1.0])
    without = judged("without", [0.1, 0.9, 0.9, 0.9, 0.9])
    found = compare_runs(labels, [one, other, without], draws=200)
    assert [run["metrics"]["iou"] for run in found["runs"]] == [pytest.approx(0.4), pytest.approx(2 / 3), None]
    first, second, third = found["pairs"]
    assert first["metrics"]["iou"] == pytest.approx(0.2) and first["intervals"]["iou"] == pytest.approx([0.1, 0.3])
    assert second["metrics"]["iou"] is third["metrics"]["iou"] is None
    assert second["undefined"]["iou"] == "no image has a known mask from both"


def test_holm_counts_every_pair():
    labels, one, other = alike(100)
    wrong = judged("wrong", 1 - one.scores)
    pairs = compare_runs(labels, [one, other, wrong], draws=10)["pairs"]
    assert [(pair["first"], pair["second"]) for pair in pairs] == [
        ("one", "other"),
        ("one", "wrong"),
        ("other", "wrong"),
    ]
    assert [pair["p_holm"] for pair in pairs] == holm([pair["p"] for pair in pairs])
    assert min(pair["p_holm"] for pair in pairs) == pytest.approx(3 * min(pair["p"] for pair in pairs))


def test_the_surest_disagreements_come_first():
    labels = np.array([1, 1, 0, 1, 0, 1])
    one = judged("one", [0.9, 0.6, 0.1, 0.2, 0.3, 0.9], [1, 1, 0, 0, 0, 1])
    other = judged("other", [0.4, 0.1, 0.9, 0.9, 0.1, math.nan], [0, 0, 1, 1, 0, 0])
    only_one, only_other = disagreements(labels, one, other)
    # Mean probability of their own verdicts: image 0 0.75, 1 0.75, 2 0.9, 5 0.7 (one half where there is no score).
    assert only_one.tolist() == [2, 0, 1, 5] and only_other.tolist() == [3]
