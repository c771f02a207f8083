"""P(fake) from the log-probabilities of an answer's tokens. Imports no torch."""

import math
import re
from collections.abc import Sequence

from llava.endpoints import TokenChoice
from llava.systems.base import AnswerFormat


def verdict_probability(text: str, tokens: Sequence[TokenChoice], words: AnswerFormat) -> float | None:
    """Returns P(fake) among the two verdict words at the verdict's token; None where the tokens do not tell it.

    A tokenizer may cut a word, so a token counts for each word that it begins, unless it begins both. A word that is
    not among the alternatives listed counts with the least of their probabilities, or with what is left of 1 if that
    is less: it cannot have more.

    Args:
        text: The answer, with a verdict.
        tokens: Its tokens.
        words: Of the system.
    """
    place = _verdict_place(text, words)
    token = None if place is None else _token_at(text, tokens, place)
    if token is None or not token.top:
        return None
    mass = [0.0, 0.0]
    for piece, logprob in token.top.items():
        begins = [_begins(piece, word) for word in words.verdict_words]
        if begins[0] != begins[1]:
            mass[int(begins[1])] += math.exp(min(logprob, 0.0))
    if not any(mass):
        return None
    unlisted = max(0.0, min(1 - sum(map(math.exp, token.top.values())), math.exp(min(token.top.values()))))
    real, fake = (value or unlisted for value in mass)
    return fake / (real + fake)


def _verdict_place(text: str, words: AnswerFormat) -> int | None:
    """Where in the text the verdict word begins."""
    prefix = words.complete_to_verdict(text)
    start = len(prefix) if text.startswith(prefix) else 0
    options = "|".join(map(re.escape, words.verdict_words))
    found = re.compile(rf"(?<!\w)({options})(?!\w)", re.IGNORECASE).search(text, start)
    return found.start() if found else None


def _token_at(text: str, tokens: Sequence[TokenChoice], place: int) -> TokenChoice | None:
    """The token that holds the character at a place; the tokens' text may begin with blanks that the answer lacks."""
    whole = "".join(token.text for token in tokens)
    offset = whole.find(text[: place + 1])
    if offset < 0:
        return None
    end = 0
    for token in tokens:
        end += len(token.text)
        if end > offset + place:
            return token
    return None


def _begins(piece: str, word: str) -> bool:
    bare = re.sub(r"^[\s▁Ġ*_\"'`]+", "", piece).rstrip().lower()
    return bool(bare) and (word.lower().startswith(bare) or re.match(rf"{re.escape(word.lower())}\b", bare) is not None)
