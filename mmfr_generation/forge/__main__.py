"""Command line: ``python -m mmfr_generation.forge --images FOLDER --out D``."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.cli import DefaultsHelpFormatter, OptionParser, inform, positive_int, run_cli, share
from llava.errors import OptionError
from llava.files import file_errors

try:
    from mmfr_generation.forge.job import ForgeJob
    from mmfr_generation.forge.photographs import find_photographs, leave_out, split_photographs
    from mmfr_generation.forge.sample import METHODS, MIN_SIDE
    from mmfr_generation.synthetic.delivery import DELIVERIES
    from mmfr_generation.synthetic.sample import MAX_SIZE
    from mmfr_generation.synthetic.writer import write_dataset
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed; it comes with: pip install 'fakereasoning[synthetic]'")

_CROPS = 40
"""Training images for each photograph, unless their number is given."""


def build_parser() -> OptionParser:
    """Returns the options of this command."""
    parser = OptionParser(
        prog="python -m mmfr_generation.forge",
        description="Turn a folder of photographs into a data set of real and forged crops in MMFR's layout.",
        formatter_class=DefaultsHelpFormatter,
    )
    parser.add_argument("--images", type=Path, required=True, help="folder of photographs, with its subfolders")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to; an interrupted run is resumed")
    parser.add_argument("--train", type=_count, help=f"images of the training tree ({_CROPS} for each photograph)")
    parser.add_argument(
        "--eval", type=_count, default=20, help=f"real images, and as many fakes, of each of {len(METHODS)} sets"
    )
    parser.add_argument(
        "--eval-share", type=share, default=0.25, help="share of the photographs that are for evaluation"
    )
    parser.add_argument(
        "--without",
        type=Path,
        metavar="DATASET",
        help="forged from the same photographs: leave out those that it evaluates on",
    )
    parser.add_argument(
        "--size", type=int, default=256, help=f"longest side of a crop in pixels, {MIN_SIDE} to {MAX_SIZE}"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides every image")
    parser.add_argument(
        "--delivery",
        choices=DELIVERIES,
        default="mixed",
        help="none: as made; mixed: half of the images resized, recompressed, blurred, framed, ...",
    )
    parser.add_argument("--credits", type=Path, help="text file on origin and licences, for the card")
    parser.add_argument("--workers", type=positive_int, default=os.cpu_count() or 1, help="processes")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more, not {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes a set as the arguments say; returns 0."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    credits = ""
    if arguments.credits is not None:
        with file_errors(arguments.credits, "read"):
            credits = arguments.credits.read_text("utf-8", errors="replace")
    photographs = find_photographs(arguments.images, MIN_SIDE)
    if arguments.without is not None:
        photographs = leave_out(photographs, arguments.without)
    seed = max(0, arguments.seed)
    training, evaluation = split_photographs(photographs, arguments.eval_share, seed)
    inform(f"{len(training)} photographs to train on, {len(evaluation)} to evaluate on")
    try:
        job = ForgeJob(
            tuple(training),
            tuple(evaluation),
            _CROPS * len(training) if arguments.train is None else arguments.train,
            arguments.eval,
            arguments.size,
            arguments.seed,
            arguments.delivery,
            arguments.eval_share,
            credits,
        )
    except OptionError as error:
        parser.error(str(error))
    # Workers inherit this: their small matrix products only lose by more threads.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    write_dataset(job, arguments.out, arguments.workers)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
