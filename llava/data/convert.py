"""Writes training records in another system's words: ``forgery data convert FILE … --to SYSTEM --out OUT.json``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.cli import OptionParser, run_cli
from llava.data.records import Record, read_records
from llava.data.rewriting import rewrite_records
from llava.errors import DataError, OptionError
from llava.files import write_json
from llava.labels import LABELS
from llava.systems import registry


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = OptionParser(prog="python -m llava.data.convert", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="training files, each of any system")
    parser.add_argument("--to", required=True, metavar="SYSTEM", help="in whose words the answers are written")
    parser.add_argument("--out", required=True, type=Path, help="new training file: one list of all records")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Reads, rewrites and writes.

    Raises:
        UserError: A file is no training file, an answer contradicts its label, or cannot be rewritten.
    """
    target = registry.answer_format(arguments.to)
    if target is None:
        raise OptionError(f"--to {arguments.to}: this system has no answers")
    if arguments.out.resolve() in [file.resolve() for file in arguments.files]:
        raise OptionError(f"--out {arguments.out} is one of the files that are read; name another")
    records = read_records(arguments.files)
    for record in records:
        verdict = registry.words_of(record.answers, target).parse_training(record.answers).verdict
        if record.label is not None and verdict not in (None, LABELS[record.label]):
            raise DataError(f"{record.origin}: its answer says {verdict}, but its label {LABELS[record.label]}")
    rewritten = rewrite_records(records, target)
    write_json(arguments.out, [_as_json(record) for record in rewritten])
    changed = sum(before is not after for before, after in zip(records, rewritten, strict=True))
    print(f"{arguments.out}: {len(records)} records, {changed} of them rewritten")


def _as_json(record: Record) -> dict[str, Any]:
    given = {"image": record.image, "system_prompt": record.system_prompt}
    return {**{name: value for name, value in given.items() if value}, "conversations": list(record.turns)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parsed = build_parser().parse_args(arguments)
    return run_cli(lambda: run(parsed))


if __name__ == "__main__":
    sys.exit(main())
