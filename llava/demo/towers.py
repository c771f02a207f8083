"""Trains the vision towers of a model by themselves, on what the answers of training records tell.

    python -m llava.demo.towers --data records.json --config model_config.json --output_dir OUT

The first stage of training a model from scratch: each tower gets a linear head on the mean of its patch features, and
learns to say whether the image is fake, which forgery attributes it has, and which frequent words its caption and its
reasoning use. The second stage trains the language model on the towers, frozen. OUT/vision_tower and OUT/dino_tower can
then be given wherever a tower is named; OUT/heads.safetensors holds the heads, OUT/metrics.json their accuracy
on validation records. A run that was stopped resumes where it last saved.
"""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file

from llava.cli import OptionParser, run_cli
from llava.demo.residual_encoder import CropSummary, ResidualVisionTower
from llava.demo.tower_contrast import FACL
from llava.demo.tower_data import RECORDS_FILE, read_examples
from llava.demo.tower_inputs import TowerInputs, read_pixels
from llava.demo.tower_lora import add_lora, merge_lora
from llava.demo.tower_targets import GROUPS, TargetNames
from llava.demo.tower_training import TOWERS, Data, TowerWithHead, Training, build_towers, evaluate
from llava.errors import CheckpointError, OptionError
from llava.files import atomic_folder, file_errors, make_folder, write_json
from llava.model.checkpoint_files import read_json
from llava.model.checkpoint_layout import memory_names
from llava.model.configuration import LlavaConfig
from llava.model.multimodal_encoder.base import VisionTower
from llava.model.multimodal_encoder.builder import read_vision_tower

CHECKPOINT, HEADS, METRICS, INPUTS = "checkpoint.pt", "heads.safetensors", "metrics.json", "inputs"
_CALIBRATION_IMAGES = 1024


def write_result(
    out: Path, towers: Mapping[str, TowerWithHead], config: LlavaConfig, names: TargetNames, metrics: Mapping[str, Any]
) -> None:
    """Writes each tower as a folder that ``read_vision_tower`` opens, and beside them the heads and their metrics."""
    for name, tower in towers.items():
        folder = out / name
        if folder.exists():
            with file_errors(folder, "replaced"):
                shutil.rmtree(folder)
        with atomic_folder(folder) as partial:
            tower.tower.save_pretrained(partial)
            write_json(partial / "preprocessor_config.json", config.mm_image_processor, indent=2)
    heads = {f"{name}.{key}": value for name, tower in towers.items() for key, value in tower.head.state_dict().items()}
    save_file(heads, out / HEADS, {"targets": json.dumps(asdict(names), ensure_ascii=False)})
    write_json(out / METRICS, metrics, indent=2)


def load_tower(tower: VisionTower, folder: Path) -> None:
    """Reads the weights of a tower that an earlier run has written.

    Raises:
        CheckpointError: There is none, or it is of another config.
    """
    source = read_vision_tower(str(folder))
    names = memory_names(tower)
    needed = {stored: tuple(tower.state_dict()[name].shape) for stored, name in names.items()}
    if {name: tuple(tensor.shape) for name, tensor in source.tensors.items()} != needed:
        raise CheckpointError(f"--start: the tower in {folder} is not the one that --config describes")
    tower.load_state_dict({names[stored]: tensor[...] for stored, tensor in source.tensors.items()})


def loss_weights(text: str) -> dict[str, float]:
    """Reads ``verdict=1,caption=0.5``; ``none`` is an empty mapping.

    Raises:
        argparse.ArgumentTypeError: A group is unknown or a weight is no number that is 0 or more.
    """
    weights = {}
    for part in [] if text == "none" else text.split(","):
        group, _, value = part.partition("=")
        try:
            weights[group.strip()] = float(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{part!r} is not of the form group=weight") from None
    unknown = [group for group in weights if group not in (*GROUPS, FACL)]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown target group {unknown[0]!r}; known: {', '.join((*GROUPS, FACL))}")
    if any(not 0 <= weight < math.inf for weight in weights.values()):
        raise argparse.ArgumentTypeError("a weight must be 0 or more")
    return {group: weight for group, weight in weights.items() if weight > 0}


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = OptionParser(prog="python -m llava.demo.towers", description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, nargs="+", required=True, help=f"record files, or folders that hold {RECORDS_FILE}")
    add("--image_folder", type=Path, help="folder of the records' images (default: that of their file)")
    add("--config", type=Path, required=True, help="config.json of the model whose towers are to be trained")
    add("--start", type=Path, metavar="FOLDER", help="output of an earlier run, whose towers are trained further")
    add(
        "--lora_r",
        type=int,
        default=0,
        help="train the CLIP tower of --start by LoRA of this rank, merged when it is written (default 0: whole)",
    )
    add("--output_dir", type=Path, required=True, help="where towers, heads, metrics and the checkpoint are written")
    add("--epochs", type=float, default=4.0, help="passes over the images (default 4)")
    add(
        "--summary_epochs",
        type=float,
        default=0.0,
        help="passes in which the summary of a second tower of type residual, if it has one, is first trained by "
        "itself (default 0)",
    )
    add("--max_steps", type=int, help="stop after so many steps, if that is less")
    add("--batch_size", type=int, default=32, help="images a step (default 32)")
    add("--learning_rate", type=float, default=1e-3, help="highest rate; warmup, then a cosine to 0 (default 1e-3)")
    add("--warmup_ratio", type=float, default=0.03, help="share of the steps that warm up (default 0.03)")
    add("--weight_decay", type=float, default=0.05, help="of matrices (default 0.05)")
    add("--max_grad_norm", type=float, default=1.0, help="each tower's gradient is clipped to this norm (default 1)")
    groups = f"{', '.join(GROUPS)}; {FACL}: contrast with the texts, by the config's field contrast"
    for name, default in (("vision_tower", "caption=1"), ("dino_tower", "verdict=1,attributes=1,reasoning=1")):
        add(
            f"--{name}_loss",
            type=loss_weights,
            default=default,
            help=f"weight of each group of targets ({groups}), or none to leave this tower out (default {default})",
        )
    add(
        "--outliers",
        "--strangers",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the real images that are moved to where no image is and called fake, so that the second "
        "tower does not call everything real that it has not seen; for a tower of type residual (default 0)",
    )
    add("--max_words", type=int, default=200, help="most words of each stage that are targets (default 200)")
    add("--min_word_share", type=float, default=0.005, help="share of answers that hold such a word (default 0.005)")
    add("--validation_share", type=float, default=0.02, help="share of the records for validation (default 0.02)")
    add("--seed", type=int, default=0, help="of weights, split and order (default 0)")
    add("--bf16", action="store_true", help="compute in bfloat16 where that is safe; faster on most machines")
    add("--device", default="auto", help="auto (default), cpu, cuda, …")
    add("--threads", type=int, help="threads of the CPU (default: all)")
    add("--workers", type=int, default=2, help="threads that decode images (default 2)")
    add("--save_minutes", type=float, default=2.0, help="minutes between checkpoints (default 2)")
    add(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="auto (default): resume from the checkpoint in the output folder, if any; never: start again",
    )
    return parser


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Trains towers as the command line says; returns their metrics on the validation records.

    Raises:
        UserError: Something in the options or the data is wrong; the message says what.
    """
    _check(options)
    try:
        config = LlavaConfig.from_dict(read_json(options.config))
    except StrictDataclassError as error:
        raise CheckpointError(f"--config {options.config} describes no model: {error.__cause__ or error}") from error
    examples = read_examples(options.data, options.image_folder)
    shuffled = torch.randperm(len(examples), generator=torch.Generator().manual_seed(options.seed)).tolist()
    examples = [examples[index] for index in shuffled]
    held_out = round(options.validation_share * len(examples))
    if held_out == len(examples):
        raise OptionError(f"--validation_share {options.validation_share} holds out all {held_out} records")
    answers = [example.answer for example in examples]
    names = TargetNames.of_answers(answers[: len(answers) - held_out], options.max_words, options.min_word_share)
    torch.manual_seed(options.seed)
    wanted = {name: weights for name in TOWERS if (weights := getattr(options, f"{name}_loss"))}
    towers = build_towers(config, names, wanted)
    second = towers.get("dino_tower")
    can_have_outliers = second is not None and isinstance(second.tower, ResidualVisionTower)
    if options.outliers and not (can_have_outliers and wanted["dino_tower"].get("verdict")):
        raise OptionError("--outliers is for a second tower of type residual that has a verdict loss")
    has_summary = second is not None and isinstance(getattr(second.tower, "whole_layer", None), CropSummary)
    if options.summary_epochs and not has_summary:
        raise OptionError("--summary_epochs is for a second tower of type residual whose config has a summary")
    for name, tower in towers.items():
        print(f"{name}: {sum(p.numel() for p in tower.tower.parameters()):,} parameters")
    make_folder(options.output_dir, "--output_dir")
    # Everything is written once before hours of training, so that nothing is lost to a tower that cannot be saved.
    with TemporaryDirectory(dir=options.output_dir, prefix=".trial_") as folder:
        write_result(Path(folder), towers, config, names, {})
    device = _device(options.device)
    images = [example.image for example in examples]
    checkpoint = options.output_dir / CHECKPOINT
    # Calibrated in a resumed run too: the inputs that were kept are known by it.
    sample = torch.cat([read_pixels([image], config) for image in images[:_CALIBRATION_IMAGES]])
    for name, tower in towers.items():
        if options.start:
            load_tower(tower.tower, options.start / name)
        else:
            tower.tower.calibrate(sample)
        if options.lora_r and not add_lora(tower.tower, options.lora_r):
            raise OptionError(f"--lora_r is for a CLIP tower; give --{name}_loss none")
        tower.to(device)
    inputs = TowerInputs(
        images, config, [tower.tower for tower in towers.values()], options.output_dir / INPUTS, options.workers
    )
    targets = torch.stack([names.targets(answer) for answer in answers])
    training_data, validation_data = Data(inputs, targets, torch.arange(len(examples))).split(held_out)
    training = Training(towers, training_data, options)
    if options.resume == "auto" and checkpoint.is_file():
        training.resume(checkpoint)
        print(f"resumed from {checkpoint} at step {training.step} of {training.total_steps}")
    elif options.summary_epochs:
        training.train_summary(checkpoint)
    training.run(checkpoint)
    training.save(checkpoint)
    for tower in towers.values():
        merge_lora(tower.tower)
    accuracy = {
        name: evaluate(tower, validation_data, names, options.batch_size) if held_out else {}
        for name, tower in towers.items()
    }
    metrics = {"steps": training.step, "examples": len(training_data), "held_out": held_out, "towers": accuracy}
    write_result(options.output_dir, towers, config, names, metrics)
    return metrics


def _check(options: argparse.Namespace) -> None:
    for name in ("epochs", "batch_size", "learning_rate", "max_grad_norm", "max_steps"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise OptionError(f"--{name} must be more than 0, not {value}")
    if not 0 <= options.summary_epochs < math.inf:
        raise OptionError(f"--summary_epochs must be 0 or more, not {options.summary_epochs}")
    if options.lora_r < 0 or (options.lora_r and not options.start):
        raise OptionError("--lora_r is the rank, 1 or more, of updates of a trained tower, which --start must name")
    for name in ("validation_share", "warmup_ratio", "min_word_share", "outliers"):
        if not 0 <= getattr(options, name) < 1:
            raise OptionError(f"--{name} must be from 0 up to but not including 1, not {getattr(options, name)}")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"--device {name}: {str(error).splitlines()[0]}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    options = build_parser().parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    return run_cli(lambda: print(json.dumps(train(options), indent=2)))


if __name__ == "__main__":
    sys.exit(main())
