"""A handful of images of every kind, with their truth: ``python -m mmfr_generation.synthetic.showcase --out D``.

They come from evaluation sets of a seed of their own. Which ones is decided by a rule, before any model sees them: of
each chosen set the first image whose scene the class has not shown yet, and where a fault is wanted, that has one; and
one of each class that was sent on. The last is a chart, which is neither real nor fake.
``mmfr_generation.forge.showcase`` adds crops of a photograph.
"""

import io
import sys
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from llava.cli import OptionParser, run_cli
from llava.errors import FileError
from llava.files import atomic_write, make_folder, write_json
from llava.labels import FAKE, LABELS, REAL
from mmfr_generation.synthetic.generators import GENERATORS
from mmfr_generation.synthetic.sample import Key, Sample, make_sample

SEED = 2026
SIZE = 112
LIST = "samples.json"
CHART = "13_chart.png"
CHOSEN: tuple[tuple[str, int, bool], ...] = (
    ("halo", REAL, False),
    ("pixel_shuffle", REAL, False),
    ("row_jitter", REAL, False),
    ("transposed_convolution", FAKE, False),
    ("inpainting", FAKE, False),
    ("guided_smoothing", FAKE, True),
    ("palette", FAKE, True),
    ("spectral_lattice", FAKE, False),
    ("block_walsh", FAKE, True),
    ("channel_shift", FAKE, False),
)
"""Evaluation set, class, and whether a high-level fault is wanted; four seen generators, three unseen ones."""
DELIVERED: tuple[tuple[str, int], ...] = (("halo", REAL), ("transposed_convolution", FAKE))
"""Evaluation set and class of those that were sent on."""


def choose() -> Iterator[tuple[Key, Sample]]:
    """Yields the images that the rule gives."""
    shown: dict[int, set[str]] = {REAL: set(), FAKE: set()}
    for name, label, faulty in CHOSEN:
        for index in count():
            key = Key(SEED, SIZE, "evaluation", name, label, index)
            sample = make_sample(key)
            if sample.truth["scene"] not in shown[label] and bool(sample.truth["faults"]) >= faulty:
                shown[label].add(sample.truth["scene"])
                yield key, sample
                break
    for name, label in DELIVERED:
        for index in count():
            key = Key(SEED, SIZE, "evaluation", name, label, index, delivery="mixed")
            sample = make_sample(key)
            if sample.truth["delivery"]:
                yield key, sample
                break


def write_showcase(out: Path) -> None:
    """Writes the images, one mask for each that has any, and ``samples.json``.

    Args:
        out: Folder: new or empty.

    Raises:
        FileError: The folder is not empty, or cannot be written.
    """
    make_folder(out, "--out")
    if any(out.iterdir()):
        raise FileError(f"{out} is not empty; remove what it holds, or choose another folder")
    entries = [write_entry(out, number, key, sample) for number, (key, sample) in enumerate(choose(), start=1)]
    atomic_write(out / CHART, _png(np.asarray(draw_chart())))
    entries.append(
        {
            **dict.fromkeys(entries[0]),
            "image": CHART,
            "faults": [],
            "caption": "A chart of five bars, which no camera took.",
            "attributes": {},
        }
    )
    about = {
        "about": "Rendered scenes of MMFR-Synthetic, none of them used in training. Chosen by a rule before any model "
        "saw them. A mask is 255 where something is wrong in one place only. The chart is neither real nor fake.",
        "command": "python -m mmfr_generation.synthetic.showcase --out llava/assets/samples",
        "samples": entries,
    }
    write_json(out / LIST, about)


def draw_chart() -> Image.Image:
    """Draws bars over axes."""
    image = Image.new("RGB", (240, 180), "white")
    draw = ImageDraw.Draw(image)
    draw.line([24, 12, 24, 160, 228, 160], fill="black", width=2)
    for index, (height, colour) in enumerate(
        zip((60, 110, 35, 140, 85), ("navy", "teal", "gold", "red", "grey"), strict=True)
    ):
        draw.rectangle([36 + 38 * index, 159 - height, 60 + 38 * index, 159], fill=colour)
    return image


def write_entry(out: Path, number: int, key: Key, sample: Sample) -> dict[str, Any]:
    """Writes an image and its mask; returns what ``samples.json`` holds of it."""
    truth = sample.truth
    stem = f"{number:02}_{LABELS[key.label]}_{truth['generator'] or truth.get('scene', 'photograph')}"
    if truth.get("delivery"):
        stem += "_sent_on"
    atomic_write(out / f"{stem}{sample.suffix}", sample.data)
    mask = None
    if sample.masks:
        mask = f"{stem}_mask.png"
        atomic_write(out / mask, _png(np.logical_or.reduce(list(sample.masks.values()))))
    generator = GENERATORS.get(truth["generator"] or "")
    delivery = truth.get("delivery")
    return {
        "image": f"{stem}{sample.suffix}",
        "label": truth["label"],
        "generator": truth["generator"],
        "trace": generator.description if generator else None,
        "role": truth["split_role"] if generator else None,
        "strength": truth["strength"],
        "delivery": " ".join(step["step"] for step in delivery) if delivery else None,
        "faults": truth.get("faults", []),
        "mask": mask,
        "caption": truth["caption"],
        "attributes": {name: sentence for name, sentence in truth["attributes"].items() if sentence},
        "seed": key.seed,
        "set": key.set,
        "index": key.index,
    }


def _png(mask_HW: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(mask_HW).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def build_parser() -> OptionParser:
    """Returns the options of this command."""
    parser = OptionParser(
        prog="python -m mmfr_generation.synthetic.showcase", description="Writes a few images of every kind."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write: new or empty")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the images; returns 0."""
    write_showcase(build_parser().parse_args(argv).out)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
