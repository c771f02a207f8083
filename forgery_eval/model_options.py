"""The options of a model and of its answers, which all commands that analyse images share. Imports no torch.

Options of answers are those of the system at hand: the one that ``--system`` names, or that the files at
``--model-path`` belong to.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from forgery_eval.answers import DEFAULT_SYSTEM
from forgery_eval.backends import SYSTEMS
from llava.cli import OptionParser, add_options, positive_int, read_options, unknown_option
from llava.errors import CheckpointError, OptionError
from llava.model_options import LOCATIONS, SPEED, add_model_options, add_which_model, loading_options, open_detector
from llava.systems import registry
from llava.systems.base import AnalyzeOptions, SystemSpec, resolve

__all__ = [
    "LOCATIONS",
    "SPEED",
    "add_batch_size",
    "add_model_options",
    "analyze_options",
    "loading_options",
    "open_detector",
    "parse_with_system",
]


def add_batch_size(group: Any) -> None:
    """Adds the option that says how many images are analysed at a time."""
    group.add_argument(
        "--batch-size",
        type=_batch_size,
        default="auto",
        help="images at a time (default auto: what fits and is fast)",
    )


def _batch_size(text: str) -> int | str:
    try:
        return text if text == "auto" else positive_int(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"must be auto or a whole number above 0, not {text!r}") from None


def parse_with_system(parser: OptionParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Adds the options of the system at hand to a parser, and parses with it.

    Args:
        parser: Has every other option of the command, those of ``add_model_options`` included.
        arguments: The command line, by default the process's.

    Returns:
        The arguments; ``options_of`` is the short name of the system whose options they hold.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        spec = _system_at_hand(given)
    except OptionError as error:
        parser.error(str(error))
    group = parser.add_argument_group(f"answers of {spec.title}")
    add_options(group, resolve(spec.options))
    parsed, unknown = parser.parse_known_args(given)
    if unknown:
        parser.error(_unknown_option(unknown[0], parser, spec))
    parsed.options_of = spec.name
    return parsed


def _system_at_hand(arguments: Sequence[str]) -> SystemSpec:
    """The system whose options a command line may use.

    Where the files belong to none, it is the default one: opening the model says what is wrong with them.
    """
    first = OptionParser(add_help=False)
    add_which_model(first)
    first.add_argument("--backend")
    known, _ = first.parse_known_args(arguments)
    if known.system:
        return registry.spec(known.system)
    if known.backend in SYSTEMS:
        return registry.spec(SYSTEMS[known.backend])
    asks_for_help = any(word in ("-h", "--help") for word in arguments)
    if known.model_path and _may_be_there(str(known.model_path), asks_for_help):
        with suppress(CheckpointError):
            return registry.identify(registry.read_files(known.model_path, known.model_base))
    return registry.spec(DEFAULT_SYSTEM)


def _may_be_there(path: str, asks_for_help: bool) -> bool:
    """Whether files may be found at a path; a hub's files, which must be got first, are not looked for to give help."""
    is_hub_id = path.count("/") == 1 and not path.startswith((".", "/", "~"))
    return Path(path).expanduser().exists() or (is_hub_id and not asks_for_help)


def _unknown_option(word: str, parser: argparse.ArgumentParser, spec: SystemSpec) -> str:
    """Says of an unknown option which systems have it, or which known option is nearest."""
    name = word.partition("=")[0]
    owners = []
    for other in registry.specs().values():
        trial = OptionParser(add_help=False)
        add_options(trial, resolve(other.options))
        folded = {option.replace("_", "-") for option in trial._option_string_actions}
        if name.replace("_", "-") in folded:
            owners.append(other.title)
    if owners:
        return f"{spec.title} has no option {name}, which is one of {', '.join(owners)} (see --model-path, --system)"
    return unknown_option(word, parser._option_string_actions)


def analyze_options(arguments: argparse.Namespace, *, attention: bool = False) -> AnalyzeOptions:
    """Returns how images are analysed.

    Raises:
        OptionError: Options exclude each other or are out of range.
    """
    return read_options(resolve(registry.spec(arguments.options_of).options), arguments, attention=attention)
