"""What training data hold in all, and where they contradict themselves. Imports no torch."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llava.data.records import Record
from llava.labels import Label, published_label
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
        if verdict not in seen:
            seen[verdict] = record
            if len(seen) == 2:
                found.append(_both(*seen.values()))
    return found


def _both(one: Record, other: Record) -> str:
    names = one.image if one.image == other.image else f"{one.image}, the same image as {other.image},"
    return f"{one.origin} and {other.origin}: {names} is called real and fake"


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
        positions: How many the model was made for, see ``llava.data.lengths``.
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


def list_some(texts: Sequence[str], limit: int = _NAMED) -> str:
    """Returns the first texts in one line, and how many more there are."""
    listing = "; ".join(texts[:limit])
    return f"{listing}; and {len(texts) - limit} more" if len(texts) > limit else listing
