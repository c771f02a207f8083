"""What a tower learns from published answers: verdict, attributes, and the words of caption and reasoning."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llava.labels import FAKE, LABELS
from llava.systems.base import ParsedAnswer
from llava.systems.fakereasoning.answer import FORGERY_ATTRIBUTES

WORD_STAGES = {"caption": "CAPTION", "reasoning": "REASONING"}
"""Stage whose words each group of word targets holds."""
GROUPS = ("verdict", "attributes", *WORD_STAGES)
_WORD = re.compile(r"[^\W\d_]+")
_MOST_COMMON = 0.9
"""Words in a larger share of the answers than this say nothing about an image."""


@dataclass(frozen=True)
class TargetNames:
    """Names of the multi-label targets, in the order of a head's outputs.

    Attributes:
        verdict: The one target "is fake".
        attributes: Forgery attributes.
        caption: Words of the CAPTION stage.
        reasoning: Words of the REASONING stage.
    """

    verdict: list[str] = field(default_factory=lambda: [LABELS[FAKE]])
    attributes: list[str] = field(default_factory=lambda: list(FORGERY_ATTRIBUTES))
    caption: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)

    @classmethod
    def of_answers(cls, answers: Sequence[ParsedAnswer], max_words: int, min_share: float) -> "TargetNames":
        """Takes the words from the answers themselves.

        Args:
            answers: Training answers.
            max_words: Most words of each stage; the more frequent ones are kept.
            min_share: Share of the answers that must contain a word.
        """
        words = {}
        for group, stage in WORD_STAGES.items():
            counts = Counter(word for answer in answers for word in set(_words(answer, stage)))
            kept = [w for w, n in counts.items() if min_share * len(answers) <= n <= _MOST_COMMON * len(answers)]
            words[group] = sorted(kept, key=lambda word: (-counts[word], word))[:max_words]
        return cls(**words)

    def sizes(self) -> list[int]:
        """Returns the number of targets in each of ``GROUPS``."""
        return [len(getattr(self, group)) for group in GROUPS]

    def targets(self, answer: ParsedAnswer) -> Tensor:
        """Returns whether an answer has each target, bool ``[K]``."""
        present: list[bool] = [answer.verdict == name for name in self.verdict]
        present += [name in answer.attributes for name in self.attributes]
        for group, stage in WORD_STAGES.items():
            words = set(_words(answer, stage))
            present += [word in words for word in getattr(self, group)]
        return torch.tensor(present, dtype=torch.bool)

    def weights(self, of_groups: Mapping[str, float]) -> Tensor:
        """Returns each target's weight ``[K]``: a group's weight is shared evenly among its targets."""
        sizes = zip(GROUPS, self.sizes(), strict=True)
        return torch.cat([torch.full((size,), of_groups.get(group, 0.0) / max(size, 1)) for group, size in sizes])


def _words(answer: ParsedAnswer, stage: str) -> list[str]:
    return _WORD.findall(answer.stages.get(stage, "").lower())
