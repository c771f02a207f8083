"""A manifest: CSV with a header, or JSONL; one image a line.

Columns: ``image`` (path, relative to the manifest's folder) and ``label`` (real, fake, 0, 1); optional ``id``, ``set``,
``reference`` (text), ``attributes`` (a list; in CSV separated by ``;``). Every other column is a group.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forgery_eval.benchmarks.base import Sample, read_label
from llava.errors import DataError
from llava.files import file_errors

_OWN = ("image", "label", "id", "set", "reference", "attributes")


def opens(path: Path) -> bool:
    """Whether it is a file with one of the two endings."""
    return path.is_file() and path.suffix.lower() in (".csv", ".jsonl")


def read(path: Path) -> Iterator[Sample]:
    """Yields the samples in the file's order.

    Raises:
        UserError: A line has no image or no label, or cannot be read.
    """
    rows = _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path)
    for number, row in rows:
        location = f"{path}, line {number}"
        if not row.get("image"):
            raise DataError(f"{location}: there is no image")
        reference = row.get("reference") or None
        if not isinstance(reference, str | None):
            raise DataError(f"{location}: the reference must be a text, not {reference!r}")
        yield Sample(
            id=str(row.get("id") or row["image"]),
            image=path.parent / str(row["image"]),
            label=read_label(row.get("label"), location),
            set=str(row.get("set") or path.stem),
            reference=reference,
            groups={name: str(value) for name, value in row.items() if name not in _OWN and _is_group(value)},
            attributes=_attributes(row.get("attributes"), location),
        )


def _attributes(value: Any, location: str) -> tuple[str, ...] | None:
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(";") if name.strip()) or None
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise DataError(f"{location}: attributes must be a list of names, not {value!r}")
    return tuple(value)


def _is_group(value: Any) -> bool:
    return isinstance(value, str | int | float) and value != ""


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with file_errors(path, "read"), path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            for row in reader:
                if None in row:
                    raise DataError(f"{path}, line {reader.line_num}: there are more values than columns")
                yield reader.line_num, row
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path}, after line {reader.line_num}: this is no CSV in UTF-8: {error}") from None


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with file_errors(path, "read"), path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: this is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: this is no object")
            yield number, row
