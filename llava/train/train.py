"""Trains a model: LoRA as published, all of it, or parts; from a checkpoint or from nothing; on GPUs or a CPU.

Under torchrun or DeepSpeed's launcher, one process a device; alone, on one. ``scripts/finetune_task_lora.sh`` starts it
with the published recipe.
"""

import hashlib
import json
import logging
import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
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
from llava.data.records import Record, read_records
from llava.data.sampler import ModalityLengthSampler
from llava.errors import DataError
from llava.files import make_folder
from llava.model.builder import resolve_attention
from llava.model.checkpoint_files import read_json
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.train.arguments import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    build_parser,
    parse_arguments,
    trained_parts,
)
from llava.train.export import export_model
from llava.train.feature_cache import CachedDataset, cache_features
from llava.train.loading import Opened, build_model, open_start
from llava.train.lora import apply_lora, choose_trainable, part_of, prepare_quantized, trainable_table
from llava.train.trainer import BEST, ForgeryTrainer, is_finished, numbered_checkpoints, whole_checkpoints, write_text
from llava.train.validation import verdict_judge

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
FINAL, TRIAL = "final", "trial"
_KEPT_OPTIONS = (
    "version",
    "model_max_length",
    "image_aspect_ratio",
    "verdict_only_share",
    "group_by_modality_length",
    "alike_lengths",
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
"""Options of data and training, beside all of the model's, that a continued run must share with its beginning."""

__all__ = ["build_parser", "main", "train"]


def train(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> Path:
    """Runs a training from its options to the final folder.

    Returns:
        The final folder.

    Raises:
        ValueError: Options, data or checkpoint cannot be used; nothing was trained then.
        OSError: Something could not be written.
    """
    _set_up_logs(args)
    transformers.set_seed(args.seed)
    opened = open_start(model_args, data_args)
    if args.save_layout == "published" and not opened.config.mm_vision_tower:
        raise ValueError(
            "--save_layout published names its vision tower rather than describing it; name it by --vision_tower"
        )
    records, held_back = _records(data_args, args, opened)
    output = Path(args.output_dir)
    start = find_start(output, args.resume)
    run = describe_run(model_args, data_args, args, records)
    if start is not None:
        refuse_other_run(output / RUN_FILE, run)
        logger.info("going on from %s", start)
    make_folder(output, "--output_dir")
    if data_args.cache_features:
        make_folder(Path(data_args.cache_features), "--cache_features")
    _join_processes(args)
    model = _build(model_args, args, opened)
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(whole, LlavaLlamaForCausalLM)
    options = _dataset_options(data_args, opened, whole)
    train_set = SupervisedDataset(records, **options, verdict_only_share=data_args.verdict_only_share, seed=args.seed)
    if data_args.cache_features:
        train_set = _cached(train_set, whole, Path(data_args.cache_features), args, options)
    trainer = _trainer(model, whole, model_args, data_args, args, opened, options, train_set, held_back)
    if args.should_save:
        print(trainable_table(model), file=sys.stderr)
    _trial_save(trainer, output)
    if args.should_save:
        write_text(output / RUN_FILE, json.dumps(run, indent=2) + "\n")
    if _is_muted():
        sys.stderr = sys.__stderr__
    if start is not None and is_finished(start):
        trainer.load_finished(start)
    else:
        try:
            trainer.train(resume_from_checkpoint=None if start is None else str(start))
        except BaseException:
            trainer.end_progress_bar()
            raise
    final = output / FINAL
    trainer.export_to(final)
    if args.should_save:
        write_text(output / "log.json", json.dumps(trainer.state.log_history, indent=2) + "\n")
        print(f"the trained model is in {final}")
    return final


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


def _records(data_args: DataArguments, args: TrainingArguments, opened: Opened) -> tuple[list[Record], list[Record]]:
    """Reads and checks the records; returns those to train on and those to validate on."""
    check = partial(
        check_records,
        tokenizer=opened.tokenizer,
        template=conv_templates[data_args.version],
        max_length=data_args.model_max_length,
        num_image_tokens=opened.num_image_tokens,
        image_folder=None if data_args.image_folder is None else Path(data_args.image_folder),
        drop_invalid=data_args.drop_invalid,
    )
    records = check(read_records([Path(path) for path in data_args.data_path]))
    if data_args.eval_data_path:
        return records, check(read_records([Path(data_args.eval_data_path)]))
    count = round(data_args.validation_share * len(records))
    if data_args.validation_share and not 0 < count < len(records):
        raise ValueError(
            f"--validation_share {data_args.validation_share} of {len(records)} records leaves none of one kind"
        )
    chosen = set(random.Random(args.seed).sample(range(len(records)), count))
    return (
        [record for place, record in enumerate(records) if place not in chosen],
        [record for place, record in enumerate(records) if place in chosen],
    )


def find_start(output: Path, resume: str) -> Path | None:
    """Returns the checkpoint to go on from, or None to begin.

    Raises:
        ValueError: The folder holds a run that is not to be continued, or there is no such checkpoint.
    """
    if resume not in ("", "auto"):
        found = Path(resume)
        if found not in whole_checkpoints(found.parent):
            raise ValueError(f"--resume {resume}: this is no whole checkpoint")
        return found
    whole = whole_checkpoints(output)
    if resume == "auto":
        if (output / RUN_FILE).is_file():
            _remove_leftovers(output)
        return whole[-1] if whole else None
    if whole or (output / FINAL).exists():
        raise ValueError(f"{output} holds a run already; --resume auto goes on with it, or name another --output_dir")
    return None


def _remove_leftovers(output: Path) -> None:
    """Removes what a run that was killed had begun to write."""
    begun = [path for path in numbered_checkpoints(output) if path not in whole_checkpoints(output)]
    for name in (FINAL, BEST, TRIAL):
        begun += [*output.glob(f".{name}.*"), *output.glob(f"..{name}.*")]
    for path in [*begun, output / TRIAL]:
        shutil.rmtree(path, ignore_errors=True)


def describe_run(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, records: Sequence[Record]
) -> dict[str, Any]:
    """Returns what a continued run must have in common with its beginning."""
    digest = hashlib.blake2b(digest_size=16)
    for record in records:
        digest.update(repr((record.image, record.turns)).encode())
    given = {**vars(model_args), **vars(data_args), **args.to_dict()}
    stage = _zero_stage(args)
    return {
        **{name: given[name] for name in (*vars(model_args), *_KEPT_OPTIONS) if name != "attn_implementation"},
        "records": len(records),
        "data": digest.hexdigest(),
        "global_batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "sharding": f"ZeRO-{stage} over {args.world_size} processes" if stage else "none",
    }


def refuse_other_run(file: Path, run: Mapping[str, Any]) -> None:
    """Compares a run with the one that a folder holds.

    Raises:
        ValueError: They differ; the message says in what.
    """
    before = read_json(file) if file.is_file() else {}
    other = [
        f"{name} was {before[name]!r}, is {value!r}" for name, value in run.items() if before.get(name, value) != value
    ]
    if other:
        raise ValueError(f"{file.parent} holds a run with other options, which cannot be continued: {'; '.join(other)}")


def _build(model_args: ModelArguments, args: TrainingArguments, opened: Opened) -> nn.Module:
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    # Without LoRA nearly all weights are trained, and those stay in 32 bits unless DeepSpeed keeps copies.
    dtype = half if args.deepspeed or model_args.lora_enable else torch.float32
    model = build_model(
        opened,
        dtype=dtype,
        device=args.device,
        bits=model_args.bits,
        attn_implementation=resolve_attention(model_args.attn_implementation, args.device, dtype),
    )
    if model_args.bits != 16:
        prepare_quantized(model, gradient_checkpointing=args.gradient_checkpointing)
    present = {part_of(name) for name, _ in model.named_parameters()}
    parts = trained_parts(model_args, present)
    trained: nn.Module = model
    if model_args.lora_enable:
        trained = apply_lora(
            model, rank=model_args.lora_r, alpha=model_args.lora_alpha, dropout=model_args.lora_dropout
        )
    choose_trainable(trained, parts)
    if not args.deepspeed:
        # Small updates vanish in 16 bits; DeepSpeed keeps 32-bit copies of its own.
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if model_args.unfreeze_towers:
        # A tower has layers behind the one whose output is taken.
        args.ddp_find_unused_parameters = True
    return trained


def _dataset_options(data_args: DataArguments, opened: Opened, model: LlavaLlamaForCausalLM) -> dict[str, Any]:
    return {
        "image_folder": None if data_args.image_folder is None else Path(data_args.image_folder),
        "tokenizer": opened.tokenizer,
        "template": conv_templates[data_args.version],
        "model_config": model.config,
        "image_processor": model.image_processor,
        "num_image_tokens": opened.num_image_tokens,
        "max_length": data_args.model_max_length,
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
        arrays, places = cache_features(
            model,
            dataset,
            folder,
            rank=args.process_index,
            world_size=args.world_size,
            wait=torch.distributed.barrier if args.world_size > 1 else lambda: None,
        )
    logger.info("features of %d images are in %s", len(places), folder)
    # The records' answers are shortened already, so no share of them is named again.
    return CachedDataset(dataset.records, **options, arrays=arrays, places=places)


def _trainer(
    model: nn.Module,
    whole: LlavaLlamaForCausalLM,
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainingArguments,
    opened: Opened,
    options: dict[str, Any],
    train_set: SupervisedDataset,
    held_back: list[Record],
) -> ForgeryTrainer:
    layout_name = args.save_layout
    if layout_name == "auto":
        layout_name = "adapter" if model_args.lora_enable else "merged"
    validation = SupervisedDataset(held_back, **options) if held_back else None
    by_score = args.validation_verdict == "score" or (
        args.validation_verdict == "auto" and data_args.verdict_only_share > 0
    )
    if validation is not None and not by_score and _zero_stage(args) == 3:
        raise ValueError("under ZeRO-3 answers cannot be generated in validation; use --validation_verdict score")
    judge = verdict_judge(
        whole,
        context_length=data_args.model_max_length,
        score_only=by_score,
        max_new_tokens=args.validation_new_tokens,
        precision=partial(_precision, args),
    )

    def export(tensors: Mapping[str, Tensor], folder: Path) -> None:
        base = "" if opened.folder is None else str(opened.folder.absolute())
        if args.save_dtype != "auto":
            dtype = getattr(torch, args.save_dtype)
            tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
        export_model(model, tensors, folder, layout_name=layout_name, base=base)

    return ForgeryTrainer(
        model=model,
        args=args,
        collator=partial(collate, pad_token_id=opened.tokenizer.pad_token_id, max_length=data_args.model_max_length),
        train_dataset=train_set,
        eval_dataset=validation,
        mapper=whole.probability_mapper,
        order=_grouped_order(data_args, args) if data_args.group_by_modality_length else None,
        judge=judge,
        export=export,
        export_trained_only=model_args.lora_enable and layout_name != "merged",
        num_image_tokens=opened.num_image_tokens,
        towers_are_cached=bool(data_args.cache_features),
    )


def _grouped_order(
    data_args: DataArguments, args: TrainingArguments
) -> Callable[[SupervisedDataset, int, int], ModalityLengthSampler]:
    seed = args.seed if args.data_seed is None else args.data_seed

    def order(dataset: SupervisedDataset, batch_size: int, rounds: int) -> ModalityLengthSampler:
        return ModalityLengthSampler(dataset.modality_lengths, batch_size, rounds, seed, alike=data_args.alike_lengths)

    return order


def _zero_stage(args: TrainingArguments) -> int:
    return args.deepspeed_plugin.zero_stage if args.deepspeed else 0


def _precision(args: TrainingArguments) -> AbstractContextManager:
    """The context of a forward outside the Trainer, which knows that weights of two kinds work together."""
    if args.deepspeed or not (args.bf16 or args.fp16):
        return nullcontext()
    return torch.autocast(args.device.type, torch.bfloat16 if args.bf16 else torch.float16)


def _trial_save(trainer: ForgeryTrainer, output: Path) -> None:
    """Writes, opens and removes the final folder once, so that a run does not fail at its end."""
    trial = output / TRIAL
    trainer.export_to(trial)
    if trainer.args.should_save:
        shutil.rmtree(trial)
    trainer.accelerator.wait_for_everyone()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status.

    Until images are read, only the first process of a machine explains what went wrong.
    """
    if _is_muted():
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 (open to the end)
    if "LOCAL_RANK" in os.environ:
        threading.Thread(target=_end_with_launcher, args=(os.getppid(),), daemon=True).start()
    status = run_cli(lambda: _run(arguments))
    if torch.distributed.is_initialized():
        # Processes that end while others still work are sometimes aborted.
        if status == 0:
            torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return status


def _end_with_launcher(launcher: int) -> None:
    """Ends this process once its launcher is gone, lest it writes into a folder where a new run goes on."""
    while os.getppid() == launcher:
        time.sleep(1)
    os._exit(1)


def _run(arguments: Sequence[str] | None) -> None:
    try:
        train(*parse_arguments(arguments))
    except DataError as error:
        # A process that reads images puts its traceback before what it says.
        said = str(error).rstrip().splitlines()[-1]
        raise DataError(said.removeprefix(f"{DataError.__module__}.{DataError.__qualname__}: ")) from None


def _is_muted() -> bool:
    """Whether another process of this machine explains what goes wrong in all of them alike."""
    return os.environ.get("LOCAL_RANK", "0") != "0"


if __name__ == "__main__":
    sys.exit(main())
