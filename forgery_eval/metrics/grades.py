"""Grades that a judge gave explanations: means with intervals. Imports no torch."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from forgery_eval.metrics.detection import DRAWS
from forgery_eval.metrics.ratios import means, ratio_part

OVERALL = "overall"
NOTHING = "no explanation was graded"


def grade_metrics(
    rows: Sequence[tuple[str, int, str, Mapping[str, int] | None]],
    rubric: Sequence[str],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Any]:
    """Computes the mean of each grade, and of their mean in each explanation.

    Args:
        rows: Of each image: set, label, explanation, and its grades or None.
        rubric: Names of the grades.
        draws: Number of bootstrap draws.
        seed: Of the draws.

    Returns:
        ``sets`` and ``all``, each part with ``metrics``, ``intervals`` and ``undefined``.
    """

    def part(name: str, chosen: Sequence[tuple[str, int, str, Mapping[str, int] | None]]) -> dict[str, Any]:
        graded = [(own, label, grades) for own, label, _, grades in chosen if grades is not None]
        columns = {key: np.array([grades[key] for *_, grades in graded], float) for key in rubric}
        columns = {OVERALL: sum(columns.values(), np.zeros(len(graded))) / len(columns), **columns}
        strata = [(own, label) for own, label, _ in graded]
        sums = means(columns)
        found = ratio_part(f"grades {name}", strata, sums, dict.fromkeys(sums, NOTHING), draws=draws, seed=seed)
        explained = sum(bool(text) for _, _, text, _ in chosen)
        counts = {"images": len(chosen), "explained": explained, "graded": len(graded)}
        return {**found, "metrics": {**counts, "not_graded": explained - len(graded), **found["metrics"]}}

    sets = dict.fromkeys(own for own, *_ in rows)
    return {
        "sets": {name: part(f"set {name}", [row for row in rows if row[0] == name]) for name in sets},
        "all": part("all", rows),
    }
