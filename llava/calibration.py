"""Temperature and bias that make P(fake) a probability; ``forgery eval --calibrate`` fits them. Imports no torch."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from llava.errors import DataError
from llava.files import read_json, write_json
from llava.report import SCORE_KIND

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
        calibrated: np.ndarray = _sigmoid(logits(np.asarray(scores, float)) / self.temperature + self.bias)
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


def kind_of_source(source: str | None) -> str | None:
    """Returns which score was read at a report's ``score_source``; None where that is unknown."""
    return _KINDS.get(source)


def logits(scores: np.ndarray) -> np.ndarray:
    """Returns log(P / (1 - P)), cut to what is finite."""
    with np.errstate(divide="ignore"):  # 0 and 1 have an infinite one, which is cut
        found: np.ndarray = np.clip(np.log(scores) - np.log1p(-scores), -_LARGEST, _LARGEST)
    return found


def _sigmoid(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # the sigmoid of a number far below 0 is 0
        found: np.ndarray = 1 / (1 + np.exp(-values))
    return found
