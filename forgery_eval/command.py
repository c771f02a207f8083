"""How commands that judge pictures end."""

import io
import sys
from collections.abc import Callable

from llava.cli import run_cli

SOME_FAILED = 3
"""Exit status where some pictures could not be judged."""


def run_judging(command: Callable[[], int]) -> int:
    """Runs a command that returns how many pictures it could not judge; returns the exit status.

    Names that the terminal's encoding cannot show are printed with escapes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    failed = 0

    def counted() -> None:
        nonlocal failed
        failed = command()

    return run_cli(counted) or (SOME_FAILED if failed else 0)
