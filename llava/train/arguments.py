"""The options of training: LLaVA's, transformers' and ours, with the names of older versions mapped."""

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from transformers import HfArgumentParser
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from llava.model.probability_mapper import SEARCHES
from llava.train.export import LAYOUTS

AVERAGES = ("global_batch", "micro_batch")
VERDICT_CHECKS = ("auto", "generate", "score")


def _option(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass
class ModelArguments:
    """Which model is trained, and what of it."""

    model_name_or_path: str | None = _option(None, "checkpoint to start from: folder or hub id")
    model_config: str | None = _option(None, "config.json to train a new model from, in the place of a checkpoint")
    tokenizer: str | None = _option(None, "tokenizer's folder for a new model")
    system: str | None = _option(None, "system to train (default: the checkpoint's, else FakeReasoning)")
    vision_tower: str | None = _option(None, "first tower: folder or hub id (default: the checkpoint's)")
    dino_weights: str | None = _option(None, "second tower: .pth, folder or hub id (default: the checkpoint's)")
    mm_fusion_type: str | None = _option(None, "fusion, if not the checkpoint's; a new one must be named in --init")
    init: str = _option("", "new parts, with random weights, by commas: fusion, mm_projector, dino_mm_projector")
    lora_enable: bool = _option(False, "train LoRA on the language model, and fusion and projectors whole")
    lora_r: int = _option(128, "rank")
    lora_alpha: float = _option(256, "scale: the update counts lora_alpha / lora_r")
    lora_dropout: float = _option(0.0, "dropout before the low-rank path (published: 0.05)")
    bits: int = _option(16, "4 or 8: quantise the language model (QLoRA)", choices=[4, 8, 16])
    tune_mm_mlp_adapter: bool = _option(False, "train the projectors only")
    unfreeze_towers: bool = _option(False, "train the towers too")
    attn_implementation: str = _option("auto", "auto (flash-attn where usable, else SDPA), or transformers' name")
    cpm_search: str = _option("labels", "where the verdict is looked for in training", choices=list(SEARCHES))
    cpm_weight: float = _option(1.0, "weight of the mapper's loss")
    cpm_temperature: float | None = _option(None, "tau of the mapper (default: the checkpoint's; published: 10)")
    mm_projector_type: str | None = _option(None, "must be the checkpoint's")
    mm_vision_select_layer: int | None = _option(None, "must be the checkpoint's")
    mm_use_im_start_end: bool = _option(False, "not supported; False as published")
    mm_use_im_patch_token: bool = _option(False, "not supported; False as published")


@dataclass
class DataArguments:
    """What it is trained on."""

    data_path: list[str] = field(default_factory=list, metadata={"help": "training records: JSON or JSONL files"})
    image_folder: str | None = _option(None, "what the records' image paths start from")
    eval_data_path: str | None = _option(None, "validation records, below the same image folder")
    validation_share: float = _option(0.0, "share of the training records to hold back for validation, 0..1")
    version: str = _option("v1", "prompt template (published: v1)")
    model_max_length: int = _option(2048, "longest sequence, image positions included; the rest is cut")
    image_aspect_ratio: str | None = _option(
        None, "pad to a square, or crop one (default: the checkpoint's)", choices=["pad", "square"]
    )
    drop_invalid: bool = _option(False, "leave out and count records that cannot be trained on, rather than stop")
    verdict_only_share: float = _option(0.0, "share of the answers that are only their CONCLUSION, 0..1")
    group_by_modality_length: bool = _option(False, "batches of like total length and one modality, as published")
    alike_lengths: bool = _option(
        False,
        "with group_by_modality_length: samples of like length in each step, which leaves the least padding; words of "
        "short answers then weigh more, since each step is averaged over its own",
    )
    lazy_preprocess: bool = _option(True, "must be True: images are always read when they are needed")
    cache_features: str | None = _option(None, "folder to keep what frozen towers say, so that they run once an image")


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """How it is trained; transformers' options and these."""

    mm_projector_lr: float | None = _option(None, "learning rate of the projectors, if another")
    tower_lr: float | None = _option(None, "learning rate of unfrozen towers, if another")
    loss_average: str = _option(
        "global_batch",
        "over what losses are averaged: all tokens and rows of an optimizer step, or each micro-batch (the authors')",
        choices=list(AVERAGES),
    )
    resume: str = _option("", "auto: go on from the newest whole checkpoint in output_dir; or a checkpoint's folder")
    save_layout: str = _option(
        "auto",
        "final folder: adapter (LoRA over its base), merged (one model), published (the authors' files and names); "
        "auto: adapter with LoRA, else merged",
        choices=["auto", *LAYOUTS],
    )
    save_dtype: str = _option(
        "auto",
        "numbers of the final folder; auto: those that the weights have in training",
        choices=["auto", "float32", "bfloat16", "float16"],
    )
    validation_verdict: str = _option(
        "auto",
        "how validation gets a verdict: generate an answer, or score the verdict alone; auto: score if "
        "verdict_only_share is above 0",
        choices=list(VERDICT_CHECKS),
    )
    validation_new_tokens: int = _option(512, "longest generated answer in validation")

    def __post_init__(self) -> None:
        """Checks.

        Raises:
            ValueError: Values exclude each other, a file is missing, or sharded training has no launcher.
        """
        if isinstance(self.deepspeed, str) and self.deepspeed[:1] != "{" and not Path(self.deepspeed).is_file():
            raise ValueError(f"--deepspeed: there is no file {self.deepspeed}")
        if self.deepspeed and "RANK" not in os.environ:
            raise ValueError(
                "--deepspeed needs a launcher, also for one process: python -m torch.distributed.run --standalone "
                "--nproc_per_node 1 -m llava.train.train …"
            )
        super().__post_init__()


_TRUE, _FALSE = ("true", "1", "yes", "y", "t"), ("false", "0", "no", "n", "f")
_RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
    "model_max_len": "model_max_length",
    "mm_vision_tower": "vision_tower",
    "freeze_mm_mlp_adapter": None,
}
_WITHOUT_EFFECT = {
    "overwrite_output_dir": "an output folder is never overwritten; --resume auto goes on with it",
    "save_safetensors": "weights are always safetensors where the layout allows it",
    "local_rank": "the launcher says it through the environment",
    "group_by_length": "use --group_by_modality_length",
    "freeze_backbone": "say what to train: --lora_enable, --tune_mm_mlp_adapter, or neither for all",
    "use_liger_kernel": "the model computes its losses itself, at supervised positions only",
    "save_only_model": "a checkpoint without the optimizer's state could not be gone on from",
    "load_best_model_at_end": "the best model by validation is kept in <output_dir>/best in any case",
}


_AT_LEAST_ONE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "model_max_length",
    "validation_new_tokens",
)
_ABOVE_ZERO = ("lora_alpha", "cpm_temperature")
_NOT_NEGATIVE = (
    "learning_rate",
    "mm_projector_lr",
    "tower_lr",
    "weight_decay",
    "warmup_steps",
    "max_grad_norm",
    "cpm_weight",
    "adam_epsilon",
    "dataloader_num_workers",
)


class TrainParser(HfArgumentParser):
    """Reads the three groups of options; long options answer to ``-`` and ``_`` alike."""

    def error(self, message: str) -> Any:
        """Says in one line what is wrong."""
        raise ValueError(f"{message}; --help lists all options")


def build_parser() -> TrainParser:
    """Returns the parser."""
    groups: Any = (ModelArguments, DataArguments, TrainingArguments)
    return TrainParser(groups, prog="python -m llava.train.train", description="Trains a model.", allow_abbrev=False)


def parse_arguments(
    arguments: Sequence[str] | None = None,
) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Reads the command line.

    Raises:
        ValueError: Something is unknown, missing or contradicts itself.
    """
    given = current_names(list(sys.argv[1:] if arguments is None else arguments))
    parser = build_parser()
    parsed, unknown = parser.parse_known_args(given)
    if unknown:
        raise ValueError(f"unknown option {unknown[0]}; --help lists all options")
    model, data, training = (_of_kind(kind, parsed) for kind in (ModelArguments, DataArguments, TrainingArguments))
    check_arguments(model, data, training)
    return model, data, training


def _of_kind(kind: Any, parsed: argparse.Namespace) -> Any:
    names = {item.name for item in dataclasses.fields(kind) if item.init}
    return kind(**{name: value for name, value in vars(parsed).items() if name in names})


def current_names(arguments: Sequence[str]) -> list[str]:
    """Rewrites options of older transformers and LLaVA as those of today.

    Raises:
        ValueError: An option has no meaning any more and asks for something that does not happen.
    """
    result: list[str] = []
    items = list(arguments)
    while items:
        word = items.pop(0)
        if not word.startswith("--"):
            result.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        values = [value] if equals else []
        while not equals and items and not items[0].startswith("--"):
            values.append(items.pop(0))
        result += _current(name, values)
    return result if any(word.startswith("--report") for word in result) else [*result, "--report_to", "none"]


def _current(name: str, values: list[str]) -> list[str]:
    first = values[0] if values else "true"
    if name in ("help", "h"):
        return ["--help"]
    if name == "warmup_ratio":
        if not _is_share(first):
            raise ValueError(f"--warmup_ratio must be a number from 0 to below 1, not {first}")
        return ["--warmup_steps", *values] if float(first) > 0 else []
    if name == "resume_from_checkpoint":
        return [] if first.lower() in _FALSE else ["--resume", "auto" if first.lower() in _TRUE else first]
    if name == "group_by_length" and first.lower() in _FALSE:
        return []
    if name in _WITHOUT_EFFECT:
        if first.lower() in _TRUE and name not in ("save_safetensors",):
            raise ValueError(f"--{name} is not supported: {_WITHOUT_EFFECT[name]}")
        return []
    renamed = _RENAMED.get(name, name)
    return [] if renamed is None else [f"--{renamed}", *values]


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) < 1
    except ValueError:
        return False


def check_arguments(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> None:
    """Refuses what cannot be, before anything is read.

    Raises:
        ValueError: The message says what excludes what, or which file is missing.
    """
    if (model.model_name_or_path is None) == (model.model_config is None):
        raise ValueError("name either --model_name_or_path (a checkpoint) or --model_config (a new model)")
    if model.model_config is not None and model.tokenizer is None:
        raise ValueError("a new model needs --tokenizer; python -m llava.data.build_tokenizer makes one")
    if not data.data_path:
        raise ValueError("--data_path is missing: name the training records")
    for name, path in (("--model_config", model.model_config), ("--eval_data_path", data.eval_data_path)):
        if path is not None and not Path(path).is_file():
            raise ValueError(f"{name}: there is no file {path}")
    if data.alike_lengths and not data.group_by_modality_length:
        raise ValueError("--alike_lengths needs --group_by_modality_length True")
    if model.mm_use_im_start_end or model.mm_use_im_patch_token:
        raise ValueError("image start, end and patch tokens in the prompt are not supported")
    if not data.lazy_preprocess:
        raise ValueError("--lazy_preprocess False is not supported: images are read when they are needed")
    if model.bits != 16 and not model.lora_enable:
        raise ValueError(
            f"--bits {model.bits} needs --lora_enable True: quantised weights cannot be trained themselves"
        )
    if model.tune_mm_mlp_adapter and model.lora_enable:
        raise ValueError("--tune_mm_mlp_adapter trains the projectors only, so --lora_enable must be False")
    if model.unfreeze_towers and data.cache_features:
        raise ValueError("--cache_features keeps what frozen towers say, so --unfreeze_towers must be False")
    if model.lora_enable and model.model_config is not None and training.save_layout != "merged":
        raise ValueError(
            "LoRA over a new model, --model_config, has no base to be stored over; use --save_layout merged"
        )
    if model.lora_enable and (model.lora_r < 1 or not 0 <= model.lora_dropout < 1):
        raise ValueError("lora_r must be at least 1, lora_dropout within 0 and 1")
    for name in ("validation_share", "verdict_only_share"):
        if not 0 <= getattr(data, name) <= 1:
            raise ValueError(f"--{name} must lie within 0 and 1, not {getattr(data, name)}")
    if data.eval_data_path and data.validation_share:
        raise ValueError("--eval_data_path and --validation_share exclude each other")
    validates = bool(data.eval_data_path or data.validation_share)
    if training.eval_strategy != "no" and not validates:
        raise ValueError(f"--eval_strategy {training.eval_strategy} needs --eval_data_path or --validation_share")
    if validates and training.eval_strategy == "no" and not training.eval_on_start:
        raise ValueError("--eval_data_path and --validation_share need --eval_strategy steps or epoch")
    if training.eval_on_start and not validates:
        raise ValueError("--eval_on_start needs --eval_data_path or --validation_share")
    if training.train_sampling_strategy == "group_by_length":
        raise ValueError("--train_sampling_strategy group_by_length: use --group_by_modality_length True")
    if training.save_layout == "adapter" and not model.lora_enable:
        raise ValueError("--save_layout adapter needs --lora_enable True")
    if training.save_layout == "merged" and model.bits != 16:
        raise ValueError(f"--save_layout merged is not possible over weights of {model.bits} bits; use adapter")
    if training.save_layout == "published" and model.unfreeze_towers and model.lora_enable:
        raise ValueError("the published LoRA layout has no place for towers; use --save_layout adapter or merged")
    if training.label_smoothing_factor:
        raise ValueError("--label_smoothing_factor is not supported: the losses are the published ones")
    given = {**vars(model), **vars(data), **vars(training)}
    for name in _AT_LEAST_ONE:
        if given[name] < 1:
            raise ValueError(f"--{name} must be at least 1, not {given[name]}")
    for name in _ABOVE_ZERO:
        if given[name] is not None and not 0 < given[name] < math.inf:
            raise ValueError(f"--{name} must be a number above 0, not {given[name]}")
    for name in _NOT_NEGATIVE:
        if given[name] is not None and not 0 <= given[name] < math.inf:
            raise ValueError(f"--{name} must be a number of at least 0, not {given[name]}")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= given[name] < 1:
            raise ValueError(f"--{name} must be from 0 to below 1, not {given[name]}")
    if training.max_steps == 0:
        raise ValueError("--max_steps must be above 0; -1 leaves the end to --num_train_epochs")
    if training.max_steps < 0 and not 0 < training.num_train_epochs < math.inf:
        raise ValueError(f"--num_train_epochs must be above 0, not {training.num_train_epochs}")
    new_parts(model)
    _check_installed(training)


def _check_installed(training: TrainingArguments) -> None:
    """Refuses what this machine has no library or device for."""
    installed = {*get_available_reporting_integrations(), "flyte"}  # transformers does not look for flyte
    for name in training.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"--report_to {name} is unknown; known: none, {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
            )
        if name not in installed:
            raise ValueError(f"--report_to {name}: it is not installed here")
    if training.fp16 and training.device.type == "cpu":
        raise ValueError("--fp16 needs a GPU; on a CPU use --bf16 True, or neither")
    try:
        transformers.Trainer.get_optimizer_cls_and_kwargs(training)
    except ImportError as error:
        raise ValueError(f"--optim {training.optim.value}: {error}") from error


def new_parts(model: ModelArguments) -> set[str]:
    """Returns the parts that ``--init`` names.

    Raises:
        ValueError: One is no part that may be new.
    """
    parts = {part.strip() for part in model.init.split(",") if part.strip()}
    allowed = {"fusion", "mm_projector", "dino_mm_projector"}
    if parts - allowed:
        raise ValueError(f"--init {', '.join(sorted(parts - allowed))}: only {', '.join(sorted(allowed))} can be new")
    return parts


def trained_parts(model: ModelArguments, present: "set[str]") -> set[str]:
    """Returns the parts that are trained, of those that the model has."""
    if model.tune_mm_mlp_adapter:
        parts = {"mm_projector", "dino_mm_projector"}
    elif model.lora_enable:
        parts = {"mm_projector", "dino_mm_projector", "fusion", "lora"}
    else:
        parts = {"mm_projector", "dino_mm_projector", "fusion", "language_model"}
    if model.unfreeze_towers:
        parts |= {"vision_tower", "dino_tower"}
    return parts & (present | {"lora"})
