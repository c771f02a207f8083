"""Generators: twelve and more, continuous, each with the trace that it claims."""

import numpy as np
import pytest

from llava.systems.fakereasoning.answer import FORGERY_ATTRIBUTES
from mmfr_generation.synthetic import generators as g
from mmfr_generation.synthetic.camera import Camera, photograph
from mmfr_generation.synthetic.decoder import decode
from mmfr_generation.synthetic.faults import draw_scene
from mmfr_generation.synthetic.scenes import SCENES

every = pytest.mark.parametrize("generator", g.GENERATORS.values(), ids=lambda generator: generator.name)


def random_image(seed: int, size: int = 112) -> np.ndarray:
    rng = np.random.default_rng(seed)
    scene = draw_scene(SCENES[seed % len(SCENES)], seed, size)
    return photograph(scene.linear_CHW, Camera.draw(rng), rng)


def test_roles_and_mechanisms_are_what_they_are_called():
    by_role = {}
    for generator in g.GENERATORS.values():
        by_role.setdefault(generator.role, set()).add(generator.mechanism)
        assert generator.attribute in FORGERY_ATTRIBUTES
        assert generator.description
    assert len(g.SEEN) >= 12
    assert by_role["unseen-known-mechanism"] <= by_role["seen"]
    assert not by_role["unseen-own-mechanism"] & by_role["seen"]
    assert len(by_role["unseen-known-mechanism"]) >= 3 and len(by_role["unseen-own-mechanism"]) >= 2


@every
@pytest.mark.parametrize("size", [64, 99, 224])
def test_any_size_goes_through_and_stays_an_image(generator, size):
    before = random_image(4, size)
    kept = before.copy()
    after = generator.apply(before, 0.7, np.random.default_rng(1))
    assert after.shape == before.shape and after.dtype == np.float32
    assert np.isfinite(after).all() and after.min() > -0.6 and after.max() < 1.6
    assert np.array_equal(before, kept)


@every
def test_the_trace_grows_steadily_with_strength(generator):
    change = []
    for strength in (0.2, 0.6, 1.0):
        changes = []
        for seed in range(10):
            before = random_image(seed)
            changes.append(np.abs(generator.apply(before, strength, np.random.default_rng(seed)) - before).mean())
        change.append(np.mean(changes))
    assert 0 < change[0] < change[1] < change[2]


@every
def test_strength_is_continuous(generator):
    before = random_image(2)
    one, other = (generator.apply(before, s, np.random.default_rng(3)) for s in (0.45, 0.451))
    assert 0 < np.abs(one - other).mean() < 0.004


@every
def test_equal_random_numbers_give_equal_images(generator):
    one, other = (generator.apply(random_image(1), 0.5, np.random.default_rng(9)) for _ in range(2))
    assert np.array_equal(one, other)


def test_nearest_upsampling_repeats_pixels():
    after = g.nearest_upsampling(random_image(0), 1.0, np.random.default_rng(0))
    assert np.allclose(after[:, ::2, ::2], after[:, 1::2, 1::2], atol=1e-6)


def test_transposed_convolution_and_pixel_shuffle_have_a_grid_of_their_period():
    grey = np.full((3, 96, 96), 0.5, np.float32)
    two = g.transposed_convolution(grey, 1.0, np.random.default_rng(0))[0]
    assert np.abs(two[:-2:2] - two[2::2])[:, 4:-4].max() < 1e-5
    assert np.abs(two[1::2] - two[::2]).mean() > 0.02
    shuffled = g.pixel_shuffle(grey, 1.0, np.random.default_rng(0))[0]
    periods = [p for p in (3, 4) if np.abs(shuffled[p:] - shuffled[:-p]).max() < 1e-5]
    assert len(periods) == 1 and shuffled.std() > 0.02


@pytest.mark.parametrize("generator", [g.spectral_peaks, g.spectral_lattice])
def test_waves_make_peaks_in_the_spectrum(generator):
    grey = np.full((3, 128, 128), 0.5, np.float32)
    power = np.abs(np.fft.rfft2(generator(grey, 1.0, np.random.default_rng(0))[0] - 0.5)) ** 2
    assert np.sort(power.ravel())[-60:].sum() > 0.8 * power.sum()


def test_palette_leaves_few_levels_and_blocks_leave_few_coefficients():
    before = random_image(3)
    assert len(np.unique(np.round(g.palette(before, 1.0, np.random.default_rng(0))[0], 4))) < 12
    whole = g._along(g._along(g._blocks(before, 8), 2, g._WALSH), 4, g._WALSH)
    back = g._joined(g._along(g._along(whole, 2, g._WALSH.T), 4, g._WALSH.T) / 64, *before.shape[1:])
    assert np.allclose(back, before, atol=1e-4)
    changes = [(np.diff(row) != 0).sum() for row in g._WALSH]
    assert changes == list(range(8))


def test_missing_noise_is_missing_and_wrong_noise_is_wrong():
    noisy = (0.5 + 0.01 * np.random.default_rng(0).standard_normal((3, 96, 96))).astype(np.float32)
    assert g.denoising(noisy, 1.0, np.random.default_rng(0)).std() < 0.5 * noisy.std()
    grain = g.white_grain(noisy, 1.0, np.random.default_rng(0)) - g.soften(noisy, 0.12)
    assert abs(np.corrcoef(grain[0].ravel(), grain[1].ravel())[0, 1]) < 0.05
    clumps = g.coarse_grain(noisy, 1.0, np.random.default_rng(0)) - g.soften(noisy, 0.12)
    assert np.corrcoef(clumps[0].ravel(), clumps[1].ravel())[0, 1] > 0.99
    assert np.corrcoef(clumps[0, :, 1:].ravel(), clumps[0, :, :-1].ravel())[0, 1] > 0.4


def test_halo_and_ringing_overshoot_at_a_step():
    step = np.full((3, 96, 96), 0.3, np.float32)
    step[:, :, 48:] = 0.7
    for generator in (g.halo, g.ringing):
        after = generator(step, 1.0, np.random.default_rng(0))
        assert after.max() > 0.73 and after.min() < 0.27


def test_inpainting_changes_one_region_only():
    before = random_image(5)
    after = g.inpainting(before, 0.6, np.random.default_rng(0))
    changed = (after != before).any(0)
    assert 0.03 < changed.mean() < 0.4
    rows, cols = changed.nonzero()
    box = (np.ptp(rows) + 1) * (np.ptp(cols) + 1)
    assert changed.sum() > 0.3 * box


def test_channels_move_apart_and_rows_move_sideways():
    dot = np.zeros((3, 64, 64), np.float32)
    dot[:, 30:34, 30:34] = 1
    moved = g.channel_shift(dot, 1.0, np.random.default_rng(0))
    assert np.array_equal(moved[1], dot[1])
    axis = np.arange(64)
    red, blue = (((moved[c].sum(0) * axis).sum(), (moved[c].sum(1) * axis).sum()) / moved[c].sum() for c in (0, 2))
    assert np.isclose(np.hypot(*(red - blue)), 3.0, atol=0.05)
    line = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (3, 64, 1))
    jittered = g.row_jitter(line, 1.0, np.random.default_rng(0))
    assert jittered[0, :, 32].std() > 0.008 and np.allclose(jittered[0], jittered[2])


def test_the_decoder_has_learnt_to_decode():
    before = random_image(6)
    after = decode(before)
    error = ((after - before) ** 2).mean()
    blocks = before.reshape(3, 14, 8, 14, 8)
    assert error < 0.35 * ((blocks - blocks.mean(axis=(2, 4), keepdims=True)) ** 2).mean()
    assert error > 1e-5
