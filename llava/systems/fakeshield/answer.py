"""Everything of FakeShield that is words: tags, questions, prompts, verdicts and their parser (arXiv 2410.02761).

This module imports no torch, so that the data pipeline can use it alone.
"""

import re
from collections.abc import Sequence

from llava.labels import LABELS, Label
from llava.systems.base import AnswerFormat, ParsedAnswer, WithoutAttributes

QUESTION = (
    "Was this photo taken directly from the camera without any processing? Has it been tampered with by any artificial "
    "photo modification techniques such as ps? Please zoom in on any details in the image, paying special attention to "
    "the edges of the objects, capturing some unnatural edges and perspective relationships, some incorrect semantics, "
    "unnatural lighting and darkness etc."
)
DOMAINS = ("aigc", "deepfake", "photoshop")
"""Names of the tagger's classes, by number. None of them means an untouched image: a tag names the kind of data."""
DOMAIN_TITLES = ("AIGC inpainting", "DeepFake", "Photoshop")


def tag_sentence(domain: int) -> str:
    """Returns the sentence of a domain that stands before the question, with its final blank."""
    return f"This is a picture that is suspected to have been tampered with by {DOMAIN_TITLES[domain]}. "


def is_tagged(question: str) -> bool:
    """Whether the sentence of a domain stands before a question."""
    return question.startswith(tuple(map(tag_sentence, range(len(DOMAINS)))))


# --- what the segmenter is asked, and says

SEG = "[SEG]"
ADDED_TOKENS = ("<im_start>", "<im_end>", "<bbox>", "<point>", SEG, "<p>", "</p>")
"""Tokens of the segmenter beyond Llama's, in the order of their ids."""
OVERVIEW = "The <im_start><image><im_end> provides an overview of the picture.\n"
"""Beginning of every message to the segmenter."""
_DESCRIBED = (
    "This photo has been tampered. The following is a description of the tampering area and the basis for judgment: \n"
)
MASK_QUESTIONS = (
    "Based on the description of the tampered area, please give the mask of the tampered area.",
    "Please provide a mask of the tampered region based on the description of the tampered region given above.",
    "Please give the mask of the tampered area based on the description of the tampered area given above.",
)
BARE_QUESTIONS = tuple(
    "This is a tampered image, point out the areas you believe have been tampered with. "
    f"Please {verb} segmentation mask."
    for verb in ("respond with", "output")
)
MASK_ANSWERS = (
    "It is [SEG].",
    "Sure, [SEG].",
    "Sure, it is [SEG].",
    "Sure, the segmentation result is [SEG].",
    "[SEG].",
)


def mask_request(description: str | None, variant: int = 0) -> str:
    """Returns what the segmenter is asked, after ``OVERVIEW``.

    Args:
        description: The explainer's whole answer; None asks without one.
        variant: Which of the published wordings.
    """
    if description is None:
        return f"\n{BARE_QUESTIONS[variant % len(BARE_QUESTIONS)]}"
    described = description.replace("&lt;", "<").replace("&gt;", ">")
    return f"{_DESCRIBED}{described}\n {MASK_QUESTIONS[variant % len(MASK_QUESTIONS)]}"


# --- the explainer's answers

STAGES = ("AREA", "BASIS")
HEADING = "1. Whether the picture has been tampered with / Description of the tampered area:"
VERDICT_PREFIX = "The picture has"
VERDICT_WORDS = ("not", "been")
"""After the prefix: has *not* been tampered with, has *been* tampered with."""
GATE = "has not been tampered with"
"""The published code makes no mask for an answer that holds exactly this."""

_HEADING = re.compile(
    r"whether the [\w ]+? has been tampered with\s*(?:/\s*description of the tampered area)?\s*:?", re.I
)
_BASIS = re.compile(r"(?:^|\n)\s*2\.\s*(?:judge?ment basis\s*:)?", re.I)
_NUMBER = re.compile(r"^\s*1\.\s*")
_CHANGED = "tampered|modified|altered|edited|manipulated|doctored|forged|changed|retouched|photoshopped"
_DECIDING = re.compile(rf"\bhas(?=\s+(?:not\s+)?been\s+(?:{_CHANGED})\b)", re.I)
_STATEMENTS: tuple[tuple[Label, re.Pattern[str]], ...] = (
    ("real", re.compile(rf"\b(?:not|never|n['’]t|no)\b[\w\s]*?\b(?:been\s+|be\s+)?(?:{_CHANGED})\b", re.I)),
    ("real", re.compile(rf"\w+n['’]t\b[\w\s]*?\b(?:been\s+|be\s+)?(?:{_CHANGED})\b", re.I)),
    ("real", re.compile(r"\b(?:un(?:altered|edited|modified|manipulated|tampered)|untouched)\b", re.I)),
    ("real", re.compile(r"(?<!not )(?<!n't )\b(?:authentic|genuine)\b", re.I)),
    (
        "real",
        re.compile(r"\bno\s+(?:signs?|traces?|evidence)\s+of\s+(?:\w+\s+)?(?:tampering|manipulation|editing)\b", re.I),
    ),
    (
        "fake",
        re.compile(
            rf"\b(?:has|have|had|was|were|is|are|been)\s+(?:(?!likely|possibly|probably)\w+ly\s+)?(?:been\s+)?(?:{_CHANGED})\b",
            re.I,
        ),
    ),
    ("fake", re.compile(r"\bnot\s+(?:an?\s+)?(?:authentic|genuine)\b", re.I)),
)
_TOLERANT: tuple[tuple[Label, re.Pattern[str]], ...] = (
    ("real", re.compile(r"\b(?:not|n't)\s+(?:an?\s+)?(?:fake|ai[- ]generated|synthetic)\b", re.I)),
    (
        "real",
        re.compile(
            r"(?<!not )(?<!n't )\b(?:is|looks|seems|appears)\s+(?:to be\s+)?(?:an?\s+)?(?:real|original)\b", re.I
        ),
    ),
    ("fake", re.compile(r"(?<!not )(?<!n't )(?<!not a )\b(?:fake|ai[- ]generated|synthetic|forgery)\b", re.I)),
    ("fake", re.compile(r"\bnot\s+(?:real|original)\b", re.I)),
    ("fake", re.compile(rf"\b(?:likely|probably|suspected to be)\s+(?:{_CHANGED})\b", re.I)),
)
_SENTENCE = re.compile(r"[^.!?\n]+[.!?]?")
_LEFT_OPEN = re.compile(r"\b(?:whether|if)\b.*", re.I)


def parse_answer(text: str, *, tolerant: bool = False) -> ParsedAnswer:
    """Reads an answer: where it was changed, on what that rests, and the verdict.

    The first sentence that says plainly whether the image was changed decides; the answer's heading and its basis are
    left out. "Tampered", "modified", "edited" and the like are one, as are "not tampered", "unaltered" and "genuine".

    Args:
        text: The answer.
        tolerant: Also read sentences that call the image fake or real, AI-generated or original, or likely edited.
    """
    area, basis = _split(text)
    stages = {name: part for name, part in zip(STAGES, (area, basis), strict=True) if part}
    statements = (*_STATEMENTS, *_TOLERANT) if tolerant else _STATEMENTS
    for sentence in _SENTENCE.findall(" ".join(area.split())):
        verdict = _verdict_of(sentence, statements)
        if verdict is not None:
            return ParsedAnswer(stages, verdict)
    problem = "the answer is empty" if not text.strip() else "the answer does not say whether the image was changed"
    return ParsedAnswer(stages, None, problem=problem)


def _verdict_of(sentence: str, statements: Sequence[tuple[Label, re.Pattern[str]]]) -> Label | None:
    """The verdict of a sentence: that of its first statement; of two at one place, the first in the list."""
    said = _LEFT_OPEN.sub("", sentence)
    found = [
        (match.start(), rank, label) for rank, (label, form) in enumerate(statements) if (match := form.search(said))
    ]
    # "appears not to have been tampered": the denial stands before what it denies.
    return min(found)[2] if found else None


def _split(text: str) -> tuple[str, str]:
    """The two numbered parts of an answer without their headings."""
    match = _BASIS.search(text)
    area, basis = (text[: match.start()], text[match.end() :]) if match else (text, "")
    return _HEADING.sub("", _NUMBER.sub("", area), count=1).strip(), basis.strip()


def gate_is_open(text: str) -> bool:
    """Whether the published code makes a mask for an answer: unless it holds ``GATE`` letter for letter."""
    return GATE not in text


def complete_to_verdict(answer: str) -> str:
    """Brings any answer to the point where only "not" or "been" is missing.

    An answer that decides between "has been" and "has not been" is cut there; to any other one, the opening of such a
    sentence is added.
    """
    match = _HEADING.search(answer)
    start = match.end() if match else 0
    deciding = _DECIDING.search(answer, start)
    basis = _BASIS.search(answer)
    if deciding and (basis is None or deciding.start() < basis.start()):
        return answer[: deciding.end()]
    written = answer.rstrip()
    return f"{written}\n\n{VERDICT_PREFIX}" if written else VERDICT_PREFIX


def parse_training(answers: Sequence[str]) -> ParsedAnswer:
    """Reads the verdict of a training conversation: that of the first answer that has one; all must agree."""
    parsed = [found for found in map(parse_answer, answers) if found.verdict is not None]
    if not parsed:
        return ParsedAnswer(problem="no answer says whether the image was changed")
    if any(other.verdict != parsed[0].verdict for other in parsed):
        return ParsedAnswer(problem="its answers disagree")
    return parsed[0]


def write_answer(label: Label, area: str = "", basis: str = "") -> str:
    """Writes an answer in the published form.

    Args:
        label: The verdict.
        area: Sentences about where and how a fake was changed.
        basis: Why.
    """
    verdict = "has been tampered with." if label == LABELS[1] else "has not been tampered with."
    first = " ".join(part for part in (HEADING, f"The picture {verdict}", area.strip()) if part)
    return f"{first}\n\n2. Judgment basis: {basis.strip()}" if basis.strip() else first


def shorten(answer: str) -> str | None:
    """Returns the part of a training answer that gives the verdict alone; None if it has no verdict."""
    verdict = parse_answer(answer).verdict
    return (
        None if verdict is None else f"{VERDICT_PREFIX} {'been' if verdict == LABELS[1] else 'not been'} tampered with."
    )


def write_training(label: Label, explanation: str) -> str:
    """Writes a training answer from a verdict and what speaks for it."""
    return write_answer(label, basis=explanation)


class _Format(WithoutAttributes):
    """The words above as an ``AnswerFormat``."""

    marks = ("Description of the tampered area", "Judgment basis:")
    write_training = staticmethod(write_training)

    question = QUESTION
    stages: tuple[str, ...] = STAGES
    explanation: str | None = "BASIS"
    verdict_prefix = VERDICT_PREFIX
    verdict_words: tuple[str, str] = VERDICT_WORDS
    parse = staticmethod(parse_answer)
    complete_to_verdict = staticmethod(complete_to_verdict)
    parse_training = staticmethod(parse_training)
    shorten = staticmethod(shorten)


FORMAT: AnswerFormat = _Format()
