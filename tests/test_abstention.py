"""Abstention: the statistics by simulation, the rule, its files, and the detector that applies it."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from forgery_eval.metrics import abstention
from forgery_eval.metrics.abstention import (
    abstention_metrics,
    agreements,
    decide_all,
    fit_band,
    fit_known,
    fit_rule,
    risk_coverage,
)
from llava import ForgeryDetector
from llava.abstention import INCONCLUSIVE, UNLIKE, UNSTABLE, AbstentionRule, KnownImages
from llava.errors import DataError, OptionError
from llava.report import ForgeryReport
from llava.systems.base import AnalyzeOptions

LEVEL = 0.1


def scored(count: int, rng: np.random.Generator, separation: float = 2.5) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and scores whose logits overlap."""
    labels = rng.integers(0, 2, count)
    logits = rng.normal(0, 2, count) + separation * (2 * labels - 1)
    return labels, 1 / (1 + np.exp(-logits))


def test_the_error_among_given_verdicts_holds_on_new_data():
    """200 calibrations: the true error exceeds the level in no more of them than the confidence permits."""
    rng = np.random.default_rng(0)
    fresh_labels, fresh = scored(40_000, rng)
    assert (fresh.round() != fresh_labels).mean() > LEVEL
    too_many, false_alarms, coverage = 0, [], []
    for _ in range(200):
        labels, scores = scored(400, rng)
        low, high = fit_band(scores, labels, LEVEL)
        low, high = -1.0 if low is None else low, 2.0 if high is None else high
        given = (fresh <= low) | (fresh >= high)
        wrong = given & ((fresh >= 0.5) != fresh_labels)
        too_many += bool(given.any() and wrong[given].mean() > LEVEL)
        false_alarms.append((fresh[fresh_labels == 0] >= high).mean())
        coverage.append(given.mean())
    assert too_many <= 200 * (1 - abstention.CONFIDENCE)
    assert np.mean(false_alarms) <= LEVEL
    assert np.mean(coverage) > 0.8


@pytest.mark.parametrize("separation", [0.0, 0.6])
def test_a_model_that_knows_nothing_gives_hardly_a_verdict(separation):
    rng = np.random.default_rng(1)
    fresh_labels, fresh = scored(20_000, rng, separation)
    too_many = 0
    for _ in range(100):
        labels, scores = scored(300, rng, separation)
        low, high = fit_band(scores, labels, LEVEL)
        given = (fresh <= (-1 if low is None else low)) | (fresh >= (2 if high is None else high))
        too_many += bool(given.any() and ((fresh >= 0.5) != fresh_labels)[given].mean() > LEVEL)
    assert too_many <= 10


def test_a_band_of_the_best_empirical_error_would_fail():
    """The wrong way, the widest threshold whose error on the calibration data is low enough, breaks the promise."""
    rng = np.random.default_rng(2)
    fresh_labels, fresh = scored(20_000, rng, 0.6)
    too_many = 0
    for _ in range(100):
        labels, scores = scored(60, rng, 0.6)
        for high in np.sort(scores[scores >= 0.5]):
            given = scores >= high
            if (labels[given] == 0).mean() <= LEVEL:
                chosen = fresh >= high
                too_many += bool(chosen.any() and (fresh_labels[chosen] == 0).mean() > LEVEL)
                break
    assert too_many > 20


@pytest.mark.parametrize("count", [120, 400, 1500])
@pytest.mark.parametrize("separation", [1.0, 1.6])
def test_the_promise_holds_where_only_a_part_can_be_given(count, separation):
    """The true error among all verdicts is far above the level; the sequence must stop in time."""
    rng = np.random.default_rng(count)
    fresh_labels, fresh = scored(30_000, rng, separation)
    assert ((fresh >= 0.5) != fresh_labels).mean() > 1.5 * LEVEL
    too_many = 0
    for _ in range(200):
        labels, scores = scored(count, rng, separation)
        low, high = fit_band(scores, labels, LEVEL)
        given = (fresh <= (-1 if low is None else low)) | (fresh >= (2 if high is None else high))
        too_many += bool(given.any() and ((fresh >= 0.5) != fresh_labels)[given].mean() > LEVEL)
    assert too_many <= 20


def test_the_share_of_a_class_is_bounded_in_expectation_where_it_binds():
    """Few reals among many fakes: errors among given verdicts are rare, and the share of reals must bind."""
    rng = np.random.default_rng(3)

    def draw(reals: int, fakes: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.repeat([0, 1], [reals, fakes])
        logits = np.concatenate([rng.normal(-0.5, 2, reals), rng.normal(3, 1, fakes)])
        return labels, 1 / (1 + np.exp(-logits))

    def share() -> float:
        called = []
        for _ in range(150):
            labels, scores = draw(40, 2000)
            high = fit_band(scores, labels, LEVEL)[1]
            fresh_labels, fresh = draw(400, 10)
            called.append(0.0 if high is None else float((fresh[fresh_labels == 0] >= high).mean()))
        return float(np.mean(called))

    assert share() <= LEVEL
    labels, scores = draw(40, 2000)
    others = scores[labels == 0]
    assert (others >= 0.5).mean() > LEVEL  # without the second bound, 0.5 would do: hardly any given verdict is wrong
    assert abstention.binom.cdf(int((others >= 0.5).sum()), int((scores >= 0.5).sum()), LEVEL) < 1e-3


def test_the_band_does_not_depend_on_the_order():
    labels, scores = scored(500, np.random.default_rng(4))
    turn = np.random.default_rng(5).permutation(500)
    assert fit_band(scores, labels, LEVEL) == fit_band(scores[turn], labels[turn], LEVEL)
    with_gaps = np.append(scores, np.nan)
    assert fit_band(with_gaps, np.append(labels, 0), LEVEL) == fit_band(scores, labels, LEVEL)


def test_perfect_scores_leave_nothing_inconclusive():
    labels = np.repeat([0, 1], 300)
    low, high = fit_band(np.where(labels == 1, 0.99, 0.01), labels, LEVEL)
    assert low < 0.5 and high == 0.5 and np.isclose(low, 0.5)
    rule = AbstentionRule(low, high, LEVEL, 0.9)
    assert not rule.decide(0.5).abstains and not rule.decide(0.4999).abstains


def test_too_few_images_allow_no_verdict():
    assert fit_band([0.9, 0.1, 0.8, 0.2], [1, 0, 1, 0], LEVEL) == (None, None)
    rule = AbstentionRule(None, None, LEVEL, 0.9)
    assert all(rule.decide(score).reason == INCONCLUSIVE for score in (0.0, 0.5, 1.0))


# --- known images


def known_features(count: int, rng: np.random.Generator, width: int = 30) -> np.ndarray:
    mixing = np.random.default_rng(99).normal(size=(width, width)) / np.sqrt(width)
    return rng.normal(size=(count, width)) @ mixing * np.linspace(3, 0.1, width) + 5


def ids(count: int) -> list[str]:
    return [f"image {number}" for number in range(count)]


def test_the_distance_is_that_to_the_third_nearest_known_image():
    """Worked out anew: directions from the covariance's eigenvectors, distances in all dimensions."""
    features = known_features(600, np.random.default_rng(0))
    known = fit_known(features, ids(600), 0.95)
    assert known.points_MK.shape == (300, abstention.DIRECTIONS + 1)
    origins = [
        np.flatnonzero(np.isclose(known.coordinates(features), point, atol=1e-4).all(1)).item()
        for point in known.points_MK
    ]
    kept = features[origins]
    fresh = known_features(50, np.random.default_rng(1)) * 1.7
    standard, fresh_standard = ((values - kept.mean(0)) / kept.std(0) for values in (kept, fresh))
    _, vectors = np.linalg.eigh(np.cov(standard.T))
    largest = vectors[:, -abstention.DIRECTIONS :]

    def place(values):
        left = values - values @ largest @ largest.T
        return np.hstack([values @ largest, np.linalg.norm(left, axis=1, keepdims=True)])

    between = np.linalg.norm(place(fresh_standard)[:, None] - place(standard)[None], axis=2)
    assert np.allclose(known.distances(fresh), np.sort(between, axis=1)[:, 2], rtol=1e-4)


def test_what_lies_between_kinds_of_known_images_is_unknown():
    """Two clouds: an ellipsoid around both would hold their middle."""
    rng = np.random.default_rng(0)
    clouds = np.where(np.arange(600)[:, None] % 2, 4.0, -4.0) * np.ones(8) + rng.normal(size=(600, 8))
    known = fit_known(clouds, ids(600), 0.95)
    assert (known.distances(rng.normal(size=(100, 8))) > known.limit).mean() > 0.95
    assert (known.distances(rng.normal(size=(200, 8)) + 4) <= known.limit).mean() > 0.85


def test_what_is_far_outside_of_the_kept_directions_is_unknown():
    rng = np.random.default_rng(0)
    flat = np.hstack([rng.normal(size=(600, abstention.DIRECTIONS)) * 5, rng.normal(size=(600, 200)) * 0.1])
    known = fit_known(flat, ids(600), 0.95)
    outside = np.hstack([rng.normal(size=(50, abstention.DIRECTIONS)) * 5, rng.normal(size=(50, 200)) * 0.4])
    assert (known.distances(outside) > known.limit).mean() > 0.95


@pytest.mark.parametrize("count", [120, 1200])
def test_known_images_are_let_through_at_the_promised_share(count):
    """On average over calibrations, also where there are few images and many features."""
    passed = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        known = fit_known(known_features(count, rng), ids(count), 0.9)
        passed.append((known.distances(known_features(500, rng)) <= known.limit).mean())
    assert 0.89 <= np.mean(passed) <= 0.945


def test_another_world_is_refused():
    rng = np.random.default_rng(0)
    known = fit_known(known_features(800, rng), ids(800), 0.95)
    elsewhere = rng.normal(size=(300, 30)) * 2 + 5
    assert (known.distances(elsewhere) > known.limit).mean() > 0.95


def test_known_images_do_not_depend_on_the_order():
    features, names = known_features(400, np.random.default_rng(0)), np.array(ids(400))
    turn = np.random.default_rng(1).permutation(400)
    first, second = fit_known(features, list(names), 0.95), fit_known(features[turn], list(names[turn]), 0.95)
    fresh = known_features(40, np.random.default_rng(2))
    assert np.allclose(first.distances(fresh), second.distances(fresh), rtol=1e-6)
    assert first.limit == pytest.approx(second.limit, rel=1e-6)


def test_few_images_and_images_without_features_give_no_statistics():
    features = known_features(60, np.random.default_rng(0))
    assert fit_known(features[:30], ids(30), 0.95) is None
    features[:40] = np.nan
    assert fit_known(features, ids(60), 0.95) is None
    assert fit_known(known_features(60, np.random.default_rng(0)), ids(60), 0.99) is None


def test_equal_features_are_known_and_others_are_not():
    """A tower that gives the same for all known images has no variance; the shape must still be usable."""
    known = fit_known(np.ones((200, 5)), ids(200), 0.9)
    assert np.isfinite(known.distances(np.ones((1, 5))))[0] and known.distances(np.ones((1, 5)))[0] <= known.limit
    assert known.distances(np.full((1, 5), 1.5))[0] > known.limit


# --- the rule and its file


@pytest.fixture
def rule() -> AbstentionRule:
    rng = np.random.default_rng(0)
    labels, scores = scored(500, rng)
    features = known_features(500, rng)
    return fit_rule(ids(500), labels, scores, features, level=0.1, share=0.95, deliveries=3, score="prompt")


def test_a_rule_is_saved_beside_the_calibration_and_comes_back(rule, tmp_path):
    path = tmp_path / "calibration.json"
    path.write_text('{"temperature": 2.0, "bias": 0.5, "score": "prompt"}')
    rule.save(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["calibration.json", "calibration.safetensors"]
    again = AbstentionRule.load(path)
    assert replace(again, known=None) == replace(rule, known=None)
    fresh = known_features(20, np.random.default_rng(7))
    assert np.allclose(again.known.distances(fresh), rule.known.distances(fresh), rtol=1e-4)
    content = json.loads(path.read_text())
    assert content["temperature"] == 2.0 and content["abstention"]["statistics"] == "calibration.safetensors"
    from forgery_eval.metrics.calibration import Calibration

    assert Calibration.load(path).temperature == 2.0
    assert AbstentionRule.beside(tmp_path) is not None and AbstentionRule.beside(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low": 0.9, "high": 0.2}, "low to high"),
        ({"high": 3}, "low to high"),
        ({"deliveries": 99}, "deliveries must be 0 to 8"),
        ({"low": "x"}, "no rule of abstention"),
        ({"error_level": None}, "no rule of abstention"),
    ],
)
def test_a_damaged_rule_is_refused(rule, tmp_path, change, message):
    path = tmp_path / "calibration.json"
    path.write_text("{}")
    rule.save(path)
    content = json.loads(path.read_text())
    content["abstention"] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        AbstentionRule.load(path)


def test_damaged_statistics_are_refused(rule, tmp_path):
    path = tmp_path / "calibration.json"
    path.write_text("{}")
    rule.save(path)
    tensors = load_file(path.with_suffix(".safetensors"))
    save_file({**tensors, "mean": tensors["mean"][:4].copy()}, path.with_suffix(".safetensors"))
    with pytest.raises(DataError, match="no statistics of known images"):
        AbstentionRule.load(path)
    path.with_suffix(".safetensors").unlink()
    with pytest.raises(Exception, match="there is no file"):
        AbstentionRule.load(path)


def test_reasons_come_in_their_order(rule):
    far = rule.known.limit * 2
    sure = (1 + rule.high) / 2
    assert rule.decide(sure, far, 0).reason == UNLIKE
    assert rule.decide(0.5, 0.0, 0).reason == INCONCLUSIVE
    assert rule.decide(sure, 0.0, 2).reason == UNSTABLE and rule.agreeing == 3
    assert rule.decide(sure, 0.0, 3).reason == ""
    assert rule.decide(None, 0.0).reason == "" and rule.decide(sure).reason == ""


# --- measures


def test_measures_of_given_verdicts():
    labels = np.array([0, 0, 0, 1, 1, 1])
    scores = np.array([0.1, 0.9, 0.5, 0.9, 0.2, np.nan])
    reasons = ["", "", INCONCLUSIVE, "", "", INCONCLUSIVE]
    found = abstention_metrics(labels, scores, reasons, scores)
    assert (found["images"], found["given"]) == (6, 4)
    assert found["coverage"] == pytest.approx(4 / 6) and found["error_among_given"] == 0.5
    assert found["reals_called_fake"] == pytest.approx(1 / 3) and found["fakes_called_real"] == pytest.approx(1 / 3)
    assert found["balanced_accuracy_of_given"] == 0.5
    assert found["no_verdict"] == {UNLIKE: 0, INCONCLUSIVE: 2, UNSTABLE: 0}
    nothing = abstention_metrics(labels, scores, [UNLIKE] * 6, scores)
    assert nothing["coverage"] == 0 and nothing["error_among_given"] is None and nothing["ece_of_given"] is None


def test_the_risk_coverage_curve_by_hand():
    labels = np.array([1, 1, 0, 0])
    scores = np.array([0.99, 0.2, 0.9, 0.45])
    curve, area = risk_coverage(labels, scores, ["", "", "", ""])
    # Sureness .49, .40, .30, .05: right, wrong (0.9), wrong (0.2), right.
    assert curve == [[0.25, 0.0], [0.5, 0.5], [0.75, pytest.approx(2 / 3)], [1.0, 0.5]]
    assert area == pytest.approx((0 + 0.5 + 2 / 3 + 0.5) / 4)
    unlike_last = risk_coverage(labels, scores, ["", UNLIKE, UNLIKE, ""])[0]
    assert unlike_last[1] == [0.5, 0.0]


def test_equal_scores_enter_together():
    labels, scores = np.array([1, 0] * 20), np.full(40, 0.9)
    first = risk_coverage(labels, scores, [""] * 40)
    second = risk_coverage(labels[::-1], scores, [""] * 40)
    assert first == second and first[1] == pytest.approx(0.5)
    assert risk_coverage(np.array([]), np.array([]), []) == ([], None)


def test_agreements_are_counted():
    scores = np.array([0.9, 0.1, 0.6])
    runs = [np.array([0.8, 0.7, np.nan]), np.array([0.6, 0.2, 0.4])]
    assert agreements(scores, runs).tolist() == [2, 1, 0]
    assert agreements(scores, []) is None
    rule = AbstentionRule(0.5, 0.5, 0.1, 0.9, deliveries=2)
    assert decide_all(rule, scores, None, agreements(scores, runs)) == ["", UNSTABLE, UNSTABLE]


# --- the detector


class GreySystem:
    """P(fake) is the mean brightness; features are mean and deviation of the pixels."""

    name, notice, answer_format, options = "Grey", "", None, AnalyzeOptions

    def prepare(self, image):
        return np.asarray(image, np.float32) / 255

    def batch_size(self, options):
        return 4

    def describe(self, options):
        return {}

    def analyze_batch(self, prepared, options):
        return [
            ForgeryReport(
                label="fake" if pixels.mean() >= 0.5 else "real",
                fake_probability=float(pixels.mean()),
                score_source="detector",
                stages={"caption": "A grey area."},
                text="A grey area.",
                system=self.name,
            )
            for pixels in prepared
        ]

    def image_features(self, prepared):
        return np.array([[pixels.mean(), pixels.std()] for pixels in prepared], np.float32)


def grey(level: int, spread: float = 0.0) -> Image.Image:
    pixels = np.random.default_rng(0).normal(level, spread, (24, 24, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


_GREYS = np.stack([np.linspace(0, 1, 21), np.zeros(21), np.zeros(21)], axis=1)
KNOWN = KnownImages(np.zeros(2), np.ones(2), np.eye(2), _GREYS, 0.12)


def test_the_detector_gives_no_verdict_where_the_rule_says_so():
    rule = AbstentionRule(0.3, 0.7, 0.1, 0.9, "detector", KNOWN)
    detector = ForgeryDetector(GreySystem(), rule)
    images = [grey(230), grey(128), grey(20), grey(200, 90)]
    fake, unsure, real, unlike = detector.analyze_many(images, batch_size=3)
    assert (fake.label, fake.abstained, real.label) == ("fake", False, "real")
    assert unsure.abstained and unsure.abstained_because.startswith("inconclusive")
    assert unlike.abstained and unlike.abstained_because.startswith("unlike anything this model knows")
    for report in (unsure, unlike):
        assert (report.label, report.fake_probability, report.caption, report.text) == (None, None, "", "")
        assert report.details["withheld"]["text"] == "A grey area."
    assert detector.analyze(images[1]).abstained_because == unsure.abstained_because
    assert json.dumps(unlike.to_dict())
    assert not any(report.abstained for report in ForgeryDetector(GreySystem()).analyze_many(images))


def test_a_band_for_another_score_is_not_applied():
    rule = AbstentionRule(0.3, 0.7, 0.1, 0.9, "answer", KNOWN)
    report = ForgeryDetector(GreySystem(), rule).analyze(grey(128))
    assert not report.abstained and "for the 'answer' score" in report.details["abstention"]["band"]


def test_stability_is_asked_of_light_deliveries():
    rule = AbstentionRule(0.5, 0.5, 0.1, 0.9, "detector", None, deliveries=5)
    steady = ForgeryDetector(GreySystem(), rule).analyze(grey(200))
    assert not steady.abstained and steady.details["abstention"]["agreeing"] == "5 of 5"

    class Fickle(GreySystem):
        """Calls everything fake that is not just the image as it was."""

        def analyze_batch(self, prepared, options):
            reports = super().analyze_batch(prepared, options)
            return [
                report if pixels.std() == 0 and pixels.shape == (24, 24, 3) else replace(report, fake_probability=0.9)
                for report, pixels in zip(reports, prepared, strict=True)
            ]

    report = ForgeryDetector(Fickle(), rule).analyze(grey(20))
    assert report.abstained and "of 5 agree, 4 are needed" in report.abstained_because


def test_features_come_in_order_and_a_broken_image_has_none(tmp_path):
    grey(40).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    detector = ForgeryDetector(GreySystem())
    rows = list(detector.features_many([tmp_path / "a.png", tmp_path / "b.png", grey(80)], batch_size=2))
    assert rows[1] is None and rows[0][0] == pytest.approx(40 / 255) and rows[2][0] == pytest.approx(80 / 255)


def test_a_system_without_features_says_so():
    class Plain:
        name = "Plain"

    detector = ForgeryDetector(Plain())
    assert not detector.has_features
    with pytest.raises(OptionError, match="Plain gives no features"):
        next(detector.features_many([grey(1)]))


def test_a_system_without_features_gets_band_and_stability_only():
    labels, scores = scored(400, np.random.default_rng(0))
    rule = fit_rule(ids(400), labels, scores, None, level=0.1, share=0.95, deliveries=2, score="detector")
    assert rule.known is None and rule.high is not None and rule.deliveries == 2
