"""Towers with heads, and the run that trains them."""

import argparse
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.cli import progress
from llava.demo.outliers import choose_outliers, make_outliers
from llava.demo.residual_encoder import CropSummary, ResidualVisionTower
from llava.demo.tower_contrast import FACL, TowerContrast
from llava.demo.tower_inputs import CROPS, LEVELS, TowerInputs, measures_of
from llava.demo.tower_targets import GROUPS, TargetNames
from llava.errors import CheckpointError, DataError, OptionError
from llava.files import atomic_file
from llava.model.configuration import LlavaConfig
from llava.model.contrast import ContrastSettings
from llava.model.multimodal_encoder.base import PixelFormat, VisionTower
from llava.model.multimodal_encoder.builder import build_vision_tower

TOWERS = {"vision_tower": "vision_tower_config", "dino_tower": "dino_tower_config"}
"""Towers of a model, which are also the folders they are written to, and the config field of each."""
_LOG_EVERY = 50
_SUMMARY_BATCH, _SUMMARY_DECAY = 128, 0.1
_VERDICT = 0
"""Index of the target that says whether an image is fake."""
_RUN_OPTIONS = (
    "seed",
    "epochs",
    "summary_epochs",
    "max_steps",
    "batch_size",
    "learning_rate",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "bf16",
    "vision_tower_loss",
    "dino_tower_loss",
    "outliers",
    "max_words",
    "min_word_share",
    "validation_share",
    "lora_r",
)


class TowerWithHead(nn.Module):
    """A tower with a linear head on the mean of its patch features.

    Args:
        tower: The tower.
        weights: Weight of each target's loss ``[K]``.
        contrast: What contrasts its images with texts, or None.
    """

    weights: Tensor

    def __init__(self, tower: VisionTower, weights: Tensor, contrast: TowerContrast | None = None) -> None:
        super().__init__()
        self.contrast = contrast
        self.tower = tower
        self.head = nn.Linear(tower.hidden_size, len(weights))
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Returns what ``read`` does, of what ``TowerInputs.of`` returns."""
        if isinstance(self.tower, ResidualVisionTower):
            return self.read(self.tower.encode_measures(measures_of(inputs)).features)
        return self.read(self.tower(inputs[LEVELS]).features)

    def read(self, features_BPC: Tensor) -> Tensor:
        """Returns the logit of every target and, with contrast, the images' projection behind them, ``[B, K + E]``."""
        seen_BC = features_BPC.mean(1)
        if self.contrast is None:
            return self.head(seen_BC)
        return torch.cat((self.head(seen_BC), self.contrast.image(seen_BC)), dim=1)

    def with_outliers(self, inputs: Mapping[str, Tensor], real_B: Tensor, outlier_B: Tensor) -> Tensor:
        """Returns the same where some of the real images are made outliers."""
        assert isinstance(self.tower, ResidualVisionTower)
        measures = make_outliers(measures_of(inputs), real_B, outlier_B)
        return self.read(self.tower.encode_measures(measures).features)

    def loss(self, logits: Tensor, targets: Tensor, outlier_B: Tensor | None = None) -> Tensor:
        """Returns the weighted sum of the targets' losses, averaged over the batch, and of the contrast.

        An outlier is fake and has no other target. ``logits`` are what ``read`` returns.
        """
        logits, projected = logits.split((len(self.weights), logits.shape[1] - len(self.weights)), dim=1)
        each = F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none")
        if outlier_B is not None:
            # softplus(-x) is -log sigmoid(x), the loss of the target 1; an outlier has no attributes and no words.
            verdict_alone = torch.zeros_like(each)
            verdict_alone[:, _VERDICT] = F.softplus(-logits[:, _VERDICT].float())
            each = torch.where(outlier_B[:, None], verdict_alone, each)
        loss = (each * self.weights).sum(1).mean()
        return loss if self.contrast is None else loss + self.contrast(projected, targets, outlier_B)


@dataclass(frozen=True)
class Data:
    """Examples.

    Attributes:
        inputs: What the towers are fed, by row.
        targets: Bool ``[N, K]``, by row.
        rows: Rows that this part of the data holds.
    """

    inputs: TowerInputs
    targets: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def split(self, last: int) -> "tuple[Data, Data]":
        """Splits off the last examples."""
        at = len(self) - last
        return replace(self, rows=self.rows[:at]), replace(self, rows=self.rows[at:])

    def batch(self, index: Tensor, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        """Returns inputs and targets of some examples, counted within this part."""
        rows = self.rows[index]
        return self.inputs.of(rows, device), self.targets[rows].to(device)


def build_towers(
    config: LlavaConfig, names: TargetNames, loss_weights: Mapping[str, Mapping[str, float]]
) -> dict[str, TowerWithHead]:
    """Builds the towers that have a loss, each with its head, with random weights.

    Raises:
        OptionError: The config has no such tower, or no tower has a loss, or contrast is asked for without settings.
        CheckpointError: The config's settings of contrast are wrong.
    """
    if any(of_groups.get(FACL) for of_groups in loss_weights.values()) and config.contrast is None:
        raise OptionError(f"{FACL} needs the config's field contrast, with temperature and intra_weight at least")
    shared = PixelFormat(**config.pixel_format())
    selection = {"select_layer": config.mm_vision_select_layer, "select_feature": config.mm_vision_select_feature}
    towers = {}
    for name, of_groups in loss_weights.items():
        tower_config = getattr(config, TOWERS[name])
        if tower_config is None:
            raise OptionError(
                f"the config has no {TOWERS[name]}; give --{name}_loss none to train the other tower only"
            )
        own = selection if name == "vision_tower" else {}
        tower = build_vision_tower({**tower_config, **own}, shared)
        contrast = None
        if weight := of_groups.get(FACL):
            settings = ContrastSettings.from_dict(config.contrast or {})
            contrast = TowerContrast(tower.hidden_size, names, settings, weight)
        towers[name] = TowerWithHead(tower, names.weights(of_groups), contrast)
    if not towers:
        raise OptionError("no tower has a loss, so there is nothing to train")
    return towers


class Training:
    """A run: towers, optimizer, and how far it has come.

    Args:
        towers: Towers with their heads, by name, on their device.
        data: Training examples.
        options: The command line's.
    """

    def __init__(self, towers: dict[str, TowerWithHead], data: Data, options: argparse.Namespace) -> None:
        self.towers, self.data, self.options = towers, data, options
        self.modules = nn.ModuleDict(towers)
        self.device = next(self.modules.parameters()).device
        self.step = 0
        self.total_steps = max(1, round(options.epochs * len(data) / options.batch_size))
        if options.max_steps is not None:
            self.total_steps = min(self.total_steps, options.max_steps)
        decayed = [p for p in self.modules.parameters() if p.ndim > 1 and p.requires_grad]
        kept = [p for p in self.modules.parameters() if p.ndim <= 1 and p.requires_grad]
        groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": kept, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.98))

    def train_summary(self, save_to: Path) -> None:
        """Trains the second tower's summary and its head by themselves, for ``summary_epochs``; saves itself.

        A perceptron needs many more passes than the blocks can be given, and they cost it a hundredth of theirs. The
        gate is closed, so that features are what the summary says alone. A run that is stopped here begins again.
        """
        tower = self.towers["dino_tower"]
        assert isinstance(tower.tower, ResidualVisionTower) and isinstance(tower.tower.whole_layer, CropSummary)
        summary, size = tower.tower.whole_layer, _SUMMARY_BATCH
        inputs, rows = self.data.inputs, self.data.rows
        crops = (inputs.kept(CROPS, part, self.device) for part in rows.split(size))
        moments_NF = torch.cat([summary.moments(part).half() for part in crops])
        targets_NK = self.data.targets[rows].to(self.device)
        parameters = [*summary.parameters(), *tower.tower.norm.parameters(), *tower.head.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=self.options.learning_rate, weight_decay=_SUMMARY_DECAY)
        steps = max(1, round(self.options.summary_epochs * len(self.data) / size))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = torch.Generator().manual_seed(self.options.seed)
        summary.train()
        for _ in progress(range(steps), desc="summary", unit="step"):
            index = torch.randint(len(self.data), (size,), generator=generator).to(self.device)
            features_BC = tower.tower.norm(summary(moments_NF[index].float()))
            loss = tower.loss(tower.read(features_BC[:, None]), targets_NK[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        self.save(save_to)

    def run(self, save_to: Path) -> None:
        """Trains to the end, and saves itself every ``save_minutes``."""
        saved, losses = time.monotonic(), dict.fromkeys(self.towers, 0.0)
        bar = progress(total=self.total_steps, initial=self.step, desc="training", unit="step")
        self.modules.train()
        for index in self._batches():
            for name, loss in self._train_step(index).items():
                losses[name] += (loss - losses[name]) * max(0.02, 1 / (self.step + 1))
            self.step += 1
            bar.update()
            if self.step % _LOG_EVERY == 0:
                bar.set_postfix({name: f"{loss:.4f}" for name, loss in losses.items()})
            if time.monotonic() - saved > 60 * self.options.save_minutes:
                self.save(save_to)
                saved = time.monotonic()
        bar.close()

    def _batches(self) -> Iterator[Tensor]:
        """Yields the indices of each batch that is still to come; the order depends on seed and epoch only."""
        size, number = self.options.batch_size, len(self.data)
        order, epoch = torch.empty(0, dtype=torch.long), -1
        for step in range(self.step, self.total_steps):
            picked = []
            # Batches run on across the end of an epoch, so that none is smaller; each epoch has its own order.
            for index in range(step * size, (step + 1) * size):
                if index // number != epoch:
                    epoch = index // number
                    generator = torch.Generator().manual_seed(self.options.seed + epoch)
                    order = torch.randperm(number, generator=generator)
                picked.append(order[index % number])
            yield torch.stack(picked)

    def _train_step(self, index: Tensor) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * self._rate()
        inputs, targets = self.data.batch(index, self.device)
        losses = {}
        self.optimizer.zero_grad()
        for name, tower in self.towers.items():
            real, outlier = ~targets[:, _VERDICT], None
            if name == "dino_tower" and self.options.outliers:
                outlier = choose_outliers(real, self.options.outliers)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16):
                logits = tower(inputs) if outlier is None else tower.with_outliers(inputs, real, outlier)
            loss = tower.loss(logits, targets, outlier)
            loss.backward()
            nn.utils.clip_grad_norm_(tower.parameters(), self.options.max_grad_norm)
            losses[name] = loss.item()
            if not math.isfinite(losses[name]):
                raise DataError(f"the loss of {name} is {losses[name]} at step {self.step}; lower --learning_rate")
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
        with atomic_file(file) as stream:
            torch.save(state, stream)

    def resume(self, file: Path) -> None:
        """Resumes the run that wrote ``file``.

        Raises:
            CheckpointError: It was another run.
        """
        state = torch.load(file, map_location=self.device, weights_only=True)
        own = run_identity(self.options, self.towers, len(self.data))
        differing = [f"{k} {state['run'].get(k)}, not {own[k]}" for k in own if state["run"].get(k) != own[k]]
        if differing:
            raise CheckpointError(
                f"{file} is of another run ({'; '.join(differing)}); remove it or name a new --output_dir"
            )
        self.modules.load_state_dict(state["towers"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        torch.set_rng_state(state["rng"].cpu())


def run_identity(options: argparse.Namespace, towers: Mapping[str, TowerWithHead], examples: int) -> dict[str, Any]:
    """Returns what a resumed run must have in common with the one that was stopped."""
    values = {name: getattr(options, name) for name in _RUN_OPTIONS}
    return {
        **values,
        "towers": {name: dict(tower.tower.config) for name, tower in towers.items()},
        "contrast": {name: vars(tower.contrast.settings) for name, tower in towers.items() if tower.contrast} or None,
        "examples": examples,
    }


@torch.no_grad()
def evaluate(tower: TowerWithHead, data: Data, names: TargetNames, batch_size: int) -> dict[str, Any]:
    """Returns how well a head tells the targets of held-out examples.

    Returns:
        For each group of targets that has a loss, the mean over its targets of ``balanced_accuracy`` (over those that
        some of the examples have and some have not; 0.5 is chance), and their number.
    """
    tower.eval()
    device = next(tower.parameters()).device
    batches = [data.batch(index, device) for index in torch.arange(len(data)).split(batch_size)]
    logits = torch.cat([tower(inputs).cpu() for inputs, _ in batches])
    predicted, targets = logits[:, : len(tower.weights)] > 0, data.targets[data.rows]
    hits = (predicted & targets).sum(0) / targets.sum(0)
    rejections = (~predicted & ~targets).sum(0) / (~targets).sum(0)
    balanced = (hits + rejections) / 2  # not finite where all examples have a target, or none has
    reached: dict[str, Any] = {}
    parts = zip(GROUPS, balanced.split(names.sizes()), tower.weights.cpu().split(names.sizes()), strict=True)
    for group, values, weights in parts:
        known = values[values.isfinite() & (weights > 0)]
        if len(known):
            reached[group] = {"balanced_accuracy": round(known.mean().item(), 4), "targets": len(known)}
    return reached
