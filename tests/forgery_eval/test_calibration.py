"""Calibration changes how sure scores are, never their order; rates at a limit are read from the whole curve."""

import numpy as np
import pytest
from sklearn import metrics as sk

from forgery_eval.metrics.calibration import Calibration, fit
from forgery_eval.metrics.detection import RANKING_METRICS, Outcomes, detection_metrics, weighted_metrics


def outcomes(labels, scores, uncalibrated=None) -> Outcomes:
    count = len(labels)
    return Outcomes(
        np.asarray(labels), np.full(count, -1), np.asarray(scores, float), np.zeros(count, int), uncalibrated
    )


def saturated(seed: int, scale: float = 20.0) -> tuple[np.ndarray, np.ndarray]:
    """Scores of which nearly all are within 1e-7 of 0 or 1, in the right order for most."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 400)
    logits = 20 + 3.0 * labels + rng.normal(0, 2, 400) * scale / 20
    return labels, 1 / (1 + np.exp(-logits))


@pytest.mark.parametrize("seed", range(3))
def test_calibration_of_saturated_scores_changes_no_ranking(seed):
    labels, scores = saturated(seed)
    calibrated = fit(scores, labels)(scores)
    before, _ = detection_metrics(outcomes(labels, scores))
    after, _ = detection_metrics(outcomes(labels, calibrated, scores))
    assert before["auroc"] > 0.8 and after["nll"] < before["nll"]
    for name in RANKING_METRICS:
        assert after[name] == before[name]
    drawn = weighted_metrics(outcomes(labels, calibrated, scores), np.ones((1, len(labels))))
    for name in RANKING_METRICS:
        assert drawn[name][0] == pytest.approx(before[name])


@pytest.mark.parametrize(("temperature", "bias"), [(0.01, 0.0), (1e-3, 50.0), (1e3, -3.0)])
def test_any_calibration_keeps_the_order_that_images_are_ranked_by(temperature, bias):
    labels, scores = saturated(7)
    after, _ = detection_metrics(outcomes(labels, Calibration(temperature, bias)(scores), scores))
    assert after["auroc"] == sk.roc_auc_score(labels, scores)


def test_scores_of_0_and_1_are_calibrated_to_numbers():
    found = Calibration(2.0, 0.5)(np.array([0.0, 1e-300, 0.5, 1.0, np.nan]))
    assert np.isfinite(found[:4]).all() and np.isnan(found[4]) and (np.diff(found[:4]) >= 0).all()


@pytest.mark.parametrize("reals", [100, 200, 1000])
def test_the_rate_at_a_limit_is_read_from_every_point_of_the_curve(reals):
    """scikit-learn#31635: corners alone leave out collinear points at which the limit would still be met."""
    # A straight line from (0, 0) to (1, 1): its inner points are all collinear.
    scores = np.repeat(np.arange(reals) / reals, 2)
    labels = np.tile([0, 1], reals)
    found, _ = detection_metrics(outcomes(labels, scores))
    assert found["tpr_at_1_fpr"] == pytest.approx(0.01) and found["tpr_at_5_fpr"] == pytest.approx(0.05)
    drawn = weighted_metrics(outcomes(labels, scores), np.ones((1, 2 * reals)))
    assert drawn["tpr_at_1_fpr"][0] == found["tpr_at_1_fpr"] and drawn["tpr_at_5_fpr"][0] == found["tpr_at_5_fpr"]


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_equal_scores_rank_by_chance(value):
    found, _ = detection_metrics(outcomes([0, 1, 1, 0, 1], [value] * 5))
    assert found["auroc"] == 0.5 and found["average_precision"] == pytest.approx(0.6) and found["tpr_at_1_fpr"] == 0
    assert found["ece"] == pytest.approx(abs(value - 0.6))
