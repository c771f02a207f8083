"""Flags of training as words: reading them, and the names that older versions gave them. Imports no torch."""

import re
from collections.abc import Mapping, Sequence

from llava.errors import OptionError

TRUE, FALSE = ("true", "1", "yes", "y", "t"), ("false", "0", "no", "n", "f")
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
    "model_max_len": "model_max_length",
    "mm_vision_tower": "vision_tower",
    "alike_lengths": "group_by_length",
    "freeze_mm_mlp_adapter": None,
}
"""Names of older transformers and LLaVA, and those of today; None for an option that is ignored."""
_NOT_SUPPORTED = {
    "overwrite_output_dir": "an output folder is never overwritten; --resume auto resumes its run",
    "save_safetensors": "weights are always safetensors where the layout allows it",
    "local_rank": "the launcher says it through the environment",
    "freeze_backbone": "say what to train: --lora_enable, --tune_mm_mlp_adapter, or neither for all",
    "use_liger_kernel": "the model computes its losses itself, at supervised positions only",
    "save_only_model": "a checkpoint without the optimizer's state could not be resumed from",
    "load_best_model_at_end": "the best model by validation is kept in <output_dir>/best in any case",
}
"""Options that would change what happens, with the reason; asked for as False they are ignored."""


def read_flags(words: Sequence[str]) -> dict[str, list[str]]:
    """Returns the flags of a command line in ``_`` spelling with their values; given twice, the last one counts.

    Raises:
        OptionError: A word is no flag, or stands before the first one.
    """
    flags: dict[str, list[str]] = {}
    values: list[str] | None = None
    for word in words:
        if not word.startswith("--"):
            if values is None:
                raise OptionError(f"'{word}' stands where a flag is expected")
            values.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if not re.fullmatch(r"[A-Za-z0-9_]+", name):
            raise OptionError(f"'{word}' is no flag")
        if name == "per_gpu_train_batch_size":
            # The batch is computed from this flag, so the two names must not stand side by side.
            name = "per_device_train_batch_size"
        values = flags[name] = [value] if equals else []
    return flags


def is_on(flags: Mapping[str, Sequence[str]], name: str) -> bool:
    """Whether a flag was given as true, or without a value."""
    return name in flags and (not flags[name] or flags[name][0].lower() in ("", *TRUE))


def current_name(name: str) -> str:
    """Returns the name of today for a flag."""
    return "warmup_steps" if name == "warmup_ratio" else RENAMED.get(name) or name


def current_names(flags: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns a command line in which options of older transformers and LLaVA have the names of today.

    Raises:
        OptionError: An option has no meaning any more and asks for something that does not happen.
    """
    words = [word for name, values in flags.items() for word in _current(name, list(values))]
    return words if any(name.startswith("report") for name in flags) else [*words, "--report_to", "none"]


def _current(name: str, values: list[str]) -> list[str]:
    first = values[0] if values else "true"
    if name == "warmup_ratio":
        if not _is_share(first):
            raise OptionError(f"--warmup_ratio must be a number from 0 to below 1, not {first}")
        return ["--warmup_steps", *values] if float(first) > 0 else []
    if name == "resume_from_checkpoint":
        return [] if first.lower() in FALSE else ["--resume", "auto" if first.lower() in TRUE else first]
    if name in _NOT_SUPPORTED:
        if first.lower() in TRUE and name != "save_safetensors":
            raise OptionError(f"--{name} is not supported: {_NOT_SUPPORTED[name]}")
        return []
    renamed = RENAMED.get(name, name)
    return [] if renamed is None else [f"--{renamed}", *values]


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) < 1
    except ValueError:
        return False
