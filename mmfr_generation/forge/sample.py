"""One image of a forged set with everything that is true of it: a pure function of its key and of the photographs."""

import uuid
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from llava.labels import FAKE, LABELS, REAL
from llava.systems.fakereasoning.answer import ATTRIBUTES
from mmfr_generation.forge.manipulations import MANIPULATIONS, Manipulation, manipulate
from mmfr_generation.forge.photographs import Photograph, cut
from mmfr_generation.synthetic import wording
from mmfr_generation.synthetic.delivery import Delivered, deliver, unsure_attributes
from mmfr_generation.synthetic.generators import GENERATORS, ForgeryGenerator
from mmfr_generation.synthetic.numerics import Array, Generator
from mmfr_generation.synthetic.sample import FULL_SHARE, JPEG_QUALITY, SPLITS, WEAKEST, Key, Sample, save_first

MIN_SIDE = 64
METHODS: dict[str, ForgeryGenerator | Manipulation] = {
    **{name: generator for name, generator in GENERATORS.items() if not generator.local},
    **MANIPULATIONS,
}
"""What makes a fake, by name: traces over the whole image, then local manipulations."""
SEEN = tuple(name for name, method in METHODS.items() if method.role == "seen")
_LOCAL_SHARE = 0.5
"""Share of the training fakes that are local manipulations."""
_AREA_KEPT = 0.0005
"""Share of the image below which what is left of a mask is too small to be spoken of."""

_REAL: dict[str, str] = {
    "Smooth and Natural Image Edges": (
        "[No pasted border or seam cuts through the image|The edges are those of the things shown, without pasted "
        "borders|Nothing in the image has a pasted border]."
    ),
    "Natural and Consistent Image Texture": (
        "[The texture changes freely and no pattern lies over it|No pattern was laid over the surfaces|No part was "
        "smoothed, enlarged or filled]."
    ),
    "Semantic Rationality": (
        "[Nothing was copied, removed or pasted in|All parts of the image belong together|No part comes from another "
        "photograph]."
    ),
}
_CAPTION = "[The image shows|This is|The picture shows] a part of a photograph, on average {colour} and {brightness}."
_HUES = ("red", "yellow", "green", "cyan", "blue", "purple")
_GREY, _DARK, _BRIGHT = 12, 85, 170


def photograph_of(key: Key, photographs: Sequence[Photograph]) -> int:
    """Returns the number of a key's photograph: the same for a real and a fake of one index."""
    return key.index % len(photographs)


def make_forged(key: Key, photographs: Sequence[Photograph]) -> Sample:
    """Cuts a crop, forges it if it is to be a fake, and delivers it.

    Args:
        key: What to make; its size is the longest side.
        photographs: Those of its split, at least one.

    Raises:
        ImageReadError: A photograph can no longer be read.
    """
    entropy = (SPLITS.index(key.split), zlib.crc32(key.set.encode()), key.label, key.index)
    streams = np.random.SeedSequence(entropy=key.seed, spawn_key=(7, *entropy)).spawn(5)
    cut_rng, forge_rng, file_rng, text_rng, way_rng = map(np.random.default_rng, streams)
    number = photograph_of(key, photographs)
    height, width = (int(side) for side in cut_rng.integers(MIN_SIDE, key.size + 1, 2))
    crop = cut(photographs[number], (height, width), cut_rng)
    stem = str(uuid.UUID(bytes=file_rng.bytes(16), version=4))
    quality = int(file_rng.integers(JPEG_QUALITY[0], JPEG_QUALITY[1] + 1))
    forged: dict[str, Any] = {"generator": None, "mechanism": None, "strength": None, "split_role": "seen"}
    if key.set:
        forged["split_role"] = METHODS[key.set].role
    masks: dict[str, Array] = {}
    if key.label == FAKE:
        other = photographs[(number + 1) % len(photographs)]
        crop, done, masks = _forge(crop, _method(key, forge_rng), other, forge_rng)
        forged |= done
    arrived = _send(crop, masks, quality, key, file_rng, way_rng)
    sentences = _sentences(key.label, forged, arrived, text_rng)
    truth = {
        "label": LABELS[key.label],
        "split": key.split,
        "set": key.set or None,
        **forged,
        "photograph": photographs[number].name,
        "jpeg_quality": quality,
        "caption": caption(arrived.pixels_HWC, text_rng),
        "attributes": sentences,
        "seed": key.seed,
        "size": key.size,
        "index": key.index,
        "delivery": [step.to_json() for step in arrived.steps],
    }
    return Sample(stem, arrived.suffix, arrived.data, arrived.pixels_HWC, arrived.masks, truth)


def _method(key: Key, rng: Generator) -> ForgeryGenerator | Manipulation:
    """What makes a fake: its evaluation set's, or in training one that is seen, drawn."""
    if key.set:
        return METHODS[key.set]
    local = rng.random() < _LOCAL_SHARE
    names = [name for name in SEEN if (name in MANIPULATIONS) == local]
    return METHODS[names[int(rng.integers(len(names)))]]


def _forge(
    crop: Array, method: ForgeryGenerator | Manipulation, other: Photograph, rng: Generator
) -> tuple[Array, dict[str, Any], dict[str, Array]]:
    strength = 1.0 if rng.random() < FULL_SHARE else round(float(rng.uniform(WEAKEST, 1.0)), 3)
    if isinstance(method, ForgeryGenerator):
        image = method.apply(crop, strength, rng)
        return image, {"generator": method.name, "mechanism": method.mechanism, "strength": strength}, {}
    made = manipulate(crop, _fitted(other, crop.shape[1:], rng), method, strength, rng)
    kind = made.kind
    done = {"generator": kind.name, "mechanism": kind.mechanism, "strength": strength if kind.graded else None}
    return made.image, done, {kind.name: made.mask}


def _fitted(photograph: Photograph, shape: tuple[int, ...], rng: Generator) -> Array:
    """A crop of another photograph in just this shape; what it lacks is mirrored."""
    height, width = shape
    crop = cut(photograph, (height, width), rng)
    margins = [(0, 0), (0, height - crop.shape[1]), (0, width - crop.shape[2])]
    filled: Array = np.pad(crop, margins, mode="symmetric")
    return filled


def _send(
    crop: Array, masks: dict[str, Array], quality: int, key: Key, file_rng: Generator, rng: Generator
) -> Delivered:
    pixels = np.rint(np.clip(crop, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    data, suffix, saved = save_first(pixels, quality, file_rng)
    if key.delivery == "none":
        return Delivered(data, suffix, saved, masks, ())
    return deliver(saved, data, suffix, masks, rng)


def _sentences(label: int, forged: dict[str, Any], arrived: Delivered, rng: Generator) -> dict[str, str | None]:
    """What is true of the image, in the words of its class."""
    sentences: dict[str, str | None] = dict.fromkeys(ATTRIBUTES[LABELS[label]])
    if label == REAL:
        unsure = unsure_attributes(arrived.steps) - {"Semantic Rationality"}
        sure = [name for name in _REAL if name not in unsure]
        for name in sure:
            if name == "Semantic Rationality" or rng.random() < 0.7:
                sentences[name] = wording.expand(_REAL[name], rng, {})
        return sentences
    method = METHODS[forged["generator"]]
    strength = 1.0 if forged["strength"] is None else forged["strength"]
    slots = {"grade": wording.grade(strength), "texture": "the surfaces", "edges": "the things"}
    if isinstance(method, Manipulation):
        mask = arrived.masks[method.name]
        slots["where"] = wording.place(mask) if mask.mean() >= _AREA_KEPT else "at the border"
        pattern = method.sentence
    else:
        pattern = wording.TRACES[method.mechanism]
    sentences[method.attribute] = wording.expand(pattern, rng, slots)
    return sentences


def caption(pixels_HWC: Array, rng: Generator) -> str:
    """Says what can be measured of an image: its mean colour and brightness."""
    red, green, blue = (float(x) for x in pixels_HWC.reshape(-1, 3).mean(axis=0))
    mean = 0.299 * red + 0.587 * green + 0.114 * blue
    brightness = "dark" if mean < _DARK else "bright" if mean > _BRIGHT else "of middle brightness"
    return wording.expand(_CAPTION, rng, {"colour": colour_name(red, green, blue), "brightness": brightness})


def colour_name(red: float, green: float, blue: float) -> str:
    """Names a colour of 8-bit values: grey, or the nearest of six hues."""
    high, low = max(red, green, blue), min(red, green, blue)
    spread = high - low
    if spread < _GREY:
        return "grey"
    if high == red:
        sextant = (green - blue) / spread
    elif high == green:
        sextant = 2 + (blue - red) / spread
    else:
        sextant = 4 + (red - green) / spread
    return _HUES[round(sextant) % 6]
