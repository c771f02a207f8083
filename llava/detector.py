"""ForgeryDetector: images in, ForgeryReports out, batched; the one way that inference, evaluation and servers use."""

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from llava.abstention import CALIBRATION, LIGHT_DELIVERIES, AbstentionRule, Decision
from llava.assets import demo_model_folder
from llava.calibration import Calibration, kind_of_source
from llava.cli import note_once, quiet_libraries
from llava.errors import CheckpointError, DataError, OptionError, UserError
from llava.files import read_json
from llava.report import SCORE_KIND, ForgeryReport
from llava.sources import load_source
from llava.systems import registry
from llava.systems.base import AnalyzeOptions, AnswerStream, FeatureSource, Listener, System, resolve

ImageLike = Any
"""Whatever ``llava.sources.load_source`` takes: paths, PIL images, arrays, tensors, bytes, file objects, data URLs."""

_LOADERS = 4
_LARGE_IMAGES = Lock()
"""Held by whoever has a large image in memory."""
NO_MODEL = (
    "no model is named, and this installation is without the embedded demonstration model (llava/assets/demo_model). "
    "Get the published weights, for example with `hf download AnnaGao/FakeReasoning`, and pass the folder's path or "
    "the hub id"
)

NO_NUMBER = (
    "the model's score is NaN or infinite, which is no number: its weights are damaged, or too large for this dtype; "
    "try dtype float32, or get the weights again"
)


@dataclass(frozen=True)
class Prepared:
    """An image as the system takes it, and what becomes of it by light deliveries."""

    image: Any
    delivered: tuple[Any, ...] = ()


@dataclass(frozen=True)
class _PartListener:
    """Follows a part of a batch for the listener of the whole.

    Attributes:
        listener: Of the whole batch.
        first: Number of the part's first image.
        told: Whether the answers' texts are passed on.
    """

    listener: Listener
    first: int
    told: bool = True

    def heard(self, row: int, piece: str, logprob: float, fake_probability: float) -> None:
        if self.told:
            self.listener.heard(self.first + row, piece, logprob, fake_probability)

    def is_gone(self, row: int) -> bool:
        return self.listener.is_gone(self.first + row)


class ForgeryDetector:
    """Tells real images from generated and manipulated ones with one of the systems.

    Args:
        system: The opened system.
        rule: When no verdict is given; None gives every verdict that the system gives.
        calibration: Makes P(fake) a probability; see ``calibrated``.
    """

    def __init__(
        self, system: System, rule: AbstentionRule | None = None, calibration: Calibration | None = None
    ) -> None:
        self.system = system
        self.rule = rule
        self.calibration = calibration

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str] | None = None,
        system: str | None = None,
        *,
        calibration: str | os.PathLike[str] | None = None,
        abstain: bool = True,
        **options: Any,
    ) -> "ForgeryDetector":
        """Opens a checkpoint.

        Args:
            path: Folder, hub id, or file; None for the embedded demonstration model.
            system: Name of the system, where the files do not tell it.
            calibration: Calibration file with the rule by which no verdict is given; by default the one in the
                checkpoint's folder, if any.
            abstain: Whether such a rule is applied.
            **options: As for ``load_pretrained_model``: ``model_base``, ``device``, ``dtype``, ``load_4bit``, …

        Raises:
            CheckpointError: No system opens it, it is broken, or there is no embedded model.
            OptionError: There is no system of that name, or an option cannot be met.
            DataError: The calibration file is damaged, or is named and holds no such rule.
        """
        path = demo_model_folder() if path is None else path
        if path is None:
            raise CheckpointError(NO_MODEL)
        files = registry.read_files(path, options.get("model_base"))
        with quiet_libraries():
            found: type[System] = resolve(registry.find(files, system).system)
        rule = _read_rule(files.folder, calibration) if abstain else None
        with quiet_libraries():  # again, for the libraries that were imported
            return cls(found.load(str(files.folder), **options), rule, _read_calibration(files.folder, calibration))

    @property
    def notice(self) -> str:
        """What whoever reads this model's answers must know; empty for most models."""
        return getattr(self.system, "notice", "")

    def announce(self) -> None:
        """Says what must be known of the model, once a process."""
        if self.notice:
            note_once(self.notice)

    def calibrated(self, report: ForgeryReport) -> float | None:
        """Returns the calibrated P(fake); None without a score, or without a calibration of the score that was read."""
        if self.calibration is None or report.fake_probability is None:
            return None
        if self.calibration.score not in (None, kind_of_source(report.score_source)):
            return None
        return float(self.calibration(np.array([report.fake_probability]))[0])

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
            image: An image, see ``llava.sources.load_source``.
            **options: Fields of the system's options, see ``AnalyzeOptions``.

        Raises:
            ImageReadError: The image cannot be read.
            OptionError: The options cannot be met.
        """
        wanted = self.options(**options)
        self.announce()
        return self.analyze_prepared([self.prepare(image, wanted)], wanted)[0]

    def analyze_many(
        self, images: Iterable[ImageLike], *, batch_size: int | str = "auto", **options: Any
    ) -> Iterator[ForgeryReport]:
        """Analyses images as they come, in batches, and yields reports in order.

        Images are read while the model works, two batches ahead at most, so that a generator of any length is taken in
        flat memory. An image that cannot be read gives a report with its ``error``.

        Args:
            images: Images, see ``llava.sources.load_source``.
            batch_size: Images at a time, or ``auto`` for what fits and is fast.
            **options: Fields of the system's options, see ``AnalyzeOptions``.

        Raises:
            OptionError: The options cannot be met.
        """
        wanted = self.options(**options)
        size = self.system.batch_size(wanted) if batch_size == "auto" else int(batch_size)
        if size < 1:
            raise OptionError(f"batch_size must be at least 1, not {size}")
        self.announce()
        return self._analyze_many(iter(images), size, wanted)

    def _analyze_many(self, images: Iterator[ImageLike], size: int, options: AnalyzeOptions) -> Iterator[ForgeryReport]:
        with ThreadPoolExecutor(_LOADERS) as loaders:
            waiting: deque[list[Future[Any]]] = deque()
            while True:
                while len(waiting) < 2:
                    batch = [loaders.submit(self.prepare, image, options) for image in islice(images, size)]
                    if not batch:
                        break
                    waiting.append(batch)
                if not waiting:
                    return
                yield from self._reports(waiting.popleft(), options)

    def analyze_batch(
        self, images: Iterable[ImageLike], options: AnalyzeOptions, turn: AbstractContextManager[Any] | None = None
    ) -> list[ForgeryReport]:
        """Analyses one batch; for whoever has several threads, of which one reads images while another analyses.

        Args:
            images: Images, see ``llava.sources.load_source``.
            options: From ``options``.
            turn: Held while the model works, such as a lock; images are read before.

        Raises:
            OptionError: The options cannot be met.
        """
        with ThreadPoolExecutor(_LOADERS) as loaders:
            batch = [loaders.submit(self.prepare, image, options) for image in images]
        with turn or nullcontext():
            return list(self._reports(batch, options))

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
        reports = iter(self.analyze_prepared(prepared, options))
        for index in range(len(batch)):
            yield self._failed(errors[index]) if index in errors else next(reports)

    @property
    def has_attention(self) -> bool:
        """Whether the system can say where it looked."""
        return bool(getattr(self.system, "has_attention", False))

    @property
    def has_features(self) -> bool:
        """Whether the system can give features of images."""
        return isinstance(self.system, FeatureSource)

    def features_many(self, images: Iterable[ImageLike], batch_size: int = 8) -> Iterator[np.ndarray | None]:
        """Yields the features of each image in order, float32, shape (D,); None for one that cannot be read.

        Raises:
            OptionError: The system gives no features.
        """
        if not isinstance(self.system, FeatureSource):
            raise OptionError(f"{self.system.name} gives no features of images")
        rest = iter(images)
        while batch := list(islice(rest, batch_size)):
            prepared: list[Any] = []
            for image in batch:
                try:
                    prepared.append(self.system.prepare(load_source(image)))
                except UserError:
                    prepared.append(None)
            readable = [item for item in prepared if item is not None]
            found = iter(self.system.image_features(readable) if readable else ())
            yield from (None if item is None else next(found) for item in prepared)

    @property
    def streams(self) -> bool:
        """Whether answers can be followed while they are decoded; not where a rule may yet withhold the verdict."""
        return self.rule is None and isinstance(self.system, AnswerStream)

    def analyze_prepared(
        self, prepared: Sequence[Prepared], options: AnalyzeOptions, listener: Listener | None = None
    ) -> list[ForgeryReport]:
        """Analyses a batch of ``prepare``, and gives no verdict where the rule says so.

        Args:
            prepared: The images; what does not fit into memory at once is analysed in halves.
            options: From ``options``.
            listener: Follows the answers where ``streams`` says so, and can end the decoding of each.

        Raises:
            OptionError: The options cannot be met.
        """
        told = _PartListener(listener, 0, self.streams) if listener else None
        reports = self._analyze_images([item.image for item in prepared], options, told)
        if self.rule is None or not prepared:
            return reports
        distances: Sequence[float | None] = [None] * len(prepared)
        if self.rule.known is not None and (features := self._features(prepared, reports)) is not None:
            distances = list(self.rule.known.distances(features))
        decided = []
        for item, report, distance in zip(prepared, reports, distances, strict=True):
            agree = self._agreement(item, report, options)
            decided.append(_decided(self.rule, report, None if distance is None else float(distance), agree))
        return decided

    def _features(self, prepared: Sequence[Prepared], reports: Sequence[ForgeryReport]) -> "np.ndarray | None":
        """Returns what the reports bring, else what the system gives when asked; None where it gives none."""
        given = [report.features for report in reports if report.features is not None]
        if len(given) == len(reports):
            return np.stack(given)
        if isinstance(self.system, FeatureSource):
            return self.system.image_features([item.image for item in prepared])
        return None

    def _agreement(self, item: Prepared, report: ForgeryReport, options: AnalyzeOptions) -> int | None:
        """How many light deliveries of an image get the verdict that it gets; None if none are made."""
        if not item.delivered:
            return None
        others = self._analyze_images(item.delivered, replace(options, attention=False))
        return sum(_side(other) == _side(report) for other in others)

    def _analyze_images(
        self, prepared: Sequence[Any], options: AnalyzeOptions, listener: Listener | None = None
    ) -> list[ForgeryReport]:
        """Analyses a batch, in halves if it does not fit into the GPU's memory."""
        if not prepared:
            return []
        try:
            with self._listening(listener):
                return [self._checked(report) for report in self.system.analyze_batch(prepared, options)]
        except RuntimeError as error:
            # By its name: a system need not stand on torch, which is slow to import.
            if type(error).__name__ != "OutOfMemoryError" or len(prepared) == 1:
                raise
        half = len(prepared) // 2
        rest = _PartListener(listener, half) if listener else None
        first = self._analyze_images(prepared[:half], options, listener)
        return first + self._analyze_images(prepared[half:], options, rest)

    def _listening(self, listener: Listener | None) -> AbstractContextManager[None]:
        if listener is None or not isinstance(self.system, AnswerStream):
            return nullcontext()
        return self.system.listening(listener)

    def prepare(self, image: ImageLike, options: AnalyzeOptions | None = None) -> Prepared:
        """Turns an image into what ``analyze_prepared`` takes; may run beside the model, in another thread.

        Args:
            image: The image.
            options: How it will be analysed; the system's own by default.

        Raises:
            ImageReadError: The image cannot be read.
        """
        managed = options is None or options.color_management == "srgb"
        steps = LIGHT_DELIVERIES[: self.rule.deliveries] if self.rule else ()
        with ExitStack() as alone:  # one large image at a time, whatever the number of loaders
            pixels = load_source(image, apply_profile=managed, if_large=lambda: alone.enter_context(_LARGE_IMAGES))
            return Prepared(self.system.prepare(pixels), tuple(self.system.prepare(step(pixels)) for step in steps))

    def _checked(self, report: ForgeryReport) -> ForgeryReport:
        """A report as it is, or one that says that its score is no number."""
        scores = (report.fake_probability, report.answer_probability, *report.probabilities)
        if all(score is None or math.isfinite(score) for score in scores):
            return report
        return self._failed(NO_NUMBER)

    def _failed(self, error: str) -> ForgeryReport:
        return ForgeryReport(label=None, fake_probability=None, score_source=None, system=self.system.name, error=error)


def _read_rule(folder: Path, calibration: str | os.PathLike[str] | None) -> AbstentionRule | None:
    if calibration is None:
        return AbstentionRule.beside(folder)
    rule = AbstentionRule.load(Path(calibration))
    if rule is None:
        raise DataError(
            f"{calibration} says nothing of when no verdict is given; make it with forgery eval --calibrate"
        )
    return rule


def _read_calibration(folder: Path, calibration: str | os.PathLike[str] | None) -> Calibration | None:
    path = folder / CALIBRATION if calibration is None else Path(calibration)
    if calibration is None and not path.is_file():
        return None
    content = read_json(path)
    has_one = not isinstance(content, dict) or "temperature" in content  # the file may hold a rule alone
    return Calibration.load(path) if has_one else None


def _side(report: ForgeryReport) -> bool | None:
    """Whether an image is called fake: by its score, or by its text where it has no score."""
    if report.fake_probability is not None:
        return report.fake_probability >= 0.5
    return None if report.label is None else report.label == "fake"


def _decided(rule: AbstentionRule, report: ForgeryReport, distance: float | None, agree: int | None) -> ForgeryReport:
    """Returns a report after the rule; a verdict that is not given lies in its details, apart from what is said."""
    if report.error or report.abstained:
        return report
    kind = SCORE_KIND.get(report.score_source) if report.score_source else None
    comparable = rule.score is None or kind == rule.score
    decision: Decision = rule.decide(report.fake_probability if comparable else None, distance, agree)
    told: dict[str, Any] = {} if distance is None else {"distance": round(distance, 4)}
    if agree is not None:
        told["agreeing"] = f"{agree} of {rule.deliveries}"
    if not comparable:
        told["band"] = f"not applied: it is for the {rule.score!r} score"
    details = {**report.details, **({"abstention": told} if told else {})}
    if not decision.abstains:
        return replace(report, details=details)
    withheld = {"label": report.label, "fake_probability": report.fake_probability, "text": report.text}
    return replace(
        report,
        label=None,
        fake_probability=None,
        answer_probability=None,
        answer_label=None,
        stages={},
        attributes={},
        text="",
        tag="",
        attention=None,
        mask=None,
        probabilities=[],
        details={**details, "withheld": withheld},
        abstained=True,
        abstained_because=decision.words,
    )
