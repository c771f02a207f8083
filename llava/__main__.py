"""The front door: ``forgery VERB …``, or ``python -m llava VERB …``. A verb imports only what it uses."""

import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llava.cli import log, quiet_libraries, run_cli, set_messages
from llava.errors import OptionError
from llava.systems.base import resolve

NAME = "forgery"
USAGE_ERROR = 2
_HELP = ("-h", "--help")


@dataclass(frozen=True)
class Verb:
    """Something that the front door can do.

    Attributes:
        help: One line for ``--help``.
        command: ``module:function`` that takes arguments and returns an exit status, imported on use.
        verbs: Verbs below this one, instead of a command.
        adapt: Changes the arguments before the command gets them.
    """

    help: str
    command: str = ""
    verbs: "Mapping[str, Verb] | None" = None
    adapt: Callable[[list[str]], list[str]] = list


def name_image(arguments: list[str]) -> list[str]:
    """Turns the images of ``detect IMAGE …`` into the option that the command knows.

    Raises:
        OptionError: No image is named, or one is named in both ways.
    """
    count = next((i for i, word in enumerate(arguments) if word.startswith("-") and word != "-"), len(arguments))
    images, options = arguments[:count], arguments[count:]
    named = any(word.partition("=")[0].replace("-", "_") == "__img_path" for word in options)
    if images and named:
        raise OptionError(f"name the image once: as {images[0]} or by --img_path")
    if not images and not named and not set(options) & set(_HELP):
        raise OptionError(f"name an image, folder or .txt list before the options: {NAME} detect IMAGE …")
    return ["--img_path", *images, *options] if images else options


DATA = {
    "show": Verb("print samples of a training file, and what of them is supervised", "llava.data.show_samples:main"),
    "convert": Verb("write training files in another system's words", "llava.data.convert:main"),
    "validate": Verb("check a training file or an evaluation set", "mmfr_generation.validate:main"),
    "download": Verb("fetch the published MMFR-Dataset, part by part", "mmfr_generation.download:main"),
    "requests": Verb("turn images into request files for an annotator", "mmfr_generation.get_jsonl:main"),
    "batch": Verb("send request files and fetch the answers", "mmfr_generation.batch_api:main"),
    "reasoning": Verb("turn answers into a reasoning or caption file", "mmfr_generation.output_to_reasoning:main"),
    "cot": Verb("build a training file from reasoning and captions", "mmfr_generation.build_cot:main"),
    "from-folder": Verb("turn any folder or table into a data set", "mmfr_generation.from_folder:main"),
    "synthetic": Verb("render the MMFR-Synthetic benchmark", "mmfr_generation.synthetic.__main__:main"),
    "forge": Verb("turn photographs into real and forged crops", "mmfr_generation.forge.__main__:main"),
    "tokenizer": Verb("train a small tokenizer for a model from scratch", "llava.demo.tokenizer:main"),
}
VERBS = {
    "detect": Verb("say of images whether they are fake, and why", "forgery_eval.inference:run", adapt=name_image),
    "eval": Verb("evaluate a model on a data set", "forgery_eval.eval:run"),
    "compare": Verb("compare evaluations, paired on the same images", "forgery_eval.compare:run"),
    "serve": Verb("serve a model on this machine: a page for people, an API for programs", "llava.serve.command:main"),
    "train": Verb("train a model, by a recipe or by its options", "llava.train.launcher:main"),
    "merge": Verb("merge a LoRA folder, or write another layout", "llava.merge:main"),
    "export": Verb("write a model as a serving engine takes it", "llava.export:main"),
    "data": Verb("make, fetch, show and check data", verbs=DATA),
    "doctor": Verb("say what is installed and found here, and what is wrong with it", "llava.doctor:main"),
}


def help_text(path: Sequence[str], verbs: Mapping[str, Verb]) -> str:
    """Returns the help of a verb that has verbs, and of the front door itself."""
    width = max(map(len, verbs)) + 2
    lines = [f"usage: {' '.join(path)} VERB …", ""]
    lines += [f"  {name:<{width}}{verb.help}" for name, verb in verbs.items()]
    return "\n".join([*lines, "", f"`{' '.join(path)} VERB --help` has the options of a verb."])


def dispatch(path: Sequence[str], verbs: Mapping[str, Verb], arguments: Sequence[str]) -> int:
    """Runs the verb that the arguments begin with; returns its exit status.

    Args:
        path: The words before, for messages.
        verbs: The verbs that can follow.
        arguments: What is left of the command line.
    """
    if not arguments or arguments[0] in _HELP:
        return run_cli(lambda: print(help_text(path, verbs))) or (0 if arguments else USAGE_ERROR)
    word, *rest = arguments
    verb = verbs.get(word)
    if verb is None:
        near = difflib.get_close_matches(word, verbs, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        log(f"error: unknown verb {word!r}{hint}; see {' '.join(path)} --help")
        return USAGE_ERROR
    path = [*path, word]
    if verb.verbs is not None:
        return dispatch(path, verb.verbs, rest)
    sys.argv[0] = " ".join(path)  # the name that the command's own usage gives
    try:
        adapted = verb.adapt(rest)
    except OptionError as error:
        log(f"error: {error}")
        return USAGE_ERROR
    set_messages(verbose=bool({"-v", "--verbose"} & set(adapted)))
    with quiet_libraries():
        command = resolve(verb.command)
    return run_cli(lambda: command(adapted))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the front door; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--version"]:
        from llava import __version__

        return run_cli(lambda: print(f"{NAME} {__version__}"))
    return dispatch([NAME], VERBS, words)


if __name__ == "__main__":
    sys.exit(main())
