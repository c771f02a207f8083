"""Key maps between a published checkpoint's tensor names and the native ones, both ways.

A map is a list of rules. Names in rules are templates: ``{n}`` stands for a number, ``{name}`` for one part of a dotted
name, ``{rest*}`` for any number of parts. What no rule knows keeps its name.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from llava.errors import CheckpointError
from llava.model.checkpoint_files import Rows, TensorLike

LORA_PREFIX = "base_model.model."
"""What adapters' files put before every name."""
NON_LORA_FILE = "non_lora_trainables.bin"
"""The file beside an adapter that holds what was trained whole."""

_FIELD = re.compile(r"\{(\w+)(\*?)\}")


@dataclass(frozen=True)
class Template:
    """A tensor name with fields."""

    text: str

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        parts, end = [], 0
        for part in _FIELD.finditer(self.text):
            inside = ".+" if part[2] else (r"\d+" if part[1] == "n" else r"[^.]+")
            parts += [re.escape(self.text[end : part.start()]), f"(?P<{part[1]}>{inside})"]
            end = part.end()
        return re.compile("".join([*parts, re.escape(self.text[end:])]))

    def read(self, name: str) -> dict[str, str] | None:
        """Returns the fields of a name of this form, or None for another name."""
        match = self._pattern.fullmatch(name)
        return match.groupdict() if match else None

    def write(self, fields: Mapping[str, str]) -> str:
        """Returns the name with these fields."""
        return _FIELD.sub(lambda part: fields[part[1]], self.text)


@dataclass(frozen=True)
class Rename:
    """One tensor under another name."""

    published: str
    native: str


@dataclass(frozen=True)
class Stacked:
    """One published tensor is several native ones, of equal size, one after the other along the first dimension."""

    published: str
    native: tuple[str, ...]


@dataclass(frozen=True)
class Duplicate:
    """A published tensor that repeats another one; left out of the native ones."""

    published: str
    of: str


Rule = Rename | Stacked | Duplicate


@dataclass(frozen=True)
class KeyMap:
    """How a published layout's names correspond to the native ones."""

    rules: tuple[Rule, ...]
    _templates: dict[str, Template] = field(default_factory=dict, repr=False, compare=False)

    def _template(self, text: str) -> Template:
        return self._templates.setdefault(text, Template(text))

    def to_native(self, tensors: Mapping[str, TensorLike]) -> dict[str, TensorLike]:
        """Renames and splits their tensors; nothing is read."""
        native: dict[str, TensorLike] = {}
        for name, tensor in tensors.items():
            for new_name, part in self._one_to_native(name, tensor):
                if new_name in native:
                    raise CheckpointError(f"{name} and another tensor both stand for {new_name}")
                native[new_name] = part
        return native

    def _one_to_native(self, name: str, tensor: TensorLike) -> Iterable[tuple[str, TensorLike]]:
        for rule in self.rules:
            fields = self._template(rule.published).read(name)
            if fields is None:
                continue
            if isinstance(rule, Duplicate):
                return []
            if isinstance(rule, Rename):
                return [(self._template(rule.native).write(fields), tensor)]
            rows, left = divmod(tensor.shape[0], len(rule.native))
            if left:
                raise CheckpointError(f"{name} has {tensor.shape[0]} rows, which cannot be {len(rule.native)} tensors")
            return [
                (self._template(target).write(fields), Rows(tensor, index * rows, (index + 1) * rows))
                for index, target in enumerate(rule.native)
            ]
        return [(name, tensor)]

    def to_published(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Renames, joins and repeats native tensors as the published layout has them; the inverse of ``to_native``."""
        published: dict[str, torch.Tensor] = {}
        for name in tensors:
            published.update(self._one_to_published(name, tensors))
        for rule in self.rules:
            if isinstance(rule, Duplicate):
                of = self._template(rule.of)
                fields_of = [(name, of.read(name)) for name in published]
                published |= {
                    self._template(rule.published).write(found): published[n] for n, found in fields_of if found
                }
        return published

    def _one_to_published(self, name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for rule in self.rules:
            if isinstance(rule, Rename):
                fields = self._template(rule.native).read(name)
                if fields is not None:
                    return {self._template(rule.published).write(fields): tensors[name]}
            elif isinstance(rule, Stacked):
                for part in rule.native:
                    fields = self._template(part).read(name)
                    if fields is None:
                        continue
                    if part != rule.native[0]:
                        return {}
                    parts = [tensors[self._template(target).write(fields)] for target in rule.native]
                    return {self._template(rule.published).write(fields): torch.cat(parts)}
        return {name: tensors[name]}


def strip_lora_prefix(tensors: Mapping[str, TensorLike]) -> dict[str, TensorLike]:
    """Returns the contents of a LoRA or non-LoRA file by the model's own names."""
    return {name.removeprefix(LORA_PREFIX): tensor for name, tensor in tensors.items()}


_STORED_PREFIXES = {"CLIPVisionModel": "vision_model.", "Dinov2Model": ""}
"""Towers of transformers' own that a model may hold, and what stands before their stored names."""


def memory_names(module: nn.Module) -> dict[str, str]:
    """Returns the name in memory of each of a module's tensors by the name under which checkpoints hold it."""
    names = list(module.state_dict())
    numbers = stored_state_dict(module, {name: torch.tensor(number) for number, name in enumerate(names)})
    return {stored: names[int(number)] for stored, number in numbers.items()}


def stored_state_dict(
    module: nn.Module, state_dict: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Returns a module's tensors by the names under which checkpoints hold them.

    Transformers keeps some towers under other names in memory, and which ones depends on its version; stored names do
    not change.

    Args:
        module: The module.
        state_dict: Its tensors by their names in memory; default: ``module.state_dict()``.
    """
    tensors = dict(module.state_dict() if state_dict is None else state_dict)
    for path, tower in module.named_modules():
        kind = type(tower).__name__
        if kind not in _STORED_PREFIXES:
            continue
        inside = f"{path}." if path else ""
        names = [name for name in tower.state_dict() if f"{inside}{name}" in tensors]
        stored = revert_weight_conversion(tower, {name: tensors.pop(f"{inside}{name}") for name in names})
        for name, tensor in stored.items():
            bare = name.removeprefix(_STORED_PREFIXES[kind])
            tensors[f"{inside}{_STORED_PREFIXES[kind]}{bare}"] = tensor
    return tensors
