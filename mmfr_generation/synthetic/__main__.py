"""Command line: ``python -m mmfr_generation.synthetic --out D --train N --eval M --size 112 --seed S``."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.cli import DefaultsHelpFormatter, OptionParser, positive_int, run_cli
from llava.errors import OptionError

try:
    from mmfr_generation.synthetic.delivery import DELIVERIES
    from mmfr_generation.synthetic.sample import MAX_SIZE, MIN_SIZE
    from mmfr_generation.synthetic.writer import Run, write_dataset
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed; it comes with: pip install 'fakereasoning[synthetic]'")


def build_parser() -> OptionParser:
    """Returns the options of this command."""
    parser = OptionParser(
        prog="python -m mmfr_generation.synthetic",
        description="Write a rendered benchmark in MMFR's layout.",
        formatter_class=DefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to; an interrupted run is resumed")
    parser.add_argument("--train", type=int, required=True, help="images of the training tree, half of them fakes")
    parser.add_argument(
        "--eval", type=int, required=True, help="real images, and as many fakes, of each evaluation set"
    )
    parser.add_argument("--size", type=int, default=112, help=f"side in pixels, {MIN_SIZE} to {MAX_SIZE}")
    parser.add_argument("--seed", type=int, default=0, help="decides every image")
    parser.add_argument(
        "--delivery",
        choices=DELIVERIES,
        default="none",
        help="none: as made; mixed: many shapes, and half of the images resized, recompressed, blurred, framed, ...",
    )
    parser.add_argument("--workers", type=positive_int, default=os.cpu_count() or 1, help="processes")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Writes a benchmark as the arguments say; returns 0."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        run = Run(arguments.train, arguments.eval, arguments.size, arguments.seed, arguments.delivery)
    except OptionError as error:
        parser.error(str(error))
    # Workers inherit this: their small matrix products only lose by more threads.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    write_dataset(run, arguments.out, arguments.workers)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
