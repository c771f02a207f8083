"""Writing files so that a kill leaves the old one or the new one, and no two runs write the same."""

from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def claim(stream: IO[Any], path: Path) -> None:
    """Keeps a file that is open for writing from other runs, until it is closed or its process ends.

    Where the system or the file system has no locks, nothing is kept.

    Raises:
        ValueError: Another run writes it.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another run is writing {path}: wait for it, or name another place") from None
    except OSError:
        return
