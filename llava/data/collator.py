"""From samples to a batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava.constants import IGNORE_INDEX

FEATURES = ("clip_features", "dino_features", "dino_attention")
"""Batch entries that hold ``TowerOutputs``, in its order."""


@dataclass(frozen=True)
class Sample:
    """One conversation with its image.

    Attributes:
        input_ids: ``[T]``.
        labels: ``[T]``.
        image: Shared pixels ``[3, S, S]``; zeros for a text-only sample.
        forgery_label: Real = 0, fake = 1, -100 if the answer has no verdict.
        features: What the towers say to the image, by the names that ``FEATURES`` has, where that is known already.
    """

    input_ids: Tensor
    labels: Tensor
    image: Tensor
    forgery_label: int
    features: Mapping[str, Tensor] | None = None


def collate(samples: Sequence[Sample], pad_token_id: int, max_length: int) -> dict[str, Tensor]:
    """Pads samples on the right and cuts them to ``max_length``.

    Returns:
        ``input_ids``, ``labels``, ``attention_mask`` ``[B, T]``, ``images`` ``[B, 3, S, S]``, ``forgery_labels``
        ``[B]``. Samples with features give those in the place of ``images``.
    """
    lengths = torch.tensor([len(sample.input_ids) for sample in samples]).clamp(max=max_length)
    ids = [sample.input_ids for sample in samples]
    labels = [sample.labels for sample in samples]
    input_ids = pad_sequence(ids, batch_first=True, padding_value=pad_token_id)[:, :max_length]
    batch = {
        "input_ids": input_ids,
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)[:, :max_length],
        "attention_mask": torch.arange(input_ids.shape[1]) < lengths[:, None],
        "forgery_labels": torch.tensor([sample.forgery_label for sample in samples]),
    }
    features = [sample.features for sample in samples if sample.features is not None]
    if not features:
        return {**batch, "images": torch.stack([sample.image for sample in samples])}
    return {**batch, **{name: torch.stack([each[name] for each in features]) for name in features[0]}}
