"""Analyses images in batches; whoever asks stores each batch before the next is analysed."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from PIL import Image

from forgery_eval.benchmarks import Sample
from forgery_eval.masks import scaled_map
from forgery_eval.store import Prediction, RunStore, Shards
from forgery_eval.workers import WorkerPool
from llava.cli import log, progress
from llava.errors import ImageReadError
from llava.images import load_image

if TYPE_CHECKING:
    import numpy as np

    from llava import ForgeryDetector, ForgeryReport
    from llava.detector import ImageLike
    from llava.systems.base import AnalyzeOptions

Item = TypeVar("Item")


@dataclass(frozen=True)
class Batch(Generic[Item]):
    """What was analysed together.

    Attributes:
        items: What the images belong to.
        reports: One an item.
        seconds: Time an image.
        asked: What else was asked of each item, where a worker was asked.
    """

    items: list[Item]
    reports: "list[ForgeryReport]"
    seconds: float = 0.0
    asked: list[Any] = field(default_factory=list)


def analyze_batches(
    detector: "ForgeryDetector",
    items: Iterable[Item],
    image_of: "Callable[[Item], ImageLike]",
    options: "AnalyzeOptions",
    batch_size: int | str,
) -> Iterator[Batch[Item]]:
    """Analyses the images of some items and yields batches in order, each before the next is analysed.

    Args:
        detector: The model.
        items: Taken as they are needed, two batches ahead at most.
        image_of: Gives an item's image or its path.
        options: How images are analysed.
        batch_size: Images at a time, or ``auto``.

    Raises:
        OptionError: The options cannot be met.
    """
    waiting: deque[Item] = deque()

    def images() -> "Iterator[ImageLike]":
        for item in items:
            waiting.append(item)
            yield image_of(item)

    size = detector.system.batch_size(options) if isinstance(batch_size, str) else batch_size
    reports = detector.analyze_many(images(), batch_size=size, **vars(options))
    while True:
        start = time.perf_counter()
        batch = list(islice(reports, size))
        if not batch:
            return
        seconds = (time.perf_counter() - start) / len(batch)
        yield Batch([waiting.popleft() for _ in batch], batch, seconds)


def fill_store(
    detector: "ForgeryDetector | WorkerPool",
    samples: Sequence[Sample],
    options: "AnalyzeOptions",
    store: RunStore,
    *,
    oriented: bool = True,
    change: Callable[[Sample, Image.Image], Image.Image] | None = None,
) -> None:
    """Analyses the samples that the store does not have, and stores each batch as it is finished.

    Batches are formed from all samples, whoever analyses them. What workers finish, in any order, goes to shards that
    are merged at the end; so do the batches between those that killed workers have left.

    Args:
        detector: The model, or the workers that have it.
        samples: All samples of the run, in order.
        options: How images are analysed.
        store: The run's store.
        oriented: Whether images are turned by their EXIF orientation.
        change: Gives another image instead of a sample's, in memory.
    """
    image_of = image_source(oriented, change, color_managed=options.color_management == "srgb")
    size = store.batch_size
    with (
        closing(Shards(store)) as shards,
        progress(total=len(samples), initial=store.done + shards.count, unit=" images") as bar,
    ):
        missing = shards.missing
        batches = ((number, list(samples[number * size : (number + 1) * size])) for number in missing)
        if isinstance(detector, WorkerPool):
            for done in detector.analyze(batches, image_of, options):
                shards.write(done.worker, done.number, store.records(*_predictions(done.items, done.result.reports)))
                bar.update(len(done.items))
        else:
            in_order = not shards.count
            rest = (sample for _, batch in batches for sample in batch)
            for number, batch in zip(missing, analyze_batches(detector, rest, image_of, options, size), strict=True):
                records = store.records(*_predictions(batch.items, batch.reports, batch.seconds))
                if in_order:
                    store.append(records)
                else:
                    shards.write(0, number, records)
                bar.update(len(batch.items))
        shards.merge()


def _predictions(
    samples: Sequence[Sample], reports: "Sequence[ForgeryReport]", seconds: float = 0.0
) -> "tuple[list[Prediction], dict[str, np.ndarray]]":
    """A batch's predictions, and its masks by id; names what could not be analysed."""
    pairs = list(zip(samples, reports, strict=True))
    for _, report in pairs:
        if report.error:
            log(f"cannot analyse {report.error}")
    masks = {sample.id: shown for sample, report in pairs if (shown := _stored_mask(report)) is not None}
    return [Prediction.from_report(s.id, s.label, report, seconds) for s, report in pairs], masks


def _stored_mask(report: "ForgeryReport") -> "np.ndarray | None":
    """What is stored of where an image was changed: the mask, or else the map that was asked for."""
    if report.mask is not None or report.attention is None:
        return report.mask
    return scaled_map(report.attention)


def image_source(
    oriented: bool = True,
    change: Callable[[Sample, Image.Image], Image.Image] | None = None,
    *,
    color_managed: bool = True,
) -> "Callable[[Sample], ImageLike]":
    """Returns what gives a sample's image; its path where it cannot be read, for the detector to say why."""

    def image_of(sample: Sample) -> "ImageLike":
        if oriented and color_managed and change is None:
            return sample.image
        try:
            image = load_image(sample.image, apply_orientation=oriented, apply_profile=color_managed)
        except ImageReadError:
            return sample.image
        return image if change is None else change(sample, image)

    return image_of
