"""Outlier exposure with made-up outliers, so that a tower does not call everything real that it has not seen.

A tower that learns from some generators calls an image fake where it finds their traces, and everything else real. An
outlier is a real image whose measures are moved by the difference of two real images of its batch: what varies together
in images still does, but the result lies where no image is. Called fake in training, outliers draw the boundary around
the real images and not only around the known traces (arXiv 1812.04606).
"""

import torch
from torch import Tensor

from llava.demo.residual_encoder import MAX_DEVIATION, Measures

_LEAST, _MOST = 0.5, 1.5
"""Range of the factor by which the difference is multiplied."""


def choose_outliers(real_B: Tensor, share: float) -> Tensor:
    """Returns which images become outliers, bool ``[B]``: a random share of the real ones."""
    return real_B & (torch.rand(len(real_B)) < share).to(real_B.device)


def make_outliers(measures: Measures, real_B: Tensor, outlier_B: Tensor) -> Measures:
    """Moves the measures of outliers, all tiles of an image alike, and all its crops.

    The two real images are drawn independently. If they are the same image, the outlier stays where it is and its label
    is wrong; in a batch with R real images this happens to one outlier in R.

    Args:
        measures: Standardised measures of B images.
        real_B: Which of them are real.
        outlier_B: Which of the real ones become outliers.
    """
    indices = real_B.nonzero().flatten().cpu()
    # Drawn on the CPU, so that a run gives the same outliers on every device.
    first, second = indices[torch.randint(max(len(indices), 1), (2, int(outlier_B.sum())))]
    factor = (_LEAST + (_MOST - _LEAST) * torch.rand(first.shape)).to(measures.crops)

    def moved(values_BTF: Tensor) -> Tensor:
        typical_BF = values_BTF.mean(1)
        # One step for the whole image, so that its tiles and crops keep their differences.
        step_OF = factor[:, None] * (typical_BF[first] - typical_BF[second])
        result = values_BTF.clone()
        result[outlier_B] += step_OF[:, None]
        return result.clamp(-MAX_DEVIATION, MAX_DEVIATION)

    return Measures(moved(measures.tiles), moved(measures.crops))
