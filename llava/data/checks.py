"""What must hold of training data before any weight is read."""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType

from transformers import PreTrainedTokenizerBase

from llava.cli import progress
from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from llava.conversation import Conversation
from llava.data.image_check import open_images
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
from llava.data.summary import Measured, list_some
from llava.errors import DataError
from llava.files import is_file
from llava.labels import LABELS
from llava.mm_utils import IMAGE_PLACEHOLDER
from llava.model.verdict import VerdictTokens
from llava.systems.base import AnswerFormat
from llava.tables import NameFinder

logger = logging.getLogger(__name__)

TOKENIZED_TOGETHER = 1024
KINDS = {
    "layout": "rows that are no records",
    "missing image": "images that are not there",
    "unreadable image": "images that do not open",
    "verdict": "answers without a verdict",
    "label": "answers against the record's label",
    "text": "answers that must not be learnt",
    "length": "answers or verdicts that are cut off",
    "tokens": "texts that the tokenizer takes for something else",
}
"""Every kind of problem, with what it means."""


@dataclass(frozen=True)
class Problem:
    """Why a record cannot be trained on.

    Attributes:
        kind: One of ``KINDS``.
        text: What is wrong with this record.
    """

    kind: str
    text: str

    def __str__(self) -> str:
        return self.text


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
    faults: Mapping[str, str] = MappingProxyType({}),
    opened: Path | None = None,
    measured: Measured | None = None,
) -> list[Record]:
    """Finds records that would train on nothing or on something wrong.

    A record is invalid whose image is missing or does not open, whose answer contradicts its label or holds what must
    not be learnt, or of whose answer truncation leaves nothing; and, if the system trains a score at the verdict, one
    whose answer has no verdict in the system's spelling within the length.

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
        faults: Rows that are no records, as ``read_records`` gives them: they count as invalid records.
        opened: Where it is kept which images open, see ``open_images``; None does not open them.
        measured: Takes what the checks learn of the records.

    Returns:
        The valid records in their order.

    Raises:
        DataError: There is no image folder, no record has an image, some records are invalid and may not be dropped,
            or all are.
        CheckpointError: The tokenizer spells real and fake alike.
    """
    if records or not faults:
        _check_images_present(records)
    verdict = VerdictTokens.from_tokenizer(tokenizer, answer_format.verdict_prefix, answer_format.verdict_words)
    spelling = verdict if needs_verdict else None
    measured = measured or Measured()
    problems = {origin: Problem("layout", fault) for origin, fault in faults.items()}
    missing = _missing_images(records, image_folder)
    records = _found_by_other_names(records, missing, image_folder)
    problems |= {origin: Problem("missing image", text) for origin, text in missing.items()}
    readable = [record for record in records if record.origin not in problems]
    arrange = arrange_of(answer_format)
    found = zip(readable, tokenize_records(readable, tokenizer, template, placeholders, arrange), strict=True)
    for record, tokenized in progress(found, desc="checking", total=len(readable), unit=" records", leave=False):
        problem = find_problem(record, tokenized, answer_format, spelling, max_length, placeholder_tokens)
        if problem:
            problems[record.origin] = problem
        elif isinstance(tokenized, TokenizedConversation):
            measured.tokens[record.origin] = expanded_length(tokenized.input_ids, placeholder_tokens)
    if opened is not None and (drop_invalid or not problems):
        problems |= _unreadable_images(records, problems, image_folder, opened, measured)
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
    marks = [token for token in map(str, getattr(tokenizer, "all_special_tokens", ())) if _is_mark(token)]
    while together := list(islice(rest, TOKENIZED_TOGETHER)):
        conversations = [fill_template(record.turns, template, record.system_prompt, arrange) for record in together]
        encode = encode_together(conversations, tokenizer, placeholders)
        for record, conversation in zip(together, conversations, strict=True):
            mark = next((mark for mark in marks for turn in record.turns if mark in turn["value"]), None)
            if mark is not None:
                yield f"a turn holds {mark}, which means something else to the tokenizer; write it in another way"
                continue
            try:
                yield label_answers(conversation, encode)
            except DataError as error:
                yield str(error)


def _is_mark(token: str) -> bool:
    """Whether a special token cannot be a word of a text; some tokenizers take an ordinary one for padding."""
    return token != DEFAULT_IMAGE_TOKEN and len(token) > 2 and not token.isalnum() and token[0] in "<[|｜"


def find_problem(
    record: Record,
    tokenized: TokenizedConversation | str,
    answer_format: AnswerFormat,
    verdict: VerdictTokens | None,
    max_length: int,
    placeholder_tokens: Mapping[int, int],
) -> Problem | None:
    """Says why a record cannot be trained on; None if it can.

    Args:
        record: The record.
        tokenized: Its ids, or why there are none.
        answer_format: Words of the system that is trained.
        verdict: How the tokenizer spells the verdict, if a score is trained at it.
        max_length: Longest sequence.
        placeholder_tokens: How many tokens each placeholder id becomes.
    """
    if isinstance(tokenized, str):
        return Problem("tokens", tokenized)
    if record.image is None and any(index in placeholder_tokens for index in tokenized.input_ids):
        missing = "a question holds the mark of something that is made of an image, but the record names no image"
        return Problem("missing image", missing)
    labels = tokenized.labels
    kept = fitting_length(tokenized.input_ids, placeholder_tokens, max_length)
    if all(label == IGNORE_INDEX for label in labels[:kept]):
        too_long = f"no word of its answer lies within the first {max_length} tokens; raise the length or shorten it"
        return Problem("length", too_long)
    conclusion = record.verdict(answer_format)
    text_problem = record.problem(answer_format)
    if record.label is not None and conclusion.verdict not in (None, LABELS[record.label]):
        return Problem("label", f"its answer says {conclusion.verdict}, but its label {LABELS[record.label]}")
    if conclusion.verdict is None and verdict is not None:
        return Problem("verdict", text_problem)
    if conclusion.verdict is not None and text_problem:
        return Problem("text", text_problem)
    if verdict is None or conclusion.verdict is None:
        return None
    position = _verdict_position(labels, verdict)
    if position is None or labels[position] != (verdict.real, verdict.fake)[LABELS.index(conclusion.verdict)]:
        word = answer_format.verdict_words[LABELS.index(conclusion.verdict)]
        spelling = f"{answer_format.verdict_prefix} {word}"
        return Problem(
            "tokens",
            f"its answer does not spell its verdict {spelling!r}, so the score cannot be trained on it; answers of "
            "other systems are written so with --rewrite_answers True",
        )
    if position >= kept:
        needed = expanded_length(tokenized.input_ids[: position + 1], placeholder_tokens)
        cut = f"its verdict is token {needed}, but all after {max_length} is cut off; raise the length or shorten it"
        return Problem("length", cut)
    return None


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


def _unreadable_images(
    records: Sequence[Record],
    problems: Mapping[str, Problem],
    image_folder: Path | None,
    opened: Path,
    measured: Measured,
) -> dict[str, Problem]:
    """Opens the images of all records without a problem; returns which of these have one now, by origin."""
    files = {
        record.origin: (image_folder or Path()) / record.image
        for record in records
        if record.image is not None and record.origin not in problems
    }
    found = open_images(list(files.values()), opened)
    measured.digests |= {origin: found[path].sha256 for origin, path in files.items()}
    return {
        origin: Problem("unreadable image", f"the image does not open: {found[path].problem}")
        for origin, path in files.items()
        if found[path].problem
    }


def _missing_images(records: Sequence[Record], image_folder: Path | None) -> dict[str, str]:
    """Which of the records' images are not there, by origin; each folder is listed once, no image opened."""
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


def _found_by_other_names(
    records: Sequence[Record], problems: dict[str, str], image_folder: Path | None
) -> Sequence[Record]:
    """Gives missing images that are there under another spelling their own path, and takes them off the problems."""
    finder = NameFinder(image_folder or Path())
    found = {}
    for record in records:
        path = finder.find(record.image) if record.image and record.origin in problems else None
        if path is not None and is_file(path):
            del problems[record.origin]
            found[record.origin] = replace(record, image=str(path.absolute()))
    finder.report("training images")
    return [found.get(record.origin, record) for record in records] if found else records


def _files_in(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:
        return set()


def _without(records: Sequence[Record], problems: Mapping[str, Problem], drop_invalid: bool) -> list[Record]:
    if not problems:
        return list(records)
    valid = [record for record in records if record.origin not in problems]
    count, total = len(problems), len(valid) + len(problems)
    kinds = Counter(problem.kind for problem in problems.values())
    counts = ", ".join(f"{kinds[kind]} {meaning}" for kind, meaning in KINDS.items() if kinds[kind])
    listing = list_some([f"{origin}: {problem}" for origin, problem in problems.items()])
    if not drop_invalid:
        raise DataError(
            f"{count} of {total} records cannot be trained on ({counts}); --drop_invalid drops them. {listing}"
        )
    if not valid:
        raise DataError(f"none of the {total} records can be trained on ({counts}). {listing}")
    logger.warning("dropped %d of %d records that cannot be trained on (%s). %s", count, total, counts, listing)
    return valid
