"""FaceForensics++ (arXiv 1901.08971) in packs of frames, ``FF++_<class>_<compression>….h5``."""

from collections.abc import Iterator
from pathlib import Path

from forgery_eval.benchmarks.base import Sample
from llava.frames import has_packs, read_videos

ON_DISK = "FaceForensics++ in packs: FF++_<class>_<compression>….h5"


def opens(path: Path) -> bool:
    """Whether it is a folder with such packs."""
    return has_packs(path)


def read(path: Path) -> Iterator[Sample]:
    """Yields every frame, class by class, the videos in the order of ``test.json``, else of their names.

    Raises:
        UserError: A pack cannot be read, or lacks a video.
    """
    for video in read_videos(path, "test"):
        name = f"{video.manipulation}/{video.key}"
        for index, frame in enumerate(video.frames):
            yield Sample(
                id=f"{name}/{index}",
                image=frame,
                label=video.label,
                set=f"ffpp_{video.compression}",
                groups={"manipulation": video.manipulation},
                video=name,
            )
