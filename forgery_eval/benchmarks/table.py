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

_OWN = ("image", "label", "id", "set", "reference", "attributes")


def opens(path: Path) -> bool:
    """Whether it is a file with one of the two endings."""
    return path.is_file() and path.suffix.lower() in (".csv", ".jsonl")


def read(path: Path) -> Iterator[Sample]:
    """Yields the samples in the file's order.

    Raises:
        ValueError: A line has no image or no label, or cannot be read.
    """
    rows = _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path)
    for number, row in rows:
        place = f"{path}, line {number}"
        if not row.get("image"):
            raise ValueError(f"{place}: there is no image")
        attributes = row.get("attributes")
        if isinstance(attributes, str):
            attributes = [name.strip() for name in attributes.split(";") if name.strip()] or None
        yield Sample(
            id=str(row.get("id") or row["image"]),
            image=path.parent / str(row["image"]),
            label=read_label(row.get("label"), place),
            set=str(row.get("set") or path.stem),
            reference=row.get("reference") or None,
            groups={name: str(value) for name, value in row.items() if name not in _OWN and _is_group(value)},
            attributes=None if attributes is None else tuple(attributes),
        )


def _is_group(value: Any) -> bool:
    return isinstance(value, str | int | float) and value != ""


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        for row in reader:
            if None in row:
                raise ValueError(f"{path}, line {reader.line_num}: there are more values than columns")
            yield reader.line_num, row


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: this is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: this is no object")
            yield number, row
