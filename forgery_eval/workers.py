"""Several workers, each with a model of its own, by Ray: one a GPU, or one a CPU core. Imports no torch.

A worker on CPUs has one thread, so that an image's numbers do not depend on how many workers there are.
"""

import argparse
import os
import shlex
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any

from forgery_eval.cluster import connect, resources
from forgery_eval.model_options import loading_options, open_detector
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
_LAUNCHED = ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")
"""Of these, torchrun and accelerate set one or both in each process that they start."""


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
    if any(name in os.environ for name in _LAUNCHED):
        count = os.environ.get("WORLD_SIZE", "1")
        more = [] if arguments.workers else ["--workers", count]
        if not arguments.ray_address and os.environ.get("LOCAL_WORLD_SIZE", count) != count:
            more += ["--ray-address", "auto"]  # several machines
        raise OptionError(
            "this was started by torchrun or accelerate launch, whose processes would each do all of the work; one "
            f"command starts its workers itself: {shlex.join(['forgery', verb, *words, *more])}"
        )
    if arguments.ray_address and not arguments.workers:
        raise OptionError("--ray-address says where the workers are; it needs --workers")
    if arguments.workers and ":" in arguments.device:
        raise OptionError(f"--device {arguments.device}: each worker gets a GPU of its own; leave the number out")


class _Worker:
    """One process with one model, which is opened by the first call; the next batch is read while one is analysed.

    Args:
        arguments: What ``open_detector`` needs of the command line.
        rule: As for ``open_detector``.
        single: Whether it has one thread.
    """

    def __init__(self, arguments: argparse.Namespace, rule: dict[str, Any], single: bool) -> None:
        self._arguments, self._rule, self._single = arguments, rule, single
        self._turn = Lock()
        self._detector: ForgeryDetector | None = None

    def _opened(self) -> "ForgeryDetector":
        with self._turn:
            if self._detector is None:
                self._detector = open_detector(self._arguments, **self._rule)
                if self._single and "torch" in sys.modules:
                    sys.modules["torch"].set_num_threads(1)
            return self._detector

    def about(self, options: "AnalyzeOptions") -> dict[str, Any]:
        """What the driver must know of the model."""
        detector = self._opened()
        return {
            "batch_size": detector.system.batch_size(options),
            "describe": detector.system.describe(options),
            "has_attention": detector.has_attention,
            "has_features": detector.has_features,
            "notice": detector.notice,
        }

    def analyze(
        self, items: list[Any], settings: "tuple[Callable[[Any], Any], AnalyzeOptions, Callable[[Any], Any] | None]"
    ) -> "Analyzed":
        """Analyses one batch."""
        image_of, options, ask = settings
        reports = self._opened().analyze_batch(map(image_of, items), options, self._turn)
        return Analyzed(reports, [ask(item) for item in items] if ask else [])

    def features(self, items: list[Any], image_of: Callable[[Any], Any]) -> "list[np.ndarray | None]":
        """Features of some images."""
        detector = self._opened()
        with self._turn:
            return list(detector.features_many(map(image_of, items), len(items)))


@dataclass(frozen=True)
class Analyzed:
    """What a worker says of a batch.

    Attributes:
        reports: One an item.
        asked: What else was asked of each item; empty if nothing was.
    """

    reports: "list[ForgeryReport]"
    asked: list[Any]


@dataclass
class _Task:
    """A batch on its way.

    Attributes:
        number: Its place among all.
        items: What is in it.
        lost: Workers that were lost while they had it.
    """

    number: int
    items: list[Any]
    lost: int = 0


@dataclass
class _Slot:
    """A worker's place.

    Attributes:
        place: Its number.
        actor: The process; another one where it was lost.
        opening: Ray's reference of what it says when its model is open; None from then on.
        lost: Workers that were lost here, one after another, before their model was open.
        queue: What it was given, by Ray's reference of the result.
    """

    place: int
    actor: Any
    opening: Any
    lost: int = 0
    queue: dict[Any, _Task] = field(default_factory=dict)

    @property
    def has_room(self) -> bool:
        """Whether it can be given a batch."""
        alone = any(task.lost for task in self.queue.values())
        return self.opening is None and not alone and len(self.queue) < _QUEUED


class _Work:
    """The batches that are still to be given out, those of lost workers first.

    Args:
        batches: Number and items, the numbers ascending.
        most_ahead: Distance from the oldest unfinished batch from which on none is begun; None for any.
    """

    def __init__(self, batches: Iterable[tuple[int, list[Any]]], most_ahead: int | None) -> None:
        self._rest = (_Task(*batch) for batch in batches)
        self._next = next(self._rest, None)
        self._most_ahead = most_ahead
        self.again: deque[_Task] = deque()

    @property
    def is_left(self) -> bool:
        """Whether there is any."""
        return bool(self.again) or self._next is not None

    def take(self, oldest: int | None, *, idle: bool = True) -> _Task | None:
        """Returns the next one; None if there is none that may be given out now.

        Args:
            oldest: Number of the oldest one that is on its way.
            idle: Whether it is for a worker that has nothing. What a lost worker had waits for such a one, so that it
                is known at which batch a worker is lost.
        """
        if self.again:
            return self.again.popleft() if idle else None
        task = self._next
        if task is None or (self._most_ahead and oldest is not None and task.number - oldest >= self._most_ahead):
            return None
        self._next = next(self._rest, None)
        return task


@dataclass(frozen=True)
class _Finished:
    """A batch and what the worker's method returned."""

    task: _Task
    result: Any


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
        has_attention: Whether the model can say where it looked.
        has_features: Whether the model gives features of images.

    Raises:
        OptionError: Ray is not installed, is not found, or has too few GPUs or CPUs.
        UserError: The model cannot be opened.
    """

    def __init__(self, arguments: argparse.Namespace, options: "AnalyzeOptions", **rule: Any) -> None:
        try:
            import ray
        except ImportError:
            raise OptionError("--workers needs Ray: pip install 'fakereasoning[cluster]'") from None
        self._ray = ray
        self.count: int = arguments.workers
        self._options = options
        self._slots: list[_Slot] = []
        self._end = connect(ray, self.count, arguments.ray_address)
        try:
            each = resources(ray, self.count, arguments.device, may_join=bool(arguments.ray_address))
            remote: Any = ray.remote(_Worker).options(
                scheduling_strategy="SPREAD", max_concurrency=_QUEUED, max_restarts=0, **each
            )
            model = argparse.Namespace(
                model_path=arguments.model_path, system=arguments.system, **loading_options(arguments)
            )
            self._start = lambda: remote.remote(model, rule, not each.get("num_gpus"))
            self._slots += [self._begin(place) for place in range(self.count)]
            about = self._first_about()
        except BaseException:
            self.close()
            raise
        self.batch_size: int = about["batch_size"]
        self.describe: dict[str, Any] = about["describe"]
        self.has_attention: bool = about["has_attention"]
        self.has_features: bool = about["has_features"]
        if about["notice"]:
            note_once(about["notice"])

    def _begin(self, place: int, lost: int = 0) -> _Slot:
        actor = self._start()
        return _Slot(place, actor, actor.about.remote(self._options), lost)

    def _first_about(self) -> dict[str, Any]:
        """What the first worker says that has opened its model; the others go on opening theirs."""
        while True:
            _, about = self._wait()
            if about is not None:
                return dict(about)

    def wait_until_open(self) -> None:
        """Waits until every worker has opened its model."""
        while any(slot.opening is not None for slot in self._slots):
            self._wait()

    def analyze(
        self,
        batches: Iterable[tuple[int, list[Any]]],
        image_of: Callable[[Any], Any],
        options: "AnalyzeOptions",
        ask: Callable[[Any], Any] | None = None,
        *,
        most_ahead: int | None = None,
    ) -> Iterator[Done]:
        """Analyses numbered batches and yields them as they are finished; each result is an ``Analyzed``.

        Args:
            batches: Number and items, the numbers ascending; taken as workers have room.
            image_of: Gives an item's image or its path, in the worker.
            options: How images are analysed.
            ask: What else is asked of each item, in the worker.
            most_ahead: Distance from the oldest unfinished batch from which on none is begun.

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
        work = _Work(batches, most_ahead)
        while True:
            self._hand_out(method, shared, work)
            if not work.is_left and not any(slot.queue for slot in self._slots):
                return
            slot, finished = self._wait(work)
            if isinstance(finished, _Finished):
                yield Done(finished.task.number, slot.place, finished.task.items, finished.result)

    def _wait(self, work: _Work | None = None) -> "tuple[_Slot, Any]":
        """Waits for the next thing that a worker says.

        Returns:
            The worker's place, and the batch that it finished, what it says of the model that it opened, or None if it
            was lost: another one begins, and its batches are in ``work``.

        Raises:
            WorkerError: One was lost after another, at one batch or while they opened the model.
            UserError: What a worker raised.
        """
        waited = {reference: slot for slot in self._slots for reference in slot.queue}
        waited |= {slot.opening: slot for slot in self._slots if slot.opening is not None}
        (reference,), _ = self._ray.wait(list(waited))
        slot = waited[reference]
        try:
            said = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise _cause(error) from None
        except self._ray.exceptions.RayError as error:
            lost = self._replace(slot, error)
            if work is not None:
                work.again.extend(lost)
            return slot, None
        if reference == slot.opening:
            slot.opening, slot.lost = None, 0
            return slot, said
        return slot, _Finished(slot.queue.pop(reference), said)

    def _hand_out(self, method: str, shared: Any, work: _Work) -> None:
        """Gives work to each worker that has room."""
        while ready := [slot for slot in self._slots if slot.has_room]:
            slot = min(ready, key=lambda one: len(one.queue))
            on_way = [task.number for other in self._slots for task in other.queue.values()]
            task = work.take(min(on_way, default=None), idle=not slot.queue)
            if task is None:
                return
            slot.queue[getattr(slot.actor, method).remote(task.items, shared)] = task

    def _replace(self, slot: _Slot, error: Exception) -> list[_Task]:
        """Puts a new worker in the place of a lost one; returns what that was given."""
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(slot.actor)  # one that only cannot be reached must not go on
        tasks = list(slot.queue.values())
        for task in tasks:
            task.lost += 1
        worst = max(tasks, key=lambda task: task.lost, default=None)
        opening = slot.lost + 1 if slot.opening is not None else 0
        if opening >= _MOST_LOST:
            raise WorkerError(
                f"{_MOST_LOST} workers were lost one after another while they opened the model; there may be too "
                f"little memory for --workers {self.count}. Ray says: {_first_line(error)}"
            )
        if worst is not None and worst.lost >= _MOST_LOST:
            named = ", ".join(str(getattr(item, "id", item)) for item in worst.items[:3])
            raise WorkerError(
                f"{_MOST_LOST} workers were lost one after another at the same batch ({named}, …); "
                f"lower --batch-size or look at these images. Ray says: {_first_line(error)}"
            )
        log(f"worker {slot.place} was lost; its {len(tasks)} batches go to others, and a new worker starts")
        self._slots[slot.place] = self._begin(slot.place, opening)
        return tasks

    def close(self) -> None:
        """Ends the workers, and Ray where it was started here."""
        for slot in self._slots:
            with suppress(self._ray.exceptions.RayError):
                self._ray.kill(slot.actor)
        self._end()

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


def _cause(error: Any) -> BaseException:
    """What a worker raised: an error of the user as it was, any other with the worker's traceback."""
    plain = isinstance(error.cause, UserError | MemoryError) or type(error.cause).__name__ == "OutOfMemoryError"
    return error.cause if plain else error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
