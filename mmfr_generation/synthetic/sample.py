"""One image of the benchmark with everything that is true of it: a pure function of its key."""

import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from PIL import Image

from llava.image_operations import Step, apply_steps, decode, encode
from llava.labels import FAKE, LABELS, REAL
from llava.systems.fakereasoning.answer import ATTRIBUTES
from mmfr_generation.synthetic import wording
from mmfr_generation.synthetic.camera import Camera, photograph, render_clean
from mmfr_generation.synthetic.delivery import Delivered, Delivery, deliver, draw_frame, is_cut, unsure_attributes
from mmfr_generation.synthetic.faults import FAULTS, DrawnScene, draw_faulty_scene, draw_scene
from mmfr_generation.synthetic.generators import GENERATORS, SEEN
from mmfr_generation.synthetic.numerics import Array, Generator
from mmfr_generation.synthetic.scenes import SCENES

Split = Literal["train", "evaluation"]
SPLITS: tuple[Split, ...] = ("train", "evaluation")

MIN_SIZE, MAX_SIZE = 64, 512
WEAKEST = 0.2
FULL_SHARE = 0.25
"""Share of the fakes whose strength is exactly 1; the others are uniform from ``WEAKEST`` to 1."""
FAULT_SHARE = 0.35
PNG_SHARE = 0.2
CAMERA_SHARE = 0.5
"""Share of the fakes that start from a photograph; the others start from a clean render."""
JPEG_QUALITY = (72, 97)
KEPT_FAULT = 0.5
"""A high-level fault is no longer spoken of where cuts left less than this share of its part of the image."""


@dataclass(frozen=True)
class Key:
    """What an image is a function of.

    Attributes:
        seed: The run's seed, 0 or more.
        size: Side in pixels, 64 to 512.
        split: ``train`` or ``evaluation``.
        set: Name of the evaluation set, which is that of its generator; empty in training.
        label: 0 for real, 1 for fake.
        index: Number within split, set and label.
        delivery: What happens to the image after it was made; the scene and its trace do not depend on it.
    """

    seed: int
    size: int
    split: Split
    set: str
    label: int
    index: int
    delivery: Delivery = "none"

    @property
    def generator(self) -> str:
        """The generator of a fake; in training the seen ones take turns."""
        return self.set or SEEN[self.index % len(SEEN)]


@dataclass(frozen=True)
class Sample:
    """An image file and its truth.

    Attributes:
        stem: Random file name without its ending.
        suffix: ``.jpg`` or ``.png``; after a delivery also ``.webp`` or ``.avif``.
        data: The file's bytes.
        pixels_HWC: The decoded image, uint8.
        masks: For the high-level fault and for a local trace a mask each, bool, shape (H, W).
        truth: What the manifest says of it, paths apart.
    """

    stem: str
    suffix: str
    data: bytes
    pixels_HWC: Array
    masks: dict[str, Array]
    truth: dict[str, Any]


def make_sample(key: Key, *, strength: float | None = None) -> Sample:
    """Renders the image of a key.

    Args:
        key: What to render.
        strength: Strength of the trace in place of the one that the key gives; for contact sheets.
    """
    entropy = (SPLITS.index(key.split), zlib.crc32(key.set.encode()), key.label, key.index)
    streams = np.random.SeedSequence(entropy=key.seed, spawn_key=entropy).spawn(6)
    scene_rng, camera_rng, forge_rng, file_rng, text_rng, way_rng = map(np.random.default_rng, streams)
    kind = SCENES[int(scene_rng.integers(len(SCENES)))]
    scene_seed = int(scene_rng.integers(1 << 62))
    camera = Camera.draw(camera_rng)
    stem = str(uuid.UUID(bytes=file_rng.bytes(16), version=4))
    quality = int(file_rng.integers(JPEG_QUALITY[0], JPEG_QUALITY[1] + 1))
    common = {"scene": kind.name, "jpeg_quality": quality}
    masks: dict[str, Array] = {}
    if key.label == REAL:
        scene = draw_scene(kind, scene_seed, key.size)
        image = photograph(scene.linear_CHW, camera, camera_rng)
        forged: dict[str, Any] = {"source": "camera", "generator": None, "mechanism": None, "strength": None}
    else:
        if forge_rng.random() < FAULT_SHARE:
            scene = draw_faulty_scene(kind, scene_seed, key.size, forge_rng)
        else:
            scene = draw_scene(kind, scene_seed, key.size)
        image, forged, masks = _forge(scene, camera, key.generator, strength, camera_rng, forge_rng)
    arrived, way = _send(image, masks, quality, key.delivery, file_rng, way_rng)
    shown, arrived = _still_true(scene, masks, arrived, way)
    if key.label == REAL:
        clear = quality >= 85 and camera.read_noise < 0.0028
        sentences = wording.authentic(shown, clear=clear, rng=text_rng, unsure=unsure_attributes(way))
    else:
        sentences = _explain(shown, forged, arrived.masks, text_rng)
    truth = {
        "label": LABELS[key.label],
        "split": key.split,
        "set": key.set or None,
        **forged,
        "split_role": GENERATORS[key.set].role if key.set else "seen",
        **common,
        "faults": [shown.fault] if shown.fault else [],
        "light": scene.light.name,
        "caption": wording.part_caption(shown, text_rng) if is_cut(way) else wording.caption(shown, text_rng),
        "attributes": sentences,
        "seed": key.seed,
        "size": key.size,
        "index": key.index,
    }
    if key.delivery != "none":
        framed = way[: len(way) - len(arrived.steps)]
        truth |= {"frame": [step.to_json() for step in framed], "delivery": [step.to_json() for step in arrived.steps]}
    return Sample(stem, arrived.suffix, arrived.data, arrived.pixels_HWC, arrived.masks, truth)


def _send(
    image_CHW: Array, masks: dict[str, Array], quality: int, delivery: Delivery, file_rng: Generator, rng: Generator
) -> tuple[Delivered, tuple[Step, ...]]:
    """Saves an image, delivers it if that is asked for, and returns all that happened to it, its frame first."""
    if delivery == "none":
        data, suffix, pixels = save_first(_as_pixels(image_CHW), quality, file_rng)
        return Delivered(data, suffix, pixels, masks, ()), ()
    frame = draw_frame(rng)
    way = (frame,) if frame else ()
    framed, masks = apply_steps(Image.fromarray(_as_pixels(image_CHW)), way, masks)
    data, suffix, pixels = save_first(np.asarray(framed), quality, file_rng)
    arrived = deliver(pixels, data, suffix, masks, rng)
    return arrived, (*way, *arrived.steps)


def _still_true(
    scene: DrawnScene, masks: dict[str, Array], arrived: Delivered, way: Sequence[Step]
) -> tuple[DrawnScene, Delivered]:
    """Returns what of a scene's facts and of its masks still holds after what happened to the image."""
    shown = wording.without_things(scene) if is_cut(way) else scene
    fault = scene.fault
    if fault is not None and arrived.masks[fault].mean() < KEPT_FAULT * masks[fault].mean():
        shown = replace(shown, fault=None, mask_HW=None)
        arrived = replace(arrived, masks={name: mask for name, mask in arrived.masks.items() if name != fault})
    return shown, arrived


def _forge(
    scene: DrawnScene, camera: Camera, name: str, strength: float | None, camera_rng: Generator, rng: Generator
) -> tuple[Array, dict[str, Any], dict[str, Array]]:
    """Makes a fake: image, what was done, and the masks of its local faults."""
    generator = GENERATORS[name]
    drawn = 1.0 if rng.random() < FULL_SHARE else round(rng.uniform(WEAKEST, 1.0), 3)
    strength = drawn if strength is None else strength
    if rng.random() < CAMERA_SHARE:
        source, before = "camera", photograph(scene.linear_CHW, camera, camera_rng)
    else:
        source = "clean"
        before = render_clean(scene.linear_CHW, camera, camera_rng, noise=generator.noisy_source)
    after = generator.apply(before, strength, rng)
    masks = {}
    if scene.fault is not None and scene.mask_HW is not None:
        masks[scene.fault] = scene.mask_HW
    if generator.local:
        masks[name] = (after != before).any(axis=0)
    done = {"source": source, "generator": name, "mechanism": generator.mechanism, "strength": strength}
    return after, done, masks


def _explain(
    scene: DrawnScene, forged: dict[str, Any], masks: dict[str, Array], rng: Generator
) -> dict[str, str | None]:
    generator = GENERATORS[forged["generator"]]
    sentences: dict[str, str | None] = dict.fromkeys(ATTRIBUTES[LABELS[FAKE]])
    sentences[generator.attribute] = wording.trace(
        scene, generator.mechanism, forged["strength"], rng, masks.get(generator.name)
    )
    if scene.fault is not None:
        sentences[FAULTS[scene.fault]] = wording.fault(replace(scene, mask_HW=masks[scene.fault]), rng)
    return sentences


def _as_pixels(image_CHW: Array) -> Array:
    pixels: Array = np.rint(np.clip(image_CHW, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    return pixels


def save_first(pixels_HWC: Array, quality: int, rng: Generator) -> tuple[bytes, str, Array]:
    """Compresses an image as JPEG; a share is then stored as PNG, with the JPEG's pixels.

    Both classes come through here, so that type, tables and quality say nothing about the class.

    Returns:
        The file's bytes, its ending, and the decoded image.
    """
    subsampling, as_png = int(rng.integers(2)) * 2, rng.random() < PNG_SHARE
    data = encode(Image.fromarray(pixels_HWC), "JPEG", quality=quality, subsampling=subsampling)
    decoded = decode(data)
    if not as_png:
        return data, ".jpg", np.asarray(decoded)
    return encode(decoded, "PNG", compress_level=3), ".png", np.asarray(decoded)
