"""Guesses of what an answer goes on with, from texts that were seen: prompt lookup.

Answers repeat themselves: their constant parts, words of the question, sentences of earlier answers. What followed the
same last ids before is guessed to follow them again. The model checks all guesses of a step in one forward, which costs
about as much as one id where weights, and not products, take the time. Greedy decoding keeps only what it would have
chosen itself, so that the text stays the same.
"""

from collections.abc import Sequence

_KEY = 3
"""Ids that must be the same."""
_MOST_KEYS = 200_000


class Lookup:
    """Remembers where ids stood, of texts that may still grow; of the same ids the last place counts."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, ...], tuple[Sequence[int], int]] = {}

    def learn(self, ids: Sequence[int], start: int = _KEY) -> None:
        """Remembers the places of a text from ``start`` on, each by the ids before it."""
        for place in range(max(start, _KEY), len(ids)):
            key = tuple(ids[place - _KEY : place])
            self._places.pop(key, None)  # so that the oldest key is the first
            self._places[key] = (ids, place)
        while len(self._places) > _MOST_KEYS:
            del self._places[next(iter(self._places))]

    def following(self, ids: Sequence[int], number: int) -> list[int]:
        """Returns what is guessed to follow these ids, at most so many."""
        text, place = self._places.get(tuple(ids[-_KEY:]), ((), 0))
        return list(text[place : place + number])


class Guesses:
    """The guesses for one batch of answers.

    Args:
        lookup: What was seen; it learns these answers too.
        number: Ids that are guessed at a time.
        start_ids: Ids before the answers.
        rows: Answers.
    """

    def __init__(self, lookup: Lookup, number: int, start_ids: Sequence[int], rows: int) -> None:
        self._lookup, self._number = lookup, number
        self._texts = [list(start_ids[-_KEY:]) for _ in range(rows)]

    def add(self, row: int, new: int) -> None:
        """Takes an answer's new id."""
        text = self._texts[row]
        text.append(new)
        self._lookup.learn(text, len(text) - 1)

    def of_rows(self, rows: Sequence[int], most: int) -> list[list[int]]:
        """Returns equally many next ids for each of these answers; nothing if for one of them there is no guess."""
        found: list[list[int]] = []
        for row in rows:
            found.append(self._lookup.following(self._texts[row], min(self._number, most)))
            if not found[-1]:
                return []
        length = min(map(len, found))
        return [ids[:length] for ids in found]
