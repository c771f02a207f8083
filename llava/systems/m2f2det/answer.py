"""M2F2-Det's words: its prompts by name, and how a verdict is read from free text. Imports no torch."""

import re
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import conv_templates
from llava.errors import OptionError
from llava.labels import LABELS, Label
from llava.systems.base import AnswerFormat, ParsedAnswer, WithoutAttributes

DETECTOR_TOKEN = "<deepfake>"
PromptName = Literal["judge", "explain", "training"]
PROMPTS: tuple[PromptName, ...] = get_args(PromptName)
"""``judge`` and ``explain`` as the authors ask, ``training`` as they train."""
PUBLISHED = "published"
"""``conv_mode`` of the authors' weights, which are asked otherwise than they were trained."""
QUESTION = "Is the image real or fake?"
EXPLAIN_QUESTION = "Why does the image look real or fake?"
STAGES = ("VERDICT", "EXPLANATION")
VERDICT_PREFIX = "The image looks"

_SYSTEM = conv_templates["llava_v1"].system
_HEAD, _TAIL = f"Assistant: {_SYSTEM}###Human: {DEFAULT_IMAGE_TOKEN}\n", " ###Assistant:"
_JUDGE = f"{_HEAD} {DETECTOR_TOKEN}\n Determine the authenticity. {QUESTION}{_TAIL}"
_SENTENCE = re.compile(r".+?(?:[.!?](?=\s|$)|\n|$)", flags=re.DOTALL)
_WORDS: Mapping[str, Label] = {"real": "real", "fake": "fake", "computer-generated": "fake"}
_TOLERANT: Mapping[str, Label] = {
    **_WORDS,
    "authentic": "real",
    "genuine": "real",
    "manipulated": "fake",
    "generated": "fake",
    "forged": "fake",
    "synthetic": "fake",
}
_NEGATION = re.compile(
    r"(?:\b(?:not|cannot|never|neither|nor|hardly)|n['’]t)(?:\s+[\w'’]+){0,3}\s*$", flags=re.IGNORECASE
)


# --- prompts


def fill_prompt(name: str, question: str | None, template: str = "v1") -> str:
    """Returns a prompt, up to where the answer begins.

    Args:
        name: ``judge``, ``explain`` or ``training``.
        question: What is asked; None for the system's own question.
        template: Template of the training, for ``training``.

    Raises:
        OptionError: There is no such prompt, ``judge`` gets a question, or one holds a placeholder.
    """
    if name not in PROMPTS:
        raise OptionError(f"unknown prompt {name!r}; known: {', '.join(PROMPTS)}")
    for mark in (DEFAULT_IMAGE_TOKEN, DETECTOR_TOKEN):
        if mark in (question or ""):
            raise OptionError(f"the question must not hold {mark}: image and detector's token stand before it")
    if name == "judge":
        if question is not None:
            raise OptionError("the prompt judge has its own question; ask yours with the prompt explain or training")
        return _JUDGE
    if name == "explain":
        return f"{_HEAD}{DETECTOR_TOKEN}\n{(question or EXPLAIN_QUESTION).strip()}{_TAIL}"
    conversation = conv_templates[template].copy()
    conversation.append_message(conversation.roles[0], arrange(f"{DEFAULT_IMAGE_TOKEN}\n{question or QUESTION}"))
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


def arrange(question: str) -> str:
    """Moves image and detector's token of a training question to its front, as published.

    The lines on which they stood stay, so that a question that begins with both has two empty lines before it; a
    question with an image alone counts as one with both.
    """
    if DETECTOR_TOKEN not in question:
        question = question.replace(DEFAULT_IMAGE_TOKEN, f"{DEFAULT_IMAGE_TOKEN}\n{DETECTOR_TOKEN}", 1)
    rest = question.replace(DEFAULT_IMAGE_TOKEN, "").replace(DETECTOR_TOKEN, "")
    return f"{DEFAULT_IMAGE_TOKEN}\n{DETECTOR_TOKEN}\n{rest}".strip()


# --- answers


def parse_answer(text: str, *, tolerant: bool = False) -> ParsedAnswer:
    """Reads verdict and explanation of an answer.

    The first sentence that says one thing alone decides. Words count whole ("unrealistic" and "really" say nothing), a
    negation turns them, and a question decides nothing.

    Args:
        text: The answer.
        tolerant: Also read words of the same meaning, such as "manipulated".
    """
    found = _deciding(text, _TOLERANT if tolerant else _WORDS)
    if found is None:
        said = f": {text.strip()[:80]!r}" if text.strip() else ", the answer is empty"
        return ParsedAnswer({"EXPLANATION": text.strip()}, problem=f"no sentence says real or fake alone{said}")
    sentence, label, _ = found
    rest = text[sentence.end() :].strip() or text[: sentence.start()].strip()
    return ParsedAnswer({"VERDICT": sentence.group().strip(), "EXPLANATION": rest}, label)


def complete_to_verdict(answer: str) -> str:
    """Cuts an answer before its verdict word; one without such a word, or with a turned one, becomes the prefix."""
    found = _deciding(answer, {name: label for name, label in _WORDS.items() if name in LABELS})
    if found is None or found[2] is None:
        return VERDICT_PREFIX
    start = found[0].start() + found[2]
    # Capitals are other words to the tokenizer, so the two verdicts would not compete there.
    return answer[:start].rstrip() if answer.startswith(found[1], start) else VERDICT_PREFIX


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
    return parsed.stages["VERDICT"] if parsed.verdict else None


def write_answer(label: Label, explanation: str) -> str:
    """Writes an answer in the form of DD-VQA: the verdict, then what speaks for it."""
    return f"{VERDICT_PREFIX} {label}. {explanation.strip()}".rstrip()


def _deciding(text: str, words: Mapping[str, Label]) -> tuple["re.Match[str]", Label, int | None] | None:
    """The first sentence whose words all say the same, what it says, and where its first word stands if not turned."""
    pattern = re.compile(rf"(?<![\w-])(?:{'|'.join(words)})(?![\w-])", flags=re.IGNORECASE)
    for sentence in _SENTENCE.finditer(text):
        inside = sentence.group()
        if inside.rstrip().endswith("?"):
            continue
        said: list[tuple[Label, int | None]] = []
        for match in pattern.finditer(inside):
            label = words[match.group().lower()]
            turned = _NEGATION.search(inside[: match.start()]) is not None
            opposite = LABELS[1 - LABELS.index(label)]
            said.append((opposite if turned else label, None if turned else match.start()))
        if len({label for label, _ in said}) == 1:
            return sentence, said[0][0], said[0][1]
    return None


class _Format(WithoutAttributes):
    """The words above as an ``AnswerFormat``."""

    question = QUESTION
    stages: tuple[str, ...] = STAGES
    explanation: str | None = "EXPLANATION"
    verdict_prefix = VERDICT_PREFIX
    verdict_words: tuple[str, str] = LABELS
    parse = staticmethod(parse_answer)
    complete_to_verdict = staticmethod(complete_to_verdict)
    parse_training = staticmethod(parse_training)
    shorten = staticmethod(shorten)
    write_training = staticmethod(write_answer)
    arrange = staticmethod(arrange)


FORMAT: AnswerFormat = _Format()
