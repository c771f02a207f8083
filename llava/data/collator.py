"""From samples to a batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava.constants import IGNORE_INDEX


@dataclass(frozen=True)
class Sample:
    """One conversation with its image.

    Attributes:
        input_ids: ``[T]``.
        labels: ``[T]``.
        image: Shared pixels ``[3, S, S]``; zeros for a text-only sample.
        forgery_label: Real = 0, fake = 1, -100 if the answer has no verdict.
        tower_outputs: What the towers give for the image, see ``TowerOutputs``, where that is known already.
        extras: A system's further inputs, by name.
        question: What the conversation asks first, without the image's mark.
    """

    input_ids: Tensor
    labels: Tensor
    image: Tensor
    forgery_label: int
    tower_outputs: Mapping[str, Tensor] | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    question: str = ""


def collate(samples: Sequence[Sample], pad_token_id: int, max_length: int) -> dict[str, Any]:
    """Pads samples on the right and cuts them to ``max_length``.

    Returns:
        ``input_ids``, ``labels``, ``attention_mask`` ``[B, T]``, ``images`` ``[B, 3, S, S]``, ``forgery_labels``
        ``[B]``; ``tower_outputs``, each ``[B, …]``, instead of ``images`` where samples have them; ``extras`` if any,
        each ``[B, …]``, or a list of B where their shapes differ.
    """
    lengths = torch.tensor([len(sample.input_ids) for sample in samples]).clamp(max=max_length)
    ids = [sample.input_ids for sample in samples]
    labels = [sample.labels for sample in samples]
    input_ids = pad_sequence(ids, batch_first=True, padding_value=pad_token_id)[:, :max_length]
    batch: dict[str, Any] = {
        "input_ids": input_ids,
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)[:, :max_length],
        "attention_mask": torch.arange(input_ids.shape[1]) < lengths[:, None],
        "forgery_labels": torch.tensor([sample.forgery_label for sample in samples]),
    }
    outputs = [sample.tower_outputs for sample in samples if sample.tower_outputs is not None]
    if outputs:
        batch["tower_outputs"] = _stacked(outputs)
    else:
        batch["images"] = torch.stack([sample.image for sample in samples])
    extras = [sample.extras for sample in samples if sample.extras]
    return {**batch, "extras": _stacked(extras)} if extras else batch


def _stacked(entries: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    columns = {name: [entry[name] for entry in entries] for name in entries[0]}
    return {
        name: torch.stack(values) if len({value.shape for value in values}) == 1 else values
        for name, values in columns.items()
    }
