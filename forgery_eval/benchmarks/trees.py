"""Trees by generator, as GenImage and ForenSynths lie: ``<generator>/<split>/{nature,ai}`` or ``{0_real,1_fake}``."""

import os
from collections.abc import Iterator
from pathlib import Path

from forgery_eval.benchmarks.base import Sample
from forgery_eval.benchmarks.mmfr import TREE
from llava.images import walk_images
from llava.labels import LABELS

ON_DISK = (
    "GenImage, ForenSynths and the like: <generator>/<split or category>/… with folders nature and ai, 0_real and "
    "1_fake, or real and fake"
)
_CLASSES = (LABELS, ("0_real", "1_fake"), ("nature", "ai"))
_OWN = _CLASSES[-1]
"""Names that no other layout has, so that a generator's folder alone is known too."""
_TRAINING, _SPLITS = "train", ("train", "val", "test")
_DEEPEST = 4


def opens(path: Path) -> bool:
    """Whether class folders lie two folders or more below it, or are called as no other layout's are."""
    if not path.is_dir() or (path / TREE).is_dir() or any(path.glob("*/*_reasoning.json")):
        return False
    return any(depth >= 2 or names == _OWN for _, names, depth in _class_parents(path.resolve(), 0))


def read(path: Path) -> Iterator[Sample]:
    """Yields the images in order of path; each generator is a set, with its split and its category as groups.

    Where there are further splits, those for training are left out.
    """
    root = path.resolve()
    found = list(_class_parents(root, 0))
    inner = {folder: folder.relative_to(root).parts for folder, _, _ in found}
    splits = {part for parts in inner.values() for part in parts if part in _SPLITS}
    for folder, names, _ in found:
        parts = inner[folder]
        if _TRAINING in parts and splits != {_TRAINING}:
            continue
        named = [part for part in parts if part not in _SPLITS]
        groups = {}
        if split := next((part for part in parts if part in _SPLITS), ""):
            groups["split"] = split
        if len(named) > 1:
            groups["category"] = "/".join(named[1:])
        for label, name in enumerate(names):
            for file in walk_images(folder / name) if (folder / name).is_dir() else ():
                inside = file.relative_to(root).as_posix()
                yield Sample(f"{root.name}/{inside}", file, label, named[0] if named else root.name, groups=groups)


def _class_parents(folder: Path, depth: int) -> Iterator[tuple[Path, tuple[str, ...], int]]:
    """Yields folders that hold class folders, in order of path, with the names of these and the depth."""
    try:
        with os.scandir(folder) as scan:
            below = sorted(entry.name for entry in scan if not entry.name.startswith(".") and entry.is_dir())
    except OSError:
        return
    names = next((names for names in _CLASSES if set(names) & set(below)), None)
    if names is not None:
        yield folder, names, depth
    elif depth < _DEEPEST:
        for name in below:
            yield from _class_parents(folder / name, depth + 1)
