"""The order of training samples is the published one, and comes back when a run resumes."""

import random

import pytest
from torch.utils.data import BatchSampler

from llava.data.sampler import ModalityLengthSampler

MIXED = [9, -3, 5, 5, -8, 2, 7, -1, 4, 6, -2, 3, 8]


def test_the_order_is_the_authors(bundled):
    cases = bundled.fact("extra", "sampler")
    assert len(cases) == 6
    for case in cases:
        sampler = ModalityLengthSampler(case["lengths"], case["batch_size"], case["world_size"], case["seed"])
        assert list(sampler) == case["indices"], case


@pytest.mark.parametrize("lengths", [MIXED, [abs(length) for length in MIXED], [-abs(length) for length in MIXED], [4]])
@pytest.mark.parametrize("sizes", [(1, 1), (2, 3), (3, 2), (16, 4)])
@pytest.mark.parametrize("by_length", [False, True])
def test_every_sample_comes_once(lengths, sizes, by_length):
    sampler = ModalityLengthSampler(lengths, *sizes, by_length=by_length)
    assert sorted(sampler) == list(range(len(lengths)))
    assert len(sampler) == len(lengths)


def test_an_epoch_has_its_own_order_and_keeps_it():
    sampler = ModalityLengthSampler(list(range(1, 60)), 2, 2, seed=5)
    orders = []
    for epoch in (0, 1, 2):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert list(sampler) == orders[-1]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    resumed = ModalityLengthSampler(list(range(1, 60)), 2, 2, seed=5)
    resumed.set_epoch(2)
    assert list(resumed) == orders[2]
    assert list(ModalityLengthSampler(list(range(1, 60)), 2, 2, seed=6)) != orders[0]


def test_a_round_has_one_modality_and_even_batches():
    choice = random.Random(0)
    lengths = [choice.choice((1, 1, -1)) * choice.randint(1, 500) for _ in range(1000)]
    batches = list(BatchSampler(ModalityLengthSampler(lengths, 4, 8), 4, drop_last=False))
    grouped = batches[:-16]  # the leftovers of both modalities come last
    assert all(len({lengths[index] > 0 for index in batch}) == 1 for batch in grouped)

    def spread(batches):
        totals = [sum(abs(lengths[index]) for index in batch) for batch in batches]
        rounds = [totals[start : start + 8] for start in range(0, len(totals), 8)]
        return sum(max(members) - min(members) for members in rounds) / len(rounds)

    shuffled = choice.sample(range(1000), 4 * len(grouped))
    assert spread(grouped) < 0.3 * spread([shuffled[start : start + 4] for start in range(0, len(shuffled), 4)])


def test_batches_of_like_length_need_less_padding():
    choice = random.Random(0)
    lengths = [choice.choice((1, 1, -1)) * choice.randint(1, 500) for _ in range(2000)]

    def padding(by_length):
        batches = list(BatchSampler(ModalityLengthSampler(lengths, 4, 8, by_length=by_length), 4, drop_last=False))[
            :-16
        ]
        sizes = [[abs(lengths[index]) for index in batch] for batch in batches]
        assert all(len({lengths[index] > 0 for index in batch}) == 1 for batch in batches)
        return sum(max(size) * len(size) - sum(size) for size in sizes) / sum(map(sum, sizes))

    assert padding(by_length=True) < 0.3 * padding(by_length=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(([], 1, 1), "no samples"), (([3, 0], 1, 1), "length 0"), (([3], 0, 1), "above 0"), (([3], 1, 0), "above 0")],
)
def test_impossible_sizes_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        ModalityLengthSampler(*arguments)
