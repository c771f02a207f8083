"""ForgeryDetector: images in, ForgeryReports out, batched; the one way that inference, evaluation and servers use."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from llava.assets import demo_model_folder
from llava.mm_utils import load_image
from llava.model.checkpoint_files import CheckpointError, read_json, resolve_folder
from llava.report import ForgeryReport
from llava.systems.base import AnalyzeOptions, CheckpointFiles, System
from llava.systems.fakereasoning.system import FakeReasoning

SYSTEMS: tuple[type[System], ...] = (FakeReasoning,)
"""Systems that can be opened; a checkpoint goes to the first that says it can."""

ImageLike = str | os.PathLike[str] | Image.Image

_LOADERS = 4
NO_MODEL = (
    "no model is named, and this installation is without the embedded demonstration model (llava/assets/demo_model). "
    "Get the published weights, for example with `hf download AnnaGao/FakeReasoning`, and pass the folder's path or "
    "the hub id"
)


class ForgeryDetector:
    """Judges images with a published system.

    Args:
        system: The opened system.
    """

    def __init__(self, system: System) -> None:
        self.system = system

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str] | None = None, **options: Any) -> "ForgeryDetector":
        """Opens a checkpoint.

        Args:
            path: Folder or hub id; None for the embedded demonstration model.
            **options: As for ``load_pretrained_model``: ``model_base``, ``device``, ``dtype``, ``load_4bit``, …

        Raises:
            CheckpointError: No system opens it, it is broken, or there is no embedded model.
        """
        path = demo_model_folder() if path is None else path
        if path is None:
            raise CheckpointError(NO_MODEL)
        folder = resolve_folder(path, "model")
        files = CheckpointFiles(folder, _read_config(folder))
        for system in SYSTEMS:
            if system.opens(files):
                return cls(system.load(str(folder), **options))
        known, found = ", ".join(system.name for system in SYSTEMS), files.config.get("model_type")
        raise CheckpointError(f"{folder} is no checkpoint of a known system ({known}): its model_type is {found!r}")

    @property
    def notice(self) -> str:
        """What whoever reads this model's answers must know; empty for most models."""
        return self.system.notice

    def analyze(self, image: ImageLike, **options: Any) -> ForgeryReport:
        """Judges one image.

        Args:
            image: A picture or its path.
            **options: Fields of ``AnalyzeOptions``.

        Raises:
            ImageReadError: The image cannot be read.
            ValueError: The options cannot be met.
        """
        wanted = AnalyzeOptions(**options)
        return self.system.analyze_batch([self._prepare(image)], wanted)[0]

    def analyze_many(
        self, images: Iterable[ImageLike], *, batch_size: int | str = "auto", **options: Any
    ) -> Iterator[ForgeryReport]:
        """Judges images as they come, in batches, and yields reports in order.

        Images are read while the model works, two batches ahead at most, so that a generator of any length is taken in
        flat memory. An image that cannot be read gives a report with its ``error``.

        Args:
            images: Pictures or paths.
            batch_size: Images at a time, or ``auto`` for what fits and is fast.
            **options: Fields of ``AnalyzeOptions``.

        Raises:
            ValueError: The options cannot be met.
        """
        wanted = AnalyzeOptions(**options)
        size = self.system.batch_size(wanted) if batch_size == "auto" else int(batch_size)
        if size < 1:
            raise ValueError(f"batch_size must be at least 1, not {size}")
        return self._analyze_many(iter(images), size, wanted)

    def _analyze_many(self, images: Iterator[ImageLike], size: int, options: AnalyzeOptions) -> Iterator[ForgeryReport]:
        with ThreadPoolExecutor(_LOADERS) as loaders:
            waiting: deque[list[Future[Any]]] = deque()
            while True:
                while len(waiting) < 2:
                    batch = [loaders.submit(self._prepare, image) for image in islice(images, size)]
                    if not batch:
                        break
                    waiting.append(batch)
                if not waiting:
                    return
                yield from self._reports(waiting.popleft(), options)

    def _reports(self, batch: Sequence[Future[Any]], options: AnalyzeOptions) -> Iterator[ForgeryReport]:
        prepared, errors = [], {}
        for place, future in enumerate(batch):
            error = future.exception()
            if error is None:
                prepared.append(future.result())
            elif isinstance(error, (OSError, ValueError, MemoryError)):
                errors[place] = str(error) or type(error).__name__
            else:
                raise error
        judged = iter(self._judge(prepared, options))
        for place in range(len(batch)):
            yield self._failed(errors[place]) if place in errors else next(judged)

    def _judge(self, prepared: Sequence[Any], options: AnalyzeOptions) -> list[ForgeryReport]:
        """Judges a batch, in halves if it does not fit into the GPU's memory."""
        if not prepared:
            return []
        try:
            return self.system.analyze_batch(prepared, options)
        except torch.OutOfMemoryError:
            if len(prepared) == 1:
                raise
        half = len(prepared) // 2
        return self._judge(prepared[:half], options) + self._judge(prepared[half:], options)

    def _prepare(self, image: ImageLike) -> Any:
        picture = image if isinstance(image, Image.Image) else load_image(image)
        return self.system.prepare(picture)

    def _failed(self, error: str) -> ForgeryReport:
        return ForgeryReport(label=None, fake_probability=None, score_source=None, system=self.system.name, error=error)


def _read_config(folder: Path) -> dict[str, Any]:
    """``config.json``; that of the base for a LoRA folder that has none."""
    if (folder / "config.json").is_file() or not (folder / "adapter_config.json").is_file():
        return read_json(folder / "config.json")
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    return _read_config(resolve_folder(base, "base model")) if base else {"model_type": "llava_llama"}
