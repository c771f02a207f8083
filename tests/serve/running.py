"""Servers in a thread of the test, on a free port of this machine, with real HTTP."""

import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from PIL import Image

from llava import ForgeryDetector, ForgeryReport
from llava.serve.app import make_app
from llava.serve.limits import Limits
from llava.serve.server import Server
from llava.serve.service import Service
from llava.systems.base import AnalyzeOptions


class StubSystem:
    """Says of an image how wide it is, when the gate is open; remembers its batches."""

    name = "Stub"
    notice = ""
    answer_format = None
    options = AnalyzeOptions
    has_attention = False

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[list[int]] = []
        self.begun = threading.Semaphore(0)

    def prepare(self, image: Image.Image) -> int:
        return image.width

    def batch_size(self, options: AnalyzeOptions) -> int:
        return 4

    def analyze_batch(self, prepared: list[int], options: AnalyzeOptions) -> list[ForgeryReport]:
        self.batches.append(list(prepared))
        self.begun.release()
        self.gate.wait()
        if 13 in prepared:
            raise KeyError("a mistake in the code")
        return [ForgeryReport("fake", width / 1000, "detector", system=self.name) for width in prepared]


@dataclass(frozen=True)
class Running:
    """A server at work."""

    url: str
    service: Service

    def analyze(self, *files: tuple[str, bytes], **fields: str) -> requests.Response:
        given = [("image", file) for file in files]
        return requests.post(f"{self.url}/v1/analyze", files=given, data=fields, timeout=60)


@contextmanager
def running(detector: ForgeryDetector, *, keys: tuple[str, ...] = (), **limits: Any) -> Iterator[Running]:
    """Serves a detector inside the block."""
    service = Service(detector, Limits(**limits), "model")
    server = Server(make_app(service, keys), service, "127.0.0.1", 0)
    opened = server.listen()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{opened.getsockname()[1]}"
    wait_until(lambda: server.started)
    try:
        yield Running(url, service)
    finally:
        if isinstance(detector.system, StubSystem):
            detector.system.gate.set()
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def wait_until(condition: Any, seconds: float = 60.0) -> None:
    """Waits for a condition; fails if it does not come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def png(width: int = 40, height: int = 30, **settings: Any) -> bytes:
    """A grey image."""
    stream = io.BytesIO()
    Image.new("RGB", (width, height), (90, 120, width % 256)).save(stream, "PNG", **settings)
    return stream.getvalue()


def data_url(content: bytes, kind: str = "image/png") -> str:
    """An image as a data URL."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def opened(url: str) -> Image.Image:
    """The image in a data URL."""
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def sample(name: str) -> tuple[str, bytes]:
    """A bundled sample as an upload."""
    from llava.assets import SAMPLES

    return name, Path(SAMPLES / name).read_bytes()
