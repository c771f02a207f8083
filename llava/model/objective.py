"""Losses of a training step, each with what it is averaged over, so that they can be averaged over a global batch.

The language model's loss is everyone's. What a system is trained for beside it is its ``TrainingObjective``
(``llava.systems.base``), which the model asks within its forward, where sharded weights are whole.

Shapes: B rows, T positions of the expanded sequence, V words.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

LM = "lm"
"""Name of the language model's own term."""


class LossTerm(NamedTuple):
    """One loss of a micro-batch.

    A tuple, so that data-parallel wrappers find the tensors in it.

    Attributes:
        total: Sum over items, ``[]``.
        items: Number of items, ``[]``.
        weight: Of its mean in the whole loss.
        values: What is summed for logs beside the two, each ``[]``.
    """

    total: Tensor
    items: Tensor
    weight: float
    values: dict[str, Tensor]

    @property
    def mean(self) -> Tensor:
        """Mean over items; 0 if there is none."""
        return self.total / self.items.clamp(min=1)


@dataclass(frozen=True)
class ObjectiveStep:
    """What an objective may look at.

    Attributes:
        labels: ``[B, T]`` of the expanded sequence, -100 where nothing is supervised; None without labels.
        length: Number of positions T.
        inputs: The system's further inputs of the batch, such as ``forgery_labels`` ``[B]``.
        logits_at: Gives logits ``[N, V]`` at rows ``[N]`` and positions ``[N]``; all others need not be computed.
        likeliest: Gives the id that each position predicts, ``[B, T]``.
    """

    labels: Tensor | None
    length: int
    inputs: Mapping[str, Tensor]
    logits_at: Callable[[Tensor, Tensor], Tensor]
    likeliest: Callable[[], Tensor]
