"""Reads one answer of the annotator: attribute sentences, or a rejection with its reason. Nothing is ever executed."""

import ast
import json
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava.cli import DefaultsHelpFormatter, OptionParser, run_cli
from llava.errors import DataError
from llava.files import file_errors
from llava.labels import LABELS, Label
from llava.screening import FAULTS, find_caption_fault, find_evidence_fault, find_fault
from llava.systems.fakereasoning.answer import ATTRIBUTES, STAGES, attribute_name, parse_answer
from mmfr_generation.prompts import ANSWER_KEY, ATTRIBUTE_KEYS

Reasoning = dict[str, str | None]
"""Sentence of every attribute of a label, in the fixed order; None where the annotator saw nothing."""

REASONS = {
    **FAULTS,
    "empty": "the answer is empty",
    "no_object": "the answer holds no JSON object",
    "unreadable": "no object in the answer can be read; it is cut off or is not plain data",
    "no_answer": f'the object has no "{ANSWER_KEY}"',
    "unclear_answer": f'the "{ANSWER_KEY}" says neither real nor fake',
    "cannot_determine": "the annotator could not determine it",
    "other_label": "the annotator names the other class",
    "no_attributes": "the object has no attributes",
    "attributes_not_object": "the attributes are not an object of names and sentences",
    "no_known_attribute": "none of the attributes belongs to the label",
    "different_answers": "the answer holds several objects that do not agree",
    "too_long": "the answer is too long to be one",
    "truncated": "the answer was cut at the token limit",
    "filtered": "a content filter cut or withheld the answer",
    "request_failed": "the request was not answered",
    "unreadable_line": "the line is not an answer of the API",
}
"""Every reason for which an answer can be rejected, with what it means."""

_MAX_CHARACTERS = 200_000
_MAX_DEPTH = 20
_MAX_OBJECTS = 50

_PIECE = re.compile(
    r"""(?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')"""
    r"|(?P<word>None|True|False|null|true|false)\b"
    r"|(?P<number>-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)"
    r"|(?P<mark>[{}\[\],:])"
    r"|(?P<space>\s+)"
    r"|(?P<other>.)",
    flags=re.DOTALL,
)
_PYTHON_WORDS = {"null": "None", "true": "True", "false": "False"}
_CANNOT = re.compile(r"\b(?:can ?not|can't|unable to|could not) (?:be )?determined?\b", flags=re.IGNORECASE)
_NOTHING = frozenset({"", "null", "none", "n/a"})
_TAG = re.compile(rf"</?(?:{'|'.join(STAGES)})>")
_THINKS = re.compile(r"</?think", flags=re.IGNORECASE)


class RejectedAnswer(DataError):
    """An answer that gives no annotation.

    Attributes:
        reason: One of ``REASONS``.
        detail: What in this answer is wrong.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        self.detail = f"{REASONS[reason]}: {detail}" if detail else REASONS[reason]
        super().__init__(self.detail)


def output_control(answer: str | None, label: Label) -> Reasoning:
    """Reads the attribute sentences from an answer about an image of a known class.

    The answer may stand in prose or in a code fence, and may be JSON or a Python literal. An attribute is matched
    without regard to case; one that does not belong to the label is dropped; a value that is no sentence counts as
    null. Several objects are accepted only if they say the same.

    Args:
        answer: The annotator's text.
        label: The class of the image that was asked about.

    Raises:
        RejectedAnswer: The answer gives no annotation of such an image.
    """
    if answer is None or not answer.strip():
        raise RejectedAnswer("empty")
    if len(answer) > _MAX_CHARACTERS:
        raise RejectedAnswer("too_long", f"{len(answer)} characters")
    if "{" not in answer:
        raise RejectedAnswer("no_object")
    objects = list(_objects(answer))
    if not objects:
        raise RejectedAnswer("unreadable")
    with_answer = [value for value in objects if ANSWER_KEY.lower() in value]
    if not with_answer:
        raise RejectedAnswer("no_answer")
    results = [_read_or_reason(value, label) for value in with_answer]
    rejected = [result for result in results if isinstance(result, RejectedAnswer)]
    accepted = [result for result in results if not isinstance(result, RejectedAnswer)]
    if not accepted:
        raise rejected[0]
    if rejected or any(result != accepted[0] for result in accepted):
        raise RejectedAnswer("different_answers", f"{len(results)} objects")
    return accepted[0]


def caption_control(answer: str | None) -> str:
    """Reads a caption from an answer.

    Raises:
        RejectedAnswer: The answer is empty, too long, or holds a tag of the training format.
    """
    caption = " ".join(_clean(answer or "").split())
    if not caption:
        raise RejectedAnswer("empty")
    if len(caption) > _MAX_CHARACTERS:
        raise RejectedAnswer("too_long", f"{len(caption)} characters")
    if _TAG.search(caption):
        raise RejectedAnswer("holds_tag")
    return caption


def screened_reasoning(answer: str | None, label: Label) -> Reasoning:
    """Reads an answer as ``output_control`` does, and refuses what must not be learnt, see ``llava.screening``.

    Raises:
        RejectedAnswer: It gives no annotation, is a refusal, thinks aloud, or a sentence of it has a fault.
    """
    before = find_fault((answer or "").partition("{")[0], prose=False)
    # Polite words around an object do no harm; what was thought can hold objects that were thought better of.
    if before is not None and (before.reason == "refused" or _THINKS.search(answer or "")):
        raise RejectedAnswer(before.reason, before.passage)
    reasoning = output_control(answer, label)
    for name, text in reasoning.items():
        fault = find_evidence_fault(text, label) if text else None
        if fault is not None:
            raise RejectedAnswer(fault.reason, f"{name}: {fault.passage}")
    return reasoning


def screened_caption(answer: str | None) -> str:
    """Reads a caption as ``caption_control`` does, and refuses what must not be learnt, see ``llava.screening``.

    Raises:
        RejectedAnswer: It is no caption, or has a fault.
    """
    caption = caption_control(answer)
    fault = find_caption_fault(caption)
    if fault is not None:
        raise RejectedAnswer(fault.reason, fault.passage)
    return caption


def _read_or_reason(value: dict[str, Any], label: Label) -> Reasoning | RejectedAnswer:
    try:
        _check_verdict(value[ANSWER_KEY.lower()], label)
        return _read_attributes(value, label)
    except RejectedAnswer as rejection:
        return rejection


def _check_verdict(text: Any, label: Label) -> None:
    if not isinstance(text, str):
        raise RejectedAnswer("unclear_answer", repr(text)[:80])
    if _CANNOT.search(text):
        raise RejectedAnswer("cannot_determine", repr(text[:80]))
    word = text.strip(" \t\r\n.").lower()
    verdict = word if word in LABELS else parse_answer(f"<CONCLUSION>{text}</CONCLUSION>", tolerant=True).verdict
    if verdict is None:
        raise RejectedAnswer("unclear_answer", repr(text[:80]))
    if verdict != label:
        raise RejectedAnswer("other_label", f"it says {verdict}, the image is {label}")


def _read_attributes(value: dict[str, Any], label: Label) -> Reasoning:
    own, other = (ATTRIBUTE_KEYS[name].lower() for name in (label, LABELS[1 - LABELS.index(label)]))
    if own not in value and other not in value:
        raise RejectedAnswer("no_attributes")
    attributes = value[own] if own in value else value[other]
    if not isinstance(attributes, dict):
        raise RejectedAnswer("attributes_not_object", repr(attributes)[:80])
    sentences = {attribute_name(name): text for name, text in attributes.items() if isinstance(name, str)}
    if not any(name in sentences for name in ATTRIBUTES[label]):
        raise RejectedAnswer("no_known_attribute", ", ".join(map(str, attributes))[:200])
    reasoning = {name: _sentence(sentences.get(name)) for name in ATTRIBUTES[label]}
    if any(_TAG.search(text) for text in reasoning.values() if text):
        raise RejectedAnswer("holds_tag")
    return reasoning


def _sentence(value: Any) -> str | None:
    if not isinstance(value, str):
        return None
    sentence = _clean(value)
    return None if sentence.rstrip(".").lower() in _NOTHING else sentence


def _clean(text: str) -> str:
    """Strips a text and puts a replacement character for each half of a character, which no file could hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip()


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Yields each object in a text that can be read, its keys in lower case; if one cannot be, the next one in it."""
    start = text.find("{")
    for _ in range(_MAX_OBJECTS):
        if start < 0:
            return
        value, end = _read_json(text, start) or _read_literal(text, start) or (None, start + 1)
        if isinstance(value, dict):
            yield {" ".join(key.split()).lower(): item for key, item in value.items() if isinstance(key, str)}
        start = text.find("{", end)


def _read_json(text: str, start: int) -> tuple[Any, int] | None:
    try:
        return json.JSONDecoder(strict=False).raw_decode(text, start)
    except (ValueError, RecursionError):
        return None


def _read_literal(text: str, start: int) -> tuple[Any, int] | None:
    """Reads an object of strings, numbers, lists and constants, in the spelling of JSON, of Python, or of both."""
    pieces, depth = [], 0
    for match in _PIECE.finditer(text, start):
        kind, piece = match.lastgroup, match[0]
        if kind == "other":
            return None
        if kind == "mark":
            depth += (piece in "{[") - (piece in "}]")
        pieces.append(_string_literal(piece) if kind == "string" else _PYTHON_WORDS.get(piece, piece))
        if depth > _MAX_DEPTH:
            return None
        if depth == 0:
            return _evaluate("".join(pieces), match.end())
    return None


def _string_literal(piece: str) -> str:
    """Spells a string so that Python reads it as JSON would: line breaks, escaped slashes, halves of characters."""
    if piece.startswith('"'):
        try:
            return repr(json.loads(piece, strict=False))
        except ValueError:
            pass
    return piece.replace("\r", "\\r").replace("\n", "\\n")


def _evaluate(source: str, end: int) -> tuple[Any, int] | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.literal_eval(source), end
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def build_parser() -> OptionParser:
    """Returns the options of this script."""
    parser = OptionParser(
        description="Read one answer of the annotator and print its attribute sentences as JSON.",
        formatter_class=DefaultsHelpFormatter,
    )
    parser.add_argument("answer", help="file with the answer's text, or - for the standard input")
    parser.add_argument("--label", choices=LABELS, required=True, help="class of the image that was asked about")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what one answer says, or why it is rejected."""
    options = build_parser().parse_args(arguments)
    with file_errors(options.answer, "read"):
        data = sys.stdin.buffer.read() if options.answer == "-" else Path(options.answer).read_bytes()
    try:
        reasoning = screened_reasoning(data.decode("utf-8", "replace"), options.label)
    except RejectedAnswer as rejection:
        raise DataError(f"rejected as {rejection.reason}: {rejection.detail}") from None
    print(json.dumps(reasoning, ensure_ascii=False, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
