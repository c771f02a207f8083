"""Ctrl-C while a command's libraries are still being imported. Imports next to nothing, since it must come first."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

COMMAND = "forgery"
"""Name of the front door, see ``llava.__main__``."""
INTERRUPTED = 130
"""Exit status after Ctrl-C."""
_FOLDERS = ("llava", "forgery_eval", "mmfr_generation", "scripts")


def _leave(number: int, frame: FrameType | None) -> None:
    """Ends the process at once: nothing has begun, and half an import must not go on."""
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def leave_at_once() -> None:
    """Lets Ctrl-C end this process without a traceback, if it runs a command of ours; as a library nothing changes."""
    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler and is_own_program(sys.orig_argv):
            signal.signal(signal.SIGINT, _leave)
    except ValueError:  # only the main thread may say what a signal does
        return


def begin_work() -> None:
    """Lets Ctrl-C raise ``KeyboardInterrupt`` again, so that the work that now begins can clear up."""
    try:
        if signal.getsignal(signal.SIGINT) is _leave:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    except ValueError:
        return


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Lets processes that are started inside the block, and all that they start, pass over Ctrl-C."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # only the main thread may say what a signal does, and it gets Ctrl-C
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def is_own_program(command_line: list[str]) -> bool:
    """Whether a command line of Python runs a command of this project.

    Args:
        command_line: As in ``sys.orig_argv``: the interpreter, its options, then a module or a script.
    """
    words = iter(command_line[1:])
    for word in words:
        if word == "-m":
            return next(words, "").partition(".")[0] in _FOLDERS[:-1]
        if word in ("-X", "-W"):
            next(words, None)
        elif not word.startswith("-"):
            root = Path(__file__).resolve().parents[1]
            inside = any(Path(word).resolve().is_relative_to(root / folder) for folder in _FOLDERS)
            return inside or Path(word).stem == COMMAND
        elif word.startswith("-c"):
            return False
    return False
