"""When no verdict is given: an image unlike all known ones, an inconclusive score, a score that does not last.

A calibration file may hold such a rule under ``abstention``; the statistics of known images lie in a safetensors file
beside it. ``forgery eval --calibrate`` fits it; the detector applies it. Imports no torch.

Shape suffixes: N images, M known images, D features, K directions.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from llava.errors import DataError, UserError
from llava.files import atomic_write, file_errors, read_json, write_json
from llava.image_operations import Step

KEY = "abstention"
CALIBRATION = "calibration.json"
"""Name of the calibration file in a model's folder; a rule in it is applied unless that is switched off."""
UNLIKE, INCONCLUSIVE, UNSTABLE = "unlike", "inconclusive", "unstable"
REASONS = {
    UNLIKE: "unlike anything this model knows",
    INCONCLUSIVE: "inconclusive",
    UNSTABLE: "the verdict does not last when the image is sent on",
}
LIGHT_DELIVERIES: tuple[Step, ...] = (
    Step("jpeg", {"quality": 90}),
    Step("crop", {"left": 0.03, "top": 0.02, "right": 0.01, "bottom": 0.03}),
    Step("resize", {"factor": 0.9, "kernel": "bicubic"}),
    Step("webp", {"quality": 90}),
    Step("noise", {"sigma": 1.5, "seed": 5}),
    Step("jpeg", {"quality": 75}),
    Step("sharpen", {"sigma": 0.8, "amount": 0.2}),
    Step("rotate", {"degrees": 1.0, "kernel": "bicubic"}),
)
"""Light steps that an image may go through without losing its verdict; the first K are used."""
_AGREEING_SHARE = 0.8
NEAREST = 3
"""Which of the nearest known images an image's distance is measured to; single odd ones among them count little."""
_STORED = {"mean": "mean_D", "spread": "spread_D", "directions": "directions_KD", "points": "points_MK"}


@dataclass(frozen=True)
class KnownImages:
    """Known images, as points in a small space; how far an image is from its nearest ones says whether it is known.

    Features are standardised and laid along the principal directions; what is left of them outside of these is one
    coordinate more, its length. No shape of the known images is assumed: those of several kinds form several clouds,
    and an ellipsoid around all (a Mahalanobis distance) holds much that lies between them.

    Attributes:
        mean_D: Mean of the features.
        spread_D: Their deviations, above 0.
        directions_KD: Orthonormal directions of the standardised features.
        points_MK: Known images, coordinates along the directions, and the length of what is left: ``[M, K + 1]``.
        limit: Largest distance of an image that counts as known.
    """

    mean_D: np.ndarray
    spread_D: np.ndarray
    directions_KD: np.ndarray
    points_MK: np.ndarray
    limit: float

    def coordinates(self, features_ND: np.ndarray) -> np.ndarray:
        """Returns each image's place among the known images, ``[N, K + 1]``."""
        standard_ND = (np.asarray(features_ND, np.float64) - self.mean_D) / self.spread_D
        along_NK = standard_ND @ self.directions_KD.astype(np.float64).T
        left_N = np.sqrt(np.maximum((standard_ND**2).sum(axis=1) - (along_NK**2).sum(axis=1), 0))
        return np.column_stack([along_NK, left_N])

    def distances(self, features_ND: np.ndarray) -> np.ndarray:
        """Returns each image's distance to its NEAREST-th nearest known image, shape (N,); NaN where a feature is."""
        places_NK = self.coordinates(features_ND)
        points_MK = self.points_MK.astype(np.float64)
        nearest = min(NEAREST, len(points_MK)) - 1
        squared = [np.partition(((points_MK - place) ** 2).sum(axis=1), nearest)[nearest] for place in places_NK]
        return np.sqrt(np.array(squared, np.float64))


@dataclass(frozen=True)
class Decision:
    """Whether a verdict is given.

    Attributes:
        reason: ``unlike``, ``inconclusive``, ``unstable``, or empty if the verdict is given.
        words: The same for reading, with numbers.
    """

    reason: str = ""
    words: str = ""

    @property
    def abstains(self) -> bool:
        """Whether no verdict is given."""
        return bool(self.reason)


@dataclass(frozen=True)
class AbstentionRule:
    """What a verdict needs to be given.

    The band is of P(fake) as the model gives it, before temperature and bias.

    Attributes:
        low: An image is called real up to here; None if the data allow no such verdict.
        high: An image is called fake from here on; None likewise.
        error_level: Error among given verdicts that the band was chosen for.
        confidence: With which that holds, over the draw of the calibration data.
        score: Kind of score that the band is for, see ``llava.report.SCORE_KIND``; None where that was not known.
        known: Statistics of known images; None for a system that has no features.
        known_share: Share of known images that the limit lets through.
        deliveries: Light deliveries of each image whose scores must agree; 0 for none.
    """

    low: float | None
    high: float | None
    error_level: float
    confidence: float
    score: str | None = None
    known: KnownImages | None = None
    known_share: float = 0.95
    deliveries: int = 0

    @property
    def agreeing(self) -> int:
        """How many of the light deliveries must agree with the image."""
        return math.ceil(_AGREEING_SHARE * self.deliveries)

    def decide(self, score: float | None, distance: float | None = None, agree: int | None = None) -> Decision:
        """Decides on an image.

        Args:
            score: P(fake); None where there is none, and then the band says nothing.
            distance: From ``KnownImages.distances``; None if it was not computed.
            agree: How many light deliveries agree; None if none were made.
        """
        if self.known is not None and distance is not None and distance > self.known.limit:
            return Decision(UNLIKE, f"{REASONS[UNLIKE]} (distance {distance:.3g}, known up to {self.known.limit:.3g})")
        if score is not None and not self.gives(score):
            return Decision(INCONCLUSIVE, f"{REASONS[INCONCLUSIVE]} ({self._band_in_words})")
        if agree is not None and agree < self.agreeing:
            return Decision(
                UNSTABLE, f"{REASONS[UNSTABLE]} ({agree} of {self.deliveries} agree, {self.agreeing} are needed)"
            )
        return Decision()

    def gives(self, score: float) -> bool:
        """Whether a score is outside the band in which nothing is said."""
        return (self.low is not None and score <= self.low) or (self.high is not None and score >= self.high)

    @property
    def _band_in_words(self) -> str:
        real = "never" if self.low is None else f"up to {self.low:.4g}"
        fake = "never" if self.high is None else f"from {self.high:.4g}"
        return f"called real {real}, fake {fake}"

    def to_json(self) -> dict[str, Any]:
        """Returns all but the statistics as plain JSON values."""
        names = ("low", "high", "error_level", "confidence", "score", "known_share", "deliveries")
        limit = None if self.known is None else self.known.limit
        return {**{name: getattr(self, name) for name in names}, "known_limit": limit}

    # --- files

    def save(self, path: Path) -> None:
        """Adds itself to a calibration file that is there already; statistics are written first, beside it."""
        values = self.to_json()
        if self.known is not None:
            values["statistics"] = path.with_suffix(".safetensors").name
            atomic_write(path.with_suffix(".safetensors"), _pack(self.known))
        write_json(path, {**read_json(path), KEY: values}, indent=None)

    @classmethod
    def load(cls, path: Path) -> "AbstentionRule | None":
        """Reads the rule of a calibration file; None if it holds none.

        Raises:
            DataError: The file holds no such rule, or its statistics are damaged.
            FileError: It or its statistics cannot be read.
        """
        content = read_json(path)
        found = content.get(KEY) if isinstance(content, dict) else None
        if found is None:
            return None
        try:
            known = None
            if found.get("statistics") is not None:
                known = _unpack(path.parent / Path(found["statistics"]).name, float(found["known_limit"]))
            rule = cls(
                low=_optional(found["low"]),
                high=_optional(found["high"]),
                error_level=float(found["error_level"]),
                confidence=float(found["confidence"]),
                score=found.get("score"),
                known=known,
                known_share=float(found["known_share"]),
                deliveries=int(found["deliveries"]),
            )
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError):
            raise DataError(f"{path}: its part {KEY!r} is no rule of abstention") from None
        bounds = [bound for bound in (rule.low, rule.high) if bound is not None]
        if not all(0 <= bound <= 1 for bound in bounds) or bounds != sorted(bounds):
            raise DataError(f"{path}: the band must go from low to high within 0 and 1")
        if not 0 <= rule.deliveries <= len(LIGHT_DELIVERIES):
            raise DataError(f"{path}: deliveries must be 0 to {len(LIGHT_DELIVERIES)}, not {rule.deliveries}")
        return rule

    @classmethod
    def beside(cls, folder: str | Path) -> "AbstentionRule | None":
        """Reads the rule in a model's folder; None if there is none."""
        path = Path(folder) / CALIBRATION
        return cls.load(path) if path.is_file() else None


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)


def _pack(known: KnownImages) -> bytes:
    arrays = {name: getattr(known, field) for name, field in _STORED.items()}
    return save({name: np.ascontiguousarray(values, np.float32) for name, values in arrays.items()})


def _unpack(path: Path, limit: float) -> KnownImages:
    with file_errors(path, "read"):
        data = path.read_bytes()
        tensors: Mapping[str, np.ndarray] = load(data)
    known = None
    if tensors.keys() >= _STORED.keys():
        known = KnownImages(**{field: tensors[name] for name, field in _STORED.items()}, limit=limit)
    if known is None or not _fits(known):
        raise DataError(f"{path} holds no statistics of known images")
    return known


def _fits(known: KnownImages) -> bool:
    width = known.mean_D.shape
    if len(width) != 1 or known.spread_D.shape != width or known.directions_KD.shape[1:] != width:
        return False
    if known.points_MK.ndim != 2 or not len(known.points_MK):
        return False
    return known.points_MK.shape[1] == len(known.directions_KD) + 1 and bool((known.spread_D > 0).all())
