"""Questions that ask which of several images is generated, or is not, answered by the images' scores."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from forgery_eval.metrics.reasoning import mean_with_interval
from forgery_eval.metrics.scoring import Scored
from llava.labels import FAKE


def choice_metrics(rows: Sequence[Scored], *, draws: int, seed: int) -> dict[str, Any]:
    """Returns the accuracy of choices between images: the right image must have the one extreme score.

    A tie, or an image without a score, makes a choice wrong. A choice between images that are not all among the rows,
    as in an evaluation of a part, does not count.

    Args:
        rows: The images.
        draws: Bootstrap draws of the interval.
        seed: Of the draws.
    """
    scores = {row.sample.id: row.uncalibrated for row in rows}
    right = [
        _is_right(row, [scores[name] for name in others])
        for row in rows
        for others in row.sample.chosen_from
        if all(name in scores for name in others)
    ]
    if not right:
        undefined = {"accuracy": "no choice has all its images here"}
        return {"metrics": {"choices": 0, "accuracy": None}, "intervals": {}, "undefined": undefined}
    if all(np.isnan(score) for score in scores.values()):
        undefined = {"accuracy": "no image has a score"}
        return {"metrics": {"choices": len(right), "accuracy": None}, "intervals": {}, "undefined": undefined}
    found: Mapping[str, Any] = mean_with_interval([float(each) for each in right], draws, seed)
    return {
        "metrics": {"choices": len(right), "accuracy": found["mean"]},
        "intervals": {"accuracy": found["interval"]},
        "undefined": {},
    }


def _is_right(row: Scored, others: Sequence[float]) -> bool:
    """Comparisons with NaN are false."""
    own = row.uncalibrated
    return all(own > other if row.sample.label == FAKE else own < other for other in others)
