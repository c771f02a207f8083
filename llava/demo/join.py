"""Joins the training records of several data sets into one file, whose images are named from its own folder.

python -m llava.demo.join rendered photographs --out records.json --part towers.json=0.75 --part answers.json=0.25

Parts have no image in common, and no photograph where a data set's manifest names the photograph of each image: what
learns from one part can be tried on another as on what it has never seen. Only what was pasted into an image may be of
a photograph of another part.
"""

import argparse
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llava.cli import OptionParser, run_cli
from llava.demo.tower_data import RECORDS_FILE
from llava.errors import DataError, OptionError
from llava.files import read_json, read_jsonl, write_json

_T = TypeVar("_T")
_MANIFEST = "manifest.jsonl"
_ROUNDING = 1e-9
"""By which shares that make up a whole may exceed it."""


def join(folders: Sequence[Path], out: Path, seed: int, parts: Mapping[Path, float] | None = None) -> int:
    """Writes the records of some data sets, shuffled; returns how many are in ``out``.

    Args:
        folders: Data sets; each holds ``RECORDS_FILE``.
        out: File of all of them; their images must lie below its folder or beside it.
        seed: Decides their order, and which belong to which part.
        parts: Further files, each with its share of every data set's records, or of its photographs, the same ones in
            all data sets; no record is in two of them.

    Raises:
        DataError: A data set holds no list of records.
    """
    draw = random.Random(seed)
    parts = parts or {}
    files: dict[Path, list[tuple[Path, dict[str, Any]]]] = {out: [], **{file: [] for file in parts}}
    records = {folder: _read(folder) for folder in folders}
    photograph_of = {folder: _photographs(folder, records[folder]) for folder in folders}
    names = sorted({name for of_images in photograph_of.values() for name in of_images.values()})
    part_of = dict(_deal(draw.sample(names, len(names)), parts))
    for folder in folders:
        drawn = [(folder, record) for record in draw.sample(records[folder], len(records[folder]))]
        files[out] += drawn
        known = [(item, photograph_of[folder].get(item[1].get("image", ""))) for item in drawn]
        for item, file in _deal([item for item, photograph in known if photograph is None], parts):
            files[file].append(item)
        for item, photograph in known:
            if photograph in part_of:
                files[part_of[photograph]].append(item)
    for file, found in files.items():
        draw.shuffle(found)
        write_json(file, [_moved(record, Path(os.path.relpath(folder, file.parent))) for folder, record in found])
    return len(files[out])


def _read(folder: Path) -> list[dict[str, Any]]:
    records = read_json(folder / RECORDS_FILE)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DataError(f"{folder / RECORDS_FILE} holds no list of records")
    return records


def _photographs(folder: Path, records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Returns the photograph of each of the records' images of which the data set's manifest, if any, names one."""
    if not (folder / _MANIFEST).is_file():
        return {}
    images = {record["image"] for record in records if "image" in record}
    lines = (line for _, line in read_jsonl(folder / _MANIFEST))
    return {
        line["image"]: line["photograph"] for line in lines if line.get("photograph") and line.get("image") in images
    }


def _deal(items: Sequence[_T], parts: Mapping[Path, float]) -> Iterator[tuple[_T, Path]]:
    """Yields the items that belong to a part, in their order, each with its part's file."""
    before = 0.0
    for file, share in parts.items():
        begin, end = (round(border * len(items)) for border in (before, before + share))
        yield from ((item, file) for item in items[begin:end])
        before += share


def _moved(record: dict[str, Any], below: Path) -> dict[str, Any]:
    return {**record, "image": (below / record["image"]).as_posix()} if "image" in record else record


def _part(text: str) -> tuple[Path, float]:
    file, _, share = text.rpartition("=")
    try:
        value = float(share)
    except ValueError:
        value = 0.0
    if not file or not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form FILE=SHARE, with a share above 0 and up to 1")
    return Path(file), value


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = OptionParser(prog="python -m llava.demo.join", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help=f"data sets that hold {RECORDS_FILE}")
    parser.add_argument("--out", type=Path, required=True, help="file of all records")
    parser.add_argument(
        "--part",
        type=_part,
        action="append",
        default=[],
        metavar="FILE=SHARE",
        help="also write this share of each set's records, or of its photographs; no record is in two parts",
    )
    parser.add_argument("--seed", type=int, default=0, help="decides parts and order (default 0)")
    options = parser.parse_args(argv)

    def run() -> None:
        parts = dict(options.part)
        if len({options.out, *parts}) != 1 + len(options.part):
            raise OptionError("each --part, and --out, needs a file of its own")
        if sum(parts.values()) > 1 + _ROUNDING:
            raise OptionError(f"the parts are {sum(parts.values()):g} of the records together, which is more than all")
        print(f"{join(options.folders, options.out, options.seed, parts):,} records in {options.out}")

    return run_cli(run)


if __name__ == "__main__":
    sys.exit(main())
