"""What must hold of training data before any weight is read."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from llava.constants import IGNORE_INDEX
from llava.conversation import Conversation
from llava.data.prompting import (
    Arrange,
    TokenizedConversation,
    arrange_of,
    encode_together,
    expanded_length,
    fill_template,
    fitting_length,
    label_answers,
)
from llava.data.records import Record
from llava.errors import DataError
from llava.labels import LABELS
from llava.mm_utils import IMAGE_PLACEHOLDER
from llava.model.verdict import VerdictTokens
from llava.systems.base import AnswerFormat

logger = logging.getLogger(__name__)

TOKENIZED_TOGETHER = 1024
_NAMED = 5


def check_records(
    records: Sequence[Record],
    *,
    answer_format: AnswerFormat,
    tokenizer: PreTrainedTokenizerBase,
    template: Conversation,
    max_length: int,
    placeholder_tokens: Mapping[int, int],
    image_folder: Path | None,
    drop_invalid: bool,
    needs_verdict: bool = True,
    placeholders: Mapping[str, int] = IMAGE_PLACEHOLDER,
) -> list[Record]:
    """Finds records that would train on nothing or on something wrong.

    A record is invalid whose image file is missing, whose answer contradicts its label, or of whose answer truncation
    leaves nothing; and, if the system trains a score at the verdict, one whose answer has no verdict in the system's
    spelling within the length. Images are not opened. Records without a verdict and cut answers are counted in the log.

    Args:
        records: What ``read_records`` returned.
        answer_format: Words of the system that is trained.
        tokenizer: The model's.
        template: Prompt template.
        max_length: Longest sequence, image positions included.
        placeholder_tokens: How many tokens each placeholder id becomes.
        image_folder: Where the records' images lie; None if their paths are complete.
        drop_invalid: Whether invalid records are left out and counted in the log, rather than refused.
        needs_verdict: Whether the system trains a score at the verdict, so that every answer must spell it.
        placeholders: What stands for images and other tokens in a prompt's text, and the id of each.

    Returns:
        The valid records in their order.

    Raises:
        DataError: There is no image folder, no record has an image, some records are invalid and may not be dropped,
            or all are.
        CheckpointError: The tokenizer spells real and fake alike.
    """
    _check_images_present(records)
    verdict = VerdictTokens.from_tokenizer(tokenizer, answer_format.verdict_prefix, answer_format.verdict_words)
    spelling = verdict if needs_verdict else None
    cut = without = 0
    problems = _image_problems(records, image_folder)
    if drop_invalid or not problems:
        readable = [record for record in records if record.origin not in problems]
        arrange = arrange_of(answer_format)
        found = zip(readable, tokenize_records(readable, tokenizer, template, placeholders, arrange), strict=True)
        for record, tokenized in tqdm(found, "checking", total=len(readable), unit=" records", leave=False):
            problem = find_problem(record, tokenized, answer_format, spelling, max_length, placeholder_tokens)
            if problem:
                problems[record.origin] = problem
                continue
            assert not isinstance(tokenized, str)
            cut += fitting_length(tokenized.input_ids, placeholder_tokens, max_length) < len(tokenized.input_ids)
            without += record.verdict(answer_format).verdict is None
    if cut:
        logger.warning("the end of %d answers is cut off at %d tokens", cut, max_length)
    if without:
        logger.warning("%d records say neither real nor fake", without)
    valid = _without(records, problems, drop_invalid)
    _check_images_present(valid)
    return valid


def tokenize_records(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    template: Conversation,
    placeholders: Mapping[str, int] = IMAGE_PLACEHOLDER,
    arrange: Arrange | None = None,
) -> Iterator[TokenizedConversation | str]:
    """Tokenises records, many at a time; gives a text where a record cannot be tokenised, saying why."""
    rest = iter(records)
    while together := [
        fill_template(record.turns, template, record.system_prompt, arrange)
        for record in islice(rest, TOKENIZED_TOGETHER)
    ]:
        encode = encode_together(together, tokenizer, placeholders)
        for conversation in together:
            try:
                yield label_answers(conversation, encode)
            except DataError as error:
                yield str(error)


def find_problem(
    record: Record,
    tokenized: TokenizedConversation | str,
    answer_format: AnswerFormat,
    verdict: VerdictTokens | None,
    max_length: int,
    placeholder_tokens: Mapping[int, int],
) -> str:
    """Says why a record cannot be trained on; nothing if it can.

    Args:
        record: The record.
        tokenized: Its ids, or why there are none.
        answer_format: Words of the system that is trained.
        verdict: How the tokenizer spells the verdict, if a score is trained at it.
        max_length: Longest sequence.
        placeholder_tokens: How many tokens each placeholder id becomes.
    """
    if isinstance(tokenized, str):
        return tokenized
    if record.image is None and any(index in placeholder_tokens for index in tokenized.input_ids):
        return "a question holds the mark of something that is made of an image, but the record names no image"
    labels = tokenized.labels
    kept = fitting_length(tokenized.input_ids, placeholder_tokens, max_length)
    if all(label == IGNORE_INDEX for label in labels[:kept]):
        return f"no word of its answer lies within the first {max_length} tokens; raise the length or shorten it"
    conclusion = record.verdict(answer_format)
    if record.label is not None and conclusion.verdict not in (None, LABELS[record.label]):
        return f"its answer says {conclusion.verdict}, but its label {LABELS[record.label]}"
    if verdict is None:
        return ""
    if conclusion.verdict is None:
        return conclusion.problem
    position = _verdict_position(labels, verdict)
    if position is None or labels[position] != (verdict.real, verdict.fake)[LABELS.index(conclusion.verdict)]:
        word = answer_format.verdict_words[LABELS.index(conclusion.verdict)]
        spelling = f"{answer_format.verdict_prefix} {word}"
        return (
            f"its answer does not spell its verdict {spelling!r}, so the score cannot be trained on it; answers of "
            "other systems are written so with --rewrite_answers True"
        )
    if position >= kept:
        needed = expanded_length(tokenized.input_ids[: position + 1], placeholder_tokens)
        return f"its verdict is token {needed}, but all after {max_length} is cut off; raise the length or shorten it"
    return ""


def is_file(path: Path) -> bool:
    """Whether there is a file; a name that no file can have is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def _check_images_present(records: Sequence[Record]) -> None:
    if not any(record.image for record in records):
        raise DataError(f"none of the {len(records)} records has an image, so there is nothing to learn from")


def _verdict_position(labels: Sequence[int], verdict: VerdictTokens) -> int | None:
    """Where the verdict word is looked for: after the first pattern."""
    pattern = list(verdict.pattern)
    for start in range(len(labels) - len(pattern)):
        if labels[start] == pattern[0] and labels[start : start + len(pattern)] == pattern:
            return start + len(pattern)
    return None


def _image_problems(records: Sequence[Record], image_folder: Path | None) -> dict[str, str]:
    """What is wrong with the records' images, by origin; each folder is listed once, no image opened."""
    if image_folder is not None and not image_folder.is_dir():
        raise DataError(f"there is no image folder {image_folder}")
    files: dict[Path, set[str]] = {}
    problems = {}
    for record in records:
        if record.image is None:
            continue
        path = (image_folder or Path()) / record.image
        if path.parent not in files:
            files[path.parent] = _files_in(path.parent)
        # Some file systems find a file by another spelling than its own, so one that is not listed is asked for.
        if path.name not in files[path.parent] and not is_file(path):
            problems[record.origin] = f"there is no image {path}"
    return problems


def _files_in(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:
        return set()


def _without(records: Sequence[Record], problems: Mapping[str, str], drop_invalid: bool) -> list[Record]:
    if not problems:
        return list(records)
    valid = [record for record in records if record.origin not in problems]
    count = len(records) - len(valid)
    named = "; ".join(f"{origin}: {problem}" for origin, problem in islice(problems.items(), _NAMED))
    listing = f"{named}; and {count - _NAMED} more" if count > _NAMED else named
    if not drop_invalid:
        raise DataError(f"{count} of {len(records)} records cannot be trained on; --drop_invalid drops them. {listing}")
    if not valid:
        raise DataError(f"none of the {len(records)} records can be trained on. {listing}")
    logger.warning("dropped %d of %d records that cannot be trained on. %s", count, len(records), listing)
    return valid
