"""Which verdicts of an evaluation are given: what the rule needs, its fit, and its measures. Imports no torch."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from forgery_eval.benchmarks import Sample
from forgery_eval.metrics.abstention import about_rule, abstention_metrics, agreements, decide_all, fit_rule
from forgery_eval.metrics.calibration import SHARE, is_for_fitting
from forgery_eval.metrics.scoring import Scored
from forgery_eval.store import Prediction
from llava.abstention import REASONS, AbstentionRule
from llava.cli import note


@dataclass(frozen=True)
class Evidence:
    """What is known of some images beside their predictions, in their order.

    Attributes:
        features: Tower features, shape (N, D), NaN where there are none; None for a system without them.
        delivered: Predictions after each light delivery, one list a delivery.
        predictions: Of perturbed images; empty for the clean ones.
    """

    features: np.ndarray | None = None
    delivered: Sequence[Sequence[Prediction]] = ()
    predictions: Sequence[Prediction] = ()

    def of(self, indices: Sequence[int]) -> "Evidence":
        """Returns that of some of the images."""
        features = None if self.features is None else self.features[list(indices)]
        delivered = [[run[index] for index in indices] for run in self.delivered]
        return Evidence(features, delivered, [self.predictions[index] for index in indices] if self.predictions else ())


@dataclass(frozen=True)
class FitSettings:
    """How a rule is fitted.

    Attributes:
        level: Error among given verdicts that is permitted.
        share: Share of known images that are let through.
        deliveries: Light deliveries of each image.
        perturbed: Whether each image is taken under one of the conditions, drawn from its id, instead of clean.
        split: Share of the ids that it is fitted on.
    """

    level: float
    share: float
    deliveries: int
    perturbed: bool = False
    split: float = SHARE


@dataclass(frozen=True)
class Judgement:
    """By which rule verdicts are given in an evaluation.

    Attributes:
        rule: A rule from elsewhere, or None.
        fit: How to fit one on the calibration split; None to fit none.
        evidence: On the clean images.
    """

    rule: AbstentionRule | None = None
    fit: FitSettings | None = None
    evidence: Evidence = field(default_factory=Evidence)

    def fitted(
        self,
        samples: Sequence[Sample],
        predictions: Sequence[Prediction],
        score: str | None,
        perturbed: Sequence[Evidence] = (),
    ) -> "Judgement":
        """Returns the judgement with a rule fitted on the calibration split, if one is to be fitted.

        Args:
            samples: All samples; those of the split are chosen by their ids.
            predictions: One a sample.
            score: Kind of score that they have.
            perturbed: Predictions and features of the same samples under each perturbation.
        """
        if self.fit is None:
            return self
        conditions = [Evidence(self.evidence.features, predictions=predictions)]
        conditions += perturbed if self.fit.perturbed else []
        indices = [index for index, sample in enumerate(samples) if is_for_fitting(sample.id, self.fit.split)]
        drawn = [conditions[_draw(samples[index].id, len(conditions))] for index in indices]
        chosen = [condition.predictions[index] for condition, index in zip(drawn, indices, strict=True)]
        features = None
        if all(condition.features is not None for condition in conditions):
            rows = [c.features[index] for c, index in zip(drawn, indices, strict=True) if c.features is not None]
            features = np.array(rows)
        rule = fit_rule(
            [prediction.id for prediction in chosen],
            [samples[index].label for index in indices],
            raw_scores(chosen).tolist(),
            features,
            level=self.fit.level,
            share=self.fit.share,
            deliveries=self.fit.deliveries,
            score=score,
        )
        self._warn(rule, self.fit)
        return replace(self, rule=rule)

    def _warn(self, rule: AbstentionRule, fit: FitSettings) -> None:
        """Says what a fitted rule cannot do."""
        if rule.low is None or rule.high is None:
            missing = " and ".join(name for name, bound in (("real", rule.low), ("fake", rule.high)) if bound is None)
            note(
                f"on these calibration data no verdict {missing} can be given with an error of at most "
                f"{fit.level:g}: calibrate on more images or permit more (--error-level), or --no-abstain"
            )
        if self.evidence.features is not None and rule.known is None:
            note("too few calibration images to say which images are known; only the band of scores is used")

    def measured(self, rows: Sequence[Scored], indices: Sequence[int]) -> dict[str, Any]:
        """Measures the verdicts that the rule gives on some of the images.

        Args:
            rows: Their scored samples.
            indices: Their numbers among all images.
        """
        assert self.rule is not None
        found = given_verdicts(self.rule, rows, self.evidence.of(indices))
        return {**found, "fitted_here": self.fit is not None}


def _draw(sample_id: str, count: int) -> int:
    """Draws one of some conditions for an image, from nothing but its id."""
    digest = hashlib.sha256(f"condition {sample_id}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % count


def raw_scores(predictions: Iterable[Prediction]) -> np.ndarray:
    """Returns P(fake) as the model gives it, NaN where there is none."""
    return np.array([np.nan if p.fake_probability is None else p.fake_probability for p in predictions], float)


def given_verdicts(rule: AbstentionRule, rows: Sequence[Scored], evidence: Evidence) -> dict[str, Any]:
    """Measures the verdicts that a rule gives, of all rows, and of each set and group; names those it withholds.

    Args:
        rule: The rule.
        rows: Scored samples.
        evidence: On the same images.
    """
    scores = raw_scores(row.prediction for row in rows)
    reasons = decide_all(
        rule, scores, evidence.features, agreements(scores, [raw_scores(run) for run in evidence.delivered])
    )
    labels = np.array([row.sample.label for row in rows], int)
    calibrated = np.array([row.score for row in rows], float)

    def measured(indices: Sequence[int]) -> dict[str, Any]:
        own = list(indices)
        return abstention_metrics(labels[own], scores[own], [reasons[index] for index in own], calibrated[own])

    def parts(names: Sequence[str | None]) -> dict[str, Any]:
        found: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            if name is not None:
                found.setdefault(name, []).append(index)
        return {name: _without_curve(measured(indices)) for name, indices in found.items()}

    groups = dict.fromkeys(name for row in rows for name in row.sample.groups)
    return {
        "rule": about_rule(rule),
        "withheld": {
            name: [row.sample.id for row, reason in zip(rows, reasons, strict=True) if reason == name]
            for name in REASONS
        },
        "all": measured(range(len(rows))),
        "sets": parts([row.sample.set for row in rows]),
        "groups": {name: parts([row.sample.groups.get(name) for row in rows]) for name in groups},
    }


def _without_curve(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if name != "risk_coverage"}


def given_under(rule: AbstentionRule, rows: Sequence[Scored], evidence: Evidence) -> dict[str, Any]:
    """Measures the verdicts that a rule gives on perturbed images, without the curve."""
    found = given_verdicts(rule, rows, evidence)
    return {**_without_curve(found["all"]), "withheld": found["withheld"]}
