"""Trains a plain network, one without a language model: a detector or a tagger of some system, or a part of one.

``--network <system>:<part>`` names it; a recipe does so by its option ``network``.
"""

import hashlib
import logging
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from llava.cli import run_cli
from llava.data.labelled import LabelledImage, read_labelled
from llava.errors import CheckpointError, OptionError
from llava.files import atomic_folder, make_folder, read_json, replace_folder, write_json
from llava.model.checkpoint_files import list_keys
from llava.systems import registry
from llava.systems.base import AnswerFormat, MaskTraining, NetworkTraining, resolve
from llava.tables import LABEL_MAP_HELP, parse_label_map
from llava.tampered import TamperedImage
from llava.train.arguments import TrainingArguments, TrainParser, make_parser, parse_groups
from llava.train.checkpointing import RUN_FILE, check_same_run, disk_errors, resume_checkpoint
from llava.train.mask_trainer import MaskDataset, MaskTrainer, read_changed_images
from llava.train.network_trainer import LabelledDataset, NetworkTrainer

_KEPT_OPTIONS = (
    "seed",
    "data_seed",
    "num_train_epochs",
    "max_steps",
    "optim",
    "optim_args",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "dataloader_drop_last",
    "bf16",
    "fp16",
)
"""Options that a resumed run must share with its start, beside all of the network's."""


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class NetworkArguments:
    """Which network is trained, and on what."""

    network: str = _option("", "what is trained: <system>:<part>")
    model_name_or_path: str | None = _option(None, "file or folder to start from")
    model_config: str | None = _option(
        None, "JSON file with the settings of a new network (default: as published), or with what is to differ"
    )
    data_path: list[str] = field(
        default_factory=list,
        metadata={
            "help": "folders with a subfolder a class, MMFR trees, tables of images and labels, training records; for "
            "masks, folders image and mask, MMFR trees with a manifest, tables with a column mask"
        },
    )
    image_folder: str | None = _option(None, "what names in tables and records start from (default: their folder)")
    eval_data_path: list[str] = field(default_factory=list, metadata={"help": "the same, to validate on"})
    validation_share: float = _option(0.0, "share of the training images to validate on instead, 0..1")
    label_map: str | None = _option(None, LABEL_MAP_HELP)
    published_optimizer: bool = _option(True, "the network's own optimizer, if it has one, instead of --optim")

    def check(self, args: TrainingArguments) -> None:
        """Checks the options.

        Raises:
            OptionError: One is invalid, missing, or excluded by another.
        """
        validates = bool(self.eval_data_path or self.validation_share)
        asks = args.eval_strategy != "no" or args.eval_on_start
        faults = (
            (not self.network, f"--network is missing; known: {', '.join(known_networks())}"),
            (not self.data_path, "--data_path is missing: name folders, tables or records of images"),
            (
                self.model_config is not None and not Path(self.model_config).is_file(),
                f"--model_config: there is no file {self.model_config}",
            ),
            (not 0 <= self.validation_share < 1, "--validation_share must be from 0 to below 1"),
            (
                bool(self.eval_data_path) and self.validation_share > 0,
                "--eval_data_path and --validation_share exclude each other",
            ),
            (asks and not validates, "validation needs --eval_data_path or --validation_share"),
            (validates and not asks, "--eval_data_path and --validation_share need --eval_strategy steps or epoch"),
            (bool(args.deepspeed), "--deepspeed is not supported for plain networks: they need no sharding"),
        )
        for is_there, message in faults:
            if is_there:
                raise OptionError(message)


def known_networks() -> list[str]:
    """Returns ``<system>:<part>`` of every plain network that can be trained."""
    return sorted(f"{name}:{part}" for name, spec in registry.specs().items() for part in spec.networks)


def network_class(name: str) -> tuple[Any, AnswerFormat | None]:
    """Returns the class behind ``<system>:<part>``, and the words that its training records are read by.

    Raises:
        OptionError: There is no such network.
    """
    system, _, part = name.partition(":")
    known = registry.specs().get(system)
    if known is None or part not in known.networks:
        raise OptionError(f"--network {name}: there is no such network; known: {', '.join(known_networks())}")
    return resolve(known.networks[part]), registry.answer_format(registry.DEFAULT)


def build_parser() -> TrainParser:
    """Returns the parser."""
    return make_parser((NetworkArguments, TrainingArguments), "llava.train.networks", "Trains a plain network.")


def train(options: NetworkArguments, args: TrainingArguments) -> Path:
    """Runs a training from its options to the final folder, which it returns.

    Raises:
        UserError: Options, data or network cannot be used, or something cannot be written.
    """
    options.check(args)
    args.check()
    level = logging.INFO if args.process_index == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    transformers.set_seed(args.seed)
    kind, words = network_class(options.network)
    config = {} if options.model_config is None else read_json(Path(options.model_config))
    if not isinstance(config, dict):
        raise OptionError(f"--model_config: {options.model_config} holds no JSON object")
    training = kind.open(options.model_name_or_path, config)
    images: Sequence[Any]
    validation: Sequence[Any]
    if isinstance(training, MaskTraining):
        images, validation = _changed_images(options, args, training)
    else:
        images, validation = _images(options, args, training, words)
    _check_steps(len(images), args)
    output = Path(str(args.output_dir))
    checkpoint = resume_checkpoint(output, args.resume)
    run = _describe_run(options, args, config, images)
    if checkpoint is not None:
        check_same_run(output / RUN_FILE, run)
        print(f"resuming from {checkpoint}", file=sys.stderr)
    make_folder(output, "--output_dir")
    if args.n_gpu > 1:
        args._n_gpu = 1  # without a launcher one process trains on one GPU
    trainer = _trainer(training, options, args, images, validation)
    trainer.trial_export()
    if args.should_save:
        write_json(output / RUN_FILE, run, indent=2)
    return trainer.run_to_end(checkpoint)


def _trainer(
    training: Any,
    options: NetworkArguments,
    args: TrainingArguments,
    images: Sequence[Any],
    validation: Sequence[Any],
) -> NetworkTrainer:
    def export(folder: Path) -> None:
        export_network(training, folder)

    if isinstance(training, MaskTraining):
        return MaskTrainer(
            training,
            args,
            train_dataset=MaskDataset(images, training, args.seed),
            eval_dataset=MaskDataset(validation, training, None) if validation else None,
            export=export,
        )
    return NetworkTrainer(
        training,
        args,
        train_dataset=LabelledDataset(images, training, args.seed),
        eval_dataset=LabelledDataset(validation, training, None) if validation else None,
        export=export,
        published_optimizer=options.published_optimizer,
    )


def _check_steps(images: int, args: TrainingArguments) -> None:
    """Refuses a training that would take no step.

    Raises:
        OptionError: There are fewer images than a batch, and batches that are not full are dropped.
    """
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and images < batch:
        raise OptionError(
            f"{images} images fill no batch of {batch}, so nothing would be trained; lower "
            "--per_device_train_batch_size, or set --dataloader_drop_last False"
        )


def _changed_images(
    options: NetworkArguments, args: TrainingArguments, training: MaskTraining
) -> tuple[list[TamperedImage], list[TamperedImage]]:
    """Returns the changed images to train on and those to validate on."""
    images = read_changed_images(options.data_path, training)
    if options.eval_data_path:
        return images, read_changed_images(options.eval_data_path, training)
    return _split(images, options, args)


def _images(
    options: NetworkArguments, args: TrainingArguments, training: NetworkTraining, words: AnswerFormat | None
) -> tuple[list[LabelledImage], list[LabelledImage]]:
    """Returns the images to train on and those to validate on."""
    meanings = {} if options.label_map is None else parse_label_map(options.label_map)
    folder = None if options.image_folder is None else Path(options.image_folder)

    def read(paths: Sequence[str], split: str) -> list[LabelledImage]:
        given = [Path(path) for path in paths]
        return read_labelled(
            given, training.classes, answer_format=words, image_folder=folder, label_map=meanings, split=split
        )

    images = read(options.data_path, "train")
    if options.eval_data_path:
        return images, read(options.eval_data_path, "val")
    return _split(images, options, args)


def _split(images: list[Any], options: NetworkArguments, args: TrainingArguments) -> tuple[list[Any], list[Any]]:
    """Keeps the share of the images that is to be validated on apart."""
    count = round(options.validation_share * len(images))
    if options.validation_share and not 0 < count < len(images):
        raise OptionError(f"--validation_share {options.validation_share} of {len(images)} images leaves none")
    chosen = set(random.Random(args.seed).sample(range(len(images)), count))
    return (
        [image for index, image in enumerate(images) if index not in chosen],
        [image for index, image in enumerate(images) if index in chosen],
    )


def _describe_run(
    options: NetworkArguments, args: TrainingArguments, config: dict[str, Any], images: Sequence[Any]
) -> dict[str, Any]:
    """Returns what a resumed run must have in common with its start."""
    digest = hashlib.blake2b(digest_size=16)
    for image in images:
        digest.update(repr(image).encode())
    given = args.to_dict()
    return {
        "network": options.network,
        "model_name_or_path": options.model_name_or_path,
        "config": config,
        "published_optimizer": options.published_optimizer,
        **{name: given[name] for name in _KEPT_OPTIONS},
        "images": len(images),
        "data": digest.hexdigest(),
        "global_batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
    }


def _stored(training: Any) -> dict[str, torch.Tensor]:
    """What a network's files hold."""
    stored: dict[str, torch.Tensor] = (
        training.stored() if isinstance(training, MaskTraining) else training.network.state_dict()
    )
    return stored


def export_network(training: NetworkTraining | MaskTraining, folder: Path) -> None:
    """Writes a network; the folder appears, instead of an earlier one, only when it was read back.

    Raises:
        FileError: It cannot be written.
        CheckpointError: What was written is not what was to be written.
    """
    waiting = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(waiting, ignore_errors=True)
    with disk_errors(folder), atomic_folder(waiting) as partial:
        training.save(partial)
        wanted = _stored(training)
        # The random weights that are made before a file is read must not change what training draws next.
        with torch.random.fork_rng(devices=[]):
            found = _stored(type(training).open(str(partial), {}))
        wrong = set(wanted) ^ set(found)
        wrong |= {
            name
            for name in set(wanted) - wrong
            if not torch.equal(wanted[name].cpu(), found[name].to(wanted[name].dtype))
        }
        if wrong:
            raise CheckpointError(f"{folder} was written but does not hold what it should: {list_keys(wrong)}")
    replace_folder(waiting, folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_cli(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> None:
    options, args = parse_groups(build_parser(), (NetworkArguments, TrainingArguments), arguments)
    train(options, args)


if __name__ == "__main__":
    sys.exit(main())
