"""Classification Probability Mapper (arXiv 2503.21210): ties the words "real" and "fake" to a probability.

At the position k that predicts the verdict word, ``P(fake) = softmax([z_real, z_fake] / tau)[fake]``, where z are the
logits of the two words. Training adds the cross-entropy of these two classes, averaged over the rows where k was found.

Shapes: B rows, T positions of the expanded sequence, V words.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llava.constants import IGNORE_INDEX

SEARCHES = ("labels", "predictions")


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
            ValueError: The tokenizer cuts the prefix differently before the two words, or spells both words alike.
        """
        real, fake = (_encode(tokenizer, f"{prefix} {word}") for word in words)
        length = _common_length(real, fake)
        if length in (len(real), len(fake)):
            raise ValueError(f"this tokenizer spells {words[0]!r} and {words[1]!r} alike after {prefix!r}")
        pattern = real[1:length]
        for context in ("\n\n", ". ", "x\n"):
            ids = _encode(tokenizer, f"{context}{prefix} {words[0]}")
            before = ids[: len(ids) - (len(real) - length)]
            pattern = pattern[len(pattern) - _common_length(pattern[::-1], before[::-1]) :]
        said = _encode(tokenizer, prefix.split()[-1])
        if len(pattern) < len(said) + 1:
            raise ValueError(
                f"this tokenizer cuts {prefix!r} so differently from place to place that the verdict cannot be found"
            )
        return cls(tuple(pattern), real[length], fake[length])

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values, for the config."""
        return {**asdict(self), "pattern": list(self.pattern)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "VerdictTokens":
        """Reads what ``to_dict`` wrote."""
        return cls(tuple(values["pattern"]), values["real"], values["fake"])


@dataclass(frozen=True)
class MapperOutput:
    """The mapper's loss on a batch.

    Attributes:
        loss: Mean cross-entropy over the rows that matched, ``[]``; 0 if none did.
        rows: How many rows matched, ``[]``.
        correct: How many of them have the likelier class right, ``[]``.
        positions: Position k of each row, ``[B]``; -1 where none was found.
    """

    loss: Tensor
    rows: Tensor
    correct: Tensor
    positions: Tensor


class ProbabilityMapper:
    """Training loss and inference score at the verdict position.

    Args:
        tokens: How the verdict is spelled.
        temperature: tau; published: 10.
        search: Where the pattern is looked for: ``labels``, so that every row with a verdict counts, or
            ``predictions``, the teacher-forced argmax, so that a row counts once the model spells the pattern itself
            (the authors' way).

    Raises:
        ValueError: An unknown search, or a temperature that is not above 0.
    """

    def __init__(self, tokens: VerdictTokens, temperature: float = 10.0, search: str = "labels") -> None:
        if search not in SEARCHES:
            raise ValueError(f"unknown cpm_search {search!r}; known: {', '.join(SEARCHES)}")
        if temperature <= 0:
            raise ValueError(f"cpm_temperature must be above 0, not {temperature}")
        self.tokens = tokens
        self.temperature = temperature
        self.search = search

    def find(self, spelled_BS: Tensor, length: int) -> Tensor:
        """Finds where the verdict is predicted.

        Args:
            spelled_BS: Ids where entry s is the word that position s predicts.
            length: Number of positions T; a pattern that leaves no position for the verdict is no match.

        Returns:
            Position k of each row's first match, ``[B]``; -1 where there is none.
        """
        size = len(self.tokens.pattern)
        if spelled_BS.shape[1] < size:
            return spelled_BS.new_full((spelled_BS.shape[0],), -1)
        pattern = spelled_BS.new_tensor(self.tokens.pattern)
        matches_BW = (spelled_BS.unfold(1, size, 1) == pattern).all(dim=-1)[:, : length - size]
        if matches_BW.shape[1] == 0:
            return spelled_BS.new_full((spelled_BS.shape[0],), -1)
        first = matches_BW.int().argmax(dim=1) + size
        return torch.where(matches_BW.any(dim=1), first, -1)

    def class_logits(self, logits: Tensor) -> Tensor:
        """Returns ``[..., 2]``, the scaled logits of real and fake, from logits ``[..., V]``, in float32."""
        return logits[..., [self.tokens.real, self.tokens.fake]].float() / self.temperature

    def fake_probability(self, logits: Tensor) -> Tensor:
        """Returns P(fake) in 0..1 from the raw logits ``[..., V]`` at the verdict position."""
        return self.class_logits(logits).softmax(dim=-1)[..., 1]

    def loss(self, logits_BTV: Tensor, forgery_labels_B: Tensor, labels_BT: Tensor | None = None) -> MapperOutput:
        """Computes the training loss.

        Args:
            logits_BTV: The model's logits over the expanded sequence.
            forgery_labels_B: Real = 0, fake = 1, -100 for a row without a class.
            labels_BT: Labels of the expanded sequence; needed for ``search="labels"``.

        Raises:
            ValueError: The labels are needed but missing.
        """
        if self.search == "labels":
            if labels_BT is None:
                raise ValueError("cpm_search='labels' looks for the verdict in the labels, but no labels were given")
            positions_B = self.positions_in_labels(labels_BT, forgery_labels_B).to(logits_BTV.device)
        else:
            positions_B = self.positions(logits_BTV.argmax(dim=-1), logits_BTV.shape[1], forgery_labels_B)
        at_verdict_BV = logits_BTV[torch.arange(len(positions_B), device=logits_BTV.device), positions_B.clamp(min=0)]
        return self.loss_at(at_verdict_BV, positions_B, forgery_labels_B)

    def positions(self, spelled_BS: Tensor, length: int, forgery_labels_B: Tensor) -> Tensor:
        """Finds where the verdict is predicted as ``find`` does, -1 also for a row without a class."""
        forgery_labels_B = forgery_labels_B.to(spelled_BS.device)
        return torch.where(forgery_labels_B == IGNORE_INDEX, -1, self.find(spelled_BS, length))

    def positions_in_labels(self, labels_BT: Tensor, forgery_labels_B: Tensor) -> Tensor:
        """Finds where the verdict is predicted by the labels of a sequence, ``[B]``; -1 where there is none."""
        return self.positions(labels_BT[:, 1:], labels_BT.shape[1], forgery_labels_B)

    def loss_at(self, at_verdict_BV: Tensor, positions_B: Tensor, forgery_labels_B: Tensor) -> MapperOutput:
        """Computes the training loss from the logits ``[B, V]`` at each row's position; rows at -1 do not count."""
        matched_B = positions_B >= 0
        targets_B = torch.where(matched_B, forgery_labels_B.to(at_verdict_BV.device), 0)
        logits_B2 = self.class_logits(at_verdict_BV)
        losses_B = F.cross_entropy(logits_B2, targets_B, reduction="none")
        rows = matched_B.sum()
        loss = torch.where(matched_B, losses_B, 0).sum() / rows.clamp(min=1)
        correct = (matched_B & (logits_B2.argmax(dim=-1) == targets_B)).sum()
        return MapperOutput(loss, rows, correct, positions_B)


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
