"""What tells one model, one image set or one folder from another: digests of contents, or of sizes and times."""

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.abstention import CALIBRATION
from llava.cli import progress
from llava.files import digest_file, digest_files, digest_json, read_json
from llava.frames import is_frame
from llava.systems import registry

_CONFIGS = ("config.json", "adapter_config.json")
_LOCATION_ENDINGS = ("_tower", "_path", "_file", "_folder", "_weights")
"""Endings of the config fields that can name files outside the checkpoint."""
_APPLIED_AFTERWARDS = (CALIBRATION, Path(CALIBRATION).with_suffix(".safetensors").name)
"""Files in a model's folder that change no prediction, only which verdicts are given."""
_WEIGHT_VARIABLES = ("DINO_WEIGHT",)
"""Environment variables that can name weights."""


def weights_digest(locations: Iterable[str | None]) -> str:
    """Returns a digest of the contents of model files and folders, but for a calibration: it is applied afterwards.

    Names are those inside each folder, so that a moved model is the same one. What is no path here (a hub id) stands
    for itself and the revision of it that is here.
    """
    files: list[Path] = []
    names: list[str] = []
    for index, location in enumerate(locations):
        root = Path(location).expanduser() if location else None
        if root is None or not root.exists():
            names.append(f"{index}:{_with_revision(location)}")
            continue
        inside = sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else [root]
        inside = [file for file in inside if file.name not in _APPLIED_AFTERWARDS]
        files += inside
        names += [f"{index}:{file.relative_to(root) if root.is_dir() else ''}" for file in inside]
    return digest_json([*names, *_progress(files, "hashing the weights")])


def images_digest(ids: Sequence[str], images: Sequence[Path], *, contents: bool = False) -> str:
    """Returns a digest of the samples' ids and of what tells their images from others.

    Args:
        ids: Of the samples.
        images: Their files.
        contents: Whether the files are read, or known by size and time of change.
    """
    # A frame's contents are its pack's, which is read once.
    files = dict.fromkeys(image.parent.parent if is_frame(image) else image for image in images)
    if contents:
        return digest_json([*ids, *_progress([*files], "hashing the images")])
    return digest_json([*ids, *(file_identity(str(file)) for file in files)])


def _progress(files: Sequence[Path], title: str) -> Iterator[str]:
    return iter(progress(digest_files(files), desc=title, total=len(files), unit=" files", leave=False))


def _with_revision(location: str | None) -> str | None:
    """Adds to a hub id the commit of it that is here, which is what will be opened."""
    if location is None or location.count("/") != 1 or location.startswith((".", "~")):
        return location
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(location, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError):
        return location
    return f"{location}@{folder.name}"


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
    if (checkpoint / "adapter_config.json").is_file():
        base = Path(registry.named_base(checkpoint).path)  # a relative path counts from the checkpoint's folder
        inner = weight_locations(base) if base.is_dir() else []
        locations += [location for location in inner if location not in locations]
    return locations


def _named_locations(config: Mapping[str, Any]) -> list[str]:
    """Locations in a config; where a config was saved itself (``_name_or_path``) is none that weights come from."""
    return [
        value
        for name, value in sorted(config.items())
        if isinstance(value, str) and value and name.endswith(_LOCATION_ENDINGS) and not name.startswith("_")
    ]


def file_identity(name: str, *, contents: bool = False) -> list[int] | str | None:
    """Returns what tells an image's file from another under the same name; None for what is no file.

    Args:
        name: The file.
        contents: Whether that is the SHA-256 of its contents, or its size and time of change (ns).
    """
    try:
        status = Path(name).stat()
        if not stat.S_ISREG(status.st_mode):
            return None
        return digest_file(Path(name)) if contents else [status.st_size, status.st_mtime_ns]
    except (OSError, ValueError):
        return None


def model_fingerprint(locations: Iterable[str | None]) -> list[Any]:
    """Returns what tells a model from another in the same places: its files' names, sizes and times of change.

    A hub id stands for itself and the revision of it that is here.
    """
    found: list[Any] = []
    for location in locations:
        root = Path(location).expanduser() if location else None
        if root is None or not root.exists():
            found.append(_with_revision(location))
            continue
        files = sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else [root]
        found.append([(str(root.resolve()), 0, 0)] + [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files])
    return found
