"""Images of many requests in batches for one model, which works in a thread of its own. Imports no torch.

Requests live in the event loop, the model in the thread. They meet in a list that a lock guards, and results go back
by ``call_soon_threadsafe``: nothing else is touched from both sides.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llava.errors import UserError
from llava.serve.limits import Limits, RequestError
from llava.serve.metrics import Metrics

if TYPE_CHECKING:
    from llava.detector import AnalyzeOptions, ForgeryDetector, Prepared
    from llava.report import ForgeryReport

_LOG = logging.getLogger("llava.serve")
_PIXELS_WITH_ATTENTION = 64_000_000
"""Pixels of a batch whose attention is asked for: that is laid over each image in four bytes a pixel."""
_LEAST_RETRY, _LONGEST_RETRY = 1, 60

Heard = Callable[[str, float, float], object]
"""Takes a piece of an answer, its log-probability, and P(fake) if it is the verdict; in the event loop."""


@dataclass(eq=False)
class Job:
    """An image that waits for its report.

    Attributes:
        prepared: The image as the model takes it.
        options: How it is analysed.
        pixels: Of the image itself.
        done: Gets the report.
        heard: Follows the answer; None if nobody does.
        is_gone: Whether nobody waits any more.
    """

    prepared: "Prepared"
    options: "AnalyzeOptions"
    pixels: int
    done: "asyncio.Future[ForgeryReport]"
    heard: Heard | None = None
    is_gone: bool = False


@dataclass(frozen=True)
class _Listener:
    """Passes pieces of answers on to the requests of a batch."""

    jobs: list[Job]

    def heard(self, row: int, piece: str, logprob: float, fake_probability: float) -> None:
        job = self.jobs[row]
        if job.heard is not None and not job.is_gone:
            _call(job, job.heard, piece, logprob, fake_probability)

    def is_gone(self, row: int) -> bool:
        return self.jobs[row].is_gone


def _call(job: Job, function: Callable[..., Any], *arguments: Any) -> None:
    """Calls in the job's event loop; nobody is there any more once that is closed."""
    loop = job.done.get_loop()
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, *arguments)


@dataclass
class Batcher:
    """Collects jobs and lets the model work on those that can be analysed together.

    Attributes:
        detector: The model; only the thread of ``start`` calls it.
        limits: Of the server.
        metrics: Counts batches and places.
    """

    detector: "ForgeryDetector"
    limits: Limits
    metrics: Metrics
    _taken: int = 0
    _waiting: list[Job] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _closed: bool = False
    _seconds_an_image: float = 0.5
    _thread: threading.Thread | None = None

    # --- in the event loop

    def start(self) -> None:
        """Starts the model's thread."""
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def is_working(self) -> bool:
        """Whether the model's thread runs."""
        return self._thread is not None and self._thread.is_alive()

    @contextmanager
    def places(self, count: int) -> Iterator[None]:
        """Takes places for the images of a request, and frees them however it ends.

        Raises:
            RequestError: 429, there are not so many.
        """
        if self._taken + count > self.limits.queue:
            wait = min(max(int(self._taken * self._seconds_an_image), _LEAST_RETRY), _LONGEST_RETRY)
            raise RequestError(
                429, "queue_full", f"the server is at work on {self._taken} images; try again in {wait} s", wait
            )
        self._taken += count
        self.metrics.places.set(self._taken)
        try:
            yield
        finally:
            self._taken -= count
            self.metrics.places.set(self._taken)

    def submit(self, prepared: "Prepared", options: "AnalyzeOptions", pixels: int, heard: Heard | None = None) -> Job:
        """Hands an image to the model; its place was taken before.

        Raises:
            RequestError: 503, the model's thread has ended.
        """
        if not self.is_working:
            raise RequestError(503, "not_ready", "the model is not at work; see /readyz")
        job = Job(prepared, options, pixels, asyncio.get_running_loop().create_future(), heard)
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Forgets a job: it is not analysed if it still waits, and its answer ends if it is being decoded."""
        job.is_gone = True
        job.done.cancel()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def close(self) -> None:
        """Lets the thread finish what waits, and end."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    # --- in the model's thread

    def _work(self) -> None:
        while batch := self._next_batch():
            start = time.perf_counter()
            self._analyze(batch)
            each = (time.perf_counter() - start) / len(batch)
            self._seconds_an_image += 0.2 * (each - self._seconds_an_image)
            self.metrics.batches.observe(len(batch))

    def _next_batch(self) -> list[Job]:
        """Waits for a job, and a little for others like it; nothing once the batcher is closed and all is done."""
        with self._changed:
            while True:
                while not self._waiting:
                    if self._closed:
                        return []
                    self._changed.wait()
                size = self._batch_size(self._waiting[0].options)
                deadline = time.monotonic() + self.limits.batch_wait_ms / 1000
                while not self._closed and 0 < len(self._alike(size)) < size:
                    left = deadline - time.monotonic()
                    if left <= 0 or not self._changed.wait(left):
                        break
                batch = self._alike(size)  # empty if all who waited have gone
                self._waiting = [job for job in self._waiting if job not in batch]
                if batch:
                    return batch

    def _batch_size(self, options: "AnalyzeOptions") -> int:
        own = self.detector.system.batch_size(options)
        return own if self.limits.batch_size is None else min(own, self.limits.batch_size)

    def _alike(self, size: int) -> list[Job]:
        """The jobs that can be analysed with the first one, itself included."""
        found: list[Job] = []
        pixels = 0
        for job in self._waiting:
            if job.options != self._waiting[0].options:
                continue
            pixels += job.pixels if job.options.attention else 0
            if found and pixels > _PIXELS_WITH_ATTENTION:
                break
            found.append(job)
            if len(found) == size:
                break
        return found

    def _analyze(self, batch: list[Job]) -> None:
        try:
            reports = self.detector.analyze_prepared(
                [job.prepared for job in batch], batch[0].options, _Listener(batch)
            )
        except UserError as error:
            self._fail(batch, RequestError(422, "bad_option", str(error)))
        except Exception:
            # A bug: the log has its traceback, and it must not reach the images that only shared the batch.
            _LOG.exception("a batch of %d could not be analysed", len(batch))
            if len(batch) > 1:
                for job in batch:
                    self._analyze([job])
            else:
                self._fail(batch, RequestError(500, "internal_error", "the analysis failed; the server's log says why"))
        else:
            for job, report in zip(batch, reports, strict=True):
                _call(job, _finish, job, report)

    def _fail(self, batch: list[Job], error: RequestError) -> None:
        for job in batch:
            _call(job, _finish, job, error)


def _finish(job: Job, result: "ForgeryReport | RequestError") -> None:
    if job.done.done():
        return
    if isinstance(result, RequestError):
        job.done.set_exception(result)
    else:
        job.done.set_result(result)
