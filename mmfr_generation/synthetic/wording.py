"""The words of the benchmark: captions and attribute sentences from a small grammar.

A pattern holds choices in square brackets, ``[one|another]``, and slots in braces, ``{side}``. Every sentence is true
of the image it is written for; only the words vary.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from mmfr_generation.synthetic.faults import DrawnScene
from mmfr_generation.synthetic.numerics import Array, Generator
from mmfr_generation.synthetic.scenes import Thing

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_PLURALS = {"person": "people", "box": "boxes"}
_OPPOSITE = {"left": "right", "right": "left"}

_CAPTION = (
    "[The image shows|This is a picture of|The picture shows|Here we see] {things} {place}[, lit from the {light}|"
    ", with light from the {light}|. The light comes from the {light}|. The scene is lit from the {light}]."
)
_TEXT_CAPTION = "[The word on {carrier} is {text}|On {carrier} we read the word {text}]."

_PART_CAPTION = (
    "[The image shows|This is a picture of|The picture shows|Here we see] a part of a {kind} scene[, lit from the "
    "{light}|, with light from the {light}|. The light comes from the {light}|. The scene is lit from the {light}]."
)

_GRADES = ((0.45, "[faint|weak|slight]"), (0.75, "[clear|visible|plain]"), (1.01, "[strong|heavy|marked]"))

TRACES: dict[str, str] = {
    "upsampling": (
        "[A {grade} grid of small squares|A {grade} checkered pattern|A {grade} pixel grid] [lies over|covers|runs "
        "through] [the whole image|{texture}|all surfaces]."
    ),
    "spectral": (
        "[A {grade} wave pattern|A {grade} pattern of regular stripes|A {grade} periodic ripple] [lies over|covers|"
        "runs through] [the whole image|{texture}|all surfaces]."
    ),
    "smoothing": (
        "[The surfaces show {grade} smoothing|{texture_} shows {grade} smoothing|There is {grade} smoothing on all "
        "surfaces] [and look painted|like paint|while the edges stay sharp]."
    ),
    "missing noise": (
        "[The grain of a camera is missing|The image lacks natural sensor grain|Grain and faint detail are gone], "
        "[with {grade} loss|a {grade} loss] [on {texture}|on all surfaces|in the whole image]."
    ),
    "wrong noise": (
        "[The grain of the image is wrong|The image does not show natural sensor grain|The grain is not that of a "
        "camera], [with {grade} specks|with {grade} added grain] [on {texture}|on all surfaces|in the whole image]."
    ),
    "edge": (
        "[{grade_} rims follow|{grade_} halos follow|There are {grade} halos and echoes along] [the edges|the "
        "outlines] of [{edges}|all things]."
    ),
    "composition": (
        "[A {grade} seam|A {grade} hard border] [cuts through the image|runs through the image] [where patches do not "
        "fit|where pieces do not match]."
    ),
    "palette": (
        "[The colours break into {grade} steps|There are {grade} bands of colour|{grade_} colour steps replace the "
        "soft shades] [in the whole image|on {texture}|on all surfaces]."
    ),
    "block": (
        "[{grade_} blocks break up|A {grade} block pattern breaks up|There are {grade} blocks all over] [the image|"
        "{texture}|the fine detail]."
    ),
    "super-resolution": (
        "[The detail is blurred and then sharpened|The image looks enlarged and sharpened|Fine detail is lost by "
        "enlarging], [with {grade} loss|a {grade} loss] [on {texture}|on all surfaces|in the whole image]."
    ),
    "learnt decoder": (
        "[The detail is decoded in coarse patches|Fine detail melts into coarse patches|Small patches replace the fine "
        "detail], [with {grade} loss|a {grade} loss] [on {texture}|on all surfaces|in the whole image]."
    ),
    "colour registration": (
        "[{grade_} colour fringes follow|There are {grade} fringes of red and blue along] [the edges|the outlines] of "
        "[{edges}|all things]."
    ),
    "line displacement": (
        "[{grade_} jagged steps break|There are {grade} jagged steps along] [the edges|the outlines] of [{edges}|"
        "all things]."
    ),
}
"""What each mechanism's trace looks like, on the attribute that its generator names."""

_PATCH = (
    "[A {grade} patch|A smooth patch with a {grade} border|A filled patch with a {grade} border] [stands out|does not "
    "fit] {where}."
)
_FAULT = "[{clause_}, seen {where}|{where_} {clause}]."

_AUTHENTIC: dict[str, str] = {
    "Consistent Lighting and Shadows": (
        "[The light comes from the {light} and all shadows fall to the {away}|All shadows fall to the {away}, away "
        "from the light|The light from the {light} and the shadows on the {away} agree]."
    ),
    "Smooth and Natural Image Edges": (
        "[The edges of {edges} are|Along {edges} the edges are|The outlines of {edges} are] [smooth and free of halos|"
        "clean, without rims or seams|smooth and natural]."
    ),
    "Natural and Consistent Image Texture": (
        "[{texture_} varies|{texture_} changes|The pattern of {texture} varies] [freely|from place to place|without "
        "any repeat] and [keeps its fine grain|shows natural grain|has no grid]."
    ),
    "High Image Quality": (
        "[The image is clear|The picture is sharp|The detail is clear] and [the colours are soft and even|shows no "
        "blocks|keeps fine detail]."
    ),
    "Semantic Rationality": "{sense}",
}


def expand(pattern: str, rng: Generator, slots: Mapping[str, str]) -> str:
    """Writes one sentence of a pattern.

    Args:
        pattern: Text with ``[a|b]`` choices and ``{slot}`` slots; a slot named ``x_`` is ``x`` with a capital.
        rng: Makes the choices.
        slots: Text of each slot; it may hold choices itself.
    """
    full = {**slots, **{f"{name}_": text for name, text in slots.items()}}

    def choose(match: re.Match[str]) -> str:
        options = match[1].split("|")
        return options[int(rng.integers(len(options)))]

    parts = re.split(r"\{(\w+)\}", _CHOICE.sub(choose, pattern))
    for k in range(1, len(parts), 2):
        name, text = parts[k], _CHOICE.sub(choose, full[parts[k]])
        parts[k] = capital(text) if name.endswith("_") else text
    return capital("".join(parts))


def capital(text: str) -> str:
    """Returns the text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def caption(scene: DrawnScene, rng: Generator) -> str:
    """Describes a scene: what is there, how many, in which colour, where, and the light's side.

    The written word is left out where a fault has broken its letters.
    """
    *others, last = [_count(thing) for thing in scene.facts.things]
    slots = {
        "things": f"{', '.join(others)} and {last}" if others else last,
        "place": scene.facts.place,
        "light": scene.light.name,
        "text": scene.facts.text,
        "carrier": scene.facts.carrier,
    }
    text = expand(_CAPTION, rng, slots)
    if scene.facts.text and scene.fault != "text":
        text += " " + expand(_TEXT_CAPTION, rng, slots)
    return text


def part_caption(scene: DrawnScene, rng: Generator) -> str:
    """Describes a scene of which only a part is in the image: its kind and the light's side."""
    return expand(_PART_CAPTION, rng, {"kind": scene.kind.name, "light": scene.light.name})


def without_things(scene: DrawnScene) -> DrawnScene:
    """Returns the scene with facts that name no single thing, for an image that shows only a part of it."""
    return replace(scene, facts=replace(scene.facts, texture="the surfaces", edges="the things"))


def authentic(scene: DrawnScene, *, clear: bool, rng: Generator, unsure: Collection[str] = ()) -> dict[str, str | None]:
    """Writes the authentic attributes of a real image.

    Args:
        scene: What the image shows.
        clear: Whether noise and compression are low enough to speak of high quality.
        rng: Chooses the words, and which of the true attributes are spoken of: two at least.
        unsure: Attributes that cannot be claimed of this image.
    """
    slots = {
        "light": scene.light.name,
        "away": _OPPOSITE[scene.light.name],
        "edges": scene.facts.edges,
        "texture": scene.facts.texture,
        "sense": scene.facts.sense,
    }
    true = [name for name in _AUTHENTIC if (clear or name != "High Image Quality") and name not in unsure]
    order = [true[int(k)] for k in rng.permutation(len(true))]
    spoken = {name for k, name in enumerate(order) if k < 2 or rng.random() < 0.6}
    return {name: expand(_AUTHENTIC[name], rng, slots) if name in spoken else None for name in _AUTHENTIC}


def grade(strength: float) -> str:
    """Returns the pattern of words for a strength."""
    return next(words for limit, words in _GRADES if strength < limit)


def trace(scene: DrawnScene, mechanism: str, strength: float, rng: Generator, mask_HW: Array | None) -> str:
    """Writes what a generator's trace looks like; a local one is also placed."""
    slots = {"grade": grade(strength), "texture": scene.facts.texture, "edges": scene.facts.edges}
    if mask_HW is None:
        return expand(TRACES[mechanism], rng, slots)
    return expand(_PATCH, rng, {**slots, "where": place(mask_HW)})


def fault(scene: DrawnScene, rng: Generator) -> str:
    """Writes what is wrong with a faulty scene, and where.

    Raises:
        ValueError: The scene has no fault.
    """
    if scene.fault is None or scene.mask_HW is None:
        raise ValueError("the scene has no fault to write about")
    clause = scene.kind.faults[scene.fault].replace("{side}", scene.light.name)
    return expand(_FAULT, rng, {"clause": clause, "where": place(scene.mask_HW)})


def place(mask_HW: Array) -> str:
    """Says in which third of the image's width a mask has its middle."""
    middle = float(mask_HW.nonzero()[1].mean() + 0.5) / mask_HW.shape[1]
    if middle < 1 / 3:
        return "at the left"
    return "at the right" if middle > 2 / 3 else "in the middle"


def _count(thing: Thing) -> str:
    noun = thing.noun if thing.count == 1 else _PLURALS.get(thing.noun, thing.noun + "s")
    return " ".join(part for part in (NUMBERS[thing.count], thing.colour, noun) if part)
