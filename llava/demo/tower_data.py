"""Training data of the tower stage: images and what their answers say."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava.data.records import read_records
from llava.errors import DataError
from llava.systems.base import ParsedAnswer
from llava.systems.fakereasoning.answer import FORMAT

RECORDS_FILE = "forgery_reasoning_cot.json"


@dataclass(frozen=True)
class Example:
    """An image's file and its training answer."""

    image: Path
    answer: ParsedAnswer


def read_examples(sources: Sequence[Path], image_folder: Path | None) -> list[Example]:
    """Reads records in the layout of the published training file.

    Args:
        sources: Files, or folders that hold ``RECORDS_FILE``.
        image_folder: What the images' names are relative to; by default the folder of their file.

    Raises:
        DataError: A file is missing or is not of that layout, or a record has no image or no verdict.
    """
    examples = []
    for source in sources:
        file = source / RECORDS_FILE if source.is_dir() else source
        for record in read_records([file]):
            if record.image is None:
                raise DataError(f"{record.origin}: there is no image, so a tower cannot learn from it")
            answer = record.verdict(FORMAT)
            if answer.verdict is None:
                raise DataError(f"{record.origin}: {answer.problem}")
            examples.append(Example((image_folder or file.parent) / record.image, answer))
    return examples
