"""Tables of several evaluations of the same images, in Markdown: clean figures with intervals, and each delivery.

To be called as ``python scripts/baselines_table.py "small CNN=results/cnn" "embedded model=results/embedded"``.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.cli import OptionParser, run_cli
from llava.errors import DataError
from llava.files import read_json

Metrics = Mapping[str, Any]
METRICS_FILE = "metrics.json"
CLEAN = {
    "auroc": "AUROC",
    "score_balanced_accuracy": "balanced accuracy at 0.5",
    "tpr_at_5_fpr": "TPR at 5 % FPR",
    "ece": "ECE",
}


def _named(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=folder")
    return name, Path(folder)


def read(folders: Mapping[str, Path]) -> dict[str, Metrics]:
    """Reads the metrics of each result folder.

    Raises:
        DataError: One has none, or they are not of equally many images.
    """
    found = {}
    for name, folder in folders.items():
        if not (folder / METRICS_FILE).is_file():
            raise DataError(f"{folder} has no {METRICS_FILE}; evaluate {name} into it first")
        found[name] = read_json(folder / METRICS_FILE)
    counts = {name: metrics["detection"]["all"]["metrics"]["images"] for name, metrics in found.items()}
    if len(set(counts.values())) != 1:
        raise DataError(f"these evaluations are not of the same images: {counts}")
    return found


def clean_table(runs: Mapping[str, Metrics]) -> list[str]:
    """Returns the lines of the clean figures, each with its 95 % interval."""
    images = next(iter(runs.values()))["detection"]["all"]["metrics"]["images"]
    lines = [f"| {images} images, as they are | {' | '.join(CLEAN.values())} |", "|---" * (len(CLEAN) + 1) + "|"]
    for name, metrics in runs.items():
        whole = metrics["detection"]["all"]
        cells = [_cell(whole["metrics"][key], whole["intervals"].get(key)) for key in CLEAN]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _cell(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" + (f" ({interval[0]:.3f}–{interval[1]:.3f})" if interval else "")


def grid_table(runs: Mapping[str, Metrics]) -> list[str]:
    """Returns the lines of the steps: AUROC with its interval, and the share of real images called fake at 0.5."""
    conditions = {name: _conditions(metrics) for name, metrics in runs.items()}
    steps = list(dict.fromkeys(step for found in conditions.values() for step in found))
    lines = [f"| step | {' | '.join(runs)} |", "|---" * (len(runs) + 1) + "|"]
    for step in steps:
        cells = []
        for found in conditions.values():
            if step not in found:
                cells.append("–")
                continue
            values, intervals = found[step]["metrics"], found[step]["intervals"]
            reals = values["score_real_accuracy"]
            wrong = "–" if reals is None else f"{100 * (1 - reals):.0f} %"
            cells.append(f"{_cell(values['auroc'], intervals.get('auroc'))}; {wrong}")
        lines.append(f"| {step} | {' | '.join(cells)} |")
    return lines


def _conditions(metrics: Metrics) -> dict[str, Metrics]:
    found = metrics.get("robustness", {}).get("conditions", [])
    return {f"{condition['step']} {condition['strength']}".strip(): condition for condition in found}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables."""
    parser = OptionParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=_named, metavar="NAME=FOLDER", help="result folders of eval.py")
    options = parser.parse_args(argv)

    def run() -> None:
        runs = read(dict(options.runs))
        print("\n".join(clean_table(runs)))
        if any(_conditions(metrics) for metrics in runs.values()):
            print("\nAUROC with its interval; share of the real images called fake at 0.5.\n")
            print("\n".join(grid_table(runs)))

    return run_cli(run)


if __name__ == "__main__":
    sys.exit(main())
