"""What all command lines have in common. Imports no torch."""

import argparse
import sys
from collections.abc import Callable
from typing import Any


class OptionParser(argparse.ArgumentParser):
    """A parser whose long options answer to ``-`` and ``_`` alike; defaults stand in the help."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses arguments after giving every long option the spelling that it was declared with."""
        given = sys.argv[1:] if args is None else args
        declared = {_folded(option): option for option in self._option_string_actions if option.startswith("--")}
        return super().parse_known_args([_respelled(argument, declared) for argument in given], namespace)


def _folded(option: str) -> str:
    return option.replace("_", "-")


def _respelled(argument: str, declared: dict[str, str]) -> str:
    name, equals, value = argument.partition("=")
    return f"{declared.get(_folded(name), name)}{equals}{value}" if name.startswith("--") else argument


def run_or_explain(command: Callable[[], None]) -> int:
    """Runs a command; says in one line what was wrong with its input.

    Returns:
        The exit status: 0, 1 for bad input, 130 after Ctrl-C.
    """
    try:
        command()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
