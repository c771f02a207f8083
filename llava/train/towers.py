"""Trains the vision towers of a model by themselves, on what the answers of training records tell.

    python -m llava.train.towers --data records.json --config model_config.json --output_dir OUT

The first stage of training a model from scratch: each tower gets a linear head on the mean of its patch features, and
learns to say whether the picture is fake, which forgery attributes it has, and which frequent words its caption and its
reasoning use. The second stage trains the language model on the towers, frozen. OUT/vision_tower and OUT/dino_tower can
then be given wherever a tower is named; OUT/heads.safetensors holds the heads, OUT/metrics.json what they reach on
records that were held out. A run that was stopped, however, goes on where it last saved.
"""

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.cli import OptionParser, run_cli
from llava.data.records import read_records
from llava.errors import DataError
from llava.files import atomic_folder
from llava.images import load_image
from llava.mm_utils import process_images
from llava.model.checkpoint_files import read_json
from llava.model.configuration import LlavaConfig
from llava.model.multimodal_encoder.base import PixelFormat, VisionTower
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.residual_encoder import ResidualVisionTower
from llava.systems.fakereasoning.answer import ParsedAnswer
from llava.train.strangers import choose_strangers, estrange
from llava.train.tower_targets import GROUPS, TargetNames

RECORDS_FILE = "forgery_reasoning_cot.json"
TOWERS = {"vision_tower": "vision_tower_config", "dino_tower": "dino_tower_config"}
"""Towers of a model, which are also the folders they are written to, and the config field of each."""
CHECKPOINT, HEADS, METRICS = "checkpoint.pt", "heads.safetensors", "metrics.json"
_CALIBRATION_IMAGES = 1024
_LOG_EVERY = 50
_VERDICT = 0
"""Place of the target that says whether a picture is fake."""
_RUN_OPTIONS = (
    "seed",
    "epochs",
    "max_steps",
    "batch_size",
    "learning_rate",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "bf16",
    "vision_tower_loss",
    "dino_tower_loss",
    "strangers",
    "max_words",
    "min_word_share",
    "validation_share",
)


@dataclass(frozen=True)
class Example:
    """A picture's file and what is said of it."""

    image: Path
    answer: ParsedAnswer


@dataclass(frozen=True)
class Data:
    """Decoded examples.

    Attributes:
        levels: Colours 0 to 255, uint8 ``[N, 3, S, S]``.
        targets: Bool ``[N, K]``.
    """

    levels: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.levels)

    def split(self, last: int) -> "tuple[Data, Data]":
        """Cuts off the last examples."""
        at = len(self) - last
        return Data(self.levels[:at], self.targets[:at]), Data(self.levels[at:], self.targets[at:])


class TaughtTower(nn.Module):
    """A tower with a linear head on the mean of its patch features.

    Args:
        tower: The tower.
        weights: Weight of each target's loss ``[K]``.
    """

    weights: Tensor

    def __init__(self, tower: VisionTower, weights: Tensor) -> None:
        super().__init__()
        self.tower = tower
        self.head = nn.Linear(tower.hidden_size, len(weights))
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, shared_pixels: Tensor) -> Tensor:
        """Returns the logit of every target ``[B, K]``."""
        return self.head(self.tower(shared_pixels).features.mean(1))

    def with_strangers(self, shared_pixels: Tensor, real_B: Tensor, strange_B: Tensor) -> Tensor:
        """Returns the same where some of the real pictures are made strangers."""
        tower = self.tower
        assert isinstance(tower, ResidualVisionTower)
        measured = estrange(tower.measure(shared_pixels), real_B, strange_B)
        return self.head(tower.encode_measured(measured).features.mean(1))

    def loss(self, logits: Tensor, targets: Tensor, strange_B: Tensor | None = None) -> Tensor:
        """Returns the weighted sum of the targets' losses, averaged over the batch; a stranger is fake and no more."""
        each = F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none")
        if strange_B is not None:
            fake = F.softplus(-logits[:, _VERDICT].float())
            nothing_else = torch.zeros_like(each)
            nothing_else[:, _VERDICT] = fake
            each = torch.where(strange_B[:, None], nothing_else, each)
        return (each * self.weights).sum(1).mean()


def read_examples(sources: Sequence[Path], image_folder: Path | None) -> list[Example]:
    """Reads records in the layout of the published training file.

    Args:
        sources: Files, or folders that hold ``RECORDS_FILE``.
        image_folder: What the pictures' names are relative to; by default the folder of their file.

    Raises:
        DataError: A file is missing or is not of that layout, or a record has no image or no verdict.
    """
    examples = []
    for source in sources:
        file = source / RECORDS_FILE if source.is_dir() else source
        for record in read_records([file]):
            if record.image is None:
                raise DataError(f"{record.origin}: there is no image, so a tower cannot learn from it")
            answer = record.conclusion
            if answer.verdict is None:
                raise DataError(f"{record.origin}: {answer.problem}")
            examples.append(Example((image_folder or file.parent) / record.image, answer))
    return examples


def read_pixels(images: Sequence[Path], config: LlavaConfig, workers: int) -> Tensor:
    """Decodes pictures as the model does, up to normalisation: uint8 ``[N, 3, S, S]``.

    Raises:
        ImageReadError: A picture cannot be read.
        ValueError: There is no memory for all of them.
    """
    as_levels = {"do_rescale": False, "do_normalize": False}
    processor = CLIPImageProcessorPil(**{**(config.mm_image_processor or {}), **as_levels})
    side = config.pixel_format()["size"]
    try:
        levels = torch.empty(len(images), 3, side, side, dtype=torch.uint8)
    except RuntimeError as error:
        raise ValueError(f"no memory for {len(images)} pictures of {side}x{side} pixels; give fewer records") from error

    def read(index: int) -> None:
        pixels = process_images([load_image(images[index])], processor, config)[0]
        levels[index] = pixels.round().clamp(0, 255).to(torch.uint8)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        for _ in tqdm(pool.map(read, range(len(images))), total=len(images), desc="reading", unit="image"):
            pass
    return levels


def shared_pixels(levels: Tensor, shared: PixelFormat, device: torch.device) -> Tensor:
    """Normalises decoded pictures as the model's image processor does, float32 ``[B, 3, S, S]``."""
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (shared.mean, shared.std))
    return (levels.to(device).float() / 255 - mean) / std


def build_towers(
    config: LlavaConfig, names: TargetNames, loss_weights: Mapping[str, Mapping[str, float]]
) -> dict[str, TaughtTower]:
    """Builds the towers that have a loss, each with its head, with random weights.

    Raises:
        ValueError: The config has no such tower.
    """
    shared = PixelFormat(**config.pixel_format())
    selection = {"select_layer": config.mm_vision_select_layer, "select_feature": config.mm_vision_select_feature}
    taught = {}
    for name, of_groups in loss_weights.items():
        tower_config = getattr(config, TOWERS[name])
        if tower_config is None:
            raise ValueError(
                f"the config has no {TOWERS[name]}; give --{name}_loss none to train the other tower alone"
            )
        own = selection if name == "vision_tower" else {}
        taught[name] = TaughtTower(build_vision_tower({**tower_config, **own}, shared), names.weights(of_groups))
    if not taught:
        raise ValueError("no tower has a loss, so there is nothing to train")
    return taught


class Training:
    """A run: towers, optimizer, and how far it has come.

    Args:
        towers: Towers with their heads, by name, on their device.
        data: Training examples.
        shared: Format of the shared pixels.
        options: The command line's.
    """

    def __init__(
        self, towers: dict[str, TaughtTower], data: Data, shared: PixelFormat, options: argparse.Namespace
    ) -> None:
        self.towers, self.data, self.shared, self.options = towers, data, shared, options
        self.modules = nn.ModuleDict(towers)
        self.device = next(self.modules.parameters()).device
        self.step = 0
        self.total_steps = max(1, round(options.epochs * len(data) / options.batch_size))
        if options.max_steps is not None:
            self.total_steps = min(self.total_steps, options.max_steps)
        decayed = [p for p in self.modules.parameters() if p.ndim > 1]
        kept = [p for p in self.modules.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": kept, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.98))

    def run(self, save_to: Path) -> None:
        """Trains to the end, and saves itself every ``save_minutes``."""
        saved, losses = time.monotonic(), dict.fromkeys(self.towers, 0.0)
        progress = tqdm(total=self.total_steps, initial=self.step, desc="training", unit="step")
        self.modules.train()
        for index in self._batches():
            for name, loss in self._train_step(index).items():
                losses[name] += (loss - losses[name]) * max(0.02, 1 / (self.step + 1))
            self.step += 1
            progress.update()
            if self.step % _LOG_EVERY == 0:
                progress.set_postfix({name: f"{loss:.4f}" for name, loss in losses.items()})
            if time.monotonic() - saved > 60 * self.options.save_minutes:
                self.save(save_to)
                saved = time.monotonic()
        progress.close()

    def _batches(self) -> Iterator[Tensor]:
        """Yields the indices of each batch that is still to come; the order hangs on seed and epoch alone."""
        size, number = self.options.batch_size, len(self.data)
        order, epoch = torch.empty(0, dtype=torch.long), -1
        for step in range(self.step, self.total_steps):
            picked = []
            for place in range(step * size, (step + 1) * size):
                if place // number != epoch:
                    epoch = place // number
                    generator = torch.Generator().manual_seed(self.options.seed + epoch)
                    order = torch.randperm(number, generator=generator)
                picked.append(order[place % number])
            yield torch.stack(picked)

    def _train_step(self, index: Tensor) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * self._rate()
        pixels = shared_pixels(self.data.levels[index], self.shared, self.device)
        targets = self.data.targets[index].to(self.device)
        losses = {}
        self.optimizer.zero_grad()
        for name, taught in self.towers.items():
            real, strange = ~targets[:, _VERDICT], None
            if name == "dino_tower" and self.options.strangers:
                strange = choose_strangers(real, self.options.strangers)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16):
                logits = taught(pixels) if strange is None else taught.with_strangers(pixels, real, strange)
            loss = taught.loss(logits, targets, strange)
            loss.backward()
            nn.utils.clip_grad_norm_(taught.parameters(), self.options.max_grad_norm)
            losses[name] = loss.item()
            if not math.isfinite(losses[name]):
                raise ValueError(f"the loss of {name} is {losses[name]} at step {self.step}; lower --learning_rate")
        self.optimizer.step()
        return losses

    def _rate(self) -> float:
        """Returns the learning rate's share now: linear warmup, then half a cosine."""
        warmup = max(1, round(self.options.warmup_ratio * self.total_steps))
        if self.step < warmup:
            return (self.step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * (self.step - warmup) / max(1, self.total_steps - warmup))

    def save(self, file: Path) -> None:
        """Writes all that a resumed run needs, whole or not at all."""
        state = {
            "step": self.step,
            "run": run_identity(self.options, self.towers, len(self.data)),
            "towers": self.modules.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        partial = file.with_name(f".{file.name}.partial")
        torch.save(state, partial)
        partial.replace(file)

    def resume(self, file: Path) -> None:
        """Goes on where the run that wrote ``file`` was.

        Raises:
            ValueError: It was another run.
        """
        state = torch.load(file, map_location=self.device, weights_only=True)
        own = run_identity(self.options, self.towers, len(self.data))
        differing = [f"{k} {state['run'].get(k)}, not {own[k]}" for k in own if state["run"].get(k) != own[k]]
        if differing:
            raise ValueError(f"{file} is of another run ({'; '.join(differing)}); remove it or name a new --output_dir")
        self.modules.load_state_dict(state["towers"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        torch.set_rng_state(state["rng"].cpu())


def run_identity(options: argparse.Namespace, towers: Mapping[str, TaughtTower], examples: int) -> dict[str, Any]:
    """Returns what a resumed run must have in common with the one that was stopped."""
    values = {name: getattr(options, name) for name in _RUN_OPTIONS}
    return {
        **values,
        "towers": {name: dict(taught.tower.config) for name, taught in towers.items()},
        "examples": examples,
    }


@torch.no_grad()
def evaluate(
    taught: TaughtTower, data: Data, shared: PixelFormat, names: TargetNames, batch_size: int
) -> dict[str, Any]:
    """Returns how well a head tells the targets of held-out examples.

    Returns:
        For each group of targets that has a loss, the mean over its targets of ``balanced_accuracy`` (over those that
        some of the examples have and some have not; 0.5 is chance), and their number.
    """
    taught.eval()
    device = next(taught.parameters()).device
    logits = [taught(shared_pixels(levels, shared, device)).cpu() for levels in data.levels.split(batch_size)]
    said, targets = torch.cat(logits) > 0, data.targets
    hits = (said & targets).sum(0) / targets.sum(0)
    rejections = (~said & ~targets).sum(0) / (~targets).sum(0)
    balanced = (hits + rejections) / 2
    reached: dict[str, Any] = {}
    parts = zip(GROUPS, balanced.split(names.sizes()), taught.weights.cpu().split(names.sizes()), strict=True)
    for group, values, weights in parts:
        known = values[values.isfinite() & (weights > 0)]
        if len(known):
            reached[group] = {"balanced_accuracy": round(known.mean().item(), 4), "targets": len(known)}
    return reached


def write_result(
    out: Path, towers: Mapping[str, TaughtTower], config: LlavaConfig, names: TargetNames, metrics: Mapping[str, Any]
) -> None:
    """Writes each tower as a folder that ``read_vision_tower`` opens, and beside them the heads and what they reach."""
    processor = json.dumps(config.mm_image_processor, indent=2) + "\n"
    for name, taught in towers.items():
        folder = out / name
        if folder.exists():
            shutil.rmtree(folder)
        with atomic_folder(folder) as partial:
            taught.tower.save_pretrained(partial)
            (partial / "preprocessor_config.json").write_text(processor, encoding="utf-8")
    heads = {
        f"{name}.{key}": value for name, taught in towers.items() for key, value in taught.head.state_dict().items()
    }
    save_file(heads, out / HEADS, {"targets": json.dumps(asdict(names), ensure_ascii=False)})
    (out / METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def loss_weights(text: str) -> dict[str, float]:
    """Reads ``verdict=1,caption=0.5``; ``none`` is nothing at all.

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
    unknown = [group for group in weights if group not in GROUPS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown target group {unknown[0]!r}; known: {', '.join(GROUPS)}")
    if any(not 0 <= weight < math.inf for weight in weights.values()):
        raise argparse.ArgumentTypeError("a weight must be 0 or more")
    return {group: weight for group, weight in weights.items() if weight > 0}


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = OptionParser(prog="python -m llava.train.towers", description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, nargs="+", required=True, help=f"record files, or folders that hold {RECORDS_FILE}")
    add("--image_folder", type=Path, help="folder of the records' pictures (default: that of their file)")
    add("--config", type=Path, required=True, help="config.json of the model whose towers are to be trained")
    add("--output_dir", type=Path, required=True, help="where towers, heads, metrics and the checkpoint are written")
    add("--epochs", type=float, default=4.0, help="passes over the pictures (default 4)")
    add("--max_steps", type=int, help="stop after so many steps, if that is less")
    add("--batch_size", type=int, default=32, help="pictures a step (default 32)")
    add("--learning_rate", type=float, default=1e-3, help="highest rate; warmup, then a cosine to 0 (default 1e-3)")
    add("--warmup_ratio", type=float, default=0.03, help="share of the steps that warm up (default 0.03)")
    add("--weight_decay", type=float, default=0.05, help="of matrices (default 0.05)")
    add("--max_grad_norm", type=float, default=1.0, help="each tower's gradient is cut to this norm (default 1)")
    groups = ", ".join(GROUPS)
    for name, default in (("vision_tower", "caption=1"), ("dino_tower", "verdict=1,attributes=1,reasoning=1")):
        add(
            f"--{name}_loss",
            type=loss_weights,
            default=default,
            help=f"weight of each group of targets ({groups}), or none to leave this tower out (default {default})",
        )
    add(
        "--strangers",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the real pictures that are moved to where no picture is and called fake, so that the second "
        "tower does not take for real what it has not seen; for a tower of type residual (default 0)",
    )
    add("--max_words", type=int, default=200, help="most words of each stage that are targets (default 200)")
    add("--min_word_share", type=float, default=0.005, help="share of answers that hold such a word (default 0.005)")
    add("--validation_share", type=float, default=0.02, help="share of the records that is held out (default 0.02)")
    add("--seed", type=int, default=0, help="of weights, split and order (default 0)")
    add("--bf16", action="store_true", help="compute in bfloat16 where that is safe; faster on most machines")
    add("--device", default="auto", help="auto (default), cpu, cuda, …")
    add("--threads", type=int, help="threads of the CPU (default: all)")
    add("--workers", type=int, default=2, help="threads that decode pictures (default 2)")
    add("--save_minutes", type=float, default=2.0, help="minutes between checkpoints (default 2)")
    add(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="auto (default): go on from the checkpoint in the output folder, if there is one; never: begin anew",
    )
    return parser


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Trains towers as the command line says; returns what they reach on the held-out records.

    Raises:
        ValueError: Something in the options or the data does not fit; the message says what.
    """
    _check(options)
    try:
        config = LlavaConfig.from_dict(read_json(options.config))
    except StrictDataclassError as error:
        raise ValueError(f"--config {options.config} describes no model: {error.__cause__ or error}") from error
    examples = read_examples(options.data, options.image_folder)
    shuffled = torch.randperm(len(examples), generator=torch.Generator().manual_seed(options.seed)).tolist()
    examples = [examples[index] for index in shuffled]
    held_out = round(options.validation_share * len(examples))
    if held_out == len(examples):
        raise ValueError(f"--validation_share {options.validation_share} holds out all {held_out} records")
    answers = [example.answer for example in examples]
    names = TargetNames.of_answers(answers[: len(answers) - held_out], options.max_words, options.min_word_share)
    torch.manual_seed(options.seed)
    wanted = {name: weights for name in TOWERS if (weights := getattr(options, f"{name}_loss"))}
    towers = build_towers(config, names, wanted)
    second = towers.get("dino_tower")
    can_have_strangers = second is not None and isinstance(second.tower, ResidualVisionTower)
    if options.strangers and not (can_have_strangers and wanted["dino_tower"].get("verdict")):
        raise ValueError("--strangers is for a second tower of type residual that has a verdict loss")
    for name, taught in towers.items():
        print(f"{name}: {sum(p.numel() for p in taught.tower.parameters()):,} parameters")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=options.output_dir, prefix=".trial_") as folder:
        write_result(Path(folder), towers, config, names, {})
    levels = read_pixels([example.image for example in examples], config, options.workers)
    data = Data(levels, torch.stack([names.targets(answer) for answer in answers]))
    learnt, held = data.split(held_out)
    shared, device = PixelFormat(**config.pixel_format()), _device(options.device)
    for taught in towers.values():
        taught.to(device)
    training = Training(towers, learnt, shared, options)
    checkpoint = options.output_dir / CHECKPOINT
    if options.resume == "auto" and checkpoint.is_file():
        training.resume(checkpoint)
        print(f"resumed from {checkpoint} at step {training.step} of {training.total_steps}")
    else:
        sample = shared_pixels(learnt.levels[:_CALIBRATION_IMAGES], shared, device)
        for taught in towers.values():
            taught.tower.calibrate(sample)
        training.save(checkpoint)
    training.run(checkpoint)
    training.save(checkpoint)
    reached = {
        name: evaluate(taught, held, shared, names, options.batch_size) if held_out else {}
        for name, taught in towers.items()
    }
    metrics = {"steps": training.step, "examples": len(learnt), "held_out": held_out, "towers": reached}
    write_result(options.output_dir, towers, config, names, metrics)
    return metrics


def _check(options: argparse.Namespace) -> None:
    for name in ("epochs", "batch_size", "learning_rate", "max_grad_norm", "max_steps"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name} must be more than 0, not {value}")
    for name in ("validation_share", "warmup_ratio", "min_word_share", "strangers"):
        if not 0 <= getattr(options, name) < 1:
            raise ValueError(f"--{name} must be from 0 up to but not including 1, not {getattr(options, name)}")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    options = build_parser().parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    return run_cli(lambda: print(json.dumps(train(options), indent=2)))


if __name__ == "__main__":
    sys.exit(main())
