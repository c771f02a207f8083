"""Reads command lines of the documents with the parsers of the commands that they name."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava import __main__ as front

ROOT = Path(__file__).parents[1]


def parse_command(words: list[str]) -> dict[str, Any]:
    """Returns the options that a command line of ours is read as; ends the process if it is wrong.

    Args:
        words: A command line that begins with ``forgery``, ``python -m MODULE`` or ``python SCRIPT``.
    """
    if words[0] == "forgery":
        return _parse_verb(words[1:], front.VERBS)
    if words[1] == "-m":
        return _parse_module(words[2], words[3:])
    script = ROOT / words[1]
    assert script.is_file(), f"there is no {script}"
    return _parse_module(".".join(script.relative_to(ROOT).with_suffix("").parts), words[2:])


def _parse_verb(words: list[str], verbs: Any) -> dict[str, Any]:
    if words in ([], ["--help"], ["--version"]):
        return {}
    verb = verbs[words[0]]
    if verb.verbs is not None:
        return _parse_verb(words[1:], verb.verbs)
    return _parse_module(verb.command.partition(":")[0], verb.adapt(words[1:]))


def _parse_module(name: str, arguments: list[str]) -> dict[str, Any]:
    if name == "llava.train.launcher":
        if any(word.startswith(("--recipe", "--list")) for word in arguments):
            # It reads its options while it plans.
            assert importlib.import_module(name).main([*arguments, "--dry-run"]) == 0
            return {}
        networks = any(word.startswith("--network") for word in arguments)
        name = "llava.train.networks" if networks else "llava.train.train"
    if name == "llava.train.networks":
        module, options = importlib.import_module(name), importlib.import_module("llava.train.arguments")
        kinds = (module.NetworkArguments, options.TrainingArguments)
        groups = options.parse_groups(module.build_parser(), kinds, arguments)
        return {key: value for group in groups for key, value in vars(group).items()}
    if name == "llava.train.train":
        groups = importlib.import_module("llava.train.arguments").parse_arguments(arguments)
        return {key: value for group in groups for key, value in vars(group).items()}
    module = importlib.import_module(name)
    if hasattr(module, "__path__") and not hasattr(module, "build_parser"):
        module = importlib.import_module(f"{name}.__main__")
    parse: Callable[[list[str]], Any]
    parse = module.parse_arguments if hasattr(module, "parse_arguments") else module.build_parser().parse_args
    return vars(parse(arguments))
