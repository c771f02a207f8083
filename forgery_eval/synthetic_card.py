"""Writes a model's card from its evaluation on MMFR-Synthetic: what it reaches where, and what it does not claim.

    python -m forgery_eval.synthetic_card --dataset_path D --result_folder R --out CARD.md

``R`` is what ``eval.py --calibrate`` wrote of ``D``. Beside the card the same figures are written as JSON. Accuracies
are balanced: the mean of that on reals and that on fakes.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from forgery_eval.predictions import Prediction, read_run
from llava.cli import OptionParser, run_cli
from llava.files import atomic_write
from llava.labels import LABELS, Label
from llava.systems.fakereasoning.answer import ATTRIBUTES

STRENGTH_EDGES = (0.2, 0.4, 0.6, 0.8, 1.0)
ROLES = {
    "seen": "generators seen in training",
    "unseen-known-mechanism": "unseen, known mechanism",
    "unseen-own-mechanism": "unseen, own mechanism",
}
Array = np.ndarray
_CLAIM = (
    "An attribute is claimed where naming it is better than chance by more than two standard errors and more precise "
    "than naming it always; where it is not claimed, the answer's words about it mean nothing."
)
_THRESHOLD = 0.5
_DATA = "evaluation_sets/"


@dataclass(frozen=True)
class Row:
    """One image: what was said of it, and the manifest's line."""

    said: Prediction
    truth: dict[str, Any]

    @property
    def fake(self) -> bool:
        """Whether it is a fake."""
        return self.truth["label"] == LABELS[1]

    def right_by(self, reading: str) -> bool:
        """Whether it was judged rightly by ``text``, the answer's verdict, or by ``score``, P(fake)."""
        if reading == "text":
            return self.said.verdict == self.truth["label"]
        chance = self.said.fake_probability
        return chance is not None and (chance >= _THRESHOLD) == self.fake


def read_rows(dataset: Path, results: Path) -> list[Row]:
    """Joins the newest run of a result folder with the data set's manifest.

    Raises:
        ValueError: There is no run or no manifest, or an image is in one of them only.
    """
    manifest, runs = dataset / "manifest.jsonl", sorted((results / "predictions").glob("*.jsonl"))
    if not manifest.is_file():
        raise ValueError(f"{dataset} has no manifest.jsonl, so it is no MMFR-Synthetic")
    if not runs:
        raise ValueError(f"{results} has no predictions; run forgery_eval/eval.py first")
    _, predictions = read_run(max(runs, key=lambda file: file.stat().st_mtime))
    entries = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    truths = {e["image"].removeprefix(_DATA): e for e in entries if e["split"] == "evaluation"}
    if set(truths) != set(predictions):
        odd = sorted(set(truths) ^ set(predictions))
        raise ValueError(f"{results} is not of {dataset}: {len(odd)} images are in one only, such as {odd[0]}")
    return [Row(predictions[name], truth) for name, truth in truths.items()]


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns every figure of the card, as plain JSON values."""
    answers = [row.said.text for row in rows if row.said.text]
    return {
        "images": len(rows),
        **{reading: accuracies(rows, reading) for reading in ("text", "score")},
        "without_verdict": sum(row.said.verdict is None for row in rows) / len(rows),
        "distinct_answers": len(set(answers)) / max(1, len(answers)),
        "agreement": sum(_agrees(row.said) for row in rows) / len(rows),
        "attributes": {label: attribute_figures(rows, label) for label in LABELS},
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


def attribute_figures(rows: Sequence[Row], label: Label) -> dict[str, dict[str, Any]]:
    """Returns how well the answers name the attributes of one class, among that class's own images.

    ``claimed``: it is named more precisely than by naming it always, and the balanced accuracy of naming it is above
    one half by more than two standard errors. Naming it always, or never, reaches one half.
    """
    own = [row for row in rows if row.truth["label"] == label]
    found = {}
    for name in ATTRIBUTES[label]:
        true = [bool(row.truth["attributes"].get(name)) for row in own]
        named = [name in row.said.attributes for row in own]
        both = sum(t and n for t, n in zip(true, named, strict=True))
        present, absent, said = sum(true), len(own) - sum(true), sum(named)
        recall = both / present if present else None
        precision = both / said if said else None
        claimed = False
        if precision is not None and recall is not None and absent:
            rejected = 1 - (said - both) / absent
            error = (recall * (1 - recall) / present + rejected * (1 - rejected) / absent) ** 0.5 / 2
            claimed = precision > present / len(own) and (recall + rejected) / 2 - 2 * error > 1 / 2
        found[name] = {
            "share": round(present / max(1, len(own)), 4),
            "precision": None if precision is None else round(precision, 4),
            "recall": None if recall is None else round(recall, 4),
            "claimed": claimed,
        }
    return found


def _agrees(said: Prediction) -> bool:
    if said.verdict is None or said.fake_probability is None:
        return False
    return LABELS[said.fake_probability >= _THRESHOLD] == said.verdict


def calibration_figures(metrics: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Returns the calibration error of both scores, before and after calibration, from ``metrics.json``."""

    def of(figures: Any, calibration: Any) -> dict[str, float | None]:
        return {"before": calibration["before"]["figures"]["ece"], "after": figures["ece"]} if calibration else {}

    answer = metrics.get("answer_score") or {}
    found = {
        "reported": of(metrics["detection"]["all"]["figures"], metrics["calibration"]),
        "answer": of(answer.get("figures"), answer.get("calibration")),
    }
    return {name: values for name, values in found.items() if values}


def card(found: dict[str, Any], about: str) -> str:
    """Returns the card as Markdown.

    Args:
        found: What ``figures`` and ``calibration_figures`` gave.
        about: What stands before the results: what the model is, its data, seed, command and time.
    """
    text, score = found["text"], found["score"]

    def table(head: str, pairs: Sequence[tuple[str, Any, Any]]) -> str:
        lines = [f"| {head} | by the answer | by P(fake) |", "|---|---|---|"]
        return "\n".join([*lines, *(f"| {name} | {_percent(a)} | {_percent(b)} |" for name, a, b in pairs)])

    roles = [(title, text["role"][role], score["role"][role]) for role, title in ROLES.items()]
    roles += [
        (f"full strength: {title}", text["full_strength"][role], score["full_strength"][role])
        for role, title in ROLES.items()
    ]
    roles.append(("reals alone (accuracy)", text["reals"], score["reals"]))
    strengths = [(name, text["strength"][name], score["strength"][name]) for name in text["strength"]]
    generators = [(name, text["generator"][name], score["generator"][name]) for name in text["generator"]]
    attributes = ["| attribute | share of its class | precision | recall | claimed |", "|---|---|---|---|---|"]
    for label in LABELS:
        for name, values in found["attributes"][label].items():
            cells = " | ".join(_percent(values[key]) for key in ("share", "precision", "recall"))
            attributes.append(f"| {name} ({label}) | {cells} | {'yes' if values['claimed'] else 'no'} |")
    calibration = ["| score | ECE as it is | ECE calibrated |", "|---|---|---|"]
    for name, title in (("reported", "P(fake) as reported"), ("answer", "P(fake) at the verdict of the own answer")):
        if name in found.get("calibration", {}):
            values = found["calibration"][name]
            calibration.append(f"| {title} | {_percent(values['before'])} | {_percent(values['after'])} |")
    return (
        "\n\n".join(
            [
                about.strip(),
                f"## Results\n\nBalanced accuracy in per cent on {found['images']:,} images that no training saw.",
                table("fakes", roles),
                table("strength", strengths),
                table("generator", generators),
                f"## Answers\n\n{_answers(found)}",
                f"Attributes named in the answers, among the images of their own class, in per cent. {_CLAIM}",
                "\n".join(attributes),
                "## Calibration\n\nExpected calibration error in per cent (15 bins).",
                "\n".join(calibration),
            ]
        )
        + "\n"
    )


def _answers(found: dict[str, Any]) -> str:
    without, distinct, agreeing = (_percent(found[key]) for key in ("without_verdict", "distinct_answers", "agreement"))
    return (
        f"{without} % have no verdict; {distinct} % of the answers are distinct; in {agreeing} % the answer and "
        "P(fake) say the same."
    )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = OptionParser(prog="python -m forgery_eval.synthetic_card", description=__doc__)
    parser.add_argument("--dataset_path", type=Path, required=True, help="MMFR-Synthetic")
    parser.add_argument("--result_folder", type=Path, required=True, help="what eval.py wrote of it")
    parser.add_argument("--about", type=Path, help="Markdown that stands before the results")
    parser.add_argument("--sample_dataset", type=Path, help="a small data set, whose figures go into the JSON as well")
    parser.add_argument("--sample_results", type=Path, help="what eval.py wrote of that")
    parser.add_argument("--out", type=Path, required=True, help="the card; the JSON stands beside it")
    return parser


def write_card(options: argparse.Namespace) -> None:
    """Writes the card and its JSON."""
    if (options.sample_dataset is None) != (options.sample_results is None):
        raise ValueError("--sample_dataset and --sample_results belong together")
    found = figures(read_rows(options.dataset_path, options.result_folder))
    metrics = json.loads((options.result_folder / "metrics.json").read_text(encoding="utf-8"))
    found["calibration"] = calibration_figures(metrics)
    about = options.about.read_text(encoding="utf-8") if options.about else "# Model card"
    atomic_write(options.out, card(found, about))
    if options.sample_dataset is not None:
        found["sample"] = figures(read_rows(options.sample_dataset, options.sample_results))
    atomic_write(options.out.with_suffix(".json"), json.dumps(found, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    options = build_parser().parse_args(argv)
    return run_cli(lambda: write_card(options))


if __name__ == "__main__":
    sys.exit(main())
