"""Data of a small FakeShield: a rendered tree as its three parts take it, and fresh images at full strength.

    python scripts/fakeshield_small_data.py train FOLDER [--small_faults 0.01]
    python scripts/fakeshield_small_data.py fresh FOLDER --count 100 --seed 1001

FOLDER/data is a tree of ``python -m mmfr_generation.synthetic``. Only its fakes with a local fault count, that is with
a mask; fakes with a small region are rendered beside them, and as many real images taken. ``train`` writes
``domains.jsonl`` for the tagger, ``explainer.json``, and for the segmenter ``segmenter_large.jsonl``, fakes with a
large region that are rendered for it alone, and ``segmenter.jsonl``, which has all; ``fresh`` renders images that no
training saw and writes ``fresh.jsonl``.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava.cli import DefaultsHelpFormatter, OptionParser, positive_int, run_cli
from llava.errors import DataError
from llava.files import file_errors, read_jsonl, write_json, write_jsonl
from llava.labels import FAKE, LABELS, REAL
from llava.systems.fakeshield.answer import DOMAINS, QUESTION, tag_sentence, write_training
from llava.tampered import manifest_masks, read_changed
from mmfr_generation.synthetic import wording
from mmfr_generation.synthetic.camera import Camera, photograph
from mmfr_generation.synthetic.faults import draw_scene
from mmfr_generation.synthetic.generators import GENERATORS, SEEN
from mmfr_generation.synthetic.layout import MANIFEST
from mmfr_generation.synthetic.sample import JPEG_QUALITY, Key, Sample, make_sample, save_first
from mmfr_generation.synthetic.scenes import SCENES

SCENE_DOMAINS = {
    "people": "deepfake",
    "landscape": "photoshop",
    "street": "photoshop",
    "garden": "photoshop",
    "still life": "aigc",
    "shelf": "aigc",
    "room": "aigc",
}
"""Which scenes stand for which domain: a tag names the kind of data, real images included, not what was done."""
LEAST_AREA = 0.02
"""Smallest share of a fresh image that is changed."""
AREAS = ((0.05, "2 to 5 %"), (0.15, "5 to 15 %"), (1.01, "15 % and more"))
"""Groups of fresh fakes by the share of the image that is changed."""
REGION, SMALL, SCENE = "inpainting", "small inpainting", "scene"
"""Kinds of local faults: a region that a generator painted over, a small one, and a fault of the scene."""
LARGE = "large inpainting"
"""A region as large as a generator's, rendered for the segmenter's first steps."""
WINDOWS = {SMALL: (0.4, 0.7), LARGE: (0.7, 1.0)}
"""Side of the window in which a region is painted, as a share of the image's: 2 to 15 % of it are changed, or more."""


def build_parser() -> OptionParser:
    """Returns the options of this command."""
    parser = OptionParser(prog="fakeshield_small_data.py", formatter_class=DefaultsHelpFormatter)
    parser.add_argument("what", choices=("train", "fresh"), help="which data to write")
    parser.add_argument("folder", type=Path, help="folder with data, and of what is written")
    parser.add_argument("--small_faults", type=float, default=0.01, help="least area of a fault that is trained on")
    parser.add_argument("--count", type=positive_int, default=100, help="fresh fakes of each of three kinds")
    parser.add_argument("--regions", type=positive_int, default=6400, help="fakes of a small region, and of a large")
    parser.add_argument("--size", type=positive_int, default=112, help="side of the images rendered here, in pixels")
    parser.add_argument("--seed", type=int, default=1001, help="decides every image rendered here")
    return parser


def domain_of(record: Mapping[str, Any]) -> str:
    """Returns the domain of an image by its scene."""
    return SCENE_DOMAINS[record["scene"]]


def explanation(record: Mapping[str, Any]) -> str:
    """Returns what speaks for an image's verdict."""
    return " ".join(text for text in record["attributes"].values() if text)


def conversation(image: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a record of the explainer's training: the domain's sentence stands before the question."""
    question = tag_sentence(DOMAINS.index(domain_of(record))) + QUESTION
    answer = write_training(record["label"], explanation(record))
    return {
        "image": image,
        "conversations": [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}],
    }


def save_mask(changed_HW: np.ndarray, file: Path) -> None:
    """Writes a mask, 255 where the image was changed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(changed_HW.astype(np.uint8) * 255).save(file)


def painted_region(kind: str, seed: int, index: int, size: int, strength: float | None = None) -> Sample:
    """Renders a photograph in which a region was painted over.

    Args:
        kind: ``SMALL`` or ``LARGE``.
        seed: Of the run; with the index and whether a strength is given it decides the image.
        index: Its number.
        size: Its side in pixels.
        strength: Of the trace; by default drawn from 0.3 to 1.
    """
    # Each kind has images of its own; a small one's do not hang on how many kinds there are.
    rng = np.random.default_rng([seed, index, size, int(strength is None), *([1] if kind == LARGE else [])])
    scene = draw_scene(SCENES[int(rng.integers(len(SCENES)))], int(rng.integers(1 << 62)), size)
    before_CHW = photograph(scene.linear_CHW, Camera.draw(rng), rng)
    drawn = float(rng.uniform(0.3, 1.0))
    strength = drawn if strength is None else strength
    side = int(rng.uniform(*WINDOWS[kind]) * size)
    top, left = (int(rng.integers(size - side + 1)) for _ in range(2))
    after_CHW = before_CHW.copy()
    window = (slice(None), slice(top, top + side), slice(left, left + side))
    after_CHW[window] = GENERATORS[REGION].apply(before_CHW[window], strength, rng)
    mask_HW = (after_CHW != before_CHW).any(axis=0)
    pixels_HWC = np.rint(np.clip(after_CHW, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    data, suffix, pixels_HWC = save_first(pixels_HWC, int(rng.integers(*JPEG_QUALITY)), rng)
    text = wording.trace(scene, GENERATORS[REGION].mechanism, strength, rng, mask_HW)
    truth = {"label": LABELS[FAKE], "scene": scene.kind.name, "attributes": {GENERATORS[REGION].attribute: text}}
    return Sample(f"{kind.split()[0]}_{index}", suffix, data, pixels_HWC, {kind: mask_HW}, truth)


def write_train(folder: Path, least_area: float, regions: int, size: int, seed: int) -> None:
    """Writes what the three parts are trained on.

    Raises:
        DataError: The tree has no image with a local fault, or no real one.
    """
    tree = folder / "data"
    records = [record for _, record in read_jsonl(tree / MANIFEST) if record["split"] == "train"]
    local = [record for record in records if record["masks"]]
    real = [record for record in records if record["label"] == LABELS[REAL]]
    if not local or not real:
        raise DataError(f"{tree} has {len(local)} images with a local fault and {len(real)} real ones; render more")
    changes = chain(tree_changes(tree, local), painted_changes(SMALL, folder, regions, size, seed))
    originals: Iterator[Change] = ((f"data/{record['image']}", record, None) for record in real[: len(local) + regions])
    conversations, domains, masked = [], [], []
    for name, record, changed_HW in chain(changes, originals):
        conversations.append(conversation(name, record))
        domains.append({"image": name, "label": domain_of(record)})
        if changed_HW is not None and changed_HW.mean() >= least_area:
            masked.append(masked_row(folder, name, record, changed_HW))
    large = [masked_row(folder, *change) for change in painted_changes(LARGE, folder, regions, size, seed)]
    write_json(folder / "explainer.json", conversations)
    write_jsonl(folder / "domains.jsonl", domains)
    write_jsonl(folder / "segmenter_large.jsonl", large)
    write_jsonl(folder / "segmenter.jsonl", masked + large)
    print(f"{len(conversations)} conversations, and {len(masked + large)} images with masks, in {folder}")


def masked_row(folder: Path, name: str, record: Mapping[str, Any], changed_HW: np.ndarray) -> dict[str, Any]:
    """Writes a mask and returns a row of the segmenter's training."""
    mask = f"joined/{Path(name).stem}.png"
    save_mask(changed_HW, folder / mask)
    described = write_training(record["label"], explanation(record))
    return {"image": name, "label": record["label"], "mask": mask, "description": described}


Change = tuple[str, Mapping[str, Any], np.ndarray | None]
"""Name of an image, what is true of it, and where it was changed, ``[height, width]`` bool; None for a real one."""


def tree_changes(tree: Path, records: Sequence[Mapping[str, Any]]) -> Iterator[Change]:
    """Reads the fakes of a tree."""
    for record in records:
        yield f"data/{record['image']}", record, read_changed(manifest_masks(tree, record))


def painted_changes(
    kind: str, folder: Path, number: int, size: int, seed: int
) -> Iterator[tuple[str, Mapping[str, Any], np.ndarray]]:
    """Renders fakes with a small region, or with a large one."""
    place = kind.split()[0]
    (folder / place).mkdir(exist_ok=True)
    for index in range(number):
        sample = painted_region(kind, seed, index, size)
        name = f"{place}/{sample.stem}{sample.suffix}"
        (folder / name).write_bytes(sample.data)
        yield name, sample.truth, changed(sample)


def fresh_fakes(kind: str, seed: int, size: int) -> Iterator[Sample]:
    """Renders fakes of a kind at full strength, one after the other."""
    others = [name for name in SEEN if name != REGION]
    for index in count():
        if kind == SMALL:
            sample = painted_region(SMALL, seed, index, size, strength=1.0)
        else:
            generator = REGION if kind == REGION else others[index % len(others)]
            sample = make_sample(Key(seed, size, "evaluation", generator, FAKE, index), strength=1.0)
        if sample.masks and changed(sample).mean() >= LEAST_AREA:
            yield sample


def changed(sample: Sample) -> np.ndarray:
    """Returns where an image was changed, ``[height, width]`` bool."""
    return np.any([*sample.masks.values()], axis=0)


def write_fresh(folder: Path, number: int, size: int, seed: int) -> None:
    """Renders fresh images: of each kind so many fakes, and as many real ones."""
    images = folder / "fresh"
    images.mkdir(exist_ok=True)
    rows = []
    for place, kind in enumerate((REGION, SMALL, SCENE)):
        fakes = fresh_fakes(kind, seed, size)
        for index in range(number):
            real = make_sample(Key(seed, size, "evaluation", REGION, REAL, place * number + index))
            for sample in (next(fakes), real):
                rows.append(fresh_row(sample, kind, folder))
    write_jsonl(folder / "fresh.jsonl", rows)
    print(f"{len(rows)} fresh images in {images}, named in {folder / 'fresh.jsonl'}")


def fresh_row(sample: Sample, kind: str, folder: Path) -> dict[str, Any]:
    """Writes an image with its mask and returns its row."""
    name = f"fresh/{sample.stem}{sample.suffix}"
    (folder / name).write_bytes(sample.data)
    row = {"image": name, "label": sample.truth["label"], "set": kind, "domain": domain_of(sample.truth)}
    if not sample.masks:
        return row
    mask, changed_HW = f"fresh_masks/{sample.stem}.png", changed(sample)
    save_mask(changed_HW, folder / mask)
    area = next(name for end, name in AREAS if changed_HW.mean() < end)
    return {**row, "mask": mask, "faults": "+".join(sorted(sample.masks)), "area": area}


def main(argv: Sequence[str] | None = None) -> int:
    """Writes what the arguments say; returns 0."""
    arguments = build_parser().parse_args(argv)
    with file_errors(arguments.folder, "written"):
        arguments.folder.mkdir(parents=True, exist_ok=True)
        if arguments.what == "train":
            write_train(arguments.folder, arguments.small_faults, arguments.regions, arguments.size, arguments.seed)
        else:
            write_fresh(arguments.folder, arguments.count, arguments.size, arguments.seed)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
