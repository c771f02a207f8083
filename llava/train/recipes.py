"""Published trainings as YAML files in ``recipes/``, and the DeepSpeed configurations beside them. Imports no torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from llava.errors import OptionError
from llava.files import file_errors
from llava.train.option_names import current_name, is_on

FOLDER = Path(__file__).with_name("recipes")
_ANSWERED_BY = {
    "group_by_modality_length": {"group_by_length", "train_sampling_strategy"},
    "gradient_checkpointing": {"activation_checkpointing"},
}
"""Flags beside its own that take the place of a recipe's option."""
_GPU_ONLY = ("bf16", "tf32")
GLOBAL_BATCH = "global_batch"
"""The entry of a recipe that the launcher divides over devices; no option of the training itself."""


def list_recipes() -> list[str]:
    """Returns the names of the recipes that come with the package."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def describe_recipes() -> str:
    """Returns one line a recipe: its name, and the comment that its file begins with."""
    heads = {name: (FOLDER / f"{name}.yaml").read_text("utf-8").partition("\n")[0] for name in list_recipes()}
    width = max(16, 2 + max(map(len, heads)))
    return "\n".join(f"{name:<{width}}{head.lstrip('# ')}" for name, head in heads.items())


def read_recipe(name: str) -> dict[str, list[str]]:
    """Returns the options of a recipe as a command line would give them, by name or file.

    Raises:
        OptionError: There is no such recipe, or its file is no list of options.
        FileError: It cannot be read.
    """
    file = FOLDER / f"{name}.yaml" if name in list_recipes() else Path(name)
    if not file.is_file():
        raise OptionError(f"--recipe {name}: neither a recipe ({', '.join(list_recipes())}) nor a file")
    with file_errors(file, "read"):
        content = file.read_bytes()
    try:
        # Without YAML's types, so that 2e-5 (text in YAML) and 0.05 (a number) are both what a command line would say.
        options = yaml.load(content, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(f"--recipe {name}: {file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(options, dict):
        raise OptionError(f"--recipe {name}: {file} must hold lines of the form 'option: value'")
    return {option.replace("-", "_"): _values(value, f"--recipe {name}, {option}") for option, value in options.items()}


def _values(value: object, where: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    texts = [item for item in values if isinstance(item, str)]
    if len(texts) < len(values):
        raise OptionError(f"{where}: the value must be one value or a list of them (JSON goes in quotes)")
    return texts


def recipe_options(
    recipe: Mapping[str, list[str]], flags: Mapping[str, Sequence[str]], *, on_cpu: bool
) -> dict[str, list[str]]:
    """Returns the options of a recipe that flags leave open, as the device can run them.

    Args:
        recipe: What ``read_recipe`` gives.
        flags: Flags that were given, which override the recipe under all of their names.
        on_cpu: Train on the CPU, which has no tf32, and computes bf16 only if it is asked to.
    """
    options = dict(recipe)
    if on_cpu:
        options |= {"use_cpu": ["True"], **{name: ["False"] for name in _GPU_ONLY if name in options}}
    elif is_on(flags, "fp16") and "bf16" in options:
        options["bf16"] = ["False"]
    given = {current_name(name) for name in flags} | set(flags)
    return {
        name: values
        for name, values in options.items()
        if name != GLOBAL_BATCH and current_name(name) not in given and not given & _ANSWERED_BY.get(name, set())
    }


def deepspeed_config(value: str) -> str:
    """Returns the file that ``--deepspeed`` names.

    ``zero2``, ``zero3``, and ``scripts/zero<stage>.json`` where there is no such file, are those of the package.
    """
    if value.startswith("{"):
        return value  # the configuration itself
    path = Path(value)
    packaged = FOLDER / f"{path.stem}.json"
    is_short = path.name == value and not path.suffix
    if not path.exists() and packaged.is_file() and (is_short or path.parent.name == "scripts"):
        return str(packaged)
    return value
