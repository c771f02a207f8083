"""What training data hold in all, and where they contradict themselves; said before the first step."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava.data.records import Record
from llava.labels import Label, published_label
from llava.model.builder import DEFAULT_CONTEXT_LENGTH
from llava.systems.base import AnswerFormat

_NAMED = 5


@dataclass
class Measured:
    """What the checks have learnt of records, by their origin.

    Attributes:
        tokens: Length in tokens before anything is cut off, image positions included.
        digests: Digest of the image's bytes, where it was opened.
    """

    tokens: dict[str, int] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)


def find_contradictions(
    records: Sequence[Record], answer_format: AnswerFormat, digests: Mapping[str, str]
) -> list[str]:
    """Says where records contradict each other or the folder that their image lies in.

    Images are the same if they have the same path or the same bytes.

    Args:
        records: Checked records.
        answer_format: Words of the system that is trained.
        digests: Digest of each record's image, by the record's origin; may lack some.
    """
    found = []
    verdicts: dict[str, dict[Label, Record]] = defaultdict(dict)
    for record in records:
        verdict = record.verdict(answer_format).verdict
        if record.image is None or verdict is None:
            continue
        folder = published_label(record.image)
        if folder is not None and folder != verdict:
            found.append(f"{record.origin}: {record.image} is called {verdict} and lies in a folder of {folder} images")
        seen = verdicts[digests.get(record.origin) or record.image]
        seen.setdefault(verdict, record)
        if len(seen) == 2 and seen[verdict] is record:
            first, second = seen.values()
            names = first.image if first.image == second.image else f"{first.image} and {second.image}, the same image,"
            found.append(f"{names} called {' and '.join(seen)}: {first.origin}; {second.origin}")
    return found


def describe_data(
    records: Sequence[Record],
    answer_format: AnswerFormat,
    measured: Measured,
    *,
    max_length: int,
    positions: float,
    name: str = "training data",
) -> list[str]:
    """Returns what to know before training: counts, lengths, and a line that begins with "warning" for each doubt.

    Args:
        records: Checked records.
        answer_format: Words of the system that is trained.
        measured: What ``check_records`` learnt of them.
        max_length: Where sequences are cut.
        positions: How many the model was made for, see ``model_positions``.
        name: What the data are.
    """
    verdicts = Counter(record.verdict(answer_format).verdict or "none" for record in records)
    counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
    images = sum(record.image is not None for record in records)
    lines = [f"{name}: {len(records)} records, {images} with an image; verdicts: {counts}"]
    lengths = [measured.tokens[record.origin] for record in records if record.origin in measured.tokens]
    if lengths:
        cut = sum(length > max_length for length in lengths)
        lines.append(
            f"  lengths: mean {sum(lengths) / len(lengths):.0f}, longest {max(lengths)} tokens; cut off after "
            f"{max_length}: {cut} answers ({cut / len(lengths):.1%}); the model has {positions:.0f} positions"
        )
        beyond = sum(min(length, max_length) > positions for length in lengths)
        if beyond:
            lines.append(
                f"warning: {beyond} records are longer than the model's {positions:.0f} positions, and are trained at "
                f"positions that it was not made for; --model_max_length {positions:.0f} cuts them there"
            )
    if len(verdicts) == 1:
        (only,) = verdicts
        lines.append(f"warning: all verdicts are {only}, so a model learns to say {only} of every image")
    return lines


def model_positions(config: Mapping[str, Any]) -> float:
    """How many positions a model was made for: those of its config, stretched as its rotary scaling says."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    factor = float(scaling.get("factor") or 1) if kind in ("linear", "dynamic") else 1.0
    return float(config.get("max_position_embeddings") or float("inf")) * max(factor, 1.0)


def default_length(config: Mapping[str, Any]) -> int:
    """Where sequences are cut unless the user says so: at the model's own length, and within its positions."""
    return int(min(config.get("tokenizer_model_max_length") or DEFAULT_CONTEXT_LENGTH, model_positions(config)))


def list_some(texts: Sequence[str], limit: int = _NAMED) -> str:
    """Returns the first texts in one line, and how many more there are."""
    listing = "; ".join(texts[:limit])
    return f"{listing}; and {len(texts) - limit} more" if len(texts) > limit else listing
