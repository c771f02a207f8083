"""Trains a model: LoRA as published, all of it, or parts; from a checkpoint or from scratch; on GPUs or a CPU.

Under torchrun or DeepSpeed's launcher, one process a device; alone, on one. ``llava.train.launcher`` starts as many as
there are devices, by a recipe.
"""

import logging
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn

from llava.cli import run_cli
from llava.conversation import conv_templates
from llava.data.checks import check_records
from llava.data.collator import collate
from llava.data.dataset import SupervisedDataset
from llava.data.image_check import cache_file
from llava.data.lengths import model_positions
from llava.data.records import Record, read_records
from llava.data.rewriting import rewrite_records
from llava.data.sampler import ModalityLengthSampler
from llava.data.summary import Measured, describe_data, find_contradictions, list_some
from llava.errors import DataError, OptionError
from llava.files import make_folder, read_json, write_json
from llava.model.branches import is_projector
from llava.model.builder import resolve_attention
from llava.model.language_contrast import language_contrast
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.saving import describes_itself
from llava.systems import registry
from llava.systems.base import AnswerFormat, TrainingObjective
from llava.train.arguments import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    build_parser,
    parse_arguments,
    trained_parts,
)
from llava.train.checkpointing import RUN_FILE, check_same_run, resume_checkpoint
from llava.train.contrast import ContrastInputs, ContrastObjective
from llava.train.export import export_model
from llava.train.feature_cache import CachedDataset, cache_features
from llava.train.loading import StartingPoint, answer_format, build_model, load_start
from llava.train.lora import apply_lora, choose_trainable, parameter_part, prepare_quantized, trainable_table
from llava.train.run_data import check_same_data, digest_records, write_run_data
from llava.train.trainer import ForgeryTrainer
from llava.train.validation import verdict_predictor

logger = logging.getLogger(__name__)

_KEPT_OPTIONS = (
    "version",
    "model_max_length",
    "image_aspect_ratio",
    "verdict_only_share",
    "group_by_modality_length",
    "group_by_length",
    "seed",
    "data_seed",
    "num_train_epochs",
    "max_steps",
    "loss_average",
    "optim",
    "optim_args",
    "learning_rate",
    "mm_projector_lr",
    "tower_lr",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "bf16",
    "fp16",
)
"""Options of data and training, beside all of the model's, that a resumed run must share with its start."""

__all__ = ["build_parser", "main", "train"]


def train(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> Path:
    """Runs a training from its options to the final folder.

    Returns:
        The final folder.

    Raises:
        UserError: Options, data or checkpoint cannot be used, or something cannot be written.
    """
    _set_up_logs(args)
    transformers.set_seed(args.seed)
    start = load_start(model_args, data_args)
    data_args = replace(data_args, model_max_length=start.max_length)
    layout = registry.component(start.config.system, "checkpoint_format")
    names_tower = layout is None or not describes_itself(layout)
    if args.save_layout == "published" and names_tower and not start.config.mm_vision_tower:
        raise OptionError(
            "--save_layout published names its vision tower rather than describing it; name it by --vision_tower"
        )
    if args.save_layout == "published" and not names_tower and model_args.lora_enable:
        raise OptionError(
            "--save_layout published: this system's published files are a whole model; use --save_layout adapter, and "
            "forgery merge --layout published afterwards"
        )
    output = Path(args.output_dir)
    checkpoint = resume_checkpoint(output, args.resume)
    records, validation_records = _records(data_args, args, start)
    run = describe_run(model_args, data_args, args, records)
    if checkpoint is not None:
        _check_same(output, run, records, data_args)
        logger.info("resuming from %s", checkpoint)
    make_folder(output, "--output_dir")
    if data_args.cache_features:
        make_folder(Path(data_args.cache_features), "--cache_features")
    _join_processes(args)
    model = _build(model_args, args, start)
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(core, LlavaLlamaForCausalLM)
    objective = _objective(core, start, [*records, *validation_records])
    options = _dataset_options(data_args, start, core, objective)
    train_set = SupervisedDataset(records, **options, verdict_only_share=data_args.verdict_only_share, seed=args.seed)
    if data_args.cache_features and core.get_model().needs_images():
        raise OptionError("--cache_features keeps no pixels, but a detector in this model looks at them; leave it out")
    if data_args.cache_features:
        train_set = _cached(train_set, core, Path(data_args.cache_features), args, options)
    validation = SupervisedDataset(validation_records, **options) if validation_records else None
    trainer = _trainer(model, core, model_args, data_args, args, start, train_set, validation, objective)
    if args.should_save:
        print(trainable_table(model), file=sys.stderr)
    trainer.trial_export()
    if args.should_save:
        write_run_data(output, records)
        write_json(output / RUN_FILE, run, indent=2)
    if _is_muted():
        sys.stderr = sys.__stderr__
    return trainer.run_to_end(checkpoint)


def _set_up_logs(args: TrainingArguments) -> None:
    level = logging.INFO if args.process_index == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    transformers.utils.logging.set_verbosity_warning()


def _join_processes(args: TrainingArguments) -> None:
    if args.n_gpu > 1:
        # Without a launcher one process trains on one GPU; transformers would split each batch over all.
        args._n_gpu = 1
    if args.deepspeed and args.device.type == "cpu":
        # Otherwise torch's own group is taken for sharded training on a CPU, which does not know the world's size.
        import deepspeed

        deepspeed.init_distributed("gloo")


def _records(
    data_args: DataArguments, args: TrainingArguments, start: StartingPoint
) -> tuple[list[Record], list[Record]]:
    """Reads and checks the records; returns those to train on and those to validate on."""
    records = _read_checked(data_args.data_path, "training data", data_args, start)
    if data_args.eval_data_path:
        return records, _read_checked([data_args.eval_data_path], "validation data", data_args, start)
    count = round(data_args.validation_share * len(records))
    if data_args.validation_share and not 0 < count < len(records):
        raise OptionError(
            f"--validation_share {data_args.validation_share} of {len(records)} records leaves none of one kind"
        )
    chosen = set(random.Random(args.seed).sample(range(len(records)), count))
    return (
        [record for index, record in enumerate(records) if index not in chosen],
        [record for index, record in enumerate(records) if index in chosen],
    )


def _read_checked(paths: Sequence[str], name: str, data_args: DataArguments, start: StartingPoint) -> list[Record]:
    """Reads and checks records, and says what they hold in all."""
    faults: dict[str, str] = {}
    measured = Measured()
    image_folder = _image_folder(data_args)
    words = answer_format(start.config)
    records = check_records(
        _read(paths, data_args, words, faults),
        tokenizer=start.tokenizer,
        template=conv_templates[data_args.version],
        max_length=start.max_length,
        answer_format=words,
        placeholder_tokens=start.placeholder_tokens,
        image_folder=image_folder,
        drop_invalid=data_args.drop_invalid,
        needs_verdict=registry.component(start.config.system, "objective") is not None,
        placeholders=start.placeholders,
        faults=faults,
        opened=cache_file(image_folder) if data_args.check_images else None,
        measured=measured,
    )
    positions = model_positions(start.config.to_dict())
    for line in describe_data(records, words, measured, max_length=start.max_length, positions=positions, name=name):
        logger.log(logging.WARNING if line.startswith("warning") else logging.INFO, "%s", line)
    contradictions = find_contradictions(records, words, measured.digests)
    if contradictions:
        said = f"{len(contradictions)} contradictions in the {name}: {list_some(contradictions)}"
        if not data_args.allow_contradictions:
            raise DataError(f"{said}. Correct them, or --allow_contradictions True trains on them as they are")
        logger.warning("warning: %s", said)
    return records


def _check_same(output: Path, run: Mapping[str, Any], records: Sequence[Record], data_args: DataArguments) -> None:
    """Checks that the run to resume has these options and records."""
    before = read_json(output / RUN_FILE) if (output / RUN_FILE).is_file() else {}
    accept = data_args.accept_changed_data
    if isinstance(before, dict):
        if accept and data_args.validation_share and before.get("records", len(records)) != len(records):
            raise OptionError(
                "--validation_share would choose other records now that their number has changed, so that some would "
                "be trained and validated on; keep the number, or name --eval_data_path"
            )
        check_same_data(output, records, before, accept=accept)
    check_same_run(output / RUN_FILE, run, but=("data", "records") if accept else ())


def _image_folder(data_args: DataArguments) -> Path | None:
    """The one folder of all images; None where each file's records have the whole path."""
    folders = data_args.image_folder or []
    return Path(folders[0]) if len(folders) == 1 else None


def _read(files: Sequence[str], data_args: DataArguments, words: AnswerFormat, faults: dict[str, str]) -> list[Record]:
    """Reads files of records, each with its own folder of images if that is asked for, and in one system's words."""
    folders = data_args.image_folder or []
    records = []
    for number, file in enumerate(files):
        for record in read_records([Path(file)], faults):
            whole = len(folders) > 1 and record.image is not None
            records.append(replace(record, image=str(Path(folders[number]) / str(record.image))) if whole else record)
    return rewrite_records(records, words) if data_args.rewrite_answers else records


def describe_run(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, records: Sequence[Record]
) -> dict[str, Any]:
    """Returns what a resumed run must have in common with its start."""
    given = {**vars(model_args), **vars(data_args), **args.to_dict()}
    stage = _zero_stage(args)
    return {
        **{name: given[name] for name in (*vars(model_args), *_KEPT_OPTIONS) if name != "attn_implementation"},
        "records": len(records),
        "data": digest_records(records),
        "global_batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "sharding": f"ZeRO-{stage} over {args.world_size} processes" if stage else "none",
    }


def _build(model_args: ModelArguments, args: TrainingArguments, start: StartingPoint) -> nn.Module:
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    # Without LoRA nearly all weights are trained, and those stay in 32 bits unless DeepSpeed keeps copies.
    dtype = half if args.deepspeed or model_args.lora_enable else torch.float32
    model = build_model(
        start,
        dtype=dtype,
        device=args.device,
        bits=model_args.bits,
        attn_implementation=resolve_attention(model_args.attn_implementation, args.device, dtype),
    )
    if model_args.bits != 16:
        prepare_quantized(model, gradient_checkpointing=args.gradient_checkpointing)
    present = {parameter_part(name) for name, _ in model.named_parameters()}
    whole = tuple(filter(is_projector, present)) if model.objective is None else model.objective.trained_whole
    parts = trained_parts(model_args, present, whole)
    trained: nn.Module = model
    if model_args.lora_enable:
        trained = apply_lora(
            model, rank=model_args.lora_r, alpha=model_args.lora_alpha, dropout=model_args.lora_dropout
        )
    choose_trainable(trained, parts)
    model.get_model().freeze_behind_outputs()
    if not args.deepspeed:
        # Small updates vanish in 16 bits; DeepSpeed keeps 32-bit copies of its own.
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if model_args.unfreeze_towers:
        # A tower has layers behind the one whose output is taken.
        args.ddp_find_unused_parameters = True
    return trained


def _objective(
    model: LlavaLlamaForCausalLM, start: StartingPoint, records: Sequence[Record]
) -> TrainingObjective | None:
    """What is trained for beside the words: what the system is, and contrast if the config asks for it."""
    if model.config.contrast is None:
        return model.objective
    settings = language_contrast(model.config.contrast)
    inputs = ContrastInputs(settings, records, answer_format(start.config), start.tokenizer)
    return ContrastObjective(inputs, model.objective)


def _dataset_options(
    data_args: DataArguments,
    start: StartingPoint,
    model: LlavaLlamaForCausalLM,
    objective: TrainingObjective | None,
) -> dict[str, Any]:
    return {
        "image_folder": _image_folder(data_args),
        "tokenizer": start.tokenizer,
        "template": conv_templates[data_args.version],
        "model_config": model.config,
        "image_processor": model.image_processor,
        "answer_format": answer_format(start.config),
        "placeholder_tokens": start.placeholder_tokens,
        "placeholders": start.placeholders,
        "image_inputs": model.get_model().image_inputs,
        "extra_inputs": None if objective is None else objective.sample_inputs,
        "max_length": start.max_length,
    }


def _cached(
    dataset: SupervisedDataset,
    model: LlavaLlamaForCausalLM,
    folder: Path,
    args: TrainingArguments,
    options: dict[str, Any],
) -> CachedDataset:
    model.to(args.device)
    with _precision(args):
        arrays, rows = cache_features(
            model,
            dataset,
            folder,
            rank=args.process_index,
            world_size=args.world_size,
            wait=torch.distributed.barrier if args.world_size > 1 else lambda: None,
        )
    logger.info("features of %d images are in %s", len(rows), folder)
    # The records' answers are shortened already, so no share of them is given again.
    return CachedDataset(dataset.records, **options, arrays=arrays, rows=rows)


def _trainer(
    model: nn.Module,
    core: LlavaLlamaForCausalLM,
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainingArguments,
    start: StartingPoint,
    train_set: SupervisedDataset,
    validation: SupervisedDataset | None,
    objective: TrainingObjective | None,
) -> ForgeryTrainer:
    layout_name = args.save_layout
    if layout_name == "auto":
        layout_name = "adapter" if model_args.lora_enable else "merged"
    by_score = args.validation_verdict == "score" or (
        args.validation_verdict == "auto" and data_args.verdict_only_share > 0
    )
    if validation is not None and not by_score and _zero_stage(args) == 3:
        raise OptionError("under ZeRO-3 answers cannot be generated in validation; use --validation_verdict score")
    predict = verdict_predictor(
        core,
        context_length=start.max_length,
        score_only=by_score,
        max_new_tokens=args.validation_new_tokens,
        precision=partial(_precision, args),
        in_step=() if validation is None or _zero_stage(args) != 3 else validation.questions,
    )

    def export(tensors: Mapping[str, Tensor], folder: Path) -> None:
        base = "" if start.folder is None else str(start.folder.absolute())
        dtype = None if args.save_dtype == "auto" else getattr(torch, args.save_dtype)
        export_model(model, tensors, folder, layout_name=layout_name, base=base, dtype=dtype)

    return ForgeryTrainer(
        model=model,
        args=args,
        collator=partial(collate, pad_token_id=start.tokenizer.pad_token_id, max_length=start.max_length),
        train_dataset=train_set,
        eval_dataset=validation,
        objective=objective,
        order=_grouped_order(data_args, args) if data_args.group_by_modality_length else None,
        predict=predict,
        export=export,
        # Towers are written whole, and some of their layers stay frozen.
        export_trained_only=model_args.lora_enable and layout_name != "merged" and not model_args.unfreeze_towers,
        placeholder_tokens=start.placeholder_tokens,
        towers_are_cached=bool(data_args.cache_features),
    )


def _grouped_order(
    data_args: DataArguments, args: TrainingArguments
) -> Callable[[SupervisedDataset, int, int], ModalityLengthSampler]:
    seed = args.seed if args.data_seed is None else args.data_seed

    def order(dataset: SupervisedDataset, batch_size: int, rounds: int) -> ModalityLengthSampler:
        return ModalityLengthSampler(
            dataset.modality_lengths, batch_size, rounds, seed, by_length=data_args.group_by_length
        )

    return order


def _zero_stage(args: TrainingArguments) -> int:
    return args.deepspeed_plugin.zero_stage if args.deepspeed else 0


def _precision(args: TrainingArguments) -> AbstractContextManager:
    """The context of a forward outside the Trainer, which knows that weights of two kinds work together."""
    if args.deepspeed or not (args.bf16 or args.fp16):
        return nullcontext()
    return torch.autocast(args.device.type, torch.bfloat16 if args.bf16 else torch.float16)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status.

    Until images are read, only the first process of a machine explains what went wrong.
    """
    if _is_muted():
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 (open to the end)
    if "LOCAL_RANK" in os.environ:
        threading.Thread(target=_end_with_launcher, args=(os.getppid(),), daemon=True).start()
    try:
        status = run_cli(lambda: _run(arguments))
    except Exception:
        sys.stderr = sys.__stderr__  # a bug can be in one process alone, so each shows its traceback
        raise
    if torch.distributed.is_initialized():
        # Processes that end while others still work are sometimes aborted.
        if status == 0:
            torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return status


def _end_with_launcher(launcher: int) -> None:
    """Ends this process once its launcher is gone, so that it does not write into a folder of a resumed run."""
    while os.getppid() == launcher:
        time.sleep(1)
    os._exit(1)


def _run(arguments: Sequence[str] | None) -> None:
    try:
        train(*parse_arguments(arguments))
    except DataError as error:
        # A worker process that reads images puts its traceback before the message.
        message = str(error).rstrip().splitlines()[-1]
        raise DataError(message.removeprefix(f"{DataError.__module__}.{DataError.__qualname__}: ")) from None


def _is_muted() -> bool:
    """Whether another process of this machine explains what goes wrong in all of them."""
    return os.environ.get("LOCAL_RANK", "0") != "0"


if __name__ == "__main__":
    sys.exit(main())
