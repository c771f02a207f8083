"""What all command lines have in common: options, messages, and how a command ends. Imports no torch."""

import argparse
import dataclasses
import difflib
import io
import logging
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from tqdm import tqdm

from llava.errors import OptionError, UserError
from llava.interrupts import INTERRUPTED, begin_work, leave_at_once

Options = TypeVar("Options")
Item = TypeVar("Item")

ALL_DONE, NOTHING_DONE, WRONG_USAGE, SOME_FAILED = 0, 1, 2, 3
EXIT_STATUSES = {
    ALL_DONE: "all was done",
    NOTHING_DONE: "nothing was done, or a check found faults; a line says why",
    WRONG_USAGE: "the command line is wrong",
    SOME_FAILED: "some items were left out, and are named; the others were done",
    INTERRUPTED: "interrupted by Ctrl-C",
}
"""What a command's exit status means, the same for every command."""


_NO_MEMORY = (
    "there is not enough memory; lower the batch size (--batch_size, or --per_device_train_batch_size in training) or "
    "the length (--max_new_tokens, --model_max_length), or take a smaller dtype (--dtype bfloat16, --load_4bit)"
)


class OptionParser(argparse.ArgumentParser):
    """A parser whose long options answer to ``-`` and ``_`` alike, and which says in one line what is wrong.

    Every command has ``--quiet`` and ``--verbose``, which hold from when its options are read.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **settings})
        if self.add_help:
            # Without a default, so that a command below another one does not undo what stood before it.
            how_much: dict[str, Any] = {"action": "store_true", "default": argparse.SUPPRESS}
            messages = self.add_mutually_exclusive_group()
            messages.add_argument("--quiet", help="print results and errors only", **how_much)
            messages.add_argument(
                "-v", "--verbose", help="print every part of each report, and what libraries say", **how_much
            )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses arguments after giving every long option the spelling that it was declared with."""
        given = list(sys.argv[1:] if args is None else args)
        end = given.index("--") if "--" in given else len(given)
        declared = {_folded(option): option for option in self._option_string_actions if option.startswith("--")}
        words = [_respelled(word, declared) for word in given[:end]] + given[end:]
        parsed, unknown = super().parse_known_args(words, namespace)
        if self.add_help:
            set_messages(quiet="quiet" in parsed, verbose="verbose" in parsed)
        return parsed, unknown

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses arguments; an unknown option is answered with the nearest known one."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(unknown_option(unknown[0], self._option_string_actions))
        return parsed

    def error(self, message: str) -> NoReturn:
        """Prints one line and ends with status 2."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


class DefaultsHelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """A ``formatter_class`` whose help names the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        no_default = action.default is None or action.default is False or action.default == []
        return action.help if no_default else super()._get_help_string(action)


def unknown_option(word: str, known: Sequence[str] | dict[str, Any]) -> str:
    """Returns a message about an unknown option that names the nearest known one."""
    name = word.partition("=")[0]
    near = difflib.get_close_matches(_folded(name), [_folded(option) for option in known if option != name], n=1)
    hint = f"; did you mean {near[0]}?" if near and name.startswith("-") else ""
    return f"unrecognized argument {word}{hint}"


def _folded(option: str) -> str:
    return option.replace("_", "-")


def _respelled(argument: str, declared: dict[str, str]) -> str:
    name, equals, value = argument.partition("=")
    return f"{declared.get(_folded(name), name)}{equals}{value}" if name.startswith("--") else argument


# --- options from dataclasses


def option(default: Any, help: str, **settings: Any) -> Any:
    """Returns a dataclass field that ``add_options`` turns into an option.

    Args:
        default: Value where the option is not given.
        help: What the option does.
        **settings: Further settings of ``add_argument``, such as ``choices``; ``flag=False`` hides the field.
    """
    return dataclasses.field(default=default, metadata={"help": help, **settings})


def add_options(group: Any, options: type) -> None:
    """Adds an option for each field of a dataclass that has a help text, named after the field."""
    hints = get_type_hints(options)
    for field in dataclasses.fields(options):
        settings = {key: value for key, value in field.metadata.items() if key not in ("flag", "name")}
        if "help" not in settings or field.metadata.get("flag") is False:
            continue
        flag = field.metadata.get("name", f"--{_folded(field.name)}")
        kind = _plain_type(hints[field.name])
        if kind is bool:
            action = "store_false" if field.default is True else "store_true"
            group.add_argument(flag, dest=field.name, action=action, **settings)
        else:
            group.add_argument(flag, dest=field.name, default=field.default, **{"type": kind, **settings})


def read_options(options: "type[Options]", namespace: argparse.Namespace, **values: Any) -> Options:
    """Returns a dataclass filled from parsed arguments; ``values`` override them.

    Raises:
        OptionError: The dataclass refuses a value.
    """
    names = {field.name for field in dataclasses.fields(options) if field.init}  # type: ignore[arg-type]
    given = {name: value for name, value in vars(namespace).items() if name in names}
    return options(**{**given, **values})


def _plain_type(hint: Any) -> Any:
    """The type that a value's text is read by: ``float`` for ``float | None``, ``str`` for a ``Literal``."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    return hint if hint in (bool, int, float) else str


def positive_int(text: str) -> int:
    """Reads a whole number above zero, for ``type=`` of an option."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text!r}")
    return int(text)


def positive_float(text: str) -> float:
    """Reads a number above zero, for ``type=`` of an option."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return number


def share(text: str) -> float:
    """Reads a share strictly between 0 and 1, for ``type=`` of an option."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, not {text!r}")
    return number


# --- messages and ends


_quiet = False
_verbose = False
_said: set[str] = set()


def set_messages(*, quiet: bool = False, verbose: bool = False) -> None:
    """Says whether remarks and progress are kept from the user, and whether libraries' messages are shown."""
    global _quiet, _verbose
    _quiet, _verbose = quiet, verbose
    if verbose:
        warnings.simplefilter("default")
        for library in ("bitsandbytes", "tifffile"):
            logging.getLogger(library).setLevel(logging.NOTSET)


def is_quiet() -> bool:
    """Whether only results and errors are wanted."""
    return _quiet


def is_verbose() -> bool:
    """Whether all is wanted that can be said."""
    return _verbose


def log(text: str) -> None:
    """Writes what went wrong to standard error, above any progress bar."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


def inform(text: str) -> None:
    """Writes a remark to standard error, unless remarks are not wanted."""
    if not _quiet:
        log(text)


def note(text: str) -> None:
    """Writes a note to standard error, unless remarks are not wanted."""
    inform(f"note: {text}")


def note_once(text: str) -> None:
    """Writes a note the first time that it is given in this process."""
    if text not in _said:
        _said.add(text)
        note(text)


def progress(items: Iterable[Item] | None = None, **settings: Any) -> "tqdm[Item]":
    """Returns a progress bar on standard error; none is drawn if it is no terminal or remarks are not wanted.

    Args:
        items: What is gone through.
        **settings: Of ``tqdm``.
    """
    return tqdm(items, **{**settings, "disable": True if _quiet or settings.get("disable") else None})


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps libraries' remarks, warnings and progress bars from the user, unless all is wanted; errors are shown."""
    if _verbose:
        yield
        return
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings(), without_bars():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def without_bars() -> Iterator[None]:
    """Keeps the progress bars of transformers from the user, unless all is wanted."""
    libraries: Any = sys.modules.get("transformers.utils.logging")
    hides = not _verbose and libraries is not None and libraries.is_progress_bar_enabled()
    if hides:
        libraries.disable_progress_bar()
    try:
        yield
    finally:
        if hides:
            libraries.enable_progress_bar()


def format_list(names: Sequence[str], limit: int = 20) -> str:
    """Lists names one a line, the first ``limit`` of them, and says how many more there are."""
    lines = [f"  {name}" for name in names[:limit]]
    if len(names) > limit:
        lines.append(f"  … and {len(names) - limit} more")
    return "\n".join(lines)


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Says of a package that is imported inside the block and is not installed with which extra it comes.

    Raises:
        OptionError: It is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("forgery_eval", "llava"):
            raise
        raise OptionError(f"{package} is not installed; it comes with: pip install 'fakereasoning[{extra}]'") from None


def exit_status(*, done: int, left_out: int) -> int:
    """Returns the exit status of a command that did some items and left others out."""
    if not left_out:
        return ALL_DONE
    return SOME_FAILED if done else NOTHING_DONE


def run_cli(command: Callable[[], int | None]) -> int:
    """Runs a command and returns its exit status.

    A ``UserError`` ends in one line; any other exception is a bug and keeps its traceback.

    Python warnings, which are for programmers, are shown only with ``--verbose``.

    Returns:
        What the command returned (None counts as 0), 1 after a ``UserError``, 130 after Ctrl-C.
    """
    begin_work()
    with warnings.catch_warnings():
        if not (_verbose or sys.warnoptions):
            warnings.simplefilter("ignore")
        try:
            return _run(command)
        finally:
            set_messages()


def _run(command: Callable[[], int | None]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal's encoding cannot show
    try:
        status = command() or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        log(f"error: {error}")
        return NOTHING_DONE
    except KeyboardInterrupt:
        leave_at_once()  # should Ctrl-C come once more while the interpreter ends
        log("interrupted")
        return INTERRUPTED
    except MemoryError:
        log(f"error: {_NO_MEMORY}")
        return 1
    except RuntimeError as error:
        # By its name and words: torch, which is slow to import, need not be there.
        if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):
            raise
        log(f"error: {_NO_MEMORY}")
        return 1
    except BrokenPipeError:
        # Whoever read the output has gone; the interpreter must not complain about it once more while it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
