"""What a text must not hold if a model is to learn from it. Imports no torch.

An annotator refuses, thinks aloud, answers in code, or writes a verdict where none is asked for. Such texts are found
here, where answers are read, where training files are checked, and before training alike.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from llava.labels import FAKE, LABELS, REAL, Label

FAULTS = {
    "refused": "the annotator refused",
    "thinking": "it thinks aloud or talks to the user instead of saying what is there",
    "not_prose": "it is JSON or code where a sentence belongs",
    "holds_tag": "it holds a tag",
    "special_token": "it holds an image mark or a special token of a tokenizer",
    "too_short": "it is empty or a single word",
    "verdict_in_caption": "a caption that says whether the image is real or fake",
    "other_verdict": "it gives the image the other class",
}
"""Every fault of a text, with what it means."""

_FLAGS = re.IGNORECASE
_HELP = (
    "help|assist|identify|describe|analy[sz]e|provide|comply|fulfil|view|see|access|process|determine|comment|answer|"
    "discuss|engage|do that|do this|continue|recogni[sz]e|tell|make|create|generate|fulfill|confirm|evaluate|assess"
)
_REFUSAL = re.compile(
    r"^\W*(?:i['’]?m|i am|we['’]?re|we are)\s+(?:\w+\s+)?(?:sorry|afraid|unable|not able)\b"
    r"|^\W*(?:sorry|apologies|my apologies|unfortunately)\b[\s,.:;!]*(?:but\s+)?(?:i|we|as|this)\b"
    r"|^\W*i\s+(?:apologi[sz]e|regret|must decline|decline)\b"
    r"|\bi\s+(?:can(?:not|['’]?t| not)|could(?: not|n['’]?t)|won['’]?t|will not|am unable to|['’]?m unable to|"
    rf"am not able to|['’]?m not able to|do(?: not|n['’]?t) (?:feel comfortable|have the ability to))\s+(?:{_HELP})"
    r"|\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b(?! (?:image|picture|work|piece))"
    r"|\b(?:against|violat\w+)\s+(?:\w+\s+){0,3}(?:policy|policies|guidelines)\b",
    _FLAGS,
)
_THINKING = re.compile(
    r"</?think(?:ing)?\b|<\|?channel\|?>"
    r"|^\W*(?:okay|ok|alright|all right|hm+|well|so|wait|right)\b[\s,.:;!…]+"
    r"(?:so\b|let['’]?s\b|let me\b|i\b|i['’]\w+|we\b|first\b|the user\b|looking at\b)"
    r"|^\W*let(?:['’]?s| me| us)\s+(?:think|look|see|start|begin|analy|examine|break|consider|describe|take|go|try)"
    r"|^\W*(?:the )?user (?:wants|asks|asked|is asking|has|provided|uploaded|would)\b"
    r"|^\W*(?:thinking|thoughts?|analysis|chain of thought|thought process)\W*(?:process)?\s*:"
    r"|^\W*(?:i|we)(?:['’]ll|\s+(?:need|have|should|will|want|must|am going|are going))\s+(?:to\s+)?"
    r"(?:think|look|see|start|analy|describe|examine|determine|figure|consider|write|produce|give|provide)"
    r"|^\W*first,?\s+(?:i|let me|let['’]?s|we)\b"
    r"|^\W*(?:sure|certainly|of course|absolutely|great|no problem)\b\s*[,!.:]"
    r"|^\W*here(?:['’]?s| is| are)\s+(?:an?|the|your|my|one)\s+(?:\w+\s+){0,3}"
    r"(?:description|caption|answer|json|analysis|response|summary|sentences?)\b",
    _FLAGS,
)
_CODE = re.compile(
    r"```|^\s*\{|^\s*\[\s*[\[{\"']|[\"']\w[\w ]*[\"']\s*:\s*(?:[\"'{\[\d]|null\b|none\b|true\b|false\b)", _FLAGS
)
_SPECIAL_TOKEN = re.compile(
    r"<image>|</?s>|<(?:unk|pad|bos|eos|mask|cls|sep|eot|eom|im_start|im_end|start_of_turn|end_of_turn)>"
    r"|<\|[^<>|\n]{1,40}\|>|<｜[^<>｜\n]{1,40}｜>|<\|(?:image|im|end)\w*|\[/?INST\]|<</?SYS>>|<0x[0-9a-f]{2}>",
    _FLAGS,
)
_TAG = re.compile(r"</?[a-z][\w:-]*(?:\s[^<>]*)?/?>", _FLAGS)
_WORD = re.compile(r"\w+")
_NO_SPACES = re.compile("[\u0e00-\u0eff\u1000-\u109f\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff]")
"""Letters of scripts that do not divide words by spaces."""


@dataclass(frozen=True)
class TextFault:
    """What is wrong with a text.

    Attributes:
        reason: One of ``FAULTS``.
        passage: The words that show it.
    """

    reason: str
    passage: str

    def __str__(self) -> str:
        return f"{FAULTS[self.reason]}: {self.passage!r}" if self.passage else FAULTS[self.reason]


def find_fault(text: str, *, prose: bool = True) -> TextFault | None:
    """Returns the first thing that a learnt text must not hold; None if there is nothing.

    Args:
        text: The text.
        prose: Whether it must be one or more plain sentences; a whole answer with tags of its own is not.
    """
    faults = [("refused", _REFUSAL), ("thinking", _THINKING), ("special_token", _SPECIAL_TOKEN)]
    if prose:
        faults += [("not_prose", _CODE), ("holds_tag", _TAG)]
    for reason, pattern in faults:
        found = pattern.search(text)
        if found:
            return TextFault(reason, " ".join(text[found.start() : found.start() + 60].split()))
    if prose and not _says_something(text):
        return TextFault("too_short", text.strip()[:60])
    return None


def _says_something(text: str) -> bool:
    words = _WORD.findall(text)
    return len(words) > 1 or bool(words and len(words[0]) > 3 and _NO_SPACES.search(words[0]))


# --- verdicts

_GENERATED = (
    r"deep ?fake|(?:ai|a\.i\.|computer|machine|artificially|digitally)[- ]"
    r"(?:generated|created|made|altered|manipulated)"
    r"|(?:generated|created|made) by (?:an? )?(?:ai|artificial intelligence|(?:image )?generator|neural network"
    r"|diffusion model)"
)
_FAKE = rf"fake|forged|fabricated|synthetic|synthesi[sz]ed|manipulated|tampered|doctored|inauthentic|{_GENERATED}"
_REAL = r"real|authentic|genuine|unaltered|unmanipulated"
_IMAGE = r"(?:image|picture|photo|photograph|portrait)"
_SURE = r"(?:\s+(?:\w+ly|most|very|indeed|therefore|thus))*"
_STATED = re.compile(
    rf"\b(?:(?:this|the)\s+(?:\w+\s+)?{_IMAGE}(?:\s+itself)?|this)\s+"
    rf"(?:is|was|must be|has to be|appears(?: to be)?|seems(?: to be)?|looks)(?P<no>n['’]t)?{_SURE}(?P<not>\s+not)?"
    rf"{_SURE}(?:\s+an?)?\s+(?:(?P<fake>{_FAKE})|(?P<real>{_REAL}))"
    # What follows must end the statement: "the image is real estate" says something else.
    rf"(?=\s+{_IMAGE}\b|\s*(?:$|[^\w\s'’-])"
    r"|\s+(?:and|because|since|as|due|based|with|but|rather|not|in|by|given)\b)",
    _FLAGS,
)
_NAMED = re.compile(
    rf"\b(?:(?P<fake>(?:{_FAKE})\s+{_IMAGE}|{_GENERATED})|(?P<real>(?:{_REAL})\s+{_IMAGE}))\b",
    _FLAGS,
)
_HEDGE = re.compile(r"\b(?:if|whether|though|unless|suppose|supposing|assuming|when|than)\b[^.;!?]{0,25}$", _FLAGS)
"""Before a statement that supposes and does not state."""


def find_verdicts(text: str, *, named: bool = False) -> Iterator[tuple[Label, str]]:
    """Yields each class that a text gives the image, with the words that do so.

    "The image is fake" states a verdict, "if the image were fake" does not.

    Args:
        text: The text.
        named: Whether naming the class is enough, as in "an AI-generated image of a cat".
    """
    for found in _STATED.finditer(text):
        if not _HEDGE.search(text[: found.start()]):
            number = FAKE if found["fake"] else REAL
            yield LABELS[1 - number if found["no"] or found["not"] else number], found[0]
    for found in _NAMED.finditer(text) if named else ():
        yield LABELS[FAKE if found["fake"] else REAL], found[0]


def find_caption_fault(text: str) -> TextFault | None:
    """Returns what is wrong with a caption: any fault of a text, or a word on the image's class."""
    fault = find_fault(text)
    verdict = next(find_verdicts(text, named=True), None)
    return fault or (TextFault("verdict_in_caption", verdict[1]) if verdict else None)


def find_evidence_fault(text: str, label: Label) -> TextFault | None:
    """Returns what is wrong with a sentence that says why an image is of a class: a fault, or the other class."""
    fault = find_fault(text)
    other = next((words for said, words in find_verdicts(text) if said != label), None)
    return fault or (TextFault("other_verdict", other) if other else None)
