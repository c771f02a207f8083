"""Made-up pictures that resemble none."""

import torch

from llava.model.multimodal_encoder.residual_encoder import FURTHEST
from llava.model.multimodal_encoder.residual_features import Measured
from llava.train.strangers import choose_strangers, estrange

REAL = torch.tensor([True, False, True, True, False, True])
STRANGE = torch.tensor([False, False, True, False, False, True])


def measured(spread: float = 0.1) -> Measured:
    torch.manual_seed(0)
    return Measured(spread * torch.randn(6, 4, 3), spread * torch.randn(6, 5))


def test_only_real_pictures_are_chosen_by_their_share():
    torch.manual_seed(0)
    real = torch.rand(20_000) < 0.5
    chosen = choose_strangers(real, 0.1)
    assert not (chosen & ~real).any()
    assert 0.08 < chosen.sum() / real.sum() < 0.12
    assert not choose_strangers(real, 0.0).any()


def test_strangers_are_moved_by_what_two_real_pictures_differ_in():
    before = measured()
    after = estrange(before, REAL, STRANGE)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new[~STRANGE], old[~STRANGE])
    reals = REAL.nonzero().flatten().tolist()
    for row in STRANGE.nonzero().flatten().tolist():
        by_tile = after.tiles[row] - before.tiles[row]
        assert torch.allclose(by_tile, by_tile[:1].expand_as(by_tile), atol=1e-6)
        moved = torch.cat((by_tile[0], after.picture[row] - before.picture[row]))
        typical = torch.cat((before.tiles.mean(1), before.picture), 1)
        steps = [typical[i] - typical[j] for i in reals for j in reals if i != j]
        ratios = [moved @ step / (step @ step) for step in steps]
        fits = [torch.allclose(moved, ratio * step, atol=1e-5) for ratio, step in zip(ratios, steps, strict=True)]
        assert any(fit and 0.5 <= ratio <= 1.5 for fit, ratio in zip(fits, ratios, strict=True))


def test_few_strangers_stay_where_they_are():
    everyone = torch.ones(20, dtype=torch.bool)
    torch.manual_seed(0)
    before = Measured(torch.randn(20, 4, 3), torch.randn(20, 5))
    stay = [bool((estrange(before, everyone, everyone).picture == before.picture).all(1).sum() > 4) for _ in range(50)]
    assert not any(stay)


def test_measures_stay_within_their_bounds():
    after = estrange(measured(spread=20.0), REAL, STRANGE)
    assert max(part[STRANGE].abs().max() for part in after) <= FURTHEST


def test_a_batch_without_strangers_stays_as_it_is():
    before = measured()
    after = estrange(before, torch.zeros(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool))
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
