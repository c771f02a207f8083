"""Contrast as a loss of the tower stage: a tower's images against the words of their reasoning."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.demo.tower_targets import GROUPS, TargetNames
from llava.errors import OptionError
from llava.labels import FAKE, REAL
from llava.model.contrast import Contrast, ContrastSettings, Entries

FACL = "facl"
"""Name of the loss beside the groups of targets."""


class TowerContrast(nn.Module):
    """Projects images and texts into one space, and contrasts them there.

    A text is the set of the frequent words of its reasoning, embedded as the sum of their vectors: a text encoder that
    needs no further data, and whose vectors are trained or stay random.

    Args:
        hidden_size: Width of the tower's features.
        names: The targets of the stage; words and attributes are read from them.
        settings: How contrast is made.
        weight: Of the loss among the tower's other losses.

    Raises:
        OptionError: There are no words.
    """

    def __init__(self, hidden_size: int, names: TargetNames, settings: ContrastSettings, weight: float) -> None:
        super().__init__()
        if not names.reasoning:
            raise OptionError(f"{FACL} needs words of the reasoning: raise --max_words or lower --min_word_share")
        self.settings, self.weight, self.sizes = settings, weight, names.sizes()
        self.image = nn.Linear(hidden_size, settings.width)
        self.words = nn.Linear(len(names.reasoning), settings.width, bias=False)
        self.words.requires_grad_(settings.text == "trained")
        self.losses = Contrast(settings, len(names.attributes))

    def forward(self, projected_BE: Tensor, targets: Tensor, outlier_B: Tensor | None = None) -> Tensor:
        """Returns the weighted loss of a batch; outliers, which no text describes, are left out.

        Args:
            projected_BE: What ``image`` gives for the images, ``[B, E]``.
            targets: Bool ``[B, K]``.
            outlier_B: Which images are outliers.
        """
        by_group = dict(zip(GROUPS, targets.split(self.sizes, dim=1), strict=True))
        words_BW, attributes_BA = by_group["reasoning"], by_group["attributes"]
        described_B = words_BW.any(dim=1) & (attributes_BA.any(dim=1) | self.settings.authentic)
        labels_B = torch.where(by_group["verdict"][:, 0], FAKE, REAL)
        # In float32: products of normalised vectors over a small temperature are large.
        text_BE = F.normalize(words_BW.to(self.words.weight) @ self.words.weight.T, dim=1)
        entries = Entries(F.normalize(projected_BE.float(), dim=1), text_BE, described_B, attributes_BA, labels_B)
        if outlier_B is not None:
            entries = entries.map(lambda values: values[~outlier_B])
        terms = self.losses(entries).values()
        return self.weight * torch.stack([term.weight * term.mean for term in terms]).sum()
