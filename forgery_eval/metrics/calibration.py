"""Temperature and bias that make P(fake) a probability: fitted on some ids, reported on the others."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression

from llava.calibration import Calibration, kind_of_source, logits
from llava.errors import DataError

__all__ = ["Calibration", "fit", "is_for_fitting", "kind_of_score"]

SHARE = 0.2
"""Of the ids, for fitting, where nothing else is said."""


def is_for_fitting(sample_id: str, share: float = SHARE) -> bool:
    """Whether an id falls in the calibration split; a larger split holds every smaller one."""
    number = int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:8], "big")
    return (number % 5 + number // 5 % 10_000 / 10_000) / 5 < share


def kind_of_score(sources: Iterable[str | None]) -> str | None:
    """Returns which score was read, ``answer``, ``prompt`` or ``detector``; None where it is unknown, or several.

    Args:
        sources: ``score_source`` of each report.
    """
    kinds = {kind_of_source(source) for source in sources}
    return kinds.pop() if len(kinds) == 1 else None


def fit(scores: Sequence[float], labels: Sequence[int], score: str | None = None) -> Calibration:
    """Fits temperature and bias by maximum likelihood; a weak prior keeps them finite where classes do not overlap.

    Args:
        scores: P(fake), NaN where there is none.
        labels: 0 real, 1 fake.
        score: What ``kind_of_score`` says.

    Raises:
        DataError: There are no images of both classes, or higher scores do not mean fake.
    """
    values, truth = np.asarray(scores, dtype=float), np.asarray(labels, dtype=int)
    known = ~np.isnan(values)
    values, truth = values[known], truth[known]
    if len(set(truth.tolist())) < 2:
        raise DataError(
            f"the calibration split has {len(values)} scored images and not both classes: calibrate on more images"
        )
    model = LogisticRegression(C=1000.0).fit(logits(values)[:, None], truth)
    # The fit gives sigmoid(slope * logit + bias); the temperature is the slope's inverse.
    slope, bias = float(model.coef_[0, 0]), float(model.intercept_[0])
    if slope <= 0:
        raise DataError("on the calibration split a higher score does not mean fake, so no temperature fits")
    return Calibration(1 / slope, bias, score)
