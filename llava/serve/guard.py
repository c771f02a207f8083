"""What stands before every request: keys, the body's size and time, and headers. Imports no torch."""

import asyncio
import hmac
import json
import time
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava.serve.limits import RequestError
from llava.serve.service import Service

_DRAINED = 4
"""So many times the largest body is read and thrown away, so that a client that still sends can read the answer."""
_DRAIN_SECONDS = 15.0
_HELD = 16
"""So many times the largest body may all requests hold together."""
_SECURITY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "media-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _SECURITY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """ASGI middleware around the whole application.

    Args:
        app: The application.
        service: Whose limits hold.
        keys: API keys; empty lets everybody in.
        paths: Known paths, for the counters.
    """

    def __init__(self, app: ASGIApp, service: Service, keys: Sequence[str], paths: frozenset[str]) -> None:
        self._app = app
        self._service = service
        self._keys = [key.encode() for key in keys]
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(receive, self._service)
        answer = _Answer(send, body, self._service, scope["path"] if scope["path"] in self._paths else "other")
        try:
            self._check(scope, body)
            await self._app(scope, body.receive, answer.send)
        except RequestError as error:
            if not answer.started:
                await answer.error(error)
        finally:
            body.forget()

    def _check(self, scope: Scope, body: "_Body") -> None:
        """Looks at what can be known before the body is read.

        Raises:
            RequestError: The server is stopping, the key is missing, or the body will be too large.
        """
        if not scope["path"].startswith("/v1/"):
            return
        if self._service.stopping:
            raise RequestError(503, "stopping", "the server is stopping; try again", 2)
        headers = dict(scope["headers"])
        if self._keys and not self._knows(headers.get(b"authorization", b"")):
            raise RequestError(401, "bad_key", "give one of the server's keys as Authorization: Bearer KEY")
        length = headers.get(b"content-length", b"")
        if length.isdigit():
            body.check(int(length))

    def _knows(self, authorization: bytes) -> bool:
        kind, _, given = authorization.partition(b" ")
        # Every key is compared, and each in constant time, so that nothing is told by how long it takes.
        matches = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        return kind.lower() == b"bearer" and any(matches)


class _Body:
    """The body of a request as it arrives, counted and timed."""

    def __init__(self, receive: Receive, service: Service) -> None:
        self._receive = receive
        self._service = service
        self._limits = service.limits
        self._read = 0
        self._held = 0
        # Some answers listen for the client's leaving while they are sent: two readers would wait for one message.
        self._reading = asyncio.Lock()
        self._end = time.monotonic() + self._limits.upload_timeout
        self.is_complete = False

    def check(self, size: int) -> None:
        """Looks at a size.

        Raises:
            RequestError: 413, it is more than is taken.
        """
        if size > self._limits.upload_bytes:
            raise RequestError(413, "too_large", f"an upload may have {self._limits.upload_mb:g} MB, not more")

    async def receive(self) -> Message:
        """Returns the next message.

        Raises:
            RequestError: The body is too large, or did not arrive in time.
        """
        async with self._reading:
            if not self.is_complete:
                return await self._next()
        return await self._receive()

    async def _next(self) -> Message:
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._end - time.monotonic()))
        except asyncio.TimeoutError:
            raise RequestError(408, "slow_upload", "the upload did not arrive in time") from None
        self._count(message)
        self.check(self._read)
        self._hold(len(message.get("body", b"")))
        return message

    def _hold(self, size: int) -> None:
        """Counts bytes that are kept until the request is answered.

        Raises:
            RequestError: 429, all requests together hold too many.
        """
        self._held += size
        self._service.held_bytes += size
        if self._service.held_bytes > _HELD * self._limits.upload_bytes:
            raise RequestError(429, "uploads_full", "too many uploads arrive at once; try again in 2 s", 2)

    def forget(self) -> None:
        """The request is answered."""
        self._service.held_bytes -= self._held
        self._held = 0

    def _count(self, message: Message) -> None:
        self._read += len(message.get("body", b""))
        self.is_complete = message["type"] != "http.request" or not message.get("more_body", False)

    async def drain(self) -> None:
        """Reads on for a while and throws away: a client that sends and does not read would lose the answer."""
        end = time.monotonic() + _DRAIN_SECONDS
        async with self._reading:
            while not self.is_complete and self._read <= _DRAINED * self._limits.upload_bytes:
                try:
                    self._count(await asyncio.wait_for(self._receive(), max(0.0, end - time.monotonic())))
                except asyncio.TimeoutError:
                    return


class _Answer:
    """What is sent: with the headers that every answer has, and counted."""

    def __init__(self, send: Send, body: _Body, service: Service, path: str) -> None:
        self._send = send
        self._body = body
        self._service = service
        self._path = path
        self._start = time.perf_counter()
        self.started = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            await self._body.drain()
            own = {name.lower(): value for name, value in _HEADERS.items()}
            if self._service.stopping:
                own["connection"] = "close"
            there = {name for name, _ in message["headers"]}
            added = [(name.encode(), value.encode()) for name, value in own.items() if name.encode() not in there]
            message = {**message, "headers": [*message["headers"], *added]}
            self._service.metrics.requests.labels(self._path, str(message["status"])).inc()
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._service.metrics.seconds.labels(self._path).observe(time.perf_counter() - self._start)

    async def error(self, error: RequestError) -> None:
        content = json.dumps(error.body).encode()
        headers = {"content-type": "application/json", "content-length": str(len(content)), **error.headers}
        encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": error.status, "headers": encoded})
        await self.send({"type": "http.response.body", "body": content})
