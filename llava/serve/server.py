"""uvicorn that stops gracefully: what was accepted is answered, and what comes later is told to come again."""

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from llava.errors import FileError
from llava.serve.service import Service

_GRACE = 0.4
"""Seconds between the signal and the closing of the port, in which requests that are on their way are answered."""


class Server(uvicorn.Server):
    """The server.

    Args:
        app: The application.
        service: Is told that the server stops.
        host: Address to listen on.
        port: Port; 0 takes a free one.
        announce: Called with the address once it is answered on.
    """

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        host: str,
        port: int,
        announce: Callable[[str], None] = lambda address: None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                timeout_keep_alive=30,
                log_level="warning",
                access_log=False,
                lifespan="on",
                http="h11",
                loop="asyncio",
            )
        )
        self._service = service
        self._host = host
        self._port = port
        self._announce = announce

    def listen(self) -> socket.socket:
        """Opens the port.

        Raises:
            FileError: It is taken, or there is no such address.
        """
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        opened = socket.socket(family, socket.SOCK_STREAM)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            opened.bind((self._host, self._port))
        except (OSError, OverflowError) as error:
            opened.close()
            raise FileError(
                f"{self._host}:{self._port} cannot be listened on: {error}; choose another --port"
            ) from error
        opened.set_inheritable(True)
        return opened

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Lets SIGTERM and Ctrl-C end the server, which then returns; a second one ends it at once."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
            yield
            return
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        self._service.stopping = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to answer."""
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            self._announce(f"http://{f'[{host}]' if ':' in host else host}:{port}/")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends after what was accepted is answered."""
        # Whatever was sent before the port closes gets an answer, if only that the server stops. Answers close their
        # connections from now on, so that no client sends on one that is about to go.
        if not self.force_exit:
            await asyncio.sleep(_GRACE)
        await super().shutdown(sockets)
