"""A manifest: CSV with a header, JSONL, or a JSON list of objects; one image a row.

Columns: ``image`` (path, relative to the manifest's folder) and ``label`` (real, fake, 0, 1), or other names and words
of the field, see ``llava.tables``; optional ``id``, ``set``, ``reference`` (text), ``attributes`` (a list; in CSV
separated by ``;``), ``mask`` (of what was changed in it). Every other column is a group.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from forgery_eval.benchmarks.base import Sample
from llava.errors import DataError
from llava.tables import TABLE_SUFFIXES, Columns, NameFinder, image_name, read_label, read_rows
from llava.tampered import row_masks

ON_DISK = "any table: .csv, .tsv, .json or .jsonl with the columns image and label"
_OWN = ("id", "set", "reference", "attributes", "mask", "description")


def opens(path: Path) -> bool:
    """Whether it is a file with the ending of a table."""
    return path.is_file() and path.suffix.lower() in TABLE_SUFFIXES


def read(path: Path, label_map: Mapping[str, int] | None = None) -> Iterator[Sample]:
    """Yields the samples in the file's order.

    Args:
        path: The manifest.
        label_map: What further label words mean.

    Raises:
        UserError: A row has no image or no label, or cannot be read.
    """
    finder = NameFinder(path.parent)
    for row in read_rows(path):
        columns = Columns.find(row.values, row.where)
        name = image_name(row, columns)
        values = row.values
        reference = values.get("reference") or None
        if not isinstance(reference, str | None):
            raise DataError(f"{row.where}: the reference must be a text, not {reference!r}")
        label = values.get(columns.label) if columns.label else None
        yield Sample(
            id=str(values.get("id") or name),
            image=finder.find(name),
            label=read_label(label, columns.label, label_map or {}, row.where),
            set=str(values.get("set") or path.stem),
            reference=reference,
            groups={
                key: str(value)
                for key, value in values.items()
                if key not in _OWN and key not in columns.own and _is_group(value)
            },
            attributes=_attributes(values.get("attributes"), row.where),
            masks=row_masks(values, finder),
        )
    finder.report(path)


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
