"""Outlier exposure: measures moved to where no image is."""

import torch

from llava.demo.outliers import choose_outliers, make_outliers
from llava.demo.residual_encoder import MAX_DEVIATION, Measures

REAL = torch.tensor([True, False, True, True, False, True])
OUTLIER = torch.tensor([False, False, True, False, False, True])


def measures(spread: float = 0.1) -> Measures:
    torch.manual_seed(0)
    return Measures(spread * torch.randn(6, 4, 3), spread * torch.randn(6, 2, 5))


def test_only_real_images_are_chosen_by_their_share():
    torch.manual_seed(0)
    real = torch.rand(20_000) < 0.5
    chosen = choose_outliers(real, 0.1)
    assert not (chosen & ~real).any()
    assert 0.08 < chosen.sum() / real.sum() < 0.12
    assert not choose_outliers(real, 0.0).any()


def test_outliers_are_moved_by_what_two_real_images_differ_in():
    before = measures()
    after = make_outliers(before, REAL, OUTLIER)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new[~OUTLIER], old[~OUTLIER])
    reals = REAL.nonzero().flatten().tolist()
    for row in OUTLIER.nonzero().flatten().tolist():
        steps = [new[row] - old[row] for old, new in zip(before, after, strict=True)]
        assert all(torch.allclose(step, step[:1].expand_as(step), atol=1e-6) for step in steps)
        moved = torch.cat([step[0] for step in steps])
        typical = torch.cat((before.tiles.mean(1), before.crops.mean(1)), 1)
        steps = [typical[i] - typical[j] for i in reals for j in reals if i != j]
        ratios = [moved @ step / (step @ step) for step in steps]
        fits = [torch.allclose(moved, ratio * step, atol=1e-5) for ratio, step in zip(ratios, steps, strict=True)]
        assert any(fit and 0.5 <= ratio <= 1.5 for fit, ratio in zip(fits, ratios, strict=True))


def test_few_outliers_stay_where_they_are():
    everyone = torch.ones(20, dtype=torch.bool)
    torch.manual_seed(0)
    before = Measures(torch.randn(20, 4, 3), torch.randn(20, 2, 5))
    stay = [
        bool((make_outliers(before, everyone, everyone).crops == before.crops).all(2).all(1).sum() > 4)
        for _ in range(50)
    ]
    assert not any(stay)


def test_measures_stay_within_their_bounds():
    after = make_outliers(measures(spread=20.0), REAL, OUTLIER)
    assert max(part[OUTLIER].abs().max() for part in after) <= MAX_DEVIATION


def test_a_batch_without_outliers_stays_as_it_is():
    before = measures()
    after = make_outliers(before, torch.zeros(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool))
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
