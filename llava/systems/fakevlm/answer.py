"""FakeVLM's words: its question, and how a verdict and its clues are read from free text. Imports no torch.

An answer is a sentence with the verdict and then its clues, ``This is a fake image. …; …; …``. Nothing marks the
verdict but the words themselves, so they are read whole and with their negation: the authors' code, which looks for
"real" anywhere in the first sentence, is in ``protocol``.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llava.labels import LABELS, Label
from llava.systems.base import AnswerFormat, ParsedAnswer, WithoutAttributes

QUESTION = "Does the image looks real/fake?"
"""The published question, its slip of the pen included."""
STAGES = ("CONCLUSION", "REASONING")
"""The sentence with the verdict, and the clues; by the names under which reports give them."""
VERDICT_PREFIX = "This is a"

_SENTENCE = re.compile(r".+?(?:[.!?](?=\s|$)|\n|$)", flags=re.DOTALL)
_STRICT: Mapping[str, Label] = {"real": "real", "fake": "fake"}
_TOLERANT: Mapping[str, Label] = {
    **_STRICT,
    "authentic": "real",
    "genuine": "real",
    "ai-generated": "fake",
    "generated": "fake",
    "synthetic": "fake",
    "manipulated": "fake",
    "forged": "fake",
    "tampered": "fake",
}
_OPPOSITE: Mapping[Label, Label] = {"real": "fake", "fake": "real"}
_NEGATION = re.compile(
    r"(?:\b(?:not|cannot|never|neither|nor|hardly)|n['’]t)(?:\s+[\w'’]+){0,3}\s*$", flags=re.IGNORECASE
)


@dataclass(frozen=True)
class _Word:
    """A word that gives a verdict: the class that it says, where it begins, and whether a negation turned it."""

    label: Label
    start: int
    negated: bool


@dataclass(frozen=True)
class _Sentence:
    """The sentence that decides: where it begins and ends, and its verdict's words."""

    start: int
    end: int
    words: list[_Word]

    @property
    def label(self) -> Label:
        return self.words[0].label


def parse_answer(text: str, *, tolerant: bool = False) -> ParsedAnswer:
    """Reads an answer's verdict and explanation.

    The first sentence with exactly one verdict decides. Words count whole ("unrealistic" says nothing), a negation
    turns them ("not a fake image" is real), a question decides nothing, and a sentence that says both says neither.

    Args:
        text: The answer.
        tolerant: Also read words of the same meaning, such as "authentic" and "AI-generated".
    """
    found = _deciding_sentence(text, _TOLERANT if tolerant else _STRICT)
    if found is None:
        said = f": {text.strip()[:80]!r}" if text.strip() else ", the answer is empty"
        return ParsedAnswer({"REASONING": text.strip()}, problem=f"no sentence says real or fake alone{said}")
    rest = text[found.end :].strip() or text[: found.start].strip()
    return ParsedAnswer({"CONCLUSION": text[found.start : found.end].strip(), "REASONING": rest}, found.label)


def complete_to_verdict(answer: str) -> str:
    """Cuts an answer before its verdict word; an answer without such a word becomes ``VERDICT_PREFIX`` alone.

    FakeVLM's answers open with their verdict, so that without one the opening itself is asked for. So it is where the
    words "real" and "fake" do not compete as they stand: behind a negation, which turns their meaning, or in capitals,
    which are other words to the tokenizer.
    """
    found = _deciding_sentence(answer, _STRICT)
    plain = [word for word in found.words if _is_plain(answer, word)] if found else []
    return answer[: plain[0].start].rstrip() if plain else VERDICT_PREFIX


def parse_training(answers: Sequence[str]) -> ParsedAnswer:
    """Reads the verdict of a training conversation: that of the first answer that has one; all must agree."""
    parsed = [parse_answer(answer) for answer in answers]
    verdicts = {one.verdict for one in parsed if one.verdict is not None}
    if len(verdicts) > 1:
        return ParsedAnswer(problem="its answers conclude differently")
    return next((one for one in parsed if one.verdict is not None), parsed[0])


def shorten(answer: str) -> str | None:
    """Returns the verdict's sentence of a training answer; None if it has no verdict."""
    parsed = parse_answer(answer)
    return parsed.stages["CONCLUSION"] if parsed.verdict else None


def write_answer(label: Label, clues: str) -> str:
    """Writes an answer in the published form.

    Args:
        label: The verdict.
        clues: What speaks for it.
    """
    return f"{VERDICT_PREFIX} {label} image. {clues.strip()}".rstrip()


def _is_plain(text: str, word: _Word) -> bool:
    return not word.negated and text.startswith(word.label, word.start)


def _deciding_sentence(text: str, words: Mapping[str, Label]) -> _Sentence | None:
    """The first sentence whose verdict words all say the same; a question says nothing."""
    pattern = re.compile(rf"(?<![\w-])(?:{'|'.join(words)})(?![\w-])", flags=re.IGNORECASE)
    for sentence in _SENTENCE.finditer(text):
        inside = sentence.group()
        if inside.rstrip().endswith("?"):
            continue
        found = []
        for match in pattern.finditer(inside):
            said, negated = words[match.group().lower()], _NEGATION.search(inside[: match.start()]) is not None
            label = _OPPOSITE[said] if negated else said
            found.append(_Word(label, sentence.start() + match.start(), negated))
        if len({word.label for word in found}) == 1:
            return _Sentence(sentence.start(), sentence.end(), found)
    return None


class _Format(WithoutAttributes):
    """The words above as an ``AnswerFormat``."""

    question = QUESTION
    stages: tuple[str, ...] = STAGES
    explanation: str | None = "REASONING"
    verdict_prefix = VERDICT_PREFIX
    verdict_words: tuple[str, str] = LABELS
    parse = staticmethod(parse_answer)
    complete_to_verdict = staticmethod(complete_to_verdict)
    parse_training = staticmethod(parse_training)
    shorten = staticmethod(shorten)
    write_training = staticmethod(write_answer)


FORMAT: AnswerFormat = _Format()
