"""The records that a run began with, so that a resumed one can say what has changed."""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava.data.records import Record
from llava.data.summary import list_some
from llava.errors import OptionError, UserError
from llava.files import read_json, write_json

logger = logging.getLogger(__name__)

DATA_FILE = "data.json"
"""Digest of every record of the run that an output folder holds, by the record's origin."""


def digest_records(records: Sequence[Record]) -> str:
    """Returns one digest of all records, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for record in records:
        digest.update(repr((record.image, record.turns)).encode())
    return digest.hexdigest()


def write_run_data(output: Path, records: Sequence[Record]) -> None:
    """Notes which records a run is trained on."""
    write_json(output / DATA_FILE, _digests(records), indent=None)


def check_same_data(output: Path, records: Sequence[Record], run: Mapping[str, object], *, accept: bool) -> None:
    """Compares records with those that a run began with.

    Args:
        output: The run's folder.
        records: Those of now.
        run: What the run's own file says of it; ``data`` is the digest of its records.
        accept: Whether changes are only said.

    Raises:
        OptionError: They have changed, and that is not accepted.
    """
    if run.get("data") in (None, digest_records(records)):
        return
    change = f"the data was another when the run in {output} began: {_describe_change(output, records)}"
    if not accept:
        raise OptionError(f"{change}. --accept_changed_data True resumes with the records of now")
    logger.warning("%s; the run goes on with the records of now", change)


def _describe_change(output: Path, records: Sequence[Record]) -> str:
    try:
        before = read_json(output / DATA_FILE)
        before = dict(before) if isinstance(before, dict) else {}
    except UserError:
        return f"{output / DATA_FILE}, which would say in what, is missing or damaged"
    now = _digests(records)
    # By what they say first: a row that was added moves all that follow, and changes none of them.
    new = _without(now, Counter(before.values()))
    gone = _without(before, Counter(now.values()))
    changed = [origin for origin in new if origin in gone]
    parts = [
        (changed, "changed"),
        ([origin for origin in new if origin not in gone], "new"),
        ([origin for origin in gone if origin not in new], "gone"),
    ]
    said = [f"{len(origins)} {what} ({list_some(origins)})" for origins, what in parts if origins]
    return ", ".join(said) or "only their order"


def _digests(records: Sequence[Record]) -> dict[str, str]:
    return {record.origin: digest_records([record]) for record in records}


def _without(digests: Mapping[str, str], others: Counter[str]) -> list[str]:
    """The origins whose digest the others do not have, or not as often."""
    left = []
    for origin, digest in digests.items():
        if others[digest]:
            others[digest] -= 1
        else:
            left.append(origin)
    return left
