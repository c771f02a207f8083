"""The operations that delivery and the robustness grid share."""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from llava import image_operations
from llava.image_operations import OPERATIONS, Step, apply_steps, encode

GEOMETRIC = [
    Step("resize", {"factor": 0.6, "kernel": "lanczos"}),
    Step("resize", {"factor": 1.7, "kernel": "box"}),
    Step("crop", {"left": 0.1, "top": 0.05, "right": 0.02, "bottom": 0.12}),
    Step("rotate", {"degrees": 4.0, "kernel": "bilinear"}),
    Step("rotate", {"degrees": -3.0, "kernel": "bicubic"}),
    Step("letterbox", {"left": 0.2, "right": 0.1, "grey": 200}),
    Step("screenshot", {"factor": 0.7, "margin": 0.1, "bar": 0.1, "grey": 30, "kernel": "bicubic"}),
]


def marked() -> tuple[Image.Image, np.ndarray]:
    """A grey image with a red rectangle, and where that is."""
    pixels = np.full((90, 140, 3), 90, np.uint8)
    mask = np.zeros((90, 140), bool)
    mask[30:60, 85:120] = True
    pixels[mask] = (250, 10, 10)
    return Image.fromarray(pixels), mask


def overlap(image: Image.Image, mask: np.ndarray) -> float:
    """How well a mask fits what is red in an image."""
    pixels = np.asarray(image).astype(int)
    red = pixels[..., 0] - pixels[..., 1] > 120
    assert mask.shape == red.shape and mask.dtype == bool
    return float((red & mask).sum() / (red | mask).sum())


@pytest.mark.parametrize("step", GEOMETRIC, ids=lambda step: f"{step.name}-{next(iter(step.values.values()))}")
def test_a_mask_goes_where_its_pixels_go(step):
    image, mask = marked()
    moved, masks = apply_steps(image, [step], {"red": mask})
    assert overlap(moved, masks["red"]) > 0.93


def test_a_mask_goes_through_a_chain():
    image, mask = marked()
    moved, masks = apply_steps(image, [*GEOMETRIC, Step("jpeg", {"quality": 60})], {"red": mask})
    assert overlap(moved, masks["red"]) > 0.85


def test_a_mask_that_stays_behind_is_seen(monkeypatch):
    monkeypatch.setattr(image_operations, "_GEOMETRIC", ("resize", "letterbox", "screenshot"))
    image, mask = marked()
    moved, masks = apply_steps(image, [Step("crop", {"left": 0.1, "top": 0, "right": 0, "bottom": 0})], {"red": mask})
    assert masks["red"].shape != np.asarray(moved).shape[:2]


@pytest.mark.parametrize("name", ["blur", "sharpen", "noise", "jpeg", "webp", "avif"])
def test_a_step_on_pixels_leaves_size_and_masks(name):
    values = {"blur": {"sigma": 1.0}, "sharpen": {"sigma": 1.0, "amount": 0.5}, "noise": {"sigma": 3.0, "seed": 1}}
    step = Step(name, values.get(name, {"quality": 70}))
    image, mask = marked()
    changed = step(image)
    assert changed.size == image.size and changed.mode == "RGB"
    assert step.on_mask(mask) is mask
    assert np.asarray(changed).tolist() != np.asarray(image).tolist()
    assert np.array_equal(np.asarray(step(image)), np.asarray(changed))


def test_blur_is_a_gaussian():
    values = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    wanted = np.stack([ndimage.gaussian_filter(values[..., c].astype(float), 1.3, truncate=3.01, mode="nearest")
                       for c in range(3)], axis=-1)  # fmt: skip
    found = np.asarray(OPERATIONS["blur"](Image.fromarray(values), sigma=1.3)).astype(float)
    assert np.abs(found - wanted).max() < 1.0


def test_noise_has_its_strength_and_its_seed():
    image = Image.new("RGB", (200, 200), (128, 128, 128))
    first, again, other = (OPERATIONS["noise"](image, sigma=5.0, seed=seed) for seed in (1, 1, 2))
    values = np.asarray(first).astype(float)
    assert values.std() == pytest.approx(5.0, abs=0.1) and values.mean() == pytest.approx(128, abs=0.2)
    assert np.array_equal(np.asarray(first), np.asarray(again))
    assert not np.array_equal(np.asarray(first), np.asarray(other))


def test_turning_leaves_no_empty_corner():
    image = Image.new("RGB", (151, 83), (255, 255, 255))
    for degrees in (-7.0, 0.4, 3.3, 12.0):
        turned = np.asarray(OPERATIONS["rotate"](image, degrees=degrees))
        assert turned.min() > 250 and turned.shape[0] > 40


def test_small_images_stay_images():
    tiny = Image.new("RGB", (20, 17), (9, 9, 9))
    for step in GEOMETRIC:
        assert min(step(tiny).size) >= 12


def test_quality_is_used():
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3)).astype(np.uint8))
    for format in ("JPEG", "WEBP", "AVIF"):
        low, high = (len(encode(image, format, quality=quality)) for quality in (30, 95))
        assert low < 0.8 * high


def test_an_unknown_operation_is_named():
    with pytest.raises(ValueError, match="unknown operation 'smudge'; known: resize"):
        Step("smudge")
