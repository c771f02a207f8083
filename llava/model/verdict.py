"""The words that give a verdict, as a tokenizer spells them, and the probability read from their logits.

``P(fake) = softmax([z_real, z_fake] / temperature)[fake]``, where z are the logits of the two words at the position
that predicts the verdict word.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llava.errors import CheckpointError


@dataclass(frozen=True)
class VerdictTokens:
    """How a tokenizer spells the verdict.

    Attributes:
        pattern: Ids that stand before the verdict word wherever an answer puts it.
        real: Id of the word "real" after the pattern.
        fake: Id of the word "fake" after the pattern.
    """

    pattern: tuple[int, ...]
    real: int
    fake: int

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, prefix: str, words: Sequence[str]) -> "VerdictTokens":
        """Reads pattern and words from a tokenizer.

        The first piece is left out, since how it is cut depends on what precedes it; so is any further piece that is
        cut differently after a line break or a space.

        Args:
            tokenizer: Any tokenizer.
            prefix: Text before the verdict word.
            words: The words for real and fake.

        Raises:
            CheckpointError: The tokenizer cuts the prefix differently before the two words, or spells both words alike.
        """
        real, fake = (_encode(tokenizer, f"{prefix} {word}") for word in words)
        length = _common_length(real, fake)
        if length in (len(real), len(fake)):
            raise CheckpointError(f"this tokenizer spells {words[0]!r} and {words[1]!r} alike after {prefix!r}")
        pattern = real[1:length]
        for context in ("\n\n", ". ", "x\n"):
            ids = _encode(tokenizer, f"{context}{prefix} {words[0]}")
            before = ids[: len(ids) - (len(real) - length)]
            pattern = pattern[len(pattern) - _common_length(pattern[::-1], before[::-1]) :]
        whole, head = _encode(tokenizer, prefix), _encode(tokenizer, prefix.rpartition(" ")[0])
        last_word = len(whole) - _common_length(whole, head)
        if len(pattern) < last_word + 1:
            raise CheckpointError(
                f"this tokenizer cuts {prefix!r} so differently from place to place that the verdict cannot be found"
            )
        return cls(tuple(pattern), real[length], fake[length])

    def class_logits(self, logits: Tensor, temperature: float) -> Tensor:
        """Returns ``[..., 2]``, the scaled logits of real and fake, from logits ``[..., V]``, in float32."""
        return logits[..., [self.real, self.fake]].float() / temperature

    def fake_probability(self, logits: Tensor, temperature: float) -> Tensor:
        """Returns P(fake) in 0..1 from the raw logits ``[..., V]`` at the verdict position, in float64 if possible.

        In float32 all scores whose logit is above 17 would be 1, and could be ranked no more.
        """
        return self.probability_of_pair(self.class_logits(logits, temperature))

    @staticmethod
    def probability_of_pair(logits_2: Tensor) -> Tensor:
        """Returns P(fake) from the scaled logits of real and fake ``[..., 2]``."""
        wide = torch.float32 if logits_2.device.type == "mps" else torch.float64
        return logits_2.to(wide).softmax(dim=-1)[..., 1]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values, for the config."""
        return {**asdict(self), "pattern": list(self.pattern)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "VerdictTokens":
        """Reads what ``to_dict`` wrote."""
        return cls(tuple(values["pattern"]), values["real"], values["fake"])


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return length
