"""Plain words for a model that was trained for none of ours: a question, and a lenient parser. Imports no torch."""

import re
from collections.abc import Sequence

from llava.labels import LABELS, Label
from llava.systems.base import AnswerFormat, ParsedAnswer, WithoutAttributes

QUESTION = (
    "Is this image real, taken by a camera, or fake, that is generated or manipulated by a program? Begin with a line "
    "'Verdict: real' or 'Verdict: fake'. Then write a line that begins with 'Why:' and names, in one to three "
    "sentences, what you see in the image that speaks for it."
)
PREFIX = "Verdict:"
_VERDICT = re.compile(r"\bverdict\b[\s*_:\"'`-]*\b(real|fake)\b", re.IGNORECASE)
_FIRST_WORD = re.compile(r"[\s*_\"'`]*(real|fake)\b(?![- ]?(?:or|and)\b)", re.IGNORECASE)
_SENTENCE = re.compile(
    r"\b(?:image|picture|photo|photograph|it)\s+(?:is|appears(?: to be)?|seems(?: to be)?|looks)\s+(?:most likely\s+|"
    r"likely\s+|probably\s+|clearly\s+)?(?:an?\s+)?(?P<not>not\s+)?(?P<word>real|fake|genuine|authentic|"
    r"ai[- ]generated|computer[- ]generated|generated|synthetic|manipulated|edited)\b",
    re.IGNORECASE,
)
_REAL_WORDS = ("real", "genuine", "authentic")
_WHY = re.compile(r"\bwhy\b[\s*_:]*(.*)", re.IGNORECASE | re.DOTALL)


def parse(text: str, *, tolerant: bool = False) -> ParsedAnswer:
    """Reads an answer: the word after ``Verdict:``, else a first word, else plain sentences that all say the same.

    Args:
        text: The answer.
        tolerant: Makes no difference; the parser is lenient always.
    """
    verdict, place = _verdict(text)
    if verdict is None:
        return ParsedAnswer(problem="it says neither real nor fake, or both")
    why = _WHY.search(text)
    reason = why[1] if why else text[place:]
    stages = {"VERDICT": verdict, "WHY": " ".join(reason.strip(" \n\t*_.:,-").split())}
    return ParsedAnswer({name: value for name, value in stages.items() if value}, verdict)


def _verdict(text: str) -> tuple[Label | None, int]:
    """The verdict and where it ends."""
    named = list(_VERDICT.finditer(text))
    words = {found[1].lower() for found in named}
    if len(words) > 1:
        return None, 0
    if named:
        return _label(named[0][1]), named[0].end()
    first = _FIRST_WORD.match(text)
    if first:
        return _label(first[1]), first.end()
    said = [(_label(found["word"], bool(found["not"])), found.end()) for found in _SENTENCE.finditer(text)]
    return said[0] if len({label for label, _ in said}) == 1 else (None, 0)


def _label(word: str, negated: bool = False) -> Label:
    return LABELS[int((word.lower() not in _REAL_WORDS) != negated)]


def complete_to_verdict(answer: str) -> str:
    """Returns the answer up to its verdict word; one without a verdict line gets its beginning."""
    named = _VERDICT.search(answer)
    if named:
        return answer[: named.start(1)].rstrip()
    return PREFIX


class _Format(WithoutAttributes):
    """The words above as an ``AnswerFormat``."""

    question = QUESTION
    stages: tuple[str, ...] = ("VERDICT", "WHY")
    explanation: str | None = "WHY"
    verdict_prefix = PREFIX
    verdict_words: tuple[str, str] = LABELS
    parse = staticmethod(parse)
    complete_to_verdict = staticmethod(complete_to_verdict)

    def parse_training(self, answers: Sequence[str]) -> ParsedAnswer:
        """Reads a training conversation, of which nobody writes any in these words unless the line is there."""
        marked = [answer for answer in answers if answer.lstrip().startswith(PREFIX)]
        return parse(marked[0]) if marked else ParsedAnswer(problem=f"no answer begins with {PREFIX!r}")

    def shorten(self, answer: str) -> str | None:
        """Returns the verdict's line alone."""
        verdict = self.parse_training([answer]).verdict
        return None if verdict is None else f"{PREFIX} {verdict}"


FORMAT: AnswerFormat = _Format()
