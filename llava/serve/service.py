"""From an upload to a result: decoded beside the model, analysed in a batch, drawn. Imports no torch."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request

from llava.errors import UserError
from llava.image_operations import Step
from llava.provenance import Provenance, read_provenance
from llava.report_page.content import STABILITY_STEPS, result, stability_rows
from llava.report_page.drawing import preview_jpeg
from llava.serve.batcher import Batcher, Heard
from llava.serve.limits import Limits, RequestError
from llava.serve.metrics import Metrics
from llava.serve.options import OptionReader
from llava.serve.uploads import Upload, Wants, gone, open_upload

if TYPE_CHECKING:
    from llava.detector import AnalyzeOptions, ForgeryDetector, Prepared
    from llava.report import ForgeryReport

_DECODERS = 2
T = TypeVar("T")


@dataclass(frozen=True)
class Accepted:
    """An upload in which nothing was found wrong, without what is large: many may wait.

    Attributes:
        name: As its sender gave it.
        wants: What is wanted.
        options: How it is analysed.
        prepared: As the model takes it; after it what becomes of it by some steps.
        pixels: Of the image.
        preview: The image, small, if that is wanted.
        provenance: What the file says of itself.
    """

    name: str
    wants: Wants
    options: "AnalyzeOptions"
    prepared: "tuple[Prepared, ...]"
    pixels: int
    preview: bytes | None
    provenance: Provenance


@dataclass
class Service:
    """What all ways of asking share.

    Attributes:
        detector: The model.
        limits: Of the server.
        name: Of the model, as requests give it.
        started: When the service was made, in seconds since 1970.
        stopping: Whether new requests are turned away.
        held_bytes: Of the bodies of all requests that are not answered yet.
    """

    detector: "ForgeryDetector"
    limits: Limits
    name: str
    metrics: Metrics = field(default_factory=Metrics)
    started: int = field(default_factory=lambda: int(time.time()))
    stopping: bool = False
    held_bytes: int = 0

    def __post_init__(self) -> None:
        self.batcher = Batcher(self.detector, self.limits, self.metrics)
        self.options = OptionReader(self.detector, self.limits)
        self._decoders = ThreadPoolExecutor(_DECODERS, thread_name_prefix="decoder")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keeps the model at work inside the block, and finishes what was accepted at its end."""
        self.batcher.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.batcher.close)
            self._decoders.shutdown()

    # --- one image

    async def accept(self, upload: Upload, wants: Wants, steps: Sequence[Step] = ()) -> Accepted:
        """Checks and decodes an upload.

        Args:
            upload: The image.
            wants: What is wanted.
            steps: After each of which the image is wanted too.

        Raises:
            RequestError: An option is not as it must be, or it is no image that is taken.
        """
        options = self.options.read(wants.options, attention=wants.attention)
        return await self._beside(self._accept, upload, wants, options, steps)

    async def analyze(
        self, prepared: "Prepared", options: "AnalyzeOptions", pixels: int, heard: Heard | None = None
    ) -> "ForgeryReport":
        """Returns the report on an image; whoever stops waiting gives its place free.

        Raises:
            RequestError: It cannot be analysed, with the reason.
        """
        job = self.batcher.submit(prepared, options, pixels, heard)
        try:
            report = await job.done
        finally:
            self.batcher.cancel(job)
        self.metrics.images.labels("none" if report.label is None else report.label).inc()
        if report.error:
            raise RequestError(422, "not_analysed", report.error)
        return report

    async def result(self, accepted: Accepted, heard: Heard | None = None) -> dict[str, Any]:
        """Returns what is said of an upload.

        Raises:
            RequestError: It cannot be analysed, with the reason.
        """
        report = await self.analyze(accepted.prepared[0], accepted.options, accepted.pixels, heard)
        return await self._beside(self._drawn, accepted, report)

    async def stability(self, upload: Upload, wants: Wants) -> dict[str, Any]:
        """Returns whether the verdict on an upload holds after common steps.

        Raises:
            RequestError: It cannot be analysed, with the reason.
        """
        accepted = await self.accept(upload, wants, tuple(STABILITY_STEPS.values()))
        every = [self.analyze(each, accepted.options, accepted.pixels) for each in accepted.prepared]
        original, *others = await gather(every)
        return {"name": upload.name, "report": original.to_dict(), "steps": stability_rows(original, others)}

    # --- waiting

    async def answered(self, request: Request, work: Awaitable[T]) -> T:
        """Returns what some work gives, unless its time is over or the client goes before.

        Raises:
            RequestError: 504, or 499 which nobody reads; or what the work raises.
        """
        task = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(_disconnected(request))
        try:
            done, _ = await asyncio.wait(
                {task, leaving}, timeout=self.limits.timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if task in done:
                return task.result()
            raise gone() if leaving in done else self.late()
        finally:
            for other in (task, leaving):
                other.cancel()
            await asyncio.gather(task, leaving, return_exceptions=True)

    def late(self) -> RequestError:
        """The answer to a request whose time is over."""
        return RequestError(
            504, "timeout", f"there was no answer within {self.limits.timeout:g} s; try again later", 10
        )

    def _accept(self, upload: Upload, wants: Wants, options: "AnalyzeOptions", steps: Sequence[Step]) -> Accepted:
        image = open_upload(upload, self.limits)
        try:
            prepared = tuple(self.detector.prepare(each) for each in (image, *(step(image) for step in steps)))
        except UserError as error:
            raise RequestError(422, "unreadable_image", f"{upload.name}: {error}") from None
        provenance = read_provenance(upload.content)
        upload.content = b""
        preview = preview_jpeg(image) if wants.preview else None
        return Accepted(upload.name, wants, options, prepared, image.width * image.height, preview, provenance)

    def _drawn(self, accepted: Accepted, report: "ForgeryReport") -> dict[str, Any]:
        wants = accepted.wants
        return result(
            accepted.name,
            report,
            self.detector.calibrated(report),
            accepted.provenance,
            constant_stages=getattr(self.detector.system.answer_format, "constant_stages", ()),
            preview=accepted.preview,
            attention=wants.attention,
            mask=wants.mask,
        )

    async def _beside(self, function: Callable[..., T], *arguments: Any) -> T:
        """Calls a function in one of the decoders' threads."""
        return await asyncio.get_running_loop().run_in_executor(self._decoders, function, *arguments)


async def gather(work: "Sequence[Awaitable[T]]") -> list[T]:
    """Waits for all; if one fails, the others are cancelled."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def _disconnected(request: Request) -> None:
    """Returns when the client has gone; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
