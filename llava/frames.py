"""Videos in HDF5 packs, as FaceForensics++ is kept, each frame addressed as a path below its pack: ``PACK.h5/KEY/3``.

Such a path stands wherever an image's does. Imports no torch; only reading a pack takes h5py.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image

from llava.errors import DataError, ImageReadError, OptionError
from llava.files import read_json
from llava.labels import FAKE, REAL

PACK_SUFFIXES = (".h5", ".hdf5")
MANIPULATIONS = ("original", "Deepfakes", "FaceSwap", "NeuralTextures", "Face2Face")
"""Classes of FaceForensics++ in the order of its packs; the first is real."""
_PACK = re.compile(r"FF\+\+_(?P<kind>\w+?)_(?P<compression>c\d+)(_test_only|_dlibv3_lite)?", re.IGNORECASE)
_SPLIT_FOLDERS = ("", "splits", "../ffpp_split", "../splits")


class Frames(Sequence[Path]):
    """The frames of one video as paths.

    Args:
        pack: The HDF5 file.
        key: Name of the video in it.
        count: How many frames count, from the first.
    """

    def __init__(self, pack: Path, key: str, count: int) -> None:
        self.pack, self.key, self.length = pack, key, count

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> list[Path]: ...
    def __getitem__(self, index: int | slice) -> Path | list[Path]:
        """Returns a frame's path, or those of a slice."""
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(self.length))]
        return self.pack / self.key / str(range(self.length)[index])


@dataclass(frozen=True)
class Video:
    """A video of FaceForensics++.

    Attributes:
        manipulation: One of ``MANIPULATIONS``.
        key: ``071``, or ``071_054`` for a manipulated one.
        compression: Such as ``c40``.
        frames: Its frames.
    """

    manipulation: str
    key: str
    compression: str
    frames: Frames

    @property
    def label(self) -> int:
        """Real = 0, fake = 1."""
        return REAL if self.manipulation == MANIPULATIONS[0] else FAKE


def has_packs(folder: Path) -> bool:
    """Whether a folder holds packs of FaceForensics++."""
    return folder.is_dir() and any(_packs(folder))


def read_videos(folder: Path, split: str) -> Iterator[Video]:
    """Yields the videos of a folder of packs, class by class.

    Args:
        folder: Folder with ``FF++_<class>_<compression>….h5``.
        split: Name of a list of pairs, ``<split>.json``, in the folder, in ``splits`` or beside it in ``ffpp_split``;
            without one all videos are taken, in order of name.

    Raises:
        DataError: A pack cannot be read, or lacks a video of the split.
    """
    pairs = _pairs(folder, split)
    for kind, compression, pack in sorted(_packs(folder), key=lambda found: MANIPULATIONS.index(found[0])):
        counts = frame_counts(pack)
        keys = sorted(counts) if pairs is None else _keys(pairs, kind)
        for key in keys:
            if key not in counts:
                raise DataError(f"{pack} has no video {key}, which {split}.json names")
            yield Video(kind, key, compression, Frames(pack, key, counts[key]))


def _packs(folder: Path) -> Iterator[tuple[str, str, Path]]:
    known = {name.lower(): name for name in MANIPULATIONS}
    for file in sorted(folder.glob("*")):
        match = _PACK.fullmatch(file.stem) if file.suffix.lower() in PACK_SUFFIXES else None
        if match and match["kind"].lower() in known:
            yield known[match["kind"].lower()], match["compression"].lower(), file


def _pairs(folder: Path, split: str) -> list[tuple[str, str]] | None:
    file = next((place for name in _SPLIT_FOLDERS if (place := folder / name / f"{split}.json").is_file()), None)
    if file is None:
        return None
    content = read_json(file)
    if not isinstance(content, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in content):
        raise DataError(f"{file} must hold a list of pairs of video numbers")
    return [(str(first), str(second)) for first, second in content]


def _keys(pairs: Sequence[tuple[str, str]], kind: str) -> list[str]:
    if kind == MANIPULATIONS[0]:
        return [number for pair in pairs for number in pair]
    return [key for first, second in pairs for key in (f"{first}_{second}", f"{second}_{first}")]


# --- packs


def frame_counts(pack: Path) -> dict[str, int]:
    """Returns how many frames each video of a pack has.

    Raises:
        DataError: It cannot be read, or holds something else than videos.
    """
    with_shapes = {}
    for key, video in _open(pack, os.getpid()).items():
        shape: Any = getattr(video, "shape", ())
        if len(shape) != 4 or shape[3] != 3:
            raise DataError(f"{pack}: {key} is no video: its shape is {list(shape)}, not [frames, height, width, 3]")
        with_shapes[str(key)] = int(shape[0])
    return with_shapes


def is_frame(path: Path) -> bool:
    """Whether a path is one of a frame in a pack that is there."""
    pack = path.parent.parent
    return pack.suffix.lower() in PACK_SUFFIXES and pack.is_file()


def read_frame(path: Path) -> Image.Image:
    """Returns a frame as an RGB image.

    Raises:
        ImageReadError: There is no such frame, or it is no image of 8 bits.
        DataError: The pack cannot be read.
    """
    pack, key, name = path.parent.parent, path.parent.name, path.name
    video: Any = _open(pack, os.getpid()).get(key)
    if video is None or not name.isdigit() or int(name) >= len(video):
        raise ImageReadError(f"{path}: there is no such frame")
    values = np.asarray(video[int(name)])
    if values.dtype != np.uint8 or values.ndim != 3 or values.shape[2] != 3:
        raise ImageReadError(f"{path}: a frame must be uint8 [height, width, 3], not {values.dtype} {values.shape}")
    return Image.fromarray(values)


@lru_cache(maxsize=16)
def _open(pack: Path, process: int) -> Any:
    """An opened pack; each process has its own, since they cannot share one."""
    if find_spec("h5py") is None:
        raise OptionError(f"{pack}: packs of frames need h5py: pip install 'fakereasoning[video]'")
    import h5py

    try:
        return h5py.File(pack, "r")
    except OSError as error:
        raise DataError(f"{pack} cannot be read as HDF5: {error}") from error
