"""Everything of FakeReasoning that is words: question, tags, verdicts, attributes, and the answer's one parser.

This module imports no torch, so that the data pipeline can use it alone.
Facts come from arXiv 2503.21210 and its published data.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from llava.errors import DataError
from llava.labels import LABELS, Label
from llava.screening import find_caption_fault, find_evidence_fault, find_fault
from llava.systems.base import AnswerFormat, ParsedAnswer

Form = Literal["cot", "reasoning", "verdict"]

QUESTION = (
    "Is this image real or fake? Please describe the image, reasoning step-by-step and conclude with "
    "'this image is real' or 'this image is fake'."
)
SUMMARY = (
    "I will determine if the image is real or fake by analyzing its content and identifying forgery attributes from "
    "both low-level and high-level perspectives. I will then conclude by stating either 'this image is real' or "
    "'this image is fake' based on my analysis."
)
"""The sentence that the SUMMARY stage of every published training answer holds."""
FORCED_SUMMARY = f"<SUMMARY> {SUMMARY} </SUMMARY>\n\n"
"""Beginning of every published training answer; given as ``assistant_prefix`` it need not be decoded."""

STAGES = ("SUMMARY", "CAPTION", "REASONING", "CONCLUSION")
FORM_STAGES: dict[Form, tuple[str, ...]] = {
    "cot": STAGES,
    "reasoning": ("REASONING", "CONCLUSION"),
    "verdict": ("CONCLUSION",),
}
"""Stages of each form of answer; ``verdict`` is the paper's "answer only" ablation."""

LOW_LEVEL_PREFIX = "From low-level perspective:"
HIGH_LEVEL_PREFIX = "From high-level perspective:"

VERDICT_PREFIX = "<CONCLUSION> This image is"
"""What stands before the verdict word; the probability mapper looks for it (arXiv 2503.21210, section on CPM)."""
VERDICT_WORDS = LABELS

FORGERY_ATTRIBUTES = (
    "Inconsistent Lighting and Shadows",
    "Irregular Image Edges",
    "Anomalous Image Texture",
    "Low Image Quality",
    "Semantic Irrationality",
)
AUTHENTIC_ATTRIBUTES = (
    "Consistent Lighting and Shadows",
    "Smooth and Natural Image Edges",
    "Natural and Consistent Image Texture",
    "High Image Quality",
    "Semantic Rationality",
)
"""Attribute names in their fixed order; the i-th authentic one is the opposite of the i-th forgery one."""
ATTRIBUTES: dict[Label, tuple[str, ...]] = {"real": AUTHENTIC_ATTRIBUTES, "fake": FORGERY_ATTRIBUTES}
HIGH_LEVEL_ATTRIBUTES = frozenset({"Semantic Irrationality", "Semantic Rationality"})

_CONCLUSION_TAG = "<CONCLUSION>"
_SPELLING = {name.lower(): name for name in (*FORGERY_ATTRIBUTES, *AUTHENTIC_ATTRIBUTES)}
_TAG = re.compile(rf"<(/?)({'|'.join(STAGES)})>")
_ATTRIBUTE_HEADING = re.compile(rf"(?<!\w)({'|'.join(re.escape(name) for name in _SPELLING)})\s*:", flags=re.IGNORECASE)
_PERSPECTIVE = re.compile(rf"{re.escape(LOW_LEVEL_PREFIX)}|{re.escape(HIGH_LEVEL_PREFIX)}", flags=re.IGNORECASE)
_STRICT_VERDICT = {f"This image is {word}.": word for word in VERDICT_WORDS}
_TOLERANT_VERDICT = re.compile(
    r"(?:(?:therefore|thus|hence|overall|so|in conclusion|based on (?:my|this|the) analysis),?\s+)?"
    r"(?:(?:this|the) (?:image|picture|photo) is(?: an?)? (?P<word>real|fake)(?: (?:image|picture|photo))?"
    r"|this is an? (?P<noun>real|fake) (?:image|picture|photo))"
    r"[.!]?",
    flags=re.IGNORECASE,
)


def attribute_name(name: str) -> str | None:
    """Returns the one spelling of an attribute name given in any case and spacing, or None if there is none."""
    return _SPELLING.get(" ".join(name.split()).lower())


def write_reasoning(label: Label, sentences: Mapping[str, str | None]) -> str:
    """Writes the REASONING stage's text from attribute sentences, low-level attributes first.

    Args:
        label: Class of the image; it decides which attributes may occur.
        sentences: Sentence of each attribute; None or an empty sentence means that the attribute is not there.

    Raises:
        DataError: An attribute does not belong to the label, or no sentence is given.
    """
    unknown = sorted(set(sentences) - set(ATTRIBUTES[label]))
    if unknown:
        raise DataError(f"no attribute of a {label} image: {', '.join(unknown)}; known: {', '.join(ATTRIBUTES[label])}")
    present = [(name, " ".join((sentences.get(name) or "").split())) for name in ATTRIBUTES[label]]
    parts = []
    for prefix, high_level in ((LOW_LEVEL_PREFIX, False), (HIGH_LEVEL_PREFIX, True)):
        named = [f"{name}: {text}" for name, text in present if text and (name in HIGH_LEVEL_ATTRIBUTES) == high_level]
        if named:
            parts.append(" ".join([prefix, *named]))
    if not parts:
        raise DataError("no attribute has a sentence, so there is nothing to reason from")
    return " ".join(parts)


def write_answer(label: Label, *, reasoning: str = "", caption: str = "", form: Form = "cot") -> str:
    """Writes an answer in the published format.

    Args:
        label: The verdict.
        reasoning: Text of the REASONING stage; needed unless ``form`` is ``"verdict"``.
        caption: Text of the CAPTION stage; needed if ``form`` is ``"cot"``.
        form: Which stages the answer has, see ``FORM_STAGES``.

    Returns:
        The stages in order, each as ``<TAG> text </TAG>``, separated by an empty line.

    Raises:
        DataError: An unknown label or form, an empty stage, or a text that itself holds a stage's tag.
    """
    if label not in LABELS:
        raise DataError(f"unknown label {label!r}; it must be one of {', '.join(LABELS)}")
    if form not in FORM_STAGES:
        raise DataError(f"unknown form {form!r}; it must be one of {', '.join(FORM_STAGES)}")
    texts = {
        "SUMMARY": SUMMARY,
        "CAPTION": caption.strip(),
        "REASONING": reasoning.strip(),
        "CONCLUSION": f"This image is {label}.",
    }
    for stage in FORM_STAGES[form]:
        if not texts[stage]:
            raise DataError(f"the {stage} stage is empty")
        if _TAG.search(texts[stage]):
            raise DataError(f"the {stage} stage holds a stage's tag: {texts[stage]!r}")
    return "\n\n".join(f"<{stage}> {texts[stage]} </{stage}>" for stage in FORM_STAGES[form])


def write_training(label: Label, explanation: str) -> str:
    """Writes a training answer from a verdict and what speaks for it: REASONING and CONCLUSION, or that one alone."""
    return write_answer(label, reasoning=explanation, form="reasoning" if explanation.strip() else "verdict")


def parse_answer(text: str, *, tolerant: bool = False) -> ParsedAnswer:
    """Reads an answer: its stages, its verdict and the attributes it names.

    A verdict is read from the CONCLUSION stage alone. By default that stage must stand once, be closed, and say
    exactly ``This image is real.`` or ``This image is fake.``, as the published format does.

    Args:
        text: The answer.
        tolerant: Also accept a CONCLUSION that is not closed because the text ends, another case, a missing full
            stop, and plain variants such as "The image is fake" or "This is a fake image". Anything that says
            more than one plain sentence ("not fake", "unrealistic", "real or fake") is never a verdict.
    """
    stages, problems = _split_stages(text, tolerant=tolerant)
    reasoning = stages.get("REASONING", "")
    verdict, problem = _read_verdict(stages, problems, tolerant=tolerant)
    return ParsedAnswer(stages, verdict, parse_attributes(reasoning), problem)


def complete_to_verdict(answer: str) -> str:
    """Brings any answer to the point where only the verdict word is missing.

    An answer that has a verdict is cut before it, one that has opened its CONCLUSION is cut back to there; else its
    open stage is closed and a CONCLUSION opened.

    Returns:
        A text that ends in ``VERDICT_PREFIX``.
    """
    before, prefix, _ = answer.partition(VERDICT_PREFIX)
    if prefix:
        return f"{before}{VERDICT_PREFIX}"
    tag, rest = VERDICT_PREFIX.split(" ", 1)
    before, opened, _ = answer.partition(tag)
    if opened:
        return f"{before}{tag} {rest}"
    open_stage = None
    for found in _TAG.finditer(answer):
        open_stage = None if found.group(1) else found.group(2)
    closing = f" </{open_stage}>" if open_stage else ""
    written = f"{answer.rstrip()}{closing}"
    return f"{written}\n\n{VERDICT_PREFIX}" if written else VERDICT_PREFIX


def parse_attributes(reasoning: str) -> dict[str, str]:
    """Returns the sentence after each ``<attribute name>:`` of a reasoning; the first one counts."""
    return {name: sentence for name, sentence in _headed(reasoning).items() if sentence}


def _headed(reasoning: str) -> dict[str, str]:
    headings = list(_ATTRIBUTE_HEADING.finditer(reasoning))
    ends = [following.start() for following in headings[1:]] + [len(reasoning)]
    found: dict[str, str] = {}
    for heading, end in zip(headings, ends, strict=False):
        sentence = _PERSPECTIVE.sub(" ", reasoning[heading.end() : end])
        found.setdefault(_SPELLING[heading.group(1).lower()], " ".join(sentence.split()))
    return found


def _split_stages(text: str, *, tolerant: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Splits an answer at its tags; returns the stages and what is wrong with a stage."""
    stages: dict[str, str] = {}
    problems: dict[str, str] = {}
    name, start = None, 0
    for tag in _TAG.finditer(text):
        closing, stage = bool(tag.group(1)), tag.group(2)
        if not closing:
            if name is not None:
                problems.setdefault(name, f"<{name}> is not closed before <{stage}>")
            name, start = stage, tag.end()
            continue
        if stage != name:
            problems.setdefault(stage, f"</{stage}> closes a stage that is not open")
            continue
        content = text[start : tag.start()].strip()
        if stage in stages and not (tolerant and stages[stage] == content):
            problems.setdefault(stage, f"<{stage}> stands more than once")
        stages.setdefault(stage, content)
        name = None
    if name is not None:
        if tolerant and name not in stages:
            stages[name] = text[start:].strip()
        else:
            problems.setdefault(name, f"<{name}> is not closed")
    return stages, problems


def _read_verdict(
    stages: Mapping[str, str], problems: Mapping[str, str], *, tolerant: bool
) -> tuple[Label | None, str]:
    if "CONCLUSION" in problems:
        return None, problems["CONCLUSION"]
    if "CONCLUSION" not in stages:
        return None, "there is no <CONCLUSION>"
    text = stages["CONCLUSION"]
    if text in _STRICT_VERDICT:
        return _STRICT_VERDICT[text], ""
    if tolerant:
        match = _TOLERANT_VERDICT.fullmatch(" ".join(text.split()))
        if match:
            word = (match["word"] or match["noun"]).lower()
            return LABELS[VERDICT_WORDS.index(word)], ""
    return None, f"the conclusion is neither 'This image is real.' nor 'This image is fake.': {text[:80]!r}"


def parse_training(answers: Sequence[str]) -> ParsedAnswer:
    """Reads the verdict of a training conversation: that of the first answer that has a CONCLUSION.

    If several have one, they must agree; if there is no verdict, ``problem`` says why.
    """
    parsed = [parse_answer(answer) for answer in answers if _CONCLUSION_TAG in answer] or [parse_answer(answers[-1])]
    if any(other.verdict != parsed[0].verdict for other in parsed):
        return ParsedAnswer(problem="its answers conclude differently")
    return parsed[0]


def screen(answers: Sequence[str]) -> str:
    """Says what in the texts of a training conversation must not be learnt; empty if there is nothing."""
    for answer in answers:
        stages, _ = _split_stages(answer, tolerant=False)
        faults = [("an answer", find_fault(answer, prose=False))]
        if "CAPTION" in stages:
            faults.append(("CAPTION", find_caption_fault(stages["CAPTION"])))
        verdict, _ = _read_verdict(stages, {}, tolerant=False) if "CONCLUSION" in stages else (None, "")
        if "REASONING" in stages and verdict is not None:
            foreign = sorted(set(_headed(stages["REASONING"])) - set(ATTRIBUTES[verdict]))
            if foreign:
                return f"REASONING names {', '.join(foreign)}, and the image is {verdict}"
            for name, text in _evidence(stages["REASONING"]):
                faults.append((f"REASONING, {name}" if name else "REASONING", find_evidence_fault(text, verdict)))
        for where, fault in faults:
            if fault is not None:
                return f"{where} must not be learnt: {fault}"
    return ""


def _evidence(reasoning: str) -> list[tuple[str, str]]:
    """Name and sentence of each attribute, those without a sentence too; the whole text where it names none."""
    if not _ATTRIBUTE_HEADING.search(reasoning):
        return [("", reasoning)]
    return list(_headed(reasoning).items())


def shorten(answer: str) -> str | None:
    """Returns the CONCLUSION of a training answer alone; None if it has no verdict."""
    verdict = parse_answer(answer).verdict
    return None if verdict is None else write_answer(verdict, form="verdict")


class _Format:
    """The words above as an ``AnswerFormat``."""

    question = QUESTION
    stages: tuple[str, ...] = STAGES
    explanation: str | None = "REASONING"
    attributes: Mapping[Label, tuple[str, ...]] = ATTRIBUTES
    verdict_prefix = VERDICT_PREFIX
    verdict_words: tuple[str, str] = VERDICT_WORDS
    closing = "</CONCLUSION>"
    constant_stages = ("SUMMARY",)
    constant_texts = (FORCED_SUMMARY,)
    marks = (_CONCLUSION_TAG,)
    parse = staticmethod(parse_answer)
    complete_to_verdict = staticmethod(complete_to_verdict)
    parse_training = staticmethod(parse_training)
    screen = staticmethod(screen)
    shorten = staticmethod(shorten)
    attribute_name = staticmethod(attribute_name)
    write_training = staticmethod(write_training)


FORMAT: AnswerFormat = _Format()
