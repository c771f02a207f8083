"""Answers as server-sent events while they are decoded. Imports no torch."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from llava.serve.limits import RequestError

_HEARTBEAT = 10.0
"""Seconds of silence after which a comment is sent, so that no proxy takes the connection for dead."""
KEEP_ALIVE = b": still at work\n\n"

Emit = Callable[[Any], None]


def event(data: Any, name: str = "") -> bytes:
    """Returns an event with JSON data."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data)}\n\n".encode()


async def while_working(
    work: Callable[[Emit], Awaitable[None]], timeout: float, late: RequestError
) -> AsyncIterator[Any]:
    """Yields what some work emits as it comes, and None for each silence.

    Whoever stops iterating, for example because the client has gone, ends the work.

    Args:
        work: Gets the function by which it emits.
        timeout: Seconds for all of it.
        late: What is raised when they are over.

    Raises:
        RequestError: ``late``, or what the work raises.
    """
    emitted: asyncio.Queue[Any] = asyncio.Queue()
    task = asyncio.ensure_future(work(emitted.put_nowait))
    getting = asyncio.ensure_future(emitted.get())
    end = asyncio.get_running_loop().time() + timeout
    try:
        while True:
            left = end - asyncio.get_running_loop().time()
            waited = min(_HEARTBEAT, max(left, 0.0))
            await asyncio.wait({getting, task}, timeout=waited, return_when=asyncio.FIRST_COMPLETED)
            if getting.done():
                yield getting.result()
                getting = asyncio.ensure_future(emitted.get())
            elif task.done():
                while not emitted.empty():  # what came since the wait ended
                    yield emitted.get_nowait()
                task.result()
                return
            elif left <= 0:
                raise late
            else:
                yield None
    finally:
        for each in (task, getting):
            each.cancel()
        await asyncio.gather(task, getting, return_exceptions=True)
