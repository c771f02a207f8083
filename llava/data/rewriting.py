"""Training records of one system in another's words, so that data of several can be mixed."""

from collections.abc import Sequence
from dataclasses import replace

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.records import Record
from llava.errors import DataError
from llava.systems import registry
from llava.systems.base import AnswerFormat


def rewrite_records(records: Sequence[Record], target: AnswerFormat) -> list[Record]:
    """Returns the records with each answer that gives a verdict written in a system's words.

    Such an answer becomes verdict and explanation in the target's form, and the question before it the target's own.
    Answers that are in these words already, and those without a verdict, stay as they are.

    Args:
        records: The records.
        target: Words of the system that is to be trained.

    Raises:
        DataError: The target cannot write answers, or not this one.
    """
    return [_rewritten(record, target) for record in records]


def _rewritten(record: Record, target: AnswerFormat) -> Record:
    own = registry.words_of(record.answers, target)
    if own is target:
        return record
    write = getattr(target, "write_training", None)
    if write is None:
        raise DataError("answers cannot be rewritten into this system's words: it has none for training")
    turns = list(record.turns)
    for number in range(0, len(turns), 2):
        question, answer = turns[number : number + 2]
        parsed = own.parse(answer["value"])
        if parsed.verdict is None:
            continue
        mark = f"{DEFAULT_IMAGE_TOKEN}\n" if DEFAULT_IMAGE_TOKEN in question["value"] else ""
        explanation = parsed.stages.get(own.explanation, "") if own.explanation else ""
        try:
            written = write(parsed.verdict, explanation)
        except DataError as error:
            raise DataError(f"{record.origin}: its answer cannot be rewritten: {error}") from error
        turns[number] = {**question, "value": f"{mark}{target.question}"}
        turns[number + 1] = {**answer, "value": written}
    return replace(record, turns=tuple(turns))
