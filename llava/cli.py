"""What all command lines have in common. Imports no torch."""

import argparse
import sys
from collections.abc import Callable
from typing import Any


class OptionParser(argparse.ArgumentParser):
    """A parser whose long options answer to ``-`` and ``_`` alike; defaults stand in the help."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **options})

    def _parse_optional(self, arg_string: str) -> Any:
        return super()._parse_optional(self._known_spelling(arg_string))

    def _known_spelling(self, argument: str) -> str:
        name, equals, value = argument.partition("=")
        if not name.startswith("--") or name in self._option_string_actions:
            return argument
        for spelling in (name.replace("_", "-"), name.replace("-", "_")):
            if spelling in self._option_string_actions:
                return f"{spelling}{equals}{value}"
        return argument


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
