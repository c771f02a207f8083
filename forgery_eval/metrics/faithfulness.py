"""Faithfulness: does P(fake) fall more when the named region is covered than when another one is. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from forgery_eval.metrics.detection import DRAWS
from forgery_eval.metrics.ratios import means, ratio_part

NOTHING = "no image that is called fake has a score, and a mask or map that leaves room to cover as much elsewhere"


@dataclass(frozen=True)
class CoveredScores:
    """P(fake) of one image as it is, and covered.

    Attributes:
        id: The sample's.
        set: Its evaluation set.
        area: Share of the image that is covered.
        before: P(fake) of the image as it is.
        named: With the named region covered.
        random: With each of the random ones covered.
    """

    id: str
    set: str
    area: float
    before: float
    named: float
    random: tuple[float, ...]

    @property
    def fall_named(self) -> float:
        """By how much P(fake) falls when the named region is covered."""
        return self.before - self.named

    @property
    def fall_random(self) -> float:
        """By how much it falls in the mean over the random regions."""
        return self.before - float(np.mean(self.random))

    @property
    def difference(self) -> float:
        """By how much more it falls for the named region."""
        return self.fall_named - self.fall_random


def faithfulness_metrics(images: Sequence[CoveredScores], *, draws: int = DRAWS, seed: int = 0) -> dict[str, Any]:
    """Computes the mean falls, of each set and of all images.

    Returns:
        ``sets`` and ``all``, each part with ``metrics``, ``intervals`` (95 %, bootstrap over images; the difference is
        paired) and ``undefined``; and ``images``, what was measured of each.
    """

    def part(name: str, chosen: Sequence[CoveredScores]) -> dict[str, Any]:
        columns = {
            "fall_named": [one.fall_named for one in chosen],
            "fall_random": [one.fall_random for one in chosen],
            "fall_difference": [one.difference for one in chosen],
            "named_falls_more": [float(one.difference > 0) for one in chosen],
            "area": [one.area for one in chosen],
        }
        sums = means({key: np.array(values, float) for key, values in columns.items()})
        # The images were drawn from all sets together; within a set of one or two a bootstrap would hardly vary.
        strata = [("all", 0)] * len(chosen)
        reasons = dict.fromkeys(sums, NOTHING)
        found = ratio_part(f"faithfulness {name}", strata, sums, reasons, draws=draws, seed=seed)
        return {**found, "metrics": {"images": len(chosen), **found["metrics"]}}

    sets = dict.fromkeys(one.set for one in images)
    return {
        "sets": {name: part(f"set {name}", [one for one in images if one.set == name]) for name in sets},
        "all": part("all", images),
        "images": [
            {"id": one.id, "before": one.before, "named": one.named, "random": list(one.random), "area": one.area}
            for one in images
        ],
    }
