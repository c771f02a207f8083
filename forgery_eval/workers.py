"""Several workers, each with a model of its own, by Ray: one a GPU, or one a CPU core. Imports no torch.

A worker on CPUs has one thread, so that an image's numbers do not depend on how many workers there are.
"""

import argparse
import os
import shlex
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any

from forgery_eval.model_options import open_detector
from llava.cli import log, note_once, positive_int
from llava.errors import OptionError, UserError, WorkerError

if TYPE_CHECKING:
    import numpy as np

    from llava import ForgeryDetector, ForgeryReport
    from llava.systems.base import AnalyzeOptions

_QUEUED = 2
"""Batches that a worker has at a time: the one it works at, and the next."""
_MOST_LOST = 5
"""Workers that one batch may lose before the run ends."""
_AHEAD = 16
"""Batches a worker that may be finished before the oldest one, where they are given in order."""
_STORE_BYTES = 256 << 20
_LAUNCHED = "LOCAL_RANK"
"""Set by torchrun and accelerate in each process that they start."""


def add_workers(group: Any) -> None:
    """Adds the options that say how many workers there are, and where."""
    group.add_argument(
        "--workers",
        type=positive_int,
        metavar="N",
        help="analyse with N processes, each with a GPU, or with a CPU core where there is none (extra cluster)",
    )
    group.add_argument("--ray-address", metavar="ADDRESS", help="with --workers: Ray cluster, or auto for the one here")


def check_workers(arguments: argparse.Namespace, verb: str, words: Sequence[str]) -> None:
    """Refuses what cannot be: processes that something else started, options that would do nothing.

    Args:
        arguments: The parsed command line.
        verb: Of the front door.
        words: The command line.

    Raises:
        OptionError: The message has the line to use.
    """
    if _LAUNCHED in os.environ:
        count = os.environ.get("WORLD_SIZE", "1")
        line = shlex.join(["forgery", verb, *words, *([] if arguments.workers else ["--workers", count])])
        raise OptionError(
            f"this was started by torchrun or accelerate launch, whose {count} processes would each do all of the "
            f"work; one command starts its workers itself: {line}"
        )
    if arguments.ray_address and not arguments.workers:
        raise OptionError("--ray-address says where the workers are; it needs --workers")
    if arguments.workers and ":" in arguments.device:
        raise OptionError(f"--device {arguments.device}: each worker gets a GPU of its own; leave the number out")


class _Worker:
    """One process with one model, which is opened by the first call.

    Args:
        arguments: The command line.
        rule: As for ``open_detector``.
        single: Whether it has one thread.
    """

    def __init__(self, arguments: argparse.Namespace, rule: dict[str, Any], single: bool) -> None:
        self._arguments, self._rule, self._single = arguments, rule, single
        self._detector: ForgeryDetector | None = None

    def _opened(self) -> "ForgeryDetector":
        if self._detector is None:
            if self._single:
                import torch

                torch.set_num_threads(1)
            self._detector = open_detector(self._arguments, **self._rule)
        return self._detector

    def about(self, options: "AnalyzeOptions") -> dict[str, Any]:
        """What the driver must know of the model."""
        detector = self._opened()
        return {
            "batch_size": detector.system.batch_size(options),
            "describe": detector.system.describe(options),
            "has_features": detector.has_features,
            "notice": detector.notice,
        }

    def analyze(
        self, items: list[Any], settings: "tuple[Callable[[Any], Any], AnalyzeOptions, Callable[[Any], Any] | None]"
    ) -> "tuple[list[ForgeryReport], list[Any], float]":
        """Analyses one batch; returns the reports, what else is asked of each item, and the time an item."""
        image_of, options, ask = settings
        start = time.perf_counter()
        images = map(image_of, items)
        reports = list(self._opened().analyze_many(images, batch_size=len(items), **vars(options)))
        asked = [ask(item) for item in items] if ask else []
        return reports, asked, (time.perf_counter() - start) / len(items)

    def features(self, items: list[Any], image_of: Callable[[Any], Any]) -> "list[np.ndarray | None]":
        """Features of some images."""
        return list(self._opened().features_many(map(image_of, items), len(items)))


@dataclass
class _Task:
    """A batch on its way.

    Attributes:
        number: Its place among all.
        items: What is in it.
        lost: Workers that were lost while they worked at it.
    """

    number: int
    items: list[Any]
    lost: int = 0


@dataclass
class _Slot:
    """A worker's place.

    Attributes:
        actor: The process; another one where it was lost.
        queue: What it was given, the oldest first, by Ray's reference of its result.
    """

    actor: Any
    queue: dict[Any, _Task] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """A batch that a worker has finished.

    Attributes:
        number: The batch's place among all.
        worker: Number of the worker's place, from 0.
        items: What is in it.
        result: What the worker's method returned.
    """

    number: int
    worker: int
    items: list[Any]
    result: Any


class WorkerPool:
    """Workers that take batches as they finish them; the batches of a lost one go to others.

    Args:
        arguments: The command line, with ``workers`` and ``ray_address``.
        options: How images are analysed.
        **rule: As for ``open_detector``.

    Attributes:
        count: How many workers there are.
        batch_size: Images at a time that fit and are fast.
        describe: All that changes an answer beside weights, options and pixels.
        has_features: Whether the model gives features of images.

    Raises:
        OptionError: Ray is not installed, is not found, or has too few GPUs or CPUs.
        UserError: The model cannot be opened.
    """

    def __init__(self, arguments: argparse.Namespace, options: "AnalyzeOptions", **rule: Any) -> None:
        try:
            import ray
        except ImportError:
            raise OptionError("--workers needs Ray: pip install -c constraints.txt -e '.[cluster]'") from None
        self._ray = ray
        self.count: int = arguments.workers
        self._owns = _connect(ray, self.count, arguments.ray_address)
        try:
            resources = _resources(ray, self.count, arguments.device)
            remote = ray.remote(_Worker).options(scheduling_strategy="SPREAD", **resources)
            self._start = lambda: remote.remote(arguments, rule, not resources.get("num_gpus"))
            self._slots = [_Slot(self._start()) for _ in range(self.count)]
            about = self._first_about(options)
        except BaseException:
            self.close()
            raise
        self.batch_size: int = about["batch_size"]
        self.describe: dict[str, Any] = about["describe"]
        self.has_features: bool = about["has_features"]
        if about["notice"]:
            note_once(about["notice"])

    def _first_about(self, options: "AnalyzeOptions") -> dict[str, Any]:
        """What the first worker says that has opened its model; the others go on opening theirs."""
        first, _ = self._ray.wait([slot.actor.about.remote(options) for slot in self._slots])
        try:
            about: dict[str, Any] = self._ray.get(first[0])
        except self._ray.exceptions.RayTaskError as error:
            raise _cause(error) from None
        except self._ray.exceptions.RayActorError as error:
            raise WorkerError(f"a worker was lost while it opened the model: {_first_line(error)}") from None
        return about

    def analyze(
        self,
        batches: Iterable[tuple[int, list[Any]]],
        image_of: Callable[[Any], Any],
        options: "AnalyzeOptions",
        ask: Callable[[Any], Any] | None = None,
        *,
        most_ahead: int | None = None,
    ) -> Iterator[Done]:
        """Analyses numbered batches and yields them as they are finished; results are as of ``_Worker.analyze``.

        Args:
            batches: Number and items, the numbers ascending; taken as workers have room.
            image_of: Gives an item's image or its path, in the worker.
            options: How images are analysed.
            ask: What else is asked of each item, in the worker.
            most_ahead: Least distance from the oldest unfinished batch from which on none is begun.

        Raises:
            WorkerError: A batch loses one worker after another.
        """
        yield from self._run("analyze", batches, (image_of, options, ask), most_ahead)

    def analyze_in_order(
        self,
        batches: Iterable[list[Any]],
        image_of: Callable[[Any], Any],
        options: "AnalyzeOptions",
        ask: Callable[[Any], Any] | None = None,
    ) -> Iterator[Done]:
        """Analyses batches and yields them in order, see ``analyze``; what is finished early waits in memory."""
        most = _AHEAD * self.count
        yield from _in_order(self.analyze(enumerate(batches), image_of, options, ask, most_ahead=most))

    def features_many(
        self, items: Iterable[Any], image_of: Callable[[Any], Any], batch_size: int = 8
    ) -> "Iterator[np.ndarray | None]":
        """Yields features of images in order, see ``ForgeryDetector.features_many``."""
        batches = enumerate(split(items, batch_size))
        for done in _in_order(self._run("features", batches, image_of, _AHEAD * self.count)):
            yield from done.result

    def _run(
        self, method: str, batches: Iterable[tuple[int, list[Any]]], settings: Any, most_ahead: int | None
    ) -> Iterator[Done]:
        shared = self._ray.put(settings)
        rest = (_Task(*batch) for batch in batches)
        again: deque[_Task] = deque()
        while True:
            self._hand_out(method, shared, rest, again, most_ahead)
            flying = {reference: place for place, slot in enumerate(self._slots) for reference in slot.queue}
            if not flying:
                return
            (reference,), _ = self._ray.wait(list(flying))
            place = flying[reference]
            try:
                result = self._ray.get(reference)
            except self._ray.exceptions.RayActorError as error:
                again.extend(self._replace(place, error))
                continue
            except self._ray.exceptions.RayTaskError as error:
                raise _cause(error) from None
            task = self._slots[place].queue.pop(reference)
            yield Done(task.number, place, task.items, result)

    def _hand_out(
        self, method: str, shared: Any, rest: Iterator[_Task], again: deque[_Task], most_ahead: int | None
    ) -> None:
        """Gives work to each worker that has room, lost batches first."""
        while slot := min((s for s in self._slots if len(s.queue) < _QUEUED), key=lambda s: len(s.queue), default=None):
            on_way = [task.number for other in self._slots for task in other.queue.values()]
            if not again:
                oldest = min(on_way, default=None)
                if most_ahead and oldest is not None and max(on_way) - oldest >= most_ahead:
                    return
            task = again.popleft() if again else next(rest, None)
            if task is None:
                return
            slot.queue[getattr(slot.actor, method).remote(task.items, shared)] = task

    def _replace(self, place: int, error: Exception) -> list[_Task]:
        """Puts a new worker in the place of a lost one; returns what that was given."""
        slot = self._slots[place]
        tasks = list(slot.queue.values())
        tasks[0].lost += 1
        if tasks[0].lost >= _MOST_LOST:
            named = ", ".join(str(getattr(item, "id", item)) for item in tasks[0].items[:3])
            raise WorkerError(
                f"{_MOST_LOST} workers were lost one after another at the same batch ({named}, …); "
                f"lower --batch-size or look at these images. Ray says: {_first_line(error)}"
            )
        log(f"worker {place} was lost; its {len(tasks)} batches go to others, and a new worker starts")
        self._slots[place] = _Slot(self._start())
        return tasks

    def close(self) -> None:
        """Ends the workers, and Ray where it was started here."""
        for slot in getattr(self, "_slots", ()):
            self._ray.kill(slot.actor)
        if self._owns:
            self._ray.shutdown()

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def split(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yields lists of so many items, the last one shorter."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def _in_order(results: Iterable[Done]) -> Iterator[Done]:
    early: dict[int, Done] = {}
    wanted = 0
    for done in results:
        early[done.number] = done
        while wanted in early:
            yield early.pop(wanted)
            wanted += 1


def _connect(ray: Any, workers: int, address: str | None) -> bool:
    """Finds or starts Ray; returns whether this process must end it."""
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # or Ray would tell its makers
    os.environ.setdefault("RAY_worker_niceness", "0")  # or workers would wait for all else on the machine
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address:
        try:
            ray.init(address=address, **common)
        except (ConnectionError, ValueError) as error:
            raise OptionError(f"--ray-address {address}: no Ray cluster answers there: {_first_line(error)}") from None
    else:
        cores = max(os.cpu_count() or 1, workers)
        # An address in the environment would be taken before a start of its own.
        ray.init("local", num_cpus=cores, object_store_memory=_STORE_BYTES, include_dashboard=False, **common)
    return True


def _resources(ray: Any, workers: int, device: str) -> dict[str, Any]:
    """What each worker has of the cluster.

    Raises:
        OptionError: There is not enough.
    """
    found = ray.cluster_resources()
    gpus = 0 if device == "cpu" else int(found.get("GPU", 0))
    if 0 < gpus < workers:
        raise OptionError(f"--workers {workers}: there are only {gpus} GPUs; ask for as many, or add --device cpu")
    if not gpus and found.get("CPU", 0) < workers:
        raise OptionError(f"--workers {workers}: the cluster has only {found.get('CPU', 0):g} CPUs")
    return {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": 1}


def _cause(error: Any) -> BaseException:
    """What a worker raised: an error of the user as it was, any other with the worker's traceback."""
    plain = isinstance(error.cause, UserError | MemoryError) or type(error.cause).__name__ == "OutOfMemoryError"
    return error.cause if plain else error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
