"""The order of training samples: batches of one modality and about the same total length, as published."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

_ROUNDS_SORTED_TOGETHER = 32


class ModalityLengthSampler(Sampler[int]):
    """Gives indices so that each batch holds samples with images or without, never both.

    Samples are drawn at random into rounds of ``batch_size * world_size``; each round is divided into ``world_size``
    batches of about the same total length, so that devices wait little for each other. The leftovers of both
    modalities come last, unsorted. The order depends on ``seed`` and epoch alone, so that a resumed run finds it
    again.

    Args:
        lengths: Length of each sample, above 0 with an image, below 0 without.
        batch_size: Samples in a micro-batch of one device.
        world_size: Micro-batches in a round: devices times accumulation steps.
        seed: Of the order.
        by_length: Whether samples of like length make a round, so that there is less padding, instead of batches of
            the same total length, as published. Such rounds come in random order.

    Raises:
        ValueError: There are no samples, a length is 0, or a size is not above 0.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, world_size: int, seed: int = 0, *, by_length: bool = False
    ) -> None:
        if not lengths or 0 in lengths:
            raise ValueError("there are no samples to order" if not lengths else "a sample has the length 0")
        if batch_size < 1 or world_size < 1:
            raise ValueError(f"batch_size {batch_size} and world_size {world_size} must be above 0")
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.world_size = world_size
        self.seed = seed
        self.by_length = by_length
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        with_image = [index for index, length in enumerate(self.lengths) if length > 0]
        without = [index for index, length in enumerate(self.lengths) if length < 0]
        if not with_image or not without:
            return iter(self._grouped(with_image or without, generator))
        rounds, leftovers = [], []
        for indices in (with_image, without):
            *whole, last = self._rounds(self._grouped(indices, generator))
            rounds += whole
            leftovers += last
        order = torch.randperm(len(rounds), generator=generator).tolist()
        return iter([index for number in order for index in rounds[number]] + sorted(leftovers))

    def _grouped(self, indices: Sequence[int], generator: torch.Generator) -> list[int]:
        drawn = [indices[position] for position in torch.randperm(len(indices), generator=generator).tolist()]
        if self.by_length:
            return self._by_length(drawn, generator)
        grouped = []
        for members in self._rounds(drawn):
            batches = self._evenly_divided(self._longest_first(members))
            grouped += [index for batch in batches for index in batch]
        return grouped

    def _by_length(self, drawn: Sequence[int], generator: torch.Generator) -> list[int]:
        """Sorts many rounds' samples together, cuts them into rounds again, and shuffles the whole ones."""
        together = self.batch_size * self.world_size * _ROUNDS_SORTED_TOGETHER
        rounds = []
        for start in range(0, len(drawn), together):
            rounds += self._rounds(self._longest_first(drawn[start : start + together]))
        last = rounds.pop()
        order = torch.randperm(len(rounds), generator=generator).tolist()
        return [index for number in order for index in rounds[number]] + last

    def _longest_first(self, members: Sequence[int]) -> list[int]:
        return sorted(members, key=lambda index: abs(self.lengths[index]), reverse=True)

    def _rounds(self, indices: Sequence[int]) -> list[list[int]]:
        size = self.batch_size * self.world_size
        return [list(indices[start : start + size]) for start in range(0, len(indices), size)]

    def _evenly_divided(self, longest_first: Sequence[int]) -> list[list[int]]:
        """Divides a round into batches: each sample goes to the batch that is shortest so far and not full."""
        if len(longest_first) % self.world_size:
            return [list(longest_first[start :: self.world_size]) for start in range(self.world_size)]
        capacity = len(longest_first) // self.world_size
        batches: list[list[int]] = [[] for _ in range(self.world_size)]
        totals = [0.0] * self.world_size
        for index in longest_first:
            shortest = totals.index(min(totals))
            batches[shortest].append(index)
            totals[shortest] += abs(self.lengths[index])
            if len(batches[shortest]) == capacity:
                totals[shortest] = float("inf")
        return batches
