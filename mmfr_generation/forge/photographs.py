"""Photographs: finding them, splitting them, and cutting crops out of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from llava.cli import format_list, inform, log
from llava.errors import DataError, ImageReadError
from llava.files import digest_files, read_jsonl
from llava.images import describe_passed_over, list_images, load_image
from mmfr_generation.synthetic.layout import MANIFEST
from mmfr_generation.synthetic.numerics import Array, Generator, luma

_SIGNATURE = 16
_ALIKE = 0.95
"""Correlation of two small grey versions from which on two files are taken for one photograph."""
_CHUNK = 1024
_FLAT = 0.012
"""A crop whose brightness varies less than this, as a share of full scale, is drawn again."""
_DRAWS = 20


@dataclass(frozen=True)
class Photograph:
    """A photograph of the folder.

    Attributes:
        path: Where it lies.
        name: Its path in the folder.
        digest: SHA-256 of its file.
        group: Equal for files that show the same photograph; they stay on one side of the split.
    """

    path: Path
    name: str
    digest: str
    group: int


def find_photographs(folder: Path, least: int) -> list[Photograph]:
    """Finds the photographs of a folder and its subfolders, each content once.

    Files that cannot be read or are too small are named and left out.

    Args:
        folder: Where they lie.
        least: Shortest side in pixels.

    Raises:
        DataError: Fewer than two different photographs can be used.
        MissingFileError: There is no such folder.
    """
    passed_over: list[Path] = []
    files = list(list_images(folder, passed_over))
    if passed_over:
        inform(describe_passed_over(passed_over))
    kept: dict[str, tuple[Path, Array]] = {}
    refused = []
    for file, digest in zip(files, digest_files(files), strict=True):
        try:
            image = load_image(file)
        except ImageReadError as error:
            refused.append(str(error))
            continue
        if min(image.size) < least:
            refused.append(f"{file}: its shorter side has {min(image.size)} pixels; {least} are needed")
        elif digest not in kept:
            kept[digest] = (file, _signature(image))
    if refused:
        log(f"left out:\n{format_list(refused)}")
    groups = _groups(np.array([signature for _, signature in kept.values()]))
    if len(set(groups)) < 2:
        raise DataError(
            f"{folder} holds {len(set(groups))} usable photographs; at least 2 different ones are needed, one to train "
            "on and one to evaluate on"
        )
    root = folder if folder.is_dir() else folder.parent
    return [
        Photograph(file, file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file), digest, group)
        for (digest, (file, _)), group in zip(kept.items(), groups, strict=True)
    ]


def _signature(image: Image.Image) -> Array:
    """A small grey version of zero mean and unit length; an even image gives zeros."""
    small = np.asarray(image.convert("L").resize((_SIGNATURE, _SIGNATURE), Image.Resampling.BOX), np.float32).ravel()
    small = small - small.mean()
    length = float(np.sqrt((small * small).sum()))
    signature: Array = small / length if length > 0 else small
    return signature


def _groups(signatures_ND: Array) -> list[int]:
    """Numbers files such that those which look alike, directly or through others, have one number."""
    parent = list(range(len(signatures_ND)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for start in range(0, len(parent), _CHUNK):
        alike = signatures_ND[start : start + _CHUNK] @ signatures_ND.T >= _ALIKE
        for row, other in zip(*alike.nonzero(), strict=True):
            low, high = sorted((root(start + int(row)), root(int(other))))
            parent[high] = low
    return [root(index) for index in range(len(parent))]


def leave_out(photographs: Sequence[Photograph], dataset: Path) -> list[Photograph]:
    """Leaves out what the evaluation sets of a forged data set show, and every other file of it.

    Args:
        photographs: From ``find_photographs``.
        dataset: A forged data set from the same folder of photographs.

    Raises:
        DataError: It evaluates on no photograph, or on one that is not among these, or fewer than two would be left.
        MissingFileError: It has no manifest.
    """
    lines = (record for _, record in read_jsonl(dataset / MANIFEST))
    names = {record.get("photograph") for record in lines if record.get("split") == "evaluation"} - {None}
    if not names:
        raise DataError(f"{dataset} evaluates on no photograph, so there is none to leave out; name a forged data set")
    groups = {photograph.group for photograph in photographs if photograph.name in names}
    if unknown := names - {photograph.name for photograph in photographs}:
        raise DataError(
            f"{dataset} evaluates on {min(map(str, unknown))}, which is not among these photographs; a data set whose "
            "photographs are to be left out must be made from the same folder"
        )
    kept = [photograph for photograph in photographs if photograph.group not in groups]
    if len({photograph.group for photograph in kept}) < 2:
        raise DataError(f"fewer than 2 photographs are left without those of {dataset}; give more photographs")
    return kept


def split_photographs(
    photographs: Sequence[Photograph], share: float, seed: int
) -> tuple[list[Photograph], list[Photograph]]:
    """Splits photographs for training and evaluation; each group goes to one side, and each side gets one.

    Args:
        photographs: From ``find_photographs``.
        share: Of the groups that go to evaluation.
        seed: Decides which.
    """
    groups = sorted({p.group: min(q.digest for q in photographs if q.group == p.group) for p in photographs}.items())
    ordered = [group for group, _ in sorted(groups, key=lambda item: item[1])]
    turn = np.random.default_rng([seed, 41]).permutation(len(ordered))
    count = min(max(1, round(share * len(ordered))), len(ordered) - 1)
    held = {ordered[int(k)] for k in turn[:count]}
    by_digest = sorted(photographs, key=lambda photograph: photograph.digest)
    return [p for p in by_digest if p.group not in held], [p for p in by_digest if p.group in held]


@lru_cache(maxsize=3)
def _opened(path: Path) -> Image.Image:
    return load_image(path)


def cut(photograph: Photograph, size: tuple[int, int], rng: Generator) -> Array:
    """Cuts a crop out of a photograph: half of them at native resolution, the others shrunk from a wider window.

    Args:
        photograph: Which.
        size: Height and width of the crop in pixels; less where the photograph is smaller.
        rng: Chooses the window; one that is quite flat is drawn again.

    Returns:
        Display values in [0, 1], shape (3, H, W), float32.

    Raises:
        ImageReadError: It can no longer be read.
    """
    image = _opened(photograph.path)
    height, width = min(size[0], image.height), min(size[1], image.width)
    crop = np.zeros((3, height, width), np.float32)
    for _ in range(_DRAWS):
        widest = min(image.height / height, image.width / width)
        scale = 1.0 if rng.random() < 0.5 else widest ** float(rng.random())
        wide, high = min(image.width, round(width * scale)), min(image.height, round(height * scale))
        left, top = int(rng.integers(image.width - wide + 1)), int(rng.integers(image.height - high + 1))
        window = (left, top, left + wide, top + high)
        native = (wide, high) == (width, height)
        small = (
            image.crop(window)
            if native
            else image.resize((width, height), Image.Resampling.LANCZOS, box=window, reducing_gap=3.0)
        )
        crop = np.ascontiguousarray(np.asarray(small, np.float32).transpose(2, 0, 1)) / np.float32(255)
        if luma(crop).std() >= _FLAT:
            break
    return crop
