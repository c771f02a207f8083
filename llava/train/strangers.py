"""Pictures that resemble none, so that a tower does not take for real whatever it has not seen.

A tower that learns from some generators calls a picture fake where it finds their traces, and everything else real. A
stranger is a real picture whose measures are moved by the difference of two real ones of its batch: what varies
together in pictures still does, but the whole lies where no picture is. Called fake in training, strangers draw the
boundary around the real pictures and not only around the known traces (outlier exposure, arXiv 1812.04606, with made-up
outliers).
"""

import torch
from torch import Tensor

from llava.model.multimodal_encoder.residual_encoder import FURTHEST
from llava.model.multimodal_encoder.residual_features import Measured

_LEAST, _MOST = 0.5, 1.5
"""How often the difference is added."""


def choose_strangers(real_B: Tensor, share: float) -> Tensor:
    """Returns which pictures are to be strangers, bool ``[B]``: that share of the real ones, by chance."""
    return real_B & (torch.rand(len(real_B)) < share).to(real_B.device)


def estrange(measured: Measured, real_B: Tensor, strange_B: Tensor) -> Measured:
    """Moves the measures of strangers, all tiles of a picture alike.

    The two real pictures are drawn independently. Now and then they are one, and the stranger stays where it is: one in
    as many as the batch has reals, the share of labels that is wrong.

    Args:
        measured: Standardised measures of B pictures.
        real_B: Which of them are real.
        strange_B: Which of the real ones are to be strangers.
    """
    places = real_B.nonzero().flatten().cpu()
    first, second = places[torch.randint(max(len(places), 1), (2, int(strange_B.sum())))]
    times = (_LEAST + (_MOST - _LEAST) * torch.rand(first.shape)).to(measured.picture)

    def moved(values: Tensor, typical_BF: Tensor) -> Tensor:
        step_SF = times[:, None] * (typical_BF[first] - typical_BF[second])
        result = values.clone()
        result[strange_B] += step_SF.view(-1, *[1] * (values.ndim - 2), step_SF.shape[-1])
        return result.clamp(-FURTHEST, FURTHEST)

    return Measured(moved(measured.tiles, measured.tiles.mean(1)), moved(measured.picture, measured.picture))
