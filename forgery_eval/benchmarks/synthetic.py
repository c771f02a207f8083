"""MMFR-Synthetic: the MMFR layout with a ``manifest.jsonl`` that knows how each image was made."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from forgery_eval.benchmarks import mmfr
from forgery_eval.benchmarks.base import Sample
from llava.errors import DataError
from llava.files import read_jsonl
from llava.tampered import manifest_masks

ON_DISK = "MMFR-Synthetic: an MMFR tree with manifest.jsonl, as forgery data synthetic renders it"
MANIFEST = "manifest.jsonl"
_FIELDS = ("generator", "split_role")
_STRENGTHS = ((0.5, "below 0.5"), (1.0, "0.5 to 1"))


def opens(path: Path) -> bool:
    """Whether it is an MMFR tree with a manifest."""
    return (path / MANIFEST).is_file() and mmfr.opens(path)


def read(path: Path) -> Iterator[Sample]:
    """Yields the samples of the MMFR tree, with their generator, role and strength as groups.

    Raises:
        UserError: The manifest or a reasoning file cannot be read.
    """
    entries = dict(_entries(path / MANIFEST))
    for sample in mmfr.read(path):
        entry = entries.get(sample.id, {})
        groups = {name: str(entry[name]) for name in _FIELDS if entry.get(name) is not None}
        strength = entry.get("strength")
        if isinstance(strength, int | float):
            groups["strength"] = next((name for end, name in _STRENGTHS if strength < end), "1")
        steps = entry.get("delivery")
        if isinstance(steps, list):
            groups |= _delivery_groups(steps)
        yield replace(sample, groups=groups, masks=manifest_masks(path, entry))


def _delivery_groups(steps: list[Any]) -> dict[str, str]:
    """How many steps an image went through, and which was the last."""
    names = [str(step.get("step")) for step in steps if isinstance(step, dict)]
    count = "untouched" if not names else f"{len(names)} step" + ("s" if len(names) > 1 else "")
    return {"delivery": count, "last_delivery": names[-1] if names else "untouched"}


def _entries(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, entry in read_jsonl(file):
        if not isinstance(entry.get("image"), str):
            raise DataError(f"{where}: this is no line of a manifest")
        yield entry["image"].removeprefix("evaluation_sets/"), entry
