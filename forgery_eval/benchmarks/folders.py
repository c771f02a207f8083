"""Plain folders: ``real`` and ``fake``, in the folder itself or in each of its subfolders."""

from collections.abc import Iterator
from pathlib import Path

from forgery_eval.benchmarks.base import Sample
from llava.images import walk_images
from llava.labels import LABELS

ON_DISK = "any folders: real and fake, in the folder itself or in each of its subfolders"


def opens(path: Path) -> bool:
    """Whether there is such a folder."""
    return bool(_set_folders(path))


def read(path: Path) -> Iterator[Sample]:
    """Yields the images sorted by path; a folder inside ``real`` or ``fake`` is the group ``folder``."""
    for folder in _set_folders(path):
        for label, name in enumerate(LABELS):
            root = folder / name
            for file in walk_images(root) if root.is_dir() else ():
                inside = file.relative_to(root).parts[:-1]
                groups = {"folder": "/".join(inside)} if inside else {}
                inner = file.relative_to(folder).as_posix()
                yield Sample(f"{folder.name}/{inner}", file, label, folder.name, groups=groups)


def _set_folders(path: Path) -> list[Path]:
    root = path.resolve()
    if not root.is_dir():
        return []
    candidates = [root] if _is_set(root) else sorted(root.iterdir())
    return [folder for folder in candidates if folder.is_dir() and _is_set(folder)]


def _is_set(folder: Path) -> bool:
    return any((folder / name).is_dir() for name in LABELS)
