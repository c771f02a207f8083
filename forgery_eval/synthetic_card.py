"""Writes a model's card from its evaluation on MMFR-Synthetic: what it reaches where, and what it does not claim.

    python -m forgery_eval.synthetic_card --dataset_path D --result_folder R --out CARD.md

``R`` is what ``eval.py --calibrate`` wrote of ``D``. Beside the card the same metrics are written as JSON. Accuracies
are balanced: the mean of that on reals and that on fakes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from forgery_eval.demo.card import calibration_metrics, card, card_metrics, read_rows, robustness_metrics
from llava.cli import OptionParser, run_cli
from llava.errors import DataError, OptionError
from llava.files import atomic_write, file_errors, read_json, write_json


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = OptionParser(prog="python -m forgery_eval.synthetic_card", description=__doc__)
    parser.add_argument("--dataset_path", type=Path, required=True, help="MMFR-Synthetic")
    parser.add_argument("--result_folder", type=Path, required=True, help="what eval.py wrote of it")
    parser.add_argument("--about", type=Path, help="Markdown that stands before the results")
    parser.add_argument("--sample_dataset", type=Path, help="a small data set, whose metrics go into the JSON as well")
    parser.add_argument("--sample_results", type=Path, help="what eval.py wrote of that")
    parser.add_argument(
        "--robustness",
        type=named_results,
        action="append",
        default=[],
        metavar="TITLE=FOLDER",
        help="what eval.py --perturb wrote with a rule of abstention; several",
    )
    parser.add_argument("--out", type=Path, required=True, help="the card; the JSON stands beside it")
    return parser


def named_results(text: str) -> tuple[str, Path]:
    """Reads ``TITLE=FOLDER``.

    Raises:
        argparse.ArgumentTypeError: It is not of that form.
    """
    title, found, folder = text.partition("=")
    if not (title and found and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form TITLE=FOLDER")
    return title, Path(folder)


def write_card(options: argparse.Namespace) -> None:
    """Writes the card and its JSON.

    Raises:
        UserError: Options, data or results do not fit together, or a file cannot be read or written.
    """
    if (options.sample_dataset is None) != (options.sample_results is None):
        raise OptionError("--sample_dataset and --sample_results belong together")
    found = card_metrics(read_rows(options.dataset_path, options.result_folder))
    file = options.result_folder / "metrics.json"
    try:
        found["calibration"] = calibration_metrics(read_json(file))
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"{file} is not what eval.py writes now; run eval.py --rescore, or evaluate again") from None
    found["robustness"] = {
        title: robustness_metrics(folder / "metrics.json", read_json(folder / "metrics.json"))
        for title, folder in options.robustness
    }
    about = "# Model card"
    if options.about:
        with file_errors(options.about, "read"):
            about = options.about.read_text(encoding="utf-8")
    atomic_write(options.out, card(found, about))
    if options.sample_dataset is not None:
        found["sample"] = card_metrics(read_rows(options.sample_dataset, options.sample_results))
    write_json(options.out.with_suffix(".json"), found)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    options = build_parser().parse_args(argv)
    return run_cli(lambda: write_card(options))


if __name__ == "__main__":
    sys.exit(main())
