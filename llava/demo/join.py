"""Joins the training records of several data sets into one file, whose images are named from its own folder.

python -m llava.demo.join rendered photographs --out forgery_reasoning_cot.json
"""

import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.cli import OptionParser, run_cli
from llava.demo.tower_data import RECORDS_FILE
from llava.errors import DataError, OptionError
from llava.files import read_json, write_json


def join(folders: Sequence[Path], out: Path, share: float, seed: int, rest: Path | None = None) -> int:
    """Writes the records of some data sets, shuffled; returns how many are in ``out``.

    Args:
        folders: Data sets; each holds ``RECORDS_FILE``.
        out: The file; their images must lie below its folder or beside it.
        share: Share of each data set's records that are taken.
        seed: Decides which, and their order.
        rest: File of the records that are not taken.

    Raises:
        DataError: A data set holds no list of records.
    """
    draw = random.Random(seed)
    taken: list[tuple[Path, dict[str, Any]]] = []
    left: list[tuple[Path, dict[str, Any]]] = []
    for folder in folders:
        records = read_json(folder / RECORDS_FILE)
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise DataError(f"{folder / RECORDS_FILE} holds no list of records")
        chosen = set(draw.sample(range(len(records)), round(share * len(records))))
        for index, record in enumerate(records):
            (taken if index in chosen else left).append((folder, record))
    for file, part in ((out, taken), (rest, left)):
        if file is not None:
            draw.shuffle(part)
            write_json(file, [_moved(record, Path(os.path.relpath(folder, file.parent))) for folder, record in part])
    return len(taken)


def _moved(record: dict[str, Any], below: Path) -> dict[str, Any]:
    return {**record, "image": (below / record["image"]).as_posix()} if "image" in record else record


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = OptionParser(prog="python -m llava.demo.join", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help=f"data sets that hold {RECORDS_FILE}")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--share", type=float, default=1.0, help="share of each set's records, 0..1 (default 1)")
    parser.add_argument("--rest", type=Path, metavar="FILE", help="also write the records that are not taken")
    parser.add_argument("--seed", type=int, default=0, help="decides which records, and their order (default 0)")
    options = parser.parse_args(argv)

    def run() -> None:
        if not 0 < options.share <= 1:
            raise OptionError(f"--share must be above 0 and at most 1, not {options.share}")
        count = join(options.folders, options.out, options.share, options.seed, options.rest)
        print(f"{count:,} records in {options.out}")

    return run_cli(run)


if __name__ == "__main__":
    sys.exit(main())
