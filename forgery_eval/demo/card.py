"""A model's card from its evaluation on MMFR-Synthetic: what it reaches where, and what it does not claim.

Accuracies are balanced: the mean of that on reals and that on fakes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from forgery_eval.answers import attribute_names
from forgery_eval.pages.base import render
from forgery_eval.store import Prediction, read_run
from llava.errors import DataError
from llava.files import read_jsonl
from llava.labels import FAKE, LABELS, Label

STRENGTH_EDGES = (0.2, 0.4, 0.6, 0.8, 1.0)
ROLES = {
    "seen": "generators seen in training",
    "unseen-known-mechanism": "unseen, known mechanism",
    "unseen-own-mechanism": "unseen, own mechanism",
}
READINGS = ("text", "score")
"""The two verdicts on an image: that of the answer, and that of P(fake)."""
GIVEN = ("images", "coverage", "error_among_given", "balanced_accuracy_of_given", "reals_called_fake", "ece_of_given")
"""Measures of the verdicts that are given, beside the number of images."""
Array = np.ndarray
_THRESHOLD = 0.5
_DATA = "evaluation_sets/"


@dataclass(frozen=True)
class Row:
    """One image: what was predicted of it, and the manifest's line."""

    prediction: Prediction
    truth: dict[str, Any]

    @property
    def fake(self) -> bool:
        """Whether it is a fake."""
        return self.truth["label"] == LABELS[FAKE]

    def right_by(self, reading: str) -> bool:
        """Whether it was labelled rightly by ``text``, the answer's verdict, or by ``score``, P(fake)."""
        if reading == "text":
            return self.prediction.verdict == self.truth["label"]
        probability = self.prediction.fake_probability
        return probability is not None and (probability >= _THRESHOLD) == self.fake


def read_rows(dataset: Path, results: Path) -> list[Row]:
    """Joins the newest run of a result folder with the data set's manifest.

    Raises:
        DataError: There is no run or no manifest, or an image is in one of them only.
        FileError: A file cannot be read.
    """
    manifest, runs = dataset / "manifest.jsonl", sorted((results / "predictions").glob("*.jsonl"))
    if not manifest.is_file():
        raise DataError(f"{dataset} has no manifest.jsonl, so it is no MMFR-Synthetic")
    if not runs:
        raise DataError(f"{results} has no predictions; run forgery_eval/eval.py first")
    _, predictions = read_run(max(runs, key=lambda file: file.stat().st_mtime))
    truths = {entry["image"].removeprefix(_DATA): entry for entry in _read_manifest(manifest)}
    if set(truths) != set(predictions):
        odd = sorted(set(truths) ^ set(predictions))
        raise DataError(f"{results} is not of {dataset}: {len(odd)} images are in one only, such as {odd[0]}")
    return [Row(predictions[name], truth) for name, truth in truths.items()]


def _read_manifest(file: Path) -> list[dict[str, Any]]:
    """The evaluation images' lines."""
    try:
        return [entry for _, entry in read_jsonl(file) if entry["split"] == "evaluation"]
    except KeyError:
        raise DataError(f"{file} is no manifest of MMFR-Synthetic") from None


def card_metrics(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns every metric of the card, as plain JSON values."""
    answers = [row.prediction.text for row in rows if row.prediction.text]
    return {
        "images": len(rows),
        **{reading: accuracies(rows, reading) for reading in READINGS},
        "without_verdict": sum(row.prediction.verdict is None for row in rows) / len(rows),
        "distinct_answers": len(set(answers)) / max(1, len(answers)),
        "agreement": sum(_agrees(row.prediction) for row in rows) / len(rows),
        "attributes": {label: attribute_metrics(rows, label) for label in LABELS},
    }


def accuracies(rows: Sequence[Row], reading: str) -> dict[str, Any]:
    """Returns balanced accuracies by the generator's role, by strength and by generator."""
    right = np.array([row.right_by(reading) for row in rows])
    fake = np.array([row.fake for row in rows])
    role = np.array([row.truth["split_role"] for row in rows])
    sets = np.array([row.truth["set"] for row in rows])
    strength = np.array([row.truth["strength"] or 0.0 for row in rows])

    def balanced(fakes: Array, reals: Array) -> float | None:
        parts = [right[fake & fakes], right[~fake & reals]]
        return round(float(np.mean([part.mean() for part in parts])), 4) if all(map(len, parts)) else None

    every = np.ones_like(fake)
    bins = {f"{low:g}-{high:g}": (strength >= low) & (strength < high) for low, high in pairwise(STRENGTH_EDGES)}
    return {
        "all": balanced(every, every),
        "reals": round(float(right[~fake].mean()), 4),
        "role": {name: balanced(role == name, role == name) for name in ROLES},
        "full_strength": {name: balanced((role == name) & (strength == 1), role == name) for name in ROLES},
        "strength": {name: balanced(inside, every) for name, inside in {**bins, "1": strength == 1}.items()},
        "generator": {str(name): balanced(sets == name, every) for name in sorted(set(sets.tolist()))},
    }


def attribute_metrics(rows: Sequence[Row], label: Label) -> dict[str, dict[str, Any]]:
    """Returns how well the answers name the attributes of one class, among that class's own images.

    ``claimed``: it is named more precisely than by naming it always, and the balanced accuracy of naming it is above
    one half by more than two standard errors. Naming it always, or never, reaches one half.
    """
    own = [row for row in rows if row.truth["label"] == label]
    found = {}
    for name in attribute_names().get(label, ()):
        true = [bool(row.truth["attributes"].get(name)) for row in own]
        named = [name in row.prediction.attributes for row in own]
        hits = sum(t and n for t, n in zip(true, named, strict=True))
        present, absent, predicted = sum(true), len(own) - sum(true), sum(named)
        recall = hits / present if present else None
        precision = hits / predicted if predicted else None
        claimed = False
        if precision is not None and recall is not None and absent:
            rejected = 1 - (predicted - hits) / absent
            # Standard error of the mean of two independent shares (binomial variances add).
            error = (recall * (1 - recall) / present + rejected * (1 - rejected) / absent) ** 0.5 / 2
            claimed = precision > present / len(own) and (recall + rejected) / 2 - 2 * error > 1 / 2
        found[name] = {
            "share": round(present / max(1, len(own)), 4),
            "precision": None if precision is None else round(precision, 4),
            "recall": None if recall is None else round(recall, 4),
            "claimed": claimed,
        }
    return found


def _agrees(prediction: Prediction) -> bool:
    if prediction.verdict is None or prediction.fake_probability is None:
        return False
    return LABELS[prediction.fake_probability >= _THRESHOLD] == prediction.verdict


def calibration_metrics(metrics: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Returns the calibration error of both scores, before and after calibration, from ``metrics.json``."""

    def of(values: Any, calibration: Any) -> dict[str, float | None]:
        return {"before": calibration["before"]["metrics"]["ece"], "after": values["ece"]} if calibration else {}

    answer = metrics.get("answer_score") or {}
    found = {
        "reported": of(metrics["detection"]["all"]["metrics"], metrics["calibration"]),
        "answer": of(answer.get("metrics"), answer.get("calibration")),
    }
    return {name: values for name, values in found.items() if values}


def robustness_metrics(file: Path, metrics: Any) -> list[dict[str, Any]]:
    """Returns what verdicts are given on clean images and under each perturbation, from ``metrics.json``.

    Raises:
        DataError: No rule of abstention was applied, or there were no perturbations.
    """
    try:
        clean, conditions = metrics["abstention"]["all"], metrics["robustness"]["conditions"]
        named = [("clean", clean), *((f"{c['step']} {c['strength']}".strip(), c["abstention"]) for c in conditions)]
        return [{"condition": name, **{key: values[key] for key in GIVEN}} for name, values in named]
    except (KeyError, TypeError):
        raise DataError(
            f"{file} holds no verdicts under perturbations; run eval.py --perturb on a model with a calibration.json"
        ) from None


def card(found: Mapping[str, Any], about: str) -> str:
    """Returns the card as Markdown.

    Args:
        found: What ``card_metrics`` and ``calibration_metrics`` gave.
        about: Markdown before the results: what the model is, its data, seed, command and time.
    """
    text, score = found["text"], found["score"]
    roles = [(title, text["role"][role], score["role"][role]) for role, title in ROLES.items()]
    roles += [
        (f"full strength: {title}", text["full_strength"][role], score["full_strength"][role])
        for role, title in ROLES.items()
    ]
    roles.append(("reals alone (accuracy)", text["reals"], score["reals"]))
    titles = (("reported", "P(fake) as reported"), ("answer", "P(fake) at the verdict of the own answer"))
    calibration = found.get("calibration", {})
    return render(
        "card.md",
        about=about.strip(),
        found=found,
        percent=percent,
        tables={
            "fakes": roles,
            **{
                key: [(name, text[key][name], score[key][name]) for name in text[key]]
                for key in ("strength", "generator")
            },
        },
        calibration=[(title, calibration[name]) for name, title in titles if name in calibration],
    )


def percent(value: float | None) -> str:
    """Returns a share in per cent."""
    return "–" if value is None else f"{100 * value:.1f}"
