"""Configs and adapter folders with one thing wrong, by the hundred: opened right, or refused in one sentence.

Never a traceback, and never another model in silence: where a mutation should not matter, or makes no sense, the logits
are those of the unmutated twin.
"""

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from llava import load_pretrained_model
from llava.errors import UserError
from llava.model.checkpoint_layout import NON_LORA_FILE, stored_state_dict
from llava.systems.fakereasoning.checkpoint import non_lora_trainables
from tests.conftest import GOLDENS
from tests.trained import trained_folder

QUICK, ALL = 60, 500
WITHOUT_INFLUENCE = {
    "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache", "notice",
    "default_score", "verdict_only_share", "cpm_weight", "pad_token_id", "attention_dropout", "initializer_range",
    "max_position_embeddings", "tokenizer_model_max_length", "cpm_search", "output_attentions",
}  # fmt: skip
"""Of a config, for the logits of a prompt with pixels that are given."""
NONSENSE: list[Any] = [None, "", "x", "12px", -1, -7, [], [1, "a"], {}, {"a": 1}, float("nan"), True, "null", "[" * 5]


def logits(model) -> torch.Tensor:
    size = model.image_processor.crop_size["height"]
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[1, -200, *range(40, 52)]]), images=pixels).logits


def open_or_refuse(folder: Path, what: str) -> torch.Tensor | None:
    """The logits of a folder's model; None if it is refused as it should be."""
    try:
        return logits(load_pretrained_model(folder, device="cpu", dtype="float32")[1])
    except UserError as error:
        said = str(error)
        assert said and "Traceback" not in said and said.count("\n") < 6, (what, said)
        return None
    except Exception as error:  # whatever it is, a user would have seen a traceback
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


def linked(folder: Path, source: Path, *own: str) -> Path:
    """A copy of a folder by links, with real copies of some files."""
    folder.mkdir()
    for file in source.iterdir():
        if file.name in own:
            shutil.copyfile(file, folder / file.name)
        else:
            (folder / file.name).symlink_to(file)
    return folder


def same(found: torch.Tensor | None, twin: torch.Tensor) -> bool:
    return found is None or (found.shape == twin.shape and torch.allclose(found, twin, atol=1e-4))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return trained_folder(tmp_path_factory.mktemp("base") / "model", GOLDENS / "base", steps=0)


# --- configs


def mutated_config(values: dict[str, Any], choice: random.Random) -> tuple[dict[str, Any], str, bool]:
    """A config with one thing changed, what it is, and whether the logits may be others."""
    values = copy.deepcopy(values)
    inner = values
    names = [name for name in values if name != "model_type"]
    name = choice.choice(names)
    path = name
    if isinstance(values[name], dict) and choice.random() < 0.7:
        inner, nested = values[name], choice.choice(list(values[name]) or ["new"])
        path, name = f"{name}.{nested}", nested
    kind = choice.choice(["nonsense", "nonsense", "absent", "renamed", "near", "unknown"])
    old = inner.get(name)
    if kind == "nonsense":
        inner[name] = choice.choice([value for value in NONSENSE if type(value) is not type(old) or value != old])
    elif kind == "absent":
        inner.pop(name, None)
    elif kind == "renamed":
        inner[f"{name}_"] = inner.pop(name, None)
    elif kind == "near":
        near = {int: lambda n: n + choice.choice([-1, 1, 2, 100]), float: lambda n: n * 2, str: lambda t: t + "x"}
        inner[name] = near.get(type(old), lambda value: [value])(old)
    else:
        inner["unknown_field"] = choice.choice(NONSENSE)
    may_differ = kind in ("absent", "renamed", "near") or (kind == "nonsense" and _is_choice(old, inner[name]))
    if path in WITHOUT_INFLUENCE or kind == "unknown":
        may_differ = False
    return values, f"{kind} {path}: {old!r} -> {inner.get(name)!r}", may_differ


def _is_choice(old: Any, new: Any) -> bool:
    """Whether a value that replaces another one can mean something: absent, or of the same kind."""
    return new is None or old is None or isinstance(new, type(old)) or (isinstance(old, float) and type(new) is int)


@pytest.mark.parametrize("numbers", [range(QUICK), pytest.param(range(QUICK, ALL), marks=pytest.mark.slow)])
def test_mutated_configs(base, tmp_path, numbers):
    values = json.loads((base / "config.json").read_text())
    twin = open_or_refuse(base, "the twin")
    opened = 0
    for number in numbers:
        mutated, what, may_differ = mutated_config(values, random.Random(number))
        folder = linked(tmp_path / str(number), base)
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(mutated))
        found = open_or_refuse(folder, f"{number}: {what}")
        opened += found is not None
        assert may_differ or same(found, twin), f"{number}: {what}"
    assert 0 < opened < len(numbers)


# --- adapter folders


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    model = load_pretrained_model(base, device="cpu", dtype="float32")[1]
    beside = non_lora_trainables(stored_state_dict(model))
    torch.manual_seed(0)
    names = [n for n, _ in model.named_modules() if n.startswith("model.layers.") and n.endswith(("q_proj", "up_proj"))]
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=names, init_lora_weights=False)
    get_peft_model(model, settings).save_pretrained(folder)
    torch.save({name: tensor + 0.01 for name, tensor in beside.items()}, folder / NON_LORA_FILE)
    values = json.loads((folder / "adapter_config.json").read_text())
    values["base_model_name_or_path"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


SCALES = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
"""Of an adapter's config: other valid values are another adapter."""


def change_settings(folder: Path, choice: random.Random) -> tuple[str, bool]:
    file = folder / "adapter_config.json"
    values = json.loads(file.read_text())
    name = choice.choice([*values, *sorted(SCALES), "unknown_field"])
    old, kind = values.get(name), choice.choice(["nonsense", "nonsense", "absent", "near"])
    if kind == "absent":
        values.pop(name, None)
    elif kind == "near" and isinstance(old, (int, float)):
        values[name] = not old if isinstance(old, bool) else old + choice.choice([-1, 1, 4])
    else:
        values[name] = choice.choice(NONSENSE)
    file.write_text(json.dumps(values))
    may_differ = name in SCALES and (kind == "absent" or not isinstance(values[name], (str, list)))
    return f"{kind} {name}: {old!r} -> {values.get(name)!r}", may_differ


def change_tensors(folder: Path, choice: random.Random) -> tuple[str, bool]:
    is_beside = choice.random() < 0.4
    file = folder / (NON_LORA_FILE if is_beside else "adapter_model.safetensors")
    tensors = dict(torch.load(file, weights_only=True) if is_beside else load_file(file))
    name, kind = choice.choice(sorted(tensors)), choice.choice(["drop", "rename", "shape", "nan", "twice", "wide"])
    tensor = tensors[name]
    changes: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
        "drop": dict,
        "rename": lambda: {f"{name}x": tensor},
        "shape": lambda: {name: tensor.reshape(-1)[:-1].clone()},
        "nan": lambda: {name: torch.full_like(tensor, float(choice.choice(["nan", "inf"])))},
        "twice": lambda: {name: tensor, f"base_model.model.{name}": tensor.clone()},
        "wide": lambda: {name: tensor.double()},
    }
    del tensors[name]
    tensors |= changes[kind]()
    torch.save(tensors, file) if is_beside else save_file(tensors, file, {"format": "pt"})
    return f"{kind} {name} of {file.name}", kind == "nan" and is_beside


def change_bytes(folder: Path, choice: random.Random) -> tuple[str, bool]:
    file = folder / choice.choice(["adapter_config.json", "adapter_model.safetensors", NON_LORA_FILE])
    content, kind = bytearray(file.read_bytes()), choice.choice(["cut", "empty", "gone", "header", "html"])
    if kind == "gone":
        file.unlink()
    elif kind == "header":
        at = choice.randrange(min(60, len(content)))
        content[at] ^= 1 << choice.randrange(8)
        file.write_bytes(content)
    else:
        cut = {"cut": content[: choice.randrange(1, len(content))], "empty": b"", "html": b"<html>404</html>"}
        file.write_bytes(cut[kind])
    # A flipped bit in JSON may make another valid number; in a weight file's header it makes other names or sizes.
    return f"{kind} {file.name}", kind == "header"


def mutants(source: Path, folder: Path, numbers: range) -> Iterator[tuple[Path, str, bool]]:
    for number in numbers:
        choice = random.Random(number)
        mutant = shutil.copytree(source, folder / str(number))
        what, may_differ = choice.choice([change_settings, change_settings, change_tensors, change_bytes])(
            mutant, choice
        )
        yield mutant, f"{number}: {what}", may_differ


@pytest.mark.parametrize("numbers", [range(QUICK), pytest.param(range(QUICK, ALL), marks=pytest.mark.slow)])
def test_mutated_adapter_folders(adapter, tmp_path, numbers):
    twin = open_or_refuse(adapter, "the twin")
    opened = 0
    for folder, what, may_differ in mutants(adapter, tmp_path, numbers):
        found = open_or_refuse(folder, what)
        opened += found is not None
        assert may_differ or same(found, twin), what
    assert 0 < opened < len(numbers)
