"""The options of training: LLaVA's, transformers' and our own."""

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import HfArgumentParser
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from llava.cli import unknown_option
from llava.errors import CheckpointError, OptionError
from llava.model.branches import LORA, is_projector, is_tower
from llava.model.configuration import CPM_SEARCHES
from llava.model.language_contrast import language_contrast
from llava.train.export import LAYOUTS
from llava.train.option_names import current_name, current_names, is_on, read_flags
from llava.train.recipes import GLOBAL_BATCH, deepspeed_config, describe_recipes, read_recipe, recipe_options

AVERAGES = ("global_batch", "micro_batch")
VERDICT_CHECKS = ("auto", "generate", "score")


def _option(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass
class ModelArguments:
    """Which model is trained, and what of it."""

    model_name_or_path: str | None = _option(None, "checkpoint to start from: folder or hub id")
    model_config: str | None = _option(None, "config.json to train a new model from, instead of a checkpoint")
    tokenizer: str | None = _option(None, "tokenizer's folder for a new model")
    system: str | None = _option(None, "system to train (default: the checkpoint's, else FakeReasoning)")
    vision_tower: str | None = _option(None, "first tower: folder or hub id (default: the checkpoint's)")
    dino_weights: str | None = _option(None, "second tower: .pth, folder or hub id (default: the checkpoint's)")
    detector: str | None = _option(None, "detector whose token stands in the prompt: folder or file (default: its own)")
    mm_fusion_type: str | None = _option(None, "fusion, if not the checkpoint's; a new one must be named in --init")
    init: str = _option("", "new parts, with random weights, by commas: fusion, mm_projector, dino_mm_projector")
    lora_enable: bool = _option(False, "train LoRA on the language model, and fusion and projectors whole")
    lora_r: int = _option(128, "rank")
    lora_alpha: float = _option(256, "scale: the update counts lora_alpha / lora_r")
    lora_dropout: float = _option(0.0, "dropout before the low-rank path (published: 0.05)")
    bits: int = _option(16, "4 or 8: quantise the language model (QLoRA)", choices=[4, 8, 16])
    tune_mm_mlp_adapter: bool = _option(False, "train the projectors only")
    trained_parts: str = _option("", "train these parts and no others, by commas, as the table of parts names them")
    unfreeze_towers: bool = _option(False, "train the towers too")
    attn_implementation: str = _option("auto", "auto (flash-attn where usable, else SDPA), or transformers' name")
    cpm_search: str = _option("labels", "where the verdict is looked for in training", choices=list(CPM_SEARCHES))
    cpm_weight: float = _option(1.0, "weight of the mapper's loss")
    cpm_temperature: float | None = _option(None, "tau of the mapper (default: the checkpoint's; published: 10)")
    contrast: str | None = _option(
        None,
        "also contrast images with the sentences of their forgery attributes: settings as JSON, temperature and "
        "intra_weight at least; none for not at all (default: the model config's)",
    )
    default_score: Literal["answer", "prompt"] | None = _option(
        None,
        "which P(fake) reports give unless asked otherwise: after the answer, or without one (default: the "
        "checkpoint's, but answer if no training answer is only its CONCLUSION)",
    )
    notice: str | None = _option(
        None, "what readers of the model's answers must know (default: the checkpoint's, as what it said before)"
    )
    mm_projector_type: str | None = _option(None, "must be the checkpoint's")
    mm_vision_select_layer: int | None = _option(None, "must be the checkpoint's")
    mm_use_im_start_end: bool = _option(False, "not supported; False as published")
    mm_use_im_patch_token: bool = _option(False, "not supported; False as published")

    def check(self) -> None:
        """Checks the options of this group.

        Raises:
            OptionError: One is invalid, missing, or excluded by another.
        """
        _check(
            (
                (self.model_name_or_path is None) == (self.model_config is None),
                "name either --model_name_or_path (a checkpoint) or --model_config (a new model)",
            ),
            (
                self.model_config is not None and self.tokenizer is None,
                "a new model needs --tokenizer; python -m llava.data.build_tokenizer makes one",
            ),
            (_missing(self.model_config), f"--model_config: there is no file {self.model_config}"),
            (
                self.mm_use_im_start_end or self.mm_use_im_patch_token,
                "image start, end and patch tokens in the prompt are not supported",
            ),
            (
                self.bits != 16 and not self.lora_enable,
                f"--bits {self.bits} needs --lora_enable True: quantised weights cannot be trained themselves",
            ),
            (
                self.tune_mm_mlp_adapter and self.lora_enable,
                "--tune_mm_mlp_adapter trains the projectors only, so --lora_enable must be False",
            ),
            (
                bool(self.trained_parts) and (self.tune_mm_mlp_adapter or self.lora_enable or self.unfreeze_towers),
                "--trained_parts says all that is trained; leave out --tune_mm_mlp_adapter, --lora_enable and "
                "--unfreeze_towers",
            ),
            (
                self.lora_enable and (self.lora_r < 1 or not 0 <= self.lora_dropout < 1),
                "lora_r must be at least 1, lora_dropout within 0 and 1",
            ),
        )
        read_contrast(self)
        _check_positive(self, "lora_alpha", "cpm_temperature")
        _check_not_negative(self, "cpm_weight")
        new_parts(self)


@dataclass
class DataArguments:
    """What it is trained on."""

    data_path: list[str] = field(default_factory=list, metadata={"help": "training records: JSON or JSONL files"})
    image_folder: list[str] | None = field(
        default=None, metadata={"help": "what the records' image paths start from: one folder, or one a training file"}
    )
    rewrite_answers: bool = _option(False, "write answers of other systems' data in the trained system's words")
    eval_data_path: str | None = _option(None, "validation records, below the same image folder")
    validation_share: float = _option(0.0, "share of the training records to validate on instead, 0..1")
    version: str = _option("v1", "prompt template (published: v1)")
    model_max_length: int | None = _option(
        None, "longest sequence, image positions included; the rest is cut (default: the model's, published: 2048)"
    )
    image_aspect_ratio: str | None = _option(
        None, "pad to a square, or crop one (default: the checkpoint's)", choices=["pad", "crop", "square"]
    )
    drop_invalid: bool = _option(False, "leave out and count invalid records, rather than stop")
    check_images: bool = _option(True, "open every image before the first step; what opened is not opened again")
    allow_contradictions: bool = _option(
        False, "train on records that contradict each other or their image's folder, rather than stop"
    )
    accept_changed_data: bool = _option(False, "resume although records have changed since the run began")
    verdict_only_share: float = _option(0.0, "share of the answers that are only their CONCLUSION, 0..1")
    group_by_modality_length: bool = _option(False, "batches of similar total length and one modality, as published")
    group_by_length: bool = _option(
        False,
        "with group_by_modality_length: samples of similar length in each step, which leaves the least padding; words "
        "of short answers then weigh more, since each step is averaged over its own",
    )
    lazy_preprocess: bool = _option(True, "must be True: images are always read when they are needed")
    cache_features: str | None = _option(None, "folder to keep outputs of frozen towers, which then run once an image")

    def check(self) -> None:
        """Checks the options of this group.

        Raises:
            OptionError: One is invalid, missing, or excluded by another.
        """
        _check(
            (not self.data_path, "--data_path is missing: name the training records"),
            (
                len(self.image_folder or [""]) not in (1, len(self.data_path)),
                f"--image_folder names {len(self.image_folder or ())} folders for {len(self.data_path)} training "
                "files: name one for all, or one for each",
            ),
            (_missing(self.eval_data_path), f"--eval_data_path: there is no file {self.eval_data_path}"),
            (
                self.group_by_length and not self.group_by_modality_length,
                "--group_by_length needs --group_by_modality_length True",
            ),
            (
                not self.lazy_preprocess,
                "--lazy_preprocess False is not supported: images are read when they are needed",
            ),
            (
                bool(self.eval_data_path and self.validation_share),
                "--eval_data_path and --validation_share exclude each other",
            ),
            (
                bool(self.eval_data_path) and len(self.image_folder or ()) > 1,
                "--eval_data_path needs one --image_folder for all records; or validate on a --validation_share",
            ),
        )
        _check_range(self, ("validation_share", "verdict_only_share"), lambda share: 0 <= share <= 1, "within 0 and 1")
        _check_at_least_one(self, "model_max_length")


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
    resume: str = _option("", "auto: resume from output_dir's newest complete checkpoint; or a checkpoint's folder")
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
        """Resolves the configuration of DeepSpeed, and lets transformers check its own options.

        Raises:
            OptionError: Values exclude each other, a file is missing, or sharded training has no launcher.
        """
        config = vars(self)["deepspeed"]
        if isinstance(config, str):
            self.deepspeed = config = deepspeed_config(config)
            if not config.startswith("{") and _missing(config):
                raise OptionError(f"--deepspeed: there is no file {config}")
        if config and "RANK" not in os.environ:
            raise OptionError(
                "--deepspeed needs a launcher, also for one process: python -m llava.train.launch --standalone "
                "--nproc_per_node 1 -m llava.train.train …"
            )
        try:
            super().__post_init__()
        except (ValueError, ImportError) as error:
            # This is how transformers refuses options; nothing but options has been looked at so far.
            raise OptionError(str(error)) from error

    def check(self) -> None:
        """Checks the options of this group, and that this machine can do what they ask for.

        Raises:
            OptionError: One is invalid, excluded by another, or not possible here.
        """
        _check(
            (
                self.train_sampling_strategy == "group_by_length",
                "--train_sampling_strategy group_by_length: use --group_by_modality_length True",
            ),
            (
                bool(self.label_smoothing_factor),
                "--label_smoothing_factor is not supported: the losses are the published ones",
            ),
            (self.max_steps == 0, "--max_steps must be above 0; -1 leaves the end to --num_train_epochs"),
            (
                self.max_steps < 0 and not 0 < self.num_train_epochs < math.inf,
                f"--num_train_epochs must be above 0, not {self.num_train_epochs}",
            ),
        )
        _check_at_least_one(self, "per_device_train_batch_size", "per_device_eval_batch_size")
        _check_at_least_one(self, "gradient_accumulation_steps", "validation_new_tokens")
        _check_not_negative(self, "learning_rate", "mm_projector_lr", "tower_lr", "weight_decay", "warmup_steps")
        _check_not_negative(self, "max_grad_norm", "adam_epsilon", "dataloader_num_workers")
        _check_range(self, ("adam_beta1", "adam_beta2"), lambda beta: 0 <= beta < 1, "from 0 to below 1")
        self._check_machine()

    def _check_machine(self) -> None:
        installed = {*get_available_reporting_integrations(), "flyte"}  # transformers does not look for flyte
        for name in self.report_to:
            _check(
                (
                    name not in INTEGRATION_TO_CALLBACK,
                    f"--report_to {name} is unknown; known: none, {', '.join(sorted(INTEGRATION_TO_CALLBACK))}",
                ),
                (name not in installed, f"--report_to {name}: it is not installed here"),
            )
        if self.fp16 and self.device.type == "cpu":
            raise OptionError("--fp16 needs a GPU; on a CPU use --bf16 True, or neither")
        try:
            transformers.Trainer.get_optimizer_cls_and_kwargs(self)
        except (ImportError, ValueError) as error:
            # A missing library, or --optim_args that do not read as name=value: the call looks at options only.
            raise OptionError(f"--optim {self.optim.value}: {error}") from error


class TrainParser(HfArgumentParser):
    """Reads the three groups of options; long options answer to ``-`` and ``_`` alike."""

    def error(self, message: str) -> Any:
        """Says in one line what is wrong."""
        raise OptionError(f"{message}; --help lists all options")


class _ListRecipes(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(describe_recipes())
        parser.exit()


def build_parser() -> TrainParser:
    """Returns the parser."""
    return make_parser((ModelArguments, DataArguments, TrainingArguments), "llava.train.train", "Trains a model.")


def make_parser(groups: Any, module: str, description: str) -> TrainParser:
    """Returns a parser of groups of options that knows recipes."""
    parser = TrainParser(groups, prog=f"python -m {module}", description=description, allow_abbrev=False)
    parser.add_argument("--recipe", help="options that hold where none is given: a recipe's name, or a YAML file")
    parser.add_argument("--list_recipes", "--list-recipes", action=_ListRecipes, nargs=0, help="list them and exit")
    return parser


def parse_arguments(
    arguments: Sequence[str] | None = None,
) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Reads the command line; what it leaves open comes from the recipe, if one is named.

    Raises:
        OptionError: Something is unknown, missing or contradicts itself.
    """
    model, data, training = parse_groups(build_parser(), (ModelArguments, DataArguments, TrainingArguments), arguments)
    check_arguments(model, data, training)
    return model, data, training


def parse_groups(parser: "TrainParser", kinds: Sequence[type], arguments: Sequence[str] | None) -> tuple[Any, ...]:
    """Returns each group of options from a command line and the recipe that it names; nothing is checked.

    Raises:
        OptionError: Something is unknown.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "-h" in words or "--help" in words:
        parser.parse_args(["--help"])
    flags = read_flags(words)
    if "recipe" in flags:
        flags |= _recipe_flags(parser, " ".join(flags.pop("recipe")), flags)
    parsed, unknown = parser.parse_known_args(current_names(flags))
    if unknown:
        raise OptionError(unknown_option(unknown[0], parser._option_string_actions))
    return tuple(_of_kind(kind, parsed) for kind in kinds)


def _recipe_flags(parser: TrainParser, name: str, flags: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Returns the options of a recipe that flags leave open."""
    recipe = read_recipe(name)
    for option in recipe.keys() - {GLOBAL_BATCH}:
        word = f"--{current_name(option)}"
        if word not in parser._option_string_actions:
            raise OptionError(f"--recipe {name}: {unknown_option(word, parser._option_string_actions)}")
    on_cpu = is_on(flags, "use_cpu") or is_on(flags, "no_cuda") or not torch.cuda.is_available()
    return recipe_options(recipe, flags, on_cpu=on_cpu)


def _of_kind(kind: Any, parsed: argparse.Namespace) -> Any:
    names = {item.name for item in dataclasses.fields(kind) if item.init}
    return kind(**{name: value for name, value in vars(parsed).items() if name in names})


def read_contrast(model: ModelArguments) -> dict[str, Any] | None:
    """Returns the settings of contrast that the options give; None if they give none or say ``none``.

    Raises:
        OptionError: They are no JSON object, or no settings.
    """
    if model.contrast in (None, "none"):
        return None
    try:
        values = json.loads(str(model.contrast))
        if not isinstance(values, dict):
            raise OptionError(f"--contrast must be a JSON object, not {model.contrast}")
        language_contrast(values)
    except json.JSONDecodeError as error:
        raise OptionError(f"--contrast is no JSON object: {error}") from error
    except CheckpointError as error:
        raise OptionError(f"--contrast: {str(error).removeprefix('contrast: ')}") from error
    return dict(values)


# --- checks


def _check(*faults: tuple[bool, str]) -> None:
    """Raises an ``OptionError`` with the message of the first fault that is there."""
    for is_there, message in faults:
        if is_there:
            raise OptionError(message)


def _check_range(options: Any, names: Sequence[str], holds: Callable[[float], bool], range_: str) -> None:
    """Checks numbers; None is always valid, and a comparison with nan never holds."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not holds(value):
            raise OptionError(f"--{name} must be {range_}, not {value}")


def _check_at_least_one(options: Any, *names: str) -> None:
    _check_range(options, names, lambda value: value >= 1, "at least 1")


def _check_positive(options: Any, *names: str) -> None:
    _check_range(options, names, lambda value: 0 < value < math.inf, "a number above 0")


def _check_not_negative(options: Any, *names: str) -> None:
    _check_range(options, names, lambda value: 0 <= value < math.inf, "a number of at least 0")


def _missing(path: str | None) -> bool:
    return path is not None and not Path(path).is_file()


def check_arguments(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> None:
    """Checks the options, each group for itself and then together, before anything is read.

    Raises:
        OptionError: The message says what excludes what, or which file is missing.
    """
    model.check()
    data.check()
    training.check()
    has_lora, layout = model.lora_enable, training.save_layout
    validates = bool(data.eval_data_path or data.validation_share)
    _check(
        (
            model.unfreeze_towers and data.cache_features is not None,
            "--cache_features keeps the outputs of frozen towers, so --unfreeze_towers must be False",
        ),
        (
            has_lora and model.model_config is not None and layout != "merged",
            "LoRA over a new model, --model_config, has no base to be stored over; use --save_layout merged",
        ),
        (layout == "adapter" and not has_lora, "--save_layout adapter needs --lora_enable True"),
        (
            layout == "merged" and model.bits != 16,
            f"--save_layout merged is not possible over weights of {model.bits} bits; use adapter",
        ),
        (
            layout == "published" and model.unfreeze_towers and has_lora,
            "the published LoRA layout has no place for towers; use --save_layout adapter or merged",
        ),
        (
            training.eval_strategy != "no" and not validates,
            f"--eval_strategy {training.eval_strategy} needs --eval_data_path or --validation_share",
        ),
        (
            validates and training.eval_strategy == "no" and not training.eval_on_start,
            "--eval_data_path and --validation_share need --eval_strategy steps or epoch",
        ),
        (
            training.eval_on_start and not validates,
            "--eval_on_start needs --eval_data_path or --validation_share",
        ),
    )


_NEW_PARTS = "fusion,mm_projector,dino_mm_projector"


def new_parts(model: ModelArguments) -> set[str]:
    """Returns the parts that ``--init`` names.

    Raises:
        OptionError: One is no part that may be new.
    """
    parts = {part.strip() for part in model.init.split(",") if part.strip()}
    wrong = sorted(part for part in parts if part != "fusion" and not is_projector(part))
    if wrong:
        raise OptionError(f"--init {', '.join(wrong)}: only the fusion and projectors can be new, as in {_NEW_PARTS}")
    return parts


def trained_parts(model: ModelArguments, present: "set[str]", trained_whole: Collection[str]) -> set[str]:
    """Returns the parts that are trained, of those that the model has.

    Args:
        model: Options.
        present: Names of the model's parts.
        trained_whole: Parts that the system trains whole beside LoRA.
    """
    if model.trained_parts:
        return {part.strip() for part in model.trained_parts.split(",") if part.strip()}
    if model.tune_mm_mlp_adapter:
        parts = set(filter(is_projector, present))
    elif model.lora_enable:
        parts = present & set(trained_whole) | {LORA}
    else:
        parts = {part for part in present if not is_tower(part)}
    return parts | (set(filter(is_tower, present)) if model.unfreeze_towers else set())
