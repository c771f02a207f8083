"""Measures the server on this machine: one request at a time, then many clients; prints one line of JSON last.

The server is started as its users start it, on a free port. Some of the clients' requests may be malformed (truncated
images, decompression bombs, other files, 50 MB). Every good answer is compared with the one that the same image got
when it was asked about alone. At the end the server is stopped under load, and requests that were sent before are
counted.
"""

import argparse
import http.client
import io
import json
import random
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from llava.cli import OptionParser, log, positive_float, positive_int, run_cli, share
from llava.errors import FileError

_BOUNDARY = "forgery-bench"
_TOLERANCE = 1e-3
"""Scores of one image in batches of other sizes agree to about six digits."""
_SETTLED = 0.25
"""Share of the time after which memory should stay as it is."""


def build_parser() -> OptionParser:
    """Returns the parser of the command line."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=positive_int, default=16, help="clients at a time (default: 16)")
    parser.add_argument("--seconds", type=positive_float, default=20.0, help="time under load (default: 20)")
    parser.add_argument(
        "--alone", type=positive_float, default=10.0, help="time of one request at a time (default: 10)"
    )
    parser.add_argument("--malformed", type=share, help="share of malformed requests (default: none)")
    parser.add_argument("--images", type=positive_int, default=16, help="different images (default: 16)")
    parser.add_argument("--side", type=positive_int, default=224, help="their side in pixels (default: 224)")
    parser.add_argument(
        "--options", default="{}", help="options of the answer as JSON, such as '{\"score_only\": true}'"
    )
    parser.add_argument(
        "--serve", nargs=argparse.REMAINDER, default=[], help="what follows are options of forgery serve"
    )
    return parser


# --- what is sent


def make_images(count: int, side: int) -> list[bytes]:
    """Returns different images, coloured patches under noise, as JPEG."""
    import numpy as np
    from PIL import Image

    images = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((side, side))
        noisy = np.asarray(small, np.float32) + rng.normal(0, 6 + seed, (side, side, 3))
        stream = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=92)
        images.append(stream.getvalue())
    return images


def malformed_bodies(image: bytes) -> list[bytes]:
    """Returns uploads that must be refused: truncated, a bomb, another file, and 50 MB."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1_000_000))) + chunk(b"IEND", b"")
    return [image[: len(image) // 3], bomb, b"%PDF-1.7 no image", bytes(50_000_000)]


def as_form(content: bytes, options: str) -> bytes:
    """Returns the body of a form with an image and options."""
    parts = [
        f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="options"\r\n\r\n{options}\r\n'.encode(),
        f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="image.jpg"\r\n'.encode(),
        b"Content-Type: image/jpeg\r\n\r\n" + content + f"\r\n--{_BOUNDARY}--\r\n".encode(),
    ]
    return b"".join(parts)


# --- the server


@dataclass(frozen=True)
class Served:
    """A server in a process of its own."""

    process: "subprocess.Popen[str]"
    host: str
    port: int

    def connection(self) -> http.client.HTTPConnection:
        """Returns a new connection."""
        return http.client.HTTPConnection(self.host, self.port, timeout=300)

    def get(self, path: str) -> str:
        """Returns what a path answers."""
        connection = self.connection()
        connection.request("GET", path)
        text = connection.getresponse().read().decode()
        connection.close()
        return text

    def metric(self, name: str) -> float:
        """Returns a counter."""
        lines = [line.split() for line in self.get("/metrics").splitlines()]
        return next(float(words[1]) for words in lines if words[:1] == [name])


@contextmanager
def served(options: Sequence[str]) -> Iterator[Served]:
    """Starts a server, and ends it after the block.

    Raises:
        FileError: It does not start.
    """
    command = [sys.executable, "-m", "llava", "serve", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        address = ""
        for line in process.stderr:
            log(line.rstrip())
            if " answers on http://" in line:
                address = line.rsplit("http://", 1)[1].strip().rstrip("/")
                break
        if not address:
            raise FileError(f"the server did not start: {' '.join(command)}")
        threading.Thread(target=_pass_on, args=(process.stderr,), daemon=True).start()
        host, _, port = address.rpartition(":")
        yield Served(process, host.strip("[]"), int(port))
    finally:
        process.kill()
        process.wait()


def _pass_on(lines: Iterable[str]) -> None:
    for line in lines:
        log(line.rstrip())


# --- clients


@dataclass
class Outcome:
    """What happened to the requests of some clients.

    Attributes:
        good: Status and seconds of each request with a good image; status 0 for one without an answer.
        bad: Status of each malformed request.
        mismatched: Good answers that were not about their image.
        lost: Requests that were sent before the server was told to stop and have no answer.
    """

    good: list[tuple[int, float]] = field(default_factory=list)
    bad: list[int] = field(default_factory=list)
    mismatched: int = 0
    lost: int = 0


@dataclass
class Load:
    """What clients send, and until when.

    Attributes:
        served: The server.
        bodies: Forms with good images.
        malformed: Forms that must be refused.
        share: Share of these.
        expected: P(fake) of each good image that was asked about; None where no score is given.
        until: When no further request is sent.
        stopped: When the server was told to stop.
    """

    served: Served
    bodies: list[bytes]
    malformed: list[bytes]
    share: float
    expected: dict[int, float | None]
    until: float = float("inf")
    stopped: float = float("inf")

    def learn(self) -> None:
        """Asks about each good image alone, which also warms the server up.

        Raises:
            FileError: An image is not answered.
        """
        for index, body in enumerate(self.bodies):
            connection = self.served.connection()
            status, content = self._ask(connection, body)
            connection.close()
            if status != 200:
                raise FileError(f"the server answered {status}: {content[:300]!r}")
            self._matches(index, content)

    def client(self, seed: int, outcome: Outcome) -> None:
        """Sends one request after the other."""
        choice = random.Random(seed)
        connection = self.served.connection()
        while time.monotonic() < min(self.until, self.stopped):
            is_bad = choice.random() < self.share
            index = choice.randrange(len(self.malformed if is_bad else self.bodies))
            start = time.monotonic()
            status, content = self._ask(connection, (self.malformed if is_bad else self.bodies)[index])
            if status == 0:
                outcome.lost += start < self.stopped - 0.05
                connection.close()
                connection = self.served.connection()
            if is_bad:
                outcome.bad.append(status)
                continue
            outcome.good.append((status, time.monotonic() - start))
            if status == 200:
                outcome.mismatched += not self._matches(index, content)
            elif status == 429:
                time.sleep(0.2)
        connection.close()

    def _ask(self, connection: http.client.HTTPConnection, body: bytes) -> tuple[int, bytes]:
        headers = {"Content-Type": f"multipart/form-data; boundary={_BOUNDARY}"}
        try:
            connection.request("POST", "/v1/analyze", body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException):
            connection.close()
            return 0, b""

    def _matches(self, index: int, content: bytes) -> bool:
        found = json.loads(content)["results"][0]["report"]["fake_probability"]
        wanted = self.expected.setdefault(index, found)
        return found == wanted or (None not in (found, wanted) and abs(found - wanted) <= _TOLERANCE)

    def run(self, clients: int, stop_after: float | None = None) -> Outcome:
        """Runs the clients until their time is over; stops the server under them if that is asked for."""
        outcomes = [Outcome() for _ in range(clients)]
        threads = [threading.Thread(target=self.client, args=(at, own)) for at, own in enumerate(outcomes)]
        for thread in threads:
            thread.start()
        if stop_after is not None:
            time.sleep(stop_after)
            self.stopped = time.monotonic()
            self.served.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        total = Outcome()
        for own in outcomes:
            total.good += own.good
            total.bad += own.bad
            total.mismatched += own.mismatched
            total.lost += own.lost
        return total


@contextmanager
def memory_watched(served: Served) -> Iterator[list[tuple[float, float]]]:
    """Collects the server's memory in MB with the seconds since the beginning, each second."""
    found: list[tuple[float, float]] = []
    done = threading.Event()
    start = time.monotonic()

    def watch() -> None:
        while not done.wait(1.0):
            found.append((time.monotonic() - start, served.metric("process_resident_memory_bytes") / 1e6))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


# --- measures


def summary(outcome: Outcome, seconds: float) -> dict[str, Any]:
    """Returns rates, times and statuses."""
    times = sorted(time for status, time in outcome.good if status == 200)
    answered = len(times)
    of_good = Counter(str(status) for status, _ in outcome.good)
    return {
        "requests_per_s": round(answered / seconds, 3),
        **{f"p{part}_s": round(times[min(answered - 1, answered * part // 100)], 4) for part in (50, 95, 99) if times},
        "good": dict(sorted(of_good.items())),
        "malformed": dict(sorted(Counter(map(str, outcome.bad)).items())),
        "mismatched": outcome.mismatched,
    }


def memory_summary(found: Sequence[tuple[float, float]], seconds: float) -> dict[str, float]:
    """Returns memory when it should have settled, and the largest and smallest after that, in MB."""
    later = [size for at, size in found if at >= _SETTLED * seconds]
    return (
        {"settled_mb": round(later[0], 1), "max_mb": round(max(later), 1), "min_mb": round(min(later), 1)}
        if later
        else {}
    )


def measure(server: Served, load: Load, parsed: argparse.Namespace) -> dict[str, Any]:
    """Measures one request at a time, many clients, and stopping under them."""
    load.learn()
    start = time.monotonic()
    alone_load = replace(load, share=0.0, until=start + parsed.alone)
    alone = summary(alone_load.run(1), time.monotonic() - start)
    names = ("forgery_batch_images_sum", "forgery_batch_images_count")
    before = [server.metric(name) for name in names]
    with memory_watched(server) as memory:
        start = time.monotonic()
        outcome = replace(load, until=start + parsed.seconds).run(parsed.clients)
        together = summary(outcome, time.monotonic() - start)
    images, batches = (server.metric(name) - old for name, old in zip(names, before, strict=True))
    stopped = replace(load, share=0.0).run(parsed.clients, stop_after=min(3.0, parsed.seconds))
    return {
        "clients": parsed.clients,
        "seconds": parsed.seconds,
        "alone": alone,
        "together": together,
        "speedup": round(together["requests_per_s"] / max(alone["requests_per_s"], 1e-9), 3),
        "images_a_batch": round(images / batches, 2) if batches else None,
        "memory": memory_summary(memory, parsed.seconds),
        "stop": {
            "answered": sum(status == 200 for status, _ in stopped.good),
            "lost": stopped.lost,
            "status": server.process.wait(300),
        },
    }


def main(arguments: Any = None) -> int:
    """Measures and prints."""
    parsed = build_parser().parse_args(arguments)
    images = make_images(parsed.images, parsed.side)
    bodies = [as_form(image, parsed.options) for image in images]
    bad = [as_form(content, parsed.options) for content in malformed_bodies(images[0])]
    with served(parsed.serve) as server:
        load = Load(server, bodies, bad, parsed.malformed or 0.0, {})
        print(json.dumps(measure(server, load, parsed)))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
