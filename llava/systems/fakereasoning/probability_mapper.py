"""Classification Probability Mapper (arXiv 2503.21210): ties the words "real" and "fake" to a probability.

At the position k that predicts the verdict word, ``P(fake) = softmax([z_real, z_fake] / tau)[fake]``, where z are the
logits of the two words. Training adds the cross-entropy of these two classes, averaged over the rows where k was found.

Shapes: B rows, T positions of the expanded sequence, V words.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.constants import IGNORE_INDEX
from llava.errors import OptionError
from llava.model.configuration import CPM_SEARCHES
from llava.model.verdict import VerdictTokens


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
        OptionError: An unknown search, or a temperature that is not above 0.
    """

    def __init__(self, tokens: VerdictTokens, temperature: float = 10.0, search: str = "labels") -> None:
        if search not in CPM_SEARCHES:
            raise OptionError(f"unknown cpm_search {search!r}; known: {', '.join(CPM_SEARCHES)}")
        if temperature <= 0:
            raise OptionError(f"cpm_temperature must be above 0, not {temperature}")
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
        return self.tokens.class_logits(logits, self.temperature)

    def fake_probability(self, logits: Tensor) -> Tensor:
        """Returns P(fake) in 0..1 from the raw logits ``[..., V]`` at the verdict position."""
        return self.tokens.fake_probability(logits, self.temperature).float()

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
