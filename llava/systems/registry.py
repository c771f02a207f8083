"""Which systems there are, and which one a checkpoint belongs to. Imports a system only when it is used, and no torch.

A third party adds a system without a line here: an entry point in the group ``llava.systems`` whose object is a
``SystemSpec``.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from llava.errors import CheckpointError, OptionError, UserError
from llava.files import read_json
from llava.systems.base import AnswerFormat, CheckpointFiles, SystemSpec, quoted, resolve

GROUP = "llava.systems"
"""Entry points of third parties."""
DEFAULT = "fakereasoning"
"""The system of records and answers that name none: MMFR data are written in its words."""
_BUILT_IN = ("fakereasoning", "fakevlm", "m2f2det", "fakeshield", "baseline", "endpoint")


@cache
def specs() -> dict[str, SystemSpec]:
    """Returns every known system by its short name.

    Raises:
        OptionError: A third party's entry point cannot be used; the message names it.
    """
    found = {name: resolve(f"llava.systems.{name}:SPEC") for name in _BUILT_IN}
    for entry in entry_points(group=GROUP):
        try:
            spec = entry.load()
        except Exception as error:
            raise OptionError(
                f"the system {entry.name!r} ({entry.value}) of an installed package cannot be imported: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not isinstance(spec, SystemSpec):
            raise OptionError(f"the system {entry.name!r} ({entry.value}) is no SystemSpec")
        found[spec.name] = spec
    return found


def spec(name: str) -> SystemSpec:
    """Returns a system by its short name or its title, in any case.

    Raises:
        OptionError: There is no such system.
    """
    for known in specs().values():
        if name.lower() in (known.name, known.title.lower()):
            return known
    raise OptionError(f"unknown system {name!r}; known: {quoted(specs())}")


def identify(files: CheckpointFiles) -> SystemSpec:
    """Returns the system that a checkpoint belongs to, by its config and tensor names.

    A config that was written here names its system; files of other origin are known by what they hold.

    Raises:
        CheckpointError: It belongs to none; the message says what it is and what to do.
    """
    own = files.config.get("system")
    if own:
        if not isinstance(own, str):
            raise CheckpointError(f"{files.folder}: system in its config must be a name, not {own!r}")
        try:
            return spec(own)
        except OptionError as error:
            raise CheckpointError(f"{files.folder}: its config names a system that is not here: {error}") from error
    for known in specs().values():
        if known.identify(files):
            return known
    raise CheckpointError(_unknown(files))


def _unknown(files: CheckpointFiles) -> str:
    kind, known = files.config.get("model_type"), quoted(specs())
    if kind in ("llava", "llava_llama"):
        return (
            f"{files.folder} is a plain LLaVA checkpoint: nothing in it tells which system it was trained as, and a "
            f"model that was not trained to detect forgeries gives no meaningful score. If it was, name the system "
            f"with --system or system=… (known: {known})"
        )
    return f"{files.folder} is no checkpoint of a known system ({known}): its model_type is {kind!r}"


def find(files: CheckpointFiles, system: str | None = None) -> SystemSpec:
    """Returns the named system, or the one that the files belong to.

    Raises:
        OptionError: There is no system of that name.
        CheckpointError: None is named, and the files belong to none.
    """
    return spec(system) if system else identify(files)


def answer_format(name: str) -> AnswerFormat | None:
    """Returns a system's words; None for a system without answers.

    Raises:
        OptionError: There is no such system.
    """
    return resolve(spec(name).answer_format)


def marked_words(answers: Sequence[str]) -> AnswerFormat | None:
    """Returns the words whose marks a training conversation's answers bear; None if they bear none."""
    for known in _formats():
        if any(mark in answer for mark in getattr(known, "marks", ()) for answer in answers):
            return known
    return None


def words_of(answers: Sequence[str], trained: AnswerFormat) -> AnswerFormat:
    """Returns the words in which a training conversation of any system is written.

    Those whose marks its answers bear; else those of the system that is trained, or, if these read no verdict, the
    first that do.

    Args:
        answers: Texts of the assistant's turns.
        trained: Words of the system that is trained.
    """
    marked = marked_words(answers)
    if marked is not None:
        return marked
    reads = (known for known in (trained, *_formats()) if known.parse_training(answers).verdict is not None)
    return next(reads, trained)


def _formats() -> list[AnswerFormat]:
    return [found for name in specs() if (found := answer_format(name)) is not None]


def component(name: str, part: str) -> Any:
    """Returns a part of a system, such as ``checkpoint_format`` or ``objective``; None if it has none.

    Raises:
        OptionError: There is no such system.
    """
    return resolve(getattr(spec(name), part))


@dataclass(frozen=True)
class NamedBase:
    """The base that a LoRA folder names: path or hub id, and the hub id's revision if one is given."""

    path: str
    revision: str | None = None


def read_files(
    path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, revision: str | None = None
) -> CheckpointFiles:
    """Looks at a checkpoint's files: a folder, a hub id, or a file for a system whose checkpoint is one.

    Args:
        path: The checkpoint.
        base: Base of a LoRA folder instead of the one that it names; a folder without a config has the base's.
        revision: Branch, tag or commit of a hub id.

    Raises:
        CheckpointError: There is nothing at the path, or its config cannot be read.
    """
    folder, source = Path(path).expanduser(), os.fspath(path)
    if not folder.exists():
        from llava.model.checkpoint_files import resolve_folder  # loads torch, which a local checkpoint needs not

        folder = resolve_folder(path, "model", revision=revision)
    if (folder / "config.json").is_file():
        return CheckpointFiles(folder, _read_config(folder / "config.json"), source)
    _check_is_model(folder)
    if (folder / "adapter_config.json").is_file():
        named = named_base(folder, base)
        if named.path:
            return replace(read_files(named.path, revision=named.revision), folder=folder)
    return CheckpointFiles(folder, {}, source)


def _check_is_model(folder: Path) -> None:
    """Says where the model is, if a folder is a training's own.

    Raises:
        CheckpointError: It is the folder of a run, or one of its checkpoints.
    """
    if (folder / "run.json").is_file():
        final = folder / "final"
        way = f"open {final}" if final.is_dir() else "it has no final folder yet: finish it with --resume auto"
        raise CheckpointError(f"{folder} is the folder of a training run, not a model; {way}")
    if (folder / "trainable.safetensors").is_file():
        raise CheckpointError(
            f"{folder} is a checkpoint to resume training from, not a model: finish the run with --resume auto and "
            f"open {folder.parent / 'final'}"
        )


def named_base(folder: Path, given: str | os.PathLike[str] | None = None) -> NamedBase:
    """Returns the base of a LoRA folder; its path is empty if nobody names one.

    Args:
        folder: The LoRA folder. A relative path in its config counts from it.
        given: Base instead of the one that the folder names, whose revision then does not count.

    Raises:
        CheckpointError: ``adapter_config.json`` cannot be read, or the name or its revision is no text.
    """
    values = _read_config(folder / "adapter_config.json")
    named, revision = (values.get(field) or "" for field in ("base_model_name_or_path", "revision"))
    for field, value in (("base_model_name_or_path", named), ("revision", revision)):
        if not isinstance(value, str):
            raise CheckpointError(f"{folder / 'adapter_config.json'}: {field} must be a text, not {value!r}")
    if given and os.fspath(given) != named:
        return NamedBase(os.fspath(given))
    beside = folder / Path(named).expanduser()
    is_beside = bool(named) and not given and beside.is_dir()
    return NamedBase(str(beside) if is_beside else named, revision or None)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file)
    except UserError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return content
