"""``adapter_config.json``: what of it changes what a LoRA adapter computes, checked field by field."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.errors import CheckpointError
from llava.model.checkpoint_files import read_json

if TYPE_CHECKING:
    from peft import LoraConfig  # slow to import, and needed for adapters only

CONFIG_FILE = "adapter_config.json"

_READ = frozenset(
    [
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "bias",
        "init_lora_weights",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "base_model_name_or_path",
        "revision",
    ]
)
"""Fields that are read here or where the base is found."""
_NEUTRAL = frozenset(
    [
        "task_type",
        "auto_mapping",
        "peft_version",
        "inference_mode",
        "lora_dropout",
        "fan_in_fan_out",
        "megatron_config",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "velora_config",
        "qalora_group_size",
        "runtime_config",
        "ensure_weight_tying",
    ]
)
"""Fields that describe a training or another kind of layer: linear layers compute the same whatever they say."""
_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Those that leave the base's weights as they are; PiSSA and others change the base that the adapter is added to."""
_BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True)
class AdapterConfig:
    """How a LoRA adapter's tensors change a model.

    Attributes:
        file: Where it was read.
        rank: r, where no pattern says otherwise.
        alpha: Scale before the division by the rank, where no pattern says otherwise.
        rank_pattern: Ranks of modules, by regular expressions of their paths.
        alpha_pattern: Alphas of modules, in the same way.
        rank_stabilised: Whether alpha is divided by the rank's root (arXiv 2312.03732).
        has_magnitudes: Whether rows are rescaled to learnt norms (DoRA, arXiv 2402.09353).
        modules_to_save: Ends of the paths of modules that were trained whole.
        bias: Which biases were trained: ``none``, ``all`` or ``lora_only``.
        targets: The same config for PEFT's own rule of which modules have adapters.
    """

    file: Path
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool
    has_magnitudes: bool
    modules_to_save: tuple[str, ...]
    bias: str
    targets: "LoraConfig"

    def rank_of(self, path: str) -> int:
        """Returns the rank of a module."""
        return self.rank_pattern.get(_pattern(self.rank_pattern, path), self.rank)

    def alpha_of(self, path: str) -> float:
        """Returns the alpha of a module."""
        return self.alpha_pattern.get(_pattern(self.alpha_pattern, path), self.alpha)

    def scale_of(self, path: str) -> float:
        """Returns what a module's update ``B A`` is multiplied by."""
        rank = self.rank_of(path)
        return float(self.alpha_of(path) / (math.sqrt(rank) if self.rank_stabilised else rank))

    def saves(self, name: str) -> bool:
        """Whether a tensor belongs to a module that was trained whole; as in PEFT, ends of paths are compared."""
        ends = tuple(self.modules_to_save)
        parts = name.split(".")
        return any(".".join(parts[:count]).endswith(ends) for count in range(1, len(parts)))

    def for_modules(self, paths: Mapping[str, str]) -> "LoraConfig":
        """Returns PEFT's config of an adapter on these modules: native paths by those in the adapter's file."""
        from peft import LoraConfig

        ranks = {native: self.rank_of(path) for path, native in paths.items()}
        alphas = {native: self.alpha_of(path) for path, native in paths.items()}
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            rank_pattern={f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != self.rank},
            alpha_pattern={f"^{re.escape(path)}": alpha for path, alpha in alphas.items() if alpha != self.alpha},
            use_rslora=self.rank_stabilised,
            use_dora=self.has_magnitudes,
            target_modules=set(paths.values()),
            inference_mode=True,
        )

    def targeted(self, paths: Iterable[str]) -> list[str]:
        """Returns those of a model's modules that the config gives an adapter to; none if it does not say.

        Raises:
            CheckpointError: A field that says which ones cannot be read.
        """
        from peft.tuners.tuners_utils import check_target_module_exists

        if self.targets.target_modules is None:
            return []
        try:
            return [path for path in paths if check_target_module_exists(self.targets, path)]
        except (TypeError, ValueError, re.error) as error:
            raise CheckpointError(f"{self.file} does not say which modules have adapters: {error}") from error


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Reads and checks a LoRA folder's config.

    Raises:
        CheckpointError: It is missing, of another kind than LoRA, or says something that cannot be met.
    """
    file = folder / CONFIG_FILE
    values = read_json(file)
    if values.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{file}: an adapter of type {values.get('peft_type')!r} is not supported; it must be LORA"
        )
    _check_unsupported(values, file)
    fields = _Fields(file, values)
    return AdapterConfig(
        file=file,
        rank=fields.rank("r", values.get("r")),
        alpha=fields.number("lora_alpha", values.get("lora_alpha")),
        rank_pattern={key: fields.rank("rank_pattern", value) for key, value in fields.pattern("rank_pattern")},
        alpha_pattern={key: fields.number("alpha_pattern", value) for key, value in fields.pattern("alpha_pattern")},
        rank_stabilised=fields.flag("use_rslora"),
        has_magnitudes=fields.flag("use_dora"),
        modules_to_save=fields.names("modules_to_save"),
        bias=fields.choice("bias", _BIASES, "none"),
        targets=_targets(values, file),
    )


def _check_unsupported(values: Mapping[str, Any], file: Path) -> None:
    """Refuses fields that would change what the adapter computes, and those that nobody here knows."""
    start = values.get("init_lora_weights")
    if not any(start is known or (isinstance(start, str) and start == known) for known in _INITIALISATIONS):
        raise CheckpointError(
            f"{file}: init_lora_weights is {start!r}, and such an adapter may belong to changed base weights; save it "
            "again as plain LoRA with PEFT's path_initial_model_for_weight_conversion"
        )
    odd = [name for name in values if name not in _READ | _NEUTRAL and values[name] not in (None, False, "", [], {})]
    if odd:
        said = ", ".join(f"{name}: {values[name]!r}"[:80] for name in sorted(odd))
        raise CheckpointError(
            f"{file} asks for what is not supported here ({said}); merge the adapter with the PEFT that wrote it, or "
            "remove a field that changes nothing"
        )


def _pattern(patterns: Mapping[str, Any], path: str) -> str:
    from peft.utils.other import get_pattern_key

    found: str = get_pattern_key(list(patterns), path)
    return found


def _targets(values: Mapping[str, Any], file: Path) -> "LoraConfig":
    from peft import LoraConfig

    names = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    try:
        return LoraConfig(**{name: values[name] for name in names if values.get(name) is not None})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file} does not say which modules have adapters: {error}") from error


@dataclass(frozen=True)
class _Fields:
    """Reads fields by their kinds; what is of another kind is refused by name."""

    file: Path
    values: Mapping[str, Any]

    def _fail(self, name: str, wanted: str, value: Any) -> CheckpointError:
        return CheckpointError(f"{self.file}: {name} must be {wanted}, not {value!r}")

    def rank(self, name: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._fail(name, "a whole number of at least 1", value)
        return value

    def number(self, name: str, value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise self._fail(name, "a finite number", value)
        return value

    def flag(self, name: str) -> bool:
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._fail(name, "true or false", value)
        return bool(value)

    def choice(self, name: str, known: tuple[str, ...], default: str) -> str:
        value = self.values.get(name)
        if value is not None and value not in known:
            raise self._fail(name, f"one of {', '.join(known)}", value)
        return value or default

    def names(self, name: str) -> tuple[str, ...]:
        value = self.values.get(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(each, str) for each in value)):
            raise self._fail(name, "a list of names", value)
        return tuple(value or ())

    def pattern(self, name: str) -> list[tuple[str, Any]]:
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise self._fail(name, "an object of names and numbers", value)
        for key in value or ():
            try:
                re.compile(key)
            except re.error as error:
                raise self._fail(name, "made of regular expressions", key) from error
        return list((value or {}).items())
