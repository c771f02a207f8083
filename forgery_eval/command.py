"""How commands that judge pictures end."""

from collections.abc import Callable

from llava.cli import run_or_explain

SOME_FAILED = 3
"""Exit status where some pictures could not be judged."""


def run_judging(command: Callable[[], int]) -> int:
    """Runs a command that returns how many pictures it could not judge; returns the exit status."""
    failed = 0

    def counted() -> None:
        nonlocal failed
        failed = command()

    return run_or_explain(counted) or (SOME_FAILED if failed else 0)
