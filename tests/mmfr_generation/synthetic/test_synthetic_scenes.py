"""Scenes: any size, one light, and faults whose masks are where the faults are."""

import numpy as np
import pytest
from PIL import Image

from mmfr_generation.synthetic.canvas import Canvas, Light
from mmfr_generation.synthetic.faults import FAULTS, draw_faulty_scene, draw_scene
from mmfr_generation.synthetic.numerics import LUMA, field
from mmfr_generation.synthetic.scenes import SCENES, Fault
from mmfr_generation.synthetic.solids import ball, cast

kinds = pytest.mark.parametrize("kind", SCENES, ids=lambda kind: kind.name)


def display(linear: np.ndarray) -> np.ndarray:
    return np.clip(linear, 0, 1) ** (1 / 2.2)


def shrunk(linear: np.ndarray, side: int) -> np.ndarray:
    grey = sum(w * plane for w, plane in zip(LUMA, display(linear), strict=True)).astype(np.float32)
    return np.asarray(Image.fromarray(grey).resize((side, side), Image.Resampling.BOX))


def test_there_are_at_least_six_kinds_and_every_fault_has_a_scene():
    assert len({kind.name for kind in SCENES}) >= 6
    assert {fault for kind in SCENES for fault in kind.faults} == set(FAULTS)


@kinds
@pytest.mark.parametrize("size", [64, 101, 512])
def test_a_scene_can_be_drawn_at_any_size(kind, size):
    scene = draw_scene(kind, seed=3, size=size)
    assert scene.linear_CHW.shape == (3, size, size)
    assert scene.linear_CHW.dtype == np.float32
    assert np.isfinite(scene.linear_CHW).all()
    assert display(scene.linear_CHW).std() > 0.05


@kinds
def test_a_scene_has_the_same_content_at_every_size(kind):
    small, large = (shrunk(draw_scene(kind, seed=8, size=size).linear_CHW, 16) for size in (96, 256))
    other = shrunk(draw_scene(kind, seed=9, size=256).linear_CHW, 16)
    alike = np.corrcoef(small.ravel(), large.ravel())[0, 1]
    assert alike > 0.8
    assert alike > np.corrcoef(small.ravel(), other.ravel())[0, 1]
    assert draw_scene(kind, 8, 96).facts == draw_scene(kind, 8, 256).facts


@kinds
def test_equal_seeds_give_equal_scenes_and_others_do_not(kind):
    first, again, other = (draw_scene(kind, seed, 64).linear_CHW for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@kinds
def test_every_declared_fault_can_be_seen_and_its_mask_is_where_the_image_changed(kind):
    for name in kind.faults:
        areas = []
        for seed in range(8):
            sound = draw_scene(kind, seed, 112)
            canvas, rng = Canvas(112), np.random.default_rng(seed)
            kind.draw(canvas, rng, Light.draw(rng), Fault(name, seed))
            changed = np.abs(display(canvas.rgb_CHW) - display(sound.linear_CHW)).max(0) > 0.06
            areas.append(changed.mean())
        assert np.median(areas) > 0.003, name
        assert max(areas) < 0.4, name


@kinds
def test_a_fault_changes_nothing_of_the_rest(kind):
    for name in kind.faults:
        states = []
        for fault in (None, Fault(name, 5)):
            rng = np.random.default_rng(4)
            kind.draw(Canvas(64), rng, Light.draw(rng), fault)
            states.append(rng.bit_generator.state)
        assert states[0] == states[1], name


@kinds
def test_a_faulty_scene_differs_from_the_sound_one_inside_its_mask_only(kind):
    for seed in range(6):
        sound = draw_scene(kind, seed, 112)
        faulty = draw_faulty_scene(kind, seed, 112, np.random.default_rng(seed))
        assert faulty.fault in kind.faults
        change = np.abs(display(faulty.linear_CHW) - display(sound.linear_CHW)).max(0)
        assert change[~faulty.mask_HW].mean() < 0.004
        assert change[faulty.mask_HW].mean() > 0.05


@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("reversed_", [False, True])
def test_shadows_fall_away_from_the_light_unless_reversed(side, reversed_):
    light = Light(side, 0.7, (1.0, 1.0, 1.0), 0.3)
    canvas = Canvas(100)
    canvas.rgb_CHW[:] = 0.5
    cast(canvas, light, 0.5, 0.6, 0.08, 0.3, reversed_=reversed_)
    dark = 0.5 - canvas.rgb_CHW[0]
    middle = (dark.sum(0) * np.linspace(-1, 1, 100)).sum() / dark.sum()
    assert np.sign(middle) == (side if reversed_ else -side)


@pytest.mark.parametrize("side", [-1, 1])
def test_a_ball_is_brighter_towards_the_light(side):
    canvas = Canvas(100)
    ball(canvas, np.random.default_rng(0), Light(side, 0.7, (1, 1, 1), 0.3), 0.5, 0.5, 0.3, (0.5, 0.5, 0.5), 0.0)
    left, right = canvas.rgb_CHW[0, :, :50].sum(), canvas.rgb_CHW[0, :, 50:].sum()
    assert (right > left) == (side > 0)


def test_textures_have_a_falling_spectrum():
    plane = field(np.random.default_rng(0), 256, 256, "rough")
    power = np.abs(np.fft.rfft2(plane)) ** 2
    low, middle, high = power[2:8, 2:8].mean(), power[16:32, 16:32].mean(), power[64:128, 64:128].mean()
    assert low > 5 * middle > 25 * high


def test_words_fit_their_box_and_broken_ones_differ():
    canvas = Canvas(112)
    (window, good), (_, bad) = (canvas.letters("HOTEL", 0.1, 0.4, 0.9, 0.6, broken=b) for b in (None, 5))
    assert good.shape == bad.shape == window.shape
    assert good.max() > 0.9 and bad.max() > 0.9
    assert np.abs(good - bad).mean() > 0.05
