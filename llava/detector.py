"""ForgeryDetector: images in, ForgeryReports out, batched; the one way that inference, evaluation and servers use."""

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

from PIL import Image

from llava.assets import demo_model_folder
from llava.errors import CheckpointError, OptionError, UserError
from llava.images import load_image, to_rgb
from llava.report import ForgeryReport
from llava.systems import registry
from llava.systems.base import AnalyzeOptions, System, resolve

ImageLike = str | os.PathLike[str] | Image.Image

_LOADERS = 4
NO_MODEL = (
    "no model is named, and this installation is without the embedded demonstration model (llava/assets/demo_model). "
    "Get the published weights, for example with `hf download AnnaGao/FakeReasoning`, and pass the folder's path or "
    "the hub id"
)

NO_NUMBER = (
    "the model's score is NaN or infinite, which is no number: its weights are damaged, or too large for this dtype; "
    "try dtype float32, or get the weights again"
)


class ForgeryDetector:
    """Tells real images from generated and manipulated ones with one of the systems.

    Args:
        system: The opened system.
    """

    def __init__(self, system: System) -> None:
        self.system = system

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str] | None = None, system: str | None = None, **options: Any
    ) -> "ForgeryDetector":
        """Opens a checkpoint.

        Args:
            path: Folder, hub id, or file; None for the embedded demonstration model.
            system: Name of the system, where the files do not tell it.
            **options: As for ``load_pretrained_model``: ``model_base``, ``device``, ``dtype``, ``load_4bit``, …

        Raises:
            CheckpointError: No system opens it, it is broken, or there is no embedded model.
            OptionError: There is no system of that name, or an option cannot be met.
        """
        path = demo_model_folder() if path is None else path
        if path is None:
            raise CheckpointError(NO_MODEL)
        files = registry.read_files(path, options.get("model_base"))
        found: type[System] = resolve(registry.find(files, system).system)
        return cls(found.load(str(files.folder), **options))

    @property
    def notice(self) -> str:
        """What whoever reads this model's answers must know; empty for most models."""
        return self.system.notice

    def options(self, **values: Any) -> AnalyzeOptions:
        """Returns the system's options with these values.

        Raises:
            OptionError: The system has no such option, or a value is out of range.
        """
        try:
            return self.system.options(**values)
        except TypeError:
            unknown = sorted(set(values) - set(self.system.options.__dataclass_fields__))
            if not unknown:
                raise
            known = ", ".join(self.system.options.__dataclass_fields__)
            raise OptionError(f"{self.system.name} has no option {', '.join(unknown)}; it has {known}") from None

    def analyze(self, image: ImageLike, **options: Any) -> ForgeryReport:
        """Analyses one image.

        Args:
            image: An image or its path.
            **options: Fields of the system's options, see ``AnalyzeOptions``.

        Raises:
            ImageReadError: The image cannot be read.
            OptionError: The options cannot be met.
        """
        wanted = self.options(**options)
        return self._checked(self.system.analyze_batch([self._prepare(image)], wanted)[0])

    def analyze_many(
        self, images: Iterable[ImageLike], *, batch_size: int | str = "auto", **options: Any
    ) -> Iterator[ForgeryReport]:
        """Analyses images as they come, in batches, and yields reports in order.

        Images are read while the model works, two batches ahead at most, so that a generator of any length is taken in
        flat memory. An image that cannot be read gives a report with its ``error``.

        Args:
            images: Images or paths.
            batch_size: Images at a time, or ``auto`` for what fits and is fast.
            **options: Fields of the system's options, see ``AnalyzeOptions``.

        Raises:
            OptionError: The options cannot be met.
        """
        wanted = self.options(**options)
        size = self.system.batch_size(wanted) if batch_size == "auto" else int(batch_size)
        if size < 1:
            raise OptionError(f"batch_size must be at least 1, not {size}")
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
        for index, future in enumerate(batch):
            error = future.exception()
            if error is None:
                prepared.append(future.result())
            elif isinstance(error, UserError | MemoryError):
                errors[index] = str(error) or type(error).__name__
            else:
                raise error
        reports = iter(self._analyze_batch(prepared, options))
        for index in range(len(batch)):
            yield self._failed(errors[index]) if index in errors else self._checked(next(reports))

    def _analyze_batch(self, prepared: Sequence[Any], options: AnalyzeOptions) -> list[ForgeryReport]:
        """Analyses a batch, in halves if it does not fit into the GPU's memory."""
        if not prepared:
            return []
        try:
            return self.system.analyze_batch(prepared, options)
        except RuntimeError as error:
            # By its name: a system need not stand on torch, which is slow to import.
            if type(error).__name__ != "OutOfMemoryError" or len(prepared) == 1:
                raise
        half = len(prepared) // 2
        return self._analyze_batch(prepared[:half], options) + self._analyze_batch(prepared[half:], options)

    def _prepare(self, image: ImageLike) -> Any:
        return self.system.prepare(to_rgb(image) if isinstance(image, Image.Image) else load_image(image))

    def _checked(self, report: ForgeryReport) -> ForgeryReport:
        """A report as it is, or one that says that its score is no number."""
        scores = (report.fake_probability, report.answer_probability, *report.probabilities)
        if all(score is None or math.isfinite(score) for score in scores):
            return report
        return self._failed(NO_NUMBER)

    def _failed(self, error: str) -> ForgeryReport:
        return ForgeryReport(label=None, fake_probability=None, score_source=None, system=self.system.name, error=error)
