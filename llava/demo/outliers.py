"""Outlier exposure with made-up outliers, so that a tower does not call everything real that it has not seen.

A tower that learns from some generators calls an image fake where it finds their traces, and everything else real. An
outlier is a real image whose measures are moved by the difference of two real images of its batch: what varies together
in images still does, but the result lies where no image is. Called fake in training, outliers draw the boundary around
the real images and not only around the known traces (arXiv 1812.04606).
"""

import torch
from torch import Tensor

from llava.demo.residual_encoder import MAX_DEVIATION
from llava.demo.residual_features import Measured

_LEAST, _MOST = 0.5, 1.5
"""Range of the factor by which the difference is multiplied."""


def choose_outliers(real_B: Tensor, share: float) -> Tensor:
    """Returns which images become outliers, bool ``[B]``: a random share of the real ones."""
    return real_B & (torch.rand(len(real_B)) < share).to(real_B.device)


def make_outliers(measured: Measured, real_B: Tensor, outlier_B: Tensor) -> Measured:
    """Moves the measures of outliers, all tiles of an image alike.

    The two real images are drawn independently. If they are the same image, the outlier stays where it is and its label
    is wrong; in a batch with R real images this happens to one outlier in R.

    Args:
        measured: Standardised measures of B images.
        real_B: Which of them are real.
        outlier_B: Which of the real ones become outliers.
    """
    indices = real_B.nonzero().flatten().cpu()
    # Drawn on the CPU, so that a run gives the same outliers on every device.
    first, second = indices[torch.randint(max(len(indices), 1), (2, int(outlier_B.sum())))]
    factor = (_LEAST + (_MOST - _LEAST) * torch.rand(first.shape)).to(measured.image)

    def moved(values: Tensor, typical_BF: Tensor) -> Tensor:
        step_OF = factor[:, None] * (typical_BF[first] - typical_BF[second])
        result = values.clone()
        # One step for the whole image: the tile axis, if any, is broadcast, so that tiles keep their differences.
        result[outlier_B] += step_OF.view(-1, *[1] * (values.ndim - 2), step_OF.shape[-1])
        return result.clamp(-MAX_DEVIATION, MAX_DEVIATION)

    return Measured(moved(measured.tiles, measured.tiles.mean(1)), moved(measured.image, measured.image))
