"""Downloads the published MMFR-Dataset, or takes its parts from a folder, and unpacks just what was asked for.

The data set is one tar archive in 86 pieces. They are read as one stream, each piece when it is its turn; the whole
archive is never put together. What is needed to resume is kept in ``<output>/.mmfr_download``.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.cli import ALL_DONE, SOME_FAILED, DefaultsHelpFormatter, OptionParser, run_cli
from llava.files import exclusive_lock
from mmfr_generation.published.sources import FolderSource, HubSource, Source
from mmfr_generation.published.unpacker import WORK_FOLDER, Unpacker

REPOSITORY = "AnnaGao/MMFR-Dataset"
PART_COUNT = 86
PART_SETS: dict[str, tuple[int, ...]] = {
    "smoke": (70,),
    "eval": tuple(range(70, 80)),
    "train": (*range(1, 70), *range(80, 87)),
    "all": tuple(range(1, 87)),
}
"""Parts of each choice: 1-69 hold diffusiondb and the training file, 70-79 the evaluation sets, 80-86 laion."""


def parts_of(text: str) -> tuple[int, ...]:
    """Reads ``--parts``: a name of ``PART_SETS``, or numbers and ranges such as ``1,70-72``.

    Raises:
        argparse.ArgumentTypeError: It is neither.
    """
    if text in PART_SETS:
        return PART_SETS[text]
    numbers: set[int] = set()
    for piece in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,3})(?:\s*-\s*(\d{1,3}))?\s*", piece)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last <= PART_COUNT:
            raise argparse.ArgumentTypeError(
                f"{text!r} is neither {', '.join(PART_SETS)} nor numbers from 1 to {PART_COUNT} such as 1,70-72"
            )
        numbers.update(range(first, last + 1))
    return tuple(sorted(numbers))


def build_parser() -> OptionParser:
    """Returns the options of this script."""
    parser = OptionParser(
        description="Download the published MMFR-Dataset and unpack it. A download that was stopped is resumed. "
        "Members that are cut because the part before or after was not asked for are named and not written.",
        formatter_class=DefaultsHelpFormatter,
    )
    parser.add_argument(
        "--parts",
        type=parts_of,
        required=True,
        help="smoke (part 70), eval (70-79: the evaluation sets), train (1-69 and 80-86), all, or numbers: 1,70-72",
    )
    parser.add_argument("--output-folder", type=Path, default=Path("MMFR-Dataset"), help="where the members go")
    parser.add_argument("--from-folder", type=Path, help="take the parts from this folder, and nothing from the hub")
    parser.add_argument("--repo-id", default=REPOSITORY, help="hub id of the data set")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the data set on the hub")
    parser.add_argument(
        "--delete-parts",
        action="store_true",
        default=None,
        help="delete each part once it is unpacked, unless a member is cut in it; by default only downloaded parts",
    )
    parser.add_argument("--keep-parts", dest="delete_parts", action="store_false", default=None, help="keep the parts")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Unpacks the wanted parts; returns 3 if something was refused, damaged or missing."""
    options = build_parser().parse_args(arguments)
    work_folder = options.output_folder / WORK_FOLDER
    with exclusive_lock(work_folder / "state.json"):
        source: Source
        if options.from_folder:
            source = FolderSource(options.from_folder)
        else:
            source = HubSource(options.repo_id, options.revision, work_folder / "parts")
        delete_parts = options.from_folder is None if options.delete_parts is None else options.delete_parts
        unpacker = Unpacker(source, options.output_folder)
        unpacker.run(options.parts, delete_parts=delete_parts)
        text, complete = unpacker.summary(options.parts)
    print(text)
    return ALL_DONE if complete else SOME_FAILED


if __name__ == "__main__":
    sys.exit(run_cli(main))
