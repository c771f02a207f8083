"""Temperature and bias that make P(fake) a probability: fitted on some ids, reported on the others."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from llava.errors import DataError
from llava.files import read_json, write_json
from llava.report import SCORE_KIND

SHARE = 5
"""One id of so many is for fitting."""
_LARGEST = 40.0
"""Logits stay within this, somewhat more than that of the largest double below 1: those of 0 and 1 are finite."""
_KINDS: dict[str | None, str] = {str(source): kind for source, kind in SCORE_KIND.items()}
"""Which score is read where."""


@dataclass(frozen=True)
class Calibration:
    """Calibrated P(fake) = sigmoid(logit(P) / temperature + bias).

    Attributes:
        temperature: Above 0; more than 1 makes scores less sure.
        bias: Above 0 moves scores towards fake.
        score: The score that it is for: ``answer``, ``prompt`` or ``detector``; None where that was not known.
    """

    temperature: float
    bias: float
    score: str | None = None

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Returns the calibrated probabilities; NaN stays NaN."""
        # The logit is shifted and scaled, so that the order of scores stays as it is.
        calibrated: np.ndarray = expit(_logits(np.asarray(scores, float)) / self.temperature + self.bias)
        return calibrated

    def save(self, path: Path) -> None:
        """Writes it, atomically."""
        write_json(path, asdict(self), indent=None)

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Reads what ``save`` wrote.

        Raises:
            DataError: The file holds something else.
            FileError: It cannot be read.
        """
        content = read_json(path)
        try:
            found = cls(float(content["temperature"]), float(content["bias"]), content.get("score"))
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path} holds no calibration") from None
        if not (np.isfinite([found.temperature, found.bias]).all() and found.temperature > 0):
            raise DataError(f"{path}: the temperature must be above 0 and the bias finite")
        if found.score not in (None, *_KINDS.values()):
            raise DataError(f"{path}: unknown score {found.score!r}; known: {', '.join(sorted(set(_KINDS.values())))}")
        return found


def is_for_fitting(sample_id: str) -> bool:
    """Whether an id falls in the calibration split; that depends on nothing else."""
    return int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:8], "big") % SHARE == 0


def kind_of_score(sources: Iterable[str | None]) -> str | None:
    """Returns which score was read, ``answer``, ``prompt`` or ``detector``; None where it is unknown, or several.

    Args:
        sources: ``score_source`` of each report.
    """
    kinds = {_KINDS.get(source) for source in sources}
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
    model = LogisticRegression(C=1000.0).fit(_logits(values)[:, None], truth)
    # The fit gives sigmoid(slope * logit + bias); the temperature is the slope's inverse.
    slope, bias = float(model.coef_[0, 0]), float(model.intercept_[0])
    if slope <= 0:
        raise DataError("on the calibration split a higher score does not mean fake, so no temperature fits")
    return Calibration(1 / slope, bias, score)


def _logits(scores: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):  # 0 and 1 have an infinite one, which is cut
        logits: np.ndarray = np.clip(np.log(scores) - np.log1p(-scores), -_LARGEST, _LARGEST)
    return logits
