"""The camera: colours survive, noise grows with the light, and leaves the traces that cameras leave."""

from dataclasses import replace

import numpy as np
import pytest

from mmfr_generation.synthetic.camera import Camera, photograph, render_clean
from mmfr_generation.synthetic.generators import GENERATORS

QUIET = Camera(1.0, 0.05, 0.0, 0.0, 0.0, 0.0, (0, 0), True, 1.0, 0.0)
NOISY = replace(QUIET, read_noise=0.004, shot_noise=0.001)


def flat(*colour: float, size: int = 64) -> np.ndarray:
    return np.ones((3, size, size), np.float32) * np.asarray(colour, np.float32)[:, None, None]


@pytest.mark.parametrize("directional", [False, True])
@pytest.mark.parametrize("phase", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_flat_colour_stays_flat_and_keeps_its_colour(phase, directional):
    camera = replace(QUIET, phase=phase, directional=directional)
    image = photograph(flat(0.5, 0.2, 0.05), camera, np.random.default_rng(0))
    assert image.std(axis=(1, 2)).max() < 0.004
    expected = np.asarray([1.055 * x ** (1 / 2.4) - 0.055 for x in (0.5, 0.2, 0.05)])[:, None, None]
    assert np.abs(image - expected).max() < 0.006


def test_noise_grows_with_the_light_and_with_the_gain():
    rng = np.random.default_rng(0)
    linear = replace(NOISY, contrast=0.0)
    dim, bright = (photograph(flat(x, x, x), linear, rng) for x in (0.1, 0.4))
    slope = [2.4 * 1.055**-1 * x ** (1 - 1 / 2.4) for x in (0.1, 0.4)]
    assert bright.std() * slope[1] > 1.5 * dim.std() * slope[0]
    calm = photograph(flat(0.4, 0.4, 0.4), replace(NOISY, shot_noise=0.0001), rng)
    assert calm.std() < 0.6 * bright.std()


def test_demosaicing_ties_neighbours_together_and_a_clean_render_does_not():
    rng = np.random.default_rng(0)
    shot = photograph(flat(0.3, 0.3, 0.3, size=128), NOISY, rng)[0, 4:-4, 4:-4]
    clean = render_clean(flat(0.3, 0.3, 0.3, size=128), NOISY, rng, noise=True)[0, 4:-4, 4:-4]

    def neighbours(plane: np.ndarray) -> float:
        centred = plane - plane.mean()
        return float((centred[:, 1:] * centred[:, :-1]).mean() / centred.var())

    assert neighbours(shot) > neighbours(clean) + 0.15
    assert 0.5 < clean.std() / shot.std() < 2


def test_the_lens_keeps_the_mean_brightness_but_darkens_corners():
    image = photograph(flat(0.3, 0.3, 0.3), replace(QUIET, vignette=0.3), np.random.default_rng(0))
    assert image[:, :4, :4].mean() < image[:, 28:36, 28:36].mean() - 0.03
    assert abs(image.mean() - photograph(flat(0.3, 0.3, 0.3), QUIET, np.random.default_rng(0)).mean()) < 0.01


def test_both_sources_of_fakes_are_as_noisy_as_photographs():
    noiseless = [name for name, generator in GENERATORS.items() if not generator.noisy_source]
    assert noiseless == ["denoising"]
