"""Command line: ``python -m mmfr_generation.synthetic --out D --train N --eval M --size 112 --seed S``."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mmfr_generation.command_line import Parser

try:
    from mmfr_generation.synthetic.sample import MAX_SIZE, MIN_SIZE
    from mmfr_generation.synthetic.writer import DatasetError, Run, write_dataset
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed; it comes with: pip install 'fakereasoning[synthetic]'")


class _Parser(Parser):
    """A parser that reports a wrong flag in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help lists the options)\n")


def build_parser() -> Parser:
    """Returns the options of this command."""
    parser = _Parser(
        prog="python -m mmfr_generation.synthetic", description="Writes a rendered benchmark in MMFR's layout."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to; an interrupted run goes on")
    parser.add_argument("--train", type=int, required=True, help="images of the training tree, half of them fakes")
    parser.add_argument(
        "--eval", type=int, required=True, help="real images, and as many fakes, of each evaluation set"
    )
    parser.add_argument("--size", type=int, default=112, help=f"side in pixels, {MIN_SIZE} to {MAX_SIZE}")
    parser.add_argument("--seed", type=int, default=0, help="decides every image")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Writes a benchmark as the arguments say.

    Returns:
        0 when it is complete, 1 when something stopped it, 130 when the user did.
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.workers < 1:
        parser.error(f"workers must be 1 or more, not {arguments.workers}")
    try:
        run = Run(arguments.train, arguments.eval, arguments.size, arguments.seed)
    except ValueError as error:
        parser.error(str(error))
    # Workers inherit this: their small matrix products only lose by more threads.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        write_dataset(run, arguments.out, arguments.workers)
    except DatasetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
