"""What every script of the pipeline shares: its option parser and its way to end."""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from llava.cli import log, positive_float
from llava.errors import UserError


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        none = action.default is None or action.default is False or action.default == []
        return action.help if none else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Option parser whose long options answer to ``-`` and ``_`` alike."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("allow_abbrev", False)
        settings.setdefault("formatter_class", _HelpFormatter)
        super().__init__(**settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses arguments after bringing each long option into its one spelling."""
        given = list(sys.argv[1:] if args is None else args)
        end = given.index("--") if "--" in given else len(given)
        return super().parse_known_args([_with_dashes(text) for text in given[:end]] + given[end:], namespace)


def _with_dashes(text: str) -> str:
    if not text.startswith("--"):
        return text
    name, equals, value = text.partition("=")
    return name.replace("_", "-") + equals + value


def price(text: str) -> float:
    """Reads an amount of zero or more, for ``type=`` of an option."""
    return 0.0 if text.strip() in {"0", "0.0"} else positive_float(text)


def run_script(main: Callable[[Sequence[str] | None], int]) -> NoReturn:
    """Runs a script's ``main`` and ends the process; a mistake of the user ends in one sentence, not a traceback."""
    try:
        status = main(None)
        sys.stdout.flush()
    except UserError as error:
        log(f"error: {error}")
        status = 1
    except KeyboardInterrupt:
        log("stopped; what is done is kept, and the same command goes on from here")
        status = 130
    except BrokenPipeError:
        # Whoever read the output has gone; the interpreter must not complain about it once more while it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except OSError as error:
        log(f"error: {describe_os_error(error)}")
        status = 1
    sys.exit(status)


def describe_os_error(error: OSError) -> str:
    """Says what the operating system refused, where, and for a full disk what to do."""
    where = f": {error.filename}" if error.filename else ""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return f"the disk is full{where}; make room, then run the same command again: what is done is kept"
    return f"{error.strerror or error}{where}"
