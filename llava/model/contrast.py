"""Forgery-aligned contrastive learning: images against the sentences of their attributes, and each among themselves.

What the first version of FakeReasoning had and never released; its abstract fixes the two axes, the rest is a reading
of ours (docs/contrast.md). With normalised embeddings v of images and t of texts, and s = v·t / tau:

- cross-modal: symmetrised InfoNCE (arXiv 1807.03748), each image against all texts and each text against all images;
- intra-modal: supervised contrast with several positives (arXiv 2004.11362, equation 2), on v and on t.

Shapes: N own anchors, M candidates (own ones, and those of other processes or of a queue), A attributes, E width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from llava.constants import IGNORE_INDEX
from llava.errors import CheckpointError
from llava.model.objective import LossTerm

CROSS, INTRA_IMAGE, INTRA_TEXT = "facl_cross", "facl_intra_image", "facl_intra_text"
"""Names of the three losses."""
TERMS = (CROSS, INTRA_IMAGE, INTRA_TEXT)
POSITIVES = ("attributes", "label")
TEXTS = ("trained", "frozen")
_LEAST_TEMPERATURE = 0.01
"""A learned temperature stays above this, as in CLIP (arXiv 2103.00020)."""


@dataclass(frozen=True)
class ContrastSettings:
    """How contrast is made; the config field ``contrast``.

    Attributes:
        temperature: tau, above 0; where it is learned, its start.
        intra_weight: beta, weight of the intra-modal losses against the cross-modal one.
        weight: Of the whole, among a step's other losses.
        learn_temperature: Whether tau is trained.
        queue: How many earlier embeddings are candidates too.
        leave_out_same: Whether a text of the same attributes is no negative of an image, and the other way round.
        positives: Which images or texts belong together: those that share an attribute (without any: the label), or
            those of one label.
        text: Whether the text side is trained.
        authentic: Whether images without forgery attributes are contrasted with their texts too.
        width: E, where there are projections of its own.
        words: Most words of a text, where texts are tokenised.
    """

    temperature: float
    intra_weight: float
    weight: float = 1.0
    learn_temperature: bool = False
    queue: int = 0
    leave_out_same: bool = True
    positives: str = "attributes"
    text: str = "trained"
    authentic: bool = False
    width: int = 64
    words: int = 96

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ContrastSettings":
        """Reads the config's field.

        Raises:
            CheckpointError: A name is unknown, tau or beta is missing, or a value is out of range.
        """
        known: dict[str, Any] = {item.name: item.type for item in fields(cls)}
        for name in values:
            if name not in known:
                raise CheckpointError(f"contrast: unknown {name!r}; known: {', '.join(known)}")
        for name in ("temperature", "intra_weight"):
            if name not in values:
                raise CheckpointError(f"contrast: {name} is missing; there is no published value to take instead")
        for name, value in values.items():
            wanted = {float: (int, float), int: (int,), bool: (bool,), str: (str,)}[known[name]]
            if not isinstance(value, wanted) or (isinstance(value, bool) and known[name] is not bool):
                raise CheckpointError(f"contrast: {name} must be of type {known[name].__name__}, not {value!r}")
        settings = cls(**values)
        settings._check()
        return settings

    def _check(self) -> None:
        faults = {
            "temperature must be above 0": not 0 < self.temperature < float("inf"),
            "intra_weight must be 0 or more": not 0 <= self.intra_weight < float("inf"),
            "weight must be 0 or more": not 0 <= self.weight < float("inf"),
            "queue must be 0 or more": self.queue < 0,
            "width and words must be 1 or more": min(self.width, self.words) < 1,
            f"positives must be one of {', '.join(POSITIVES)}": self.positives not in POSITIVES,
            f"text must be one of {', '.join(TEXTS)}": self.text not in TEXTS,
        }
        for message, is_there in faults.items():
            if is_there:
                raise CheckpointError(f"contrast: {message}")


@dataclass(frozen=True)
class Entries:
    """Images with their texts.

    Attributes:
        image: Normalised embeddings ``[N, E]``.
        text: Normalised embeddings ``[N, E]``; anything where there is no text.
        has_text: Bool ``[N]``.
        attributes: Bool ``[N, A]``.
        labels: Real = 0, fake = 1, -100 if it is not known, ``[N]``.
    """

    image: Tensor
    text: Tensor
    has_text: Tensor
    attributes: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Entries":
        """Returns these with each field changed alike."""
        return Entries(**{name: change(values) for name, values in vars(self).items()})

    def joined(self, other: "Entries") -> "Entries":
        """Returns these, then the others."""
        return Entries(**{name: torch.cat((values, getattr(other, name))) for name, values in vars(self).items()})


class Contrast(nn.Module):
    """The losses, with their temperature and, if there is one, their queue.

    Args:
        settings: How contrast is made.
        attributes: A, for the queue.

    Attributes:
        log_temperature: Logarithm of tau, ``[]``; trained if the settings say so.
    """

    queued: Tensor

    def __init__(self, settings: ContrastSettings, attributes: int = 0) -> None:
        super().__init__()
        self.settings = settings
        start = torch.tensor(settings.temperature).log()
        self.log_temperature = nn.Parameter(start, requires_grad=settings.learn_temperature)
        if settings.queue:
            shapes = {"image": (settings.width,), "text": (settings.width,), "attributes": (attributes,)}
            for name, shape in {**shapes, "has_text": (), "labels": ()}.items():
                dtype = torch.float32 if name in ("image", "text") else torch.long if name == "labels" else torch.bool
                self.register_buffer(f"queue_{name}", torch.zeros(settings.queue, *shape, dtype=dtype))
            self.register_buffer("queued", torch.zeros((), dtype=torch.long))

    @property
    def temperature(self) -> Tensor:
        """tau, ``[]``."""
        return self.log_temperature.exp().clamp(min=_LEAST_TEMPERATURE if self.settings.learn_temperature else 0)

    def forward(self, own: Entries) -> dict[str, LossTerm]:
        """Returns the three losses of these anchors, each with its weight in the whole.

        Other processes' entries and the queue's are candidates. Every process must call it equally often, with any
        number of entries. In training with gradients, the entries of all processes are queued afterwards.
        """
        settings = self.settings
        everyone, first = gather(own)
        candidates = everyone.joined(self._queue()) if settings.queue else everyone
        anchors = torch.arange(first, first + len(own), device=own.labels.device)
        tau = self.temperature
        found = {CROSS: cross_modal(candidates, anchors, tau, leave_out_same=settings.leave_out_same)}
        positives = positives_of(candidates, anchors, settings.positives)
        everything = torch.ones_like(candidates.has_text)
        found[INTRA_IMAGE] = intra_modal(candidates.image, anchors, positives, everything, tau)
        found[INTRA_TEXT] = intra_modal(candidates.text, anchors, positives, candidates.has_text, tau)
        if settings.queue and self.training and torch.is_grad_enabled():
            self._enqueue(everyone)
        beta = settings.intra_weight
        return {
            name: LossTerm(total, items, settings.weight * (1.0 if name == CROSS else beta), {})
            for name, (total, items) in found.items()
        }

    def _queue(self) -> Entries:
        filled = min(int(self.queued), self.settings.queue)
        return Entries(**{item.name: getattr(self, f"queue_{item.name}")[:filled] for item in fields(Entries)})

    @torch.no_grad()
    def _enqueue(self, entries: Entries) -> None:
        size = self.settings.queue
        newest = entries.map(lambda values: values[max(0, len(values) - size) :])
        places = (self.queued + torch.arange(len(newest), device=self.queued.device)) % size
        for name, values in vars(newest).items():
            # A new tensor: the old one is still part of this step's graph.
            kept = getattr(self, f"queue_{name}").clone()
            kept[places] = values.to(kept.dtype)
            setattr(self, f"queue_{name}", kept)
        self.queued += len(newest)


def positives_of(entries: Entries, anchors: Tensor, kind: str) -> Tensor:
    """Returns which of M entries belong to each of N anchors, bool ``[N, M]``; see ``ContrastSettings.positives``."""
    labels, attributes = entries.labels, entries.attributes
    same_label = (labels[anchors, None] == labels[None]) & (labels[anchors, None] != IGNORE_INDEX)
    if kind == "label":
        return same_label
    shared = (attributes[anchors].float() @ attributes.float().T) > 0
    has_none = ~attributes.any(dim=1)
    return shared | (same_label & has_none[anchors, None] & has_none[None])


def cross_modal(
    entries: Entries, anchors: Tensor, temperature: Tensor, *, leave_out_same: bool
) -> tuple[Tensor, Tensor]:
    """Symmetrised InfoNCE of images and their texts.

    Each anchor with a text counts ``-½ log softmax_j(s_ij)_i - ½ log softmax_j(s_ji)_i``. Texts are those that there
    are; images are all, those without a text too.

    Args:
        entries: All M.
        anchors: Indices of the N anchors among them.
        temperature: tau, ``[]``.
        leave_out_same: Whether entries of the same, not empty, set of attributes are left out of the negatives.

    Returns:
        Sum over the anchors with a text, and their number.
    """
    anchors = anchors[entries.has_text[anchors]]
    is_own = anchors[:, None] == torch.arange(len(entries), device=anchors.device)
    left_out = torch.zeros_like(is_own)
    if leave_out_same:
        own = entries.attributes[anchors]
        left_out = (own[:, None] == entries.attributes[None]).all(dim=2) & own.any(dim=1)[:, None] & ~is_own
    to_texts = _masked(entries.image[anchors] @ entries.text.T / temperature, left_out | ~entries.has_text[None])
    to_images = _masked(entries.text[anchors] @ entries.image.T / temperature, left_out)
    both = F.cross_entropy(to_texts, anchors, reduction="sum") + F.cross_entropy(to_images, anchors, reduction="sum")
    return both / 2, anchors.new_tensor(len(anchors))


def intra_modal(
    features: Tensor, anchors: Tensor, positives: Tensor, candidates: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """Supervised contrast among embeddings of one kind.

    An anchor counts ``-1/|P| sum_p log softmax_a(z_i·z_a / tau)_p`` over its positives P among all candidates a but
    itself; one without a positive does not count.

    Args:
        features: Normalised, ``[M, E]``.
        anchors: Indices of the N anchors among them.
        positives: Bool ``[N, M]``; the anchor itself may be among them.
        candidates: Which features there are, bool ``[M]``.
        temperature: tau, ``[]``.

    Returns:
        Sum over the anchors that count, and their number.
    """
    is_own = anchors[:, None] == torch.arange(len(features), device=anchors.device)
    positives = positives & candidates[None] & ~is_own
    counted = candidates[anchors] & positives.any(dim=1)
    positives, excluded = positives[counted], (is_own | ~candidates[None])[counted]
    logarithms = _masked(features[anchors[counted]] @ features.T / temperature, excluded).log_softmax(dim=1)
    means = logarithms.masked_fill(~positives, 0).sum(dim=1) / positives.sum(dim=1)
    return -means.sum(), counted.sum()


def _masked(logits: Tensor, left_out: Tensor) -> Tensor:
    return logits.float().masked_fill(left_out, float("-inf"))


# --- between processes


class _Gathered(torch.autograd.Function):
    """Equally long tensors of all processes, one after the other; gradients of all come back to each one's own."""

    @staticmethod
    def forward(context: Any, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own.contiguous())
        context.size = len(own)
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        whole = gradients[0].contiguous()
        dist.all_reduce(whole)
        first = dist.get_rank() * context.size
        return whole[first : first + context.size]


def gather(own: Entries) -> tuple[Entries, int]:
    """Returns the entries of all processes, whose numbers may differ, and the index of this one's first."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return own, 0
    count = torch.tensor([len(own)], device=own.labels.device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    sizes = [int(size) for size in counts]
    longest = max(sizes)
    kept = torch.cat([torch.arange(size) + rank * longest for rank, size in enumerate(sizes)]).to(count.device)

    def whole(values: Tensor) -> Tensor:
        padded = torch.cat([values, values.new_zeros(longest - len(values), *values.shape[1:])])
        if not values.is_floating_point():
            return _Gathered.apply(padded.long())[kept].to(values.dtype)
        return _Gathered.apply(padded)[kept]

    return own.map(whole), sum(sizes[: dist.get_rank()])
