"""The data card of a written benchmark, and its contact sheet."""

import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from llava.labels import FAKE, REAL
from mmfr_generation.synthetic.faults import FAULTS
from mmfr_generation.synthetic.generators import GENERATORS
from mmfr_generation.synthetic.numerics import Array
from mmfr_generation.synthetic.sample import (
    CAMERA_SHARE,
    FAULT_SHARE,
    FULL_SHARE,
    JPEG_QUALITY,
    PNG_SHARE,
    WEAKEST,
    Key,
    Sample,
    make_sample,
)
from mmfr_generation.synthetic.scenes import SCENES

CARD, SHEET = "card.md", "contact_sheet.png"
_TILE_LIMIT = 112
_STRENGTHS = (0.25, 0.6, 1.0)
_SEARCH = 2000
_CARD = """\
# MMFR-Synthetic

Rendered scenes in the layout of the MMFR dataset. What is real or fake here, why, and where is known by construction.
It is a world of its own: a detector that is good here says nothing yet about photographs.

![contact sheet]({sheet})

## Contents

| part | real | fake |
|---|---|---|
| training | {train_real} | {train_fake} |
| each of {sets} evaluation sets | {per_set} | {per_set} |

Images are {made}{size} x {size} pixels; the seed is {seed}. The same images come again, byte for byte, from

    python -m mmfr_generation.synthetic --out D --train {train} --eval {per_set} --size {size} --seed {seed}{option}

with the same versions of Pillow (JPEG, PNG and its font), numpy and scipy.

- Scenes: {scenes}; each with one light, its shadows, texture and depth.
- Real: the scene through a camera (lens, colour filter array, shot and read noise, demosaicing, tone curve).
- Fake: {camera:.0%} start from such a photograph, the others from a clean render with noise as strong as a camera's,
  the generator `denoising` apart. Then one generator leaves its trace.
- Strength: {full:.0%} of the fakes have strength 1, the others are uniform from {weakest} to 1.
- Faults: {fault:.0%} of the fakes also get a high-level fault, drawn among those of their scene. A mask is with every
  such fault and with every local trace: {masks}.
- Both classes {end} in a JPEG of quality {quality[0]} to {quality[1]}; {png:.0%} are then stored as PNG.
- `manifest.jsonl` has for each image its label, generator, mechanism, strength, source, faults, masks, caption and
  attributes; `split_role` tells generators of training (`seen`) from those that only evaluation sees: of a mechanism
  that training knows (`unseen-known-mechanism`) or of their own (`unseen-own-mechanism`).
- Masks are 255 where the fault is, and have the size of their image.
{delivered}
## Generators, and what the size of a file gives away

File type, pixel size, tables, names, order, metadata and mean colour carry nothing. The size of a file does,
since a trace changes how well an image compresses: the last column is the chance that a fake's file is larger than a
real's of its set, with a 95 % interval (0.5: nothing is given away).

| generator | mechanism | role | attribute | trace | larger file |
|---|---|---|---|---|---|
{rows}
"""


def write_card(
    seed: int, size: int, records: Sequence[Mapping[str, Any]], out: Path, delivery: str = "none"
) -> dict[str, bytes]:
    """Makes the data card and the contact sheet of a benchmark whose images are written.

    Args:
        seed: The run's seed.
        size: Side of the images in pixels.
        records: The manifest's lines.
        out: The benchmark's folder; file sizes are read from it.
        delivery: What happened to the images.

    Returns:
        Bytes of each file by its name.
    """
    buffer = io.BytesIO()
    contact_sheet(seed, min(size, _TILE_LIMIT)).save(buffer, "PNG", compress_level=9)
    return {CARD: _card(seed, size, records, out, delivery).encode(), SHEET: buffer.getvalue()}


def auc(negative: Sequence[float], positive: Sequence[float]) -> tuple[float, float]:
    """Returns how often a positive value exceeds a negative one (ties half), and the half-width of its 95 % interval.

    The interval is that of Hanley and McNeil. Both lists must hold a value.
    """
    below = np.searchsorted(np.sort(negative), positive, "left")
    upto = np.searchsorted(np.sort(negative), positive, "right")
    area = float((below + upto).mean() / 2 / len(negative))
    q1, q2 = area / (2 - area), 2 * area * area / (1 + area)
    spread = area * (1 - area) + (len(positive) - 1) * (q1 - area**2) + (len(negative) - 1) * (q2 - area**2)
    return area, 1.96 * (max(spread, 0.0) / len(positive) / len(negative)) ** 0.5


def contact_sheet(seed: int, size: int) -> Image.Image:
    """Draws reals of each scene, each generator from weak to strong, and each fault beside its mask.

    Args:
        seed: The run's seed.
        size: Side of a tile in pixels; it is rendered, not resized.
    """
    tiles = [*_real_tiles(seed, size), *_generator_tiles(seed, size), *_fault_tiles(seed, size)]
    columns, label = 9, 14
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (size + 4), rows * (size + label + 4)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(9)
    for k, (title, pixels) in enumerate(tiles):
        x, y = k % columns * (size + 4) + 2, k // columns * (size + label + 4) + 2
        sheet.paste(Image.fromarray(pixels), (x, y))
        pen.text((x, y + size), title, fill="black", font=font)
    return sheet


def _real_tiles(seed: int, size: int) -> Iterator[tuple[str, Array]]:
    samples = _first(seed, size, REAL, [kind.name for kind in SCENES], lambda s: [s.truth["scene"]])
    yield from ((f"real: {name}", sample.pixels_HWC) for name, sample in samples.items())
    for k in range(-len(samples) % 9):
        yield "real", make_sample(Key(seed, size, "evaluation", next(iter(GENERATORS)), REAL, k)).pixels_HWC


def _generator_tiles(seed: int, size: int) -> Iterator[tuple[str, Array]]:
    for name in GENERATORS:
        for strength in _STRENGTHS:
            sample = make_sample(Key(seed, size, "evaluation", name, FAKE, 0), strength=strength)
            yield f"{name[:17]} {strength:g}", sample.pixels_HWC


def _fault_tiles(seed: int, size: int) -> Iterator[tuple[str, Array]]:
    for name, sample in _first(seed, size, FAKE, list(FAULTS), lambda s: s.truth["faults"]).items():
        yield f"fault: {name}", sample.pixels_HWC
        marked = sample.pixels_HWC.astype(np.float32)
        marked[~sample.masks[name]] *= 0.35
        yield f"mask: {name}", marked.astype(np.uint8)


def _first(seed: int, size: int, label: int, names: list[str], has: Callable[[Sample], list[str]]) -> dict[str, Sample]:
    """Finds the first training image that has each of some names, with a weak trace."""
    samples: dict[str, Sample] = {}
    for index in range(_SEARCH):
        if len(samples) == len(names):
            break
        sample = make_sample(Key(seed, size, "train", "", label, index), strength=WEAKEST)
        for name in has(sample):
            if name in names:
                samples.setdefault(name, sample)
    return {name: samples[name] for name in names if name in samples}


def _card(seed: int, size: int, records: Sequence[Mapping[str, Any]], out: Path, delivery: str) -> str:
    counts = Counter((r["split"], r["label"]) for r in records)
    masks = Counter(name for r in records for name in r["masks"])
    rows = []
    for g in GENERATORS.values():
        leak = size_leak([r for r in records if r["set"] == g.name], out)
        rows.append(f"| {g.name} | {g.mechanism} | {g.role} | {g.attribute} | {g.description} | {leak} |")
    return _CARD.format(
        sheet=SHEET,
        train=counts["train", "real"] + counts["train", "fake"],
        train_real=counts["train", "real"],
        train_fake=counts["train", "fake"],
        sets=len(GENERATORS),
        per_set=counts["evaluation", "real"] // len(GENERATORS),
        size=size,
        seed=seed,
        made="" if delivery == "none" else "rendered at ",
        end="end" if delivery == "none" else "begin",
        scenes=", ".join(kind.name for kind in SCENES),
        camera=CAMERA_SHARE,
        full=FULL_SHARE,
        weakest=WEAKEST,
        fault=FAULT_SHARE,
        masks=", ".join(f"{name} {count}" for name, count in sorted(masks.items())) or "none",
        quality=JPEG_QUALITY,
        png=PNG_SHARE,
        option="" if delivery == "none" else f" --delivery {delivery}",
        delivered=delivered_words(records),
        rows="\n".join(rows),
    )


def delivered_words(records: Sequence[Mapping[str, Any]]) -> str:
    """Returns a line of a card about what happened to the images; an empty text if nothing can have."""
    chains = [record["delivery"] for record in records if "delivery" in record]
    if not chains:
        return ""
    steps = Counter(step["step"] for chain in chains for step in chain)
    counted = ", ".join(f"{name} {count}" for name, count in sorted(steps.items())) or "none"
    untouched = sum(1 for chain in chains if not chain)
    return (
        f"- Delivery, drawn for both classes alike: {len(chains) - untouched} of {len(chains)} images go through a "
        "chain of one to four steps\n  and another file (JPEG, PNG, WebP, AVIF). Before it, a frame gives rendered "
        "images their shape. Steps:\n  {counted}.\n  The manifest has them in `frame` and `delivery`; what is said of "
        "an image that was cut names no thing that may be gone.\n".replace("{counted}", counted)
    )


def size_leak(records: Sequence[Mapping[str, Any]], out: Path) -> str:
    """Returns how often a fake's file is larger than a real's, with its 95 % interval, in words."""
    sizes: dict[str, list[float]] = {"real": [], "fake": []}
    for record in records:
        sizes[record["label"]].append((out / record["image"]).stat().st_size)
    if not records:
        return "no images"
    area, half = auc(sizes["real"], sizes["fake"])
    return f"{area:.2f} ± {half:.2f}"
