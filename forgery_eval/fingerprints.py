"""What tells one model, one image set or one folder from another: digests of contents, or of sizes and times."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava.files import digest_files, digest_json, read_json
from llava.frames import is_frame

_CONFIGS = ("config.json", "adapter_config.json")
_LOCATION_ENDINGS = ("_tower", "_path", "_file", "_folder", "_weights")
"""Endings of the config fields that can name files outside the checkpoint."""
_WEIGHT_VARIABLES = ("DINO_WEIGHT",)
"""Environment variables that can name weights."""


def weights_digest(locations: Iterable[str | None]) -> str:
    """Returns a digest of the contents of model files and folders.

    Names are those inside each folder, so that a moved model is the same one. What is no path here (a hub id) stands
    for itself.
    """
    files: list[Path] = []
    names: list[str] = []
    for index, location in enumerate(locations):
        root = Path(location).expanduser() if location else None
        if root is None or not root.exists():
            names.append(f"{index}:{location}")
            continue
        inside = sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else [root]
        files += inside
        names += [f"{index}:{file.relative_to(root) if root.is_dir() else ''}" for file in inside]
    return digest_json([*names, *_progress(files, "hashing the weights")])


def images_digest(ids: Sequence[str], images: Sequence[Path]) -> str:
    """Returns a digest of the samples' ids and of the contents of their images."""
    # A frame's contents are its pack's, which is read once.
    files = dict.fromkeys(image.parent.parent if is_frame(image) else image for image in images)
    return digest_json([*ids, *_progress([*files], "hashing the images")])


def _progress(files: Sequence[Path], title: str) -> Iterator[str]:
    return iter(tqdm(digest_files(files), desc=title, total=len(files), unit=" files", leave=False))


def weight_locations(checkpoint: Path, given: Iterable[str | None] = ()) -> list[str | None]:
    """Returns every location that a model's weights may come from: the checkpoint, the given ones, and named ones.

    Args:
        checkpoint: The checkpoint's folder or file.
        given: Locations that options name.

    Raises:
        UserError: A config cannot be read.
    """
    locations = [str(checkpoint), *given, *map(os.environ.get, _WEIGHT_VARIABLES)]
    for name in _CONFIGS:
        # A system of several models has one folder for each.
        for file in [checkpoint / name, *sorted(checkpoint.glob(f"*/{name}"))]:
            if not file.is_file():
                continue
            config = read_json(file)
            locations += _named_locations(config) if isinstance(config, Mapping) else []
    return locations


def _named_locations(config: Mapping[str, Any]) -> list[str]:
    """Locations in a config; where a config was saved itself (``_name_or_path``) is none that weights come from."""
    return [
        value
        for name, value in sorted(config.items())
        if isinstance(value, str) and value and name.endswith(_LOCATION_ENDINGS) and not name.startswith("_")
    ]


def model_fingerprint(path: str | os.PathLike[str] | None) -> list[tuple[str, int, int]] | str | None:
    """Returns what tells a model from another at the same path: its files' names, sizes and times of change.

    A hub id stands for itself.
    """
    root = Path(path).expanduser() if path else None
    if root is None or not root.exists():
        return None if path is None else str(path)
    files = sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else [root]
    return [(str(root.resolve()), 0, 0)] + [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
