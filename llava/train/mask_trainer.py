"""The loop of a network that says where images were changed: its own losses, on images with masks."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from llava.errors import DataError, ImageReadError
from llava.images import load_image
from llava.labels import FAKE
from llava.model.objective import LossTerm
from llava.systems.base import MaskTraining
from llava.tampered import TamperedImage, read_tampered
from llava.train import checkpointing
from llava.train.arguments import TrainingArguments
from llava.train.logging import mean_losses
from llava.train.network_trainer import NetworkTrainer

logger = logging.getLogger(__name__)


class MaskDataset(Dataset[Any]):
    """Changed images with their masks, as a network takes them.

    Args:
        images: The images.
        training: Makes samples of them.
        seed: Of what is drawn for a sample, with the number of the draw; None draws the same for each image always.
    """

    def __init__(self, images: Sequence[TamperedImage], training: MaskTraining, seed: int | None) -> None:
        self.images = images
        self.training = training
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: int) -> Any:
        """Returns a sample.

        Args:
            draw: The image's index, plus the length for each epoch before: one draw is the same in every process.

        Raises:
            DataError: Its image or mask cannot be read.
        """
        index = draw % len(self.images)
        image = self.images[index]
        try:
            pixels = load_image(image.image)
        except ImageReadError as error:
            raise DataError(str(error)) from error
        random = Random(f"{index}" if self.seed is None else f"{self.seed}/{draw}")
        return self.training.sample(image, pixels, random)


def read_changed_images(paths: Sequence[str], training: MaskTraining) -> list[TamperedImage]:
    """Lists the changed images of data sets, those whose mask is not known left out.

    Raises:
        DataError: There is none.
    """
    images = [image for path in paths for image in read_tampered(Path(path), described_by=training.described_by)]
    changed = [image for image in images if image.label == FAKE and image.masks]
    if not changed:
        raise DataError(f"{', '.join(paths)}: of {len(images)} images none is changed and has a mask")
    without = sum(image.label == FAKE for image in images) - len(changed)
    if without:
        logger.warning("%d changed images have no mask and are left out", without)
    found: list[TamperedImage] = training.described(changed)
    silent = sum(image.description is None for image in found)
    if silent:
        logger.warning(
            "%d of %d images are not described; they are asked about without a description", silent, len(found)
        )
    return found


class MaskTrainer(NetworkTrainer):
    """Trains a network on masks.

    Args:
        training: The network and how it is trained.
        args: Options.
        train_dataset: Images to train on.
        eval_dataset: Images to validate on, or None.
        export: Writes the network as a folder.
    """

    def __init__(
        self,
        training: MaskTraining,
        args: TrainingArguments,
        *,
        train_dataset: MaskDataset,
        eval_dataset: MaskDataset | None,
        export: Callable[[Path], None],
    ) -> None:
        parts: Any = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        own: Any = training
        super().__init__(own, args, **parts, export=export, published_optimizer=False)
        self.data_collator = training.collate

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Returns the weighted sum of the losses' means over a micro-batch."""
        terms: Mapping[str, LossTerm] = model(**inputs)
        for name, term in terms.items():
            for key, value in ((f"{name}_total", term.total), (f"{name}_items", term.items)):
                self._sums[key] = value.detach().float() + self._sums.get(key, 0.0)
        loss = torch.stack([term.weight * term.mean for term in terms.values()]).sum()
        return (loss, terms) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to each training log the losses since the last one, each by itself."""
        if "loss" in logs and self._sums:
            losses = mean_losses(self._checked_sums())
            seconds, self._since = time.perf_counter() - self._since, time.perf_counter()
            logs |= {f"{name}_loss": round(value, 6) for name, value in losses.items()}
            logs["seconds"] = round(seconds, 3)
            self._sums = {}
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Returns the losses over the validation images, with answers given.

        The network with the lowest sum of losses so far is kept in ``<output_dir>/best``.
        """
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        was_training = self.model.training
        sums: dict[str, float] = {}
        weights: dict[str, float] = {}
        self.model.eval()
        size = self.args.per_device_eval_batch_size
        for first in range(0, len(dataset), size):
            samples = [dataset[index] for index in range(first, min(first + size, len(dataset)))]
            batch = self._prepare_inputs(self.training_collate(samples))
            with self.compute_loss_context_manager():
                terms: Mapping[str, LossTerm] = self.model(**batch)
            for name, term in terms.items():
                weights[name] = term.weight
                for key, value in ((f"{name}_total", term.total), (f"{name}_items", term.items)):
                    sums[key] = float(value) + sums.get(key, 0.0)
        self.model.train(was_training)
        losses = mean_losses(sums)
        loss = sum(weights[name] * value for name, value in losses.items())
        logged = {f"{metric_key_prefix}_loss": loss}
        logged |= {f"{metric_key_prefix}_{name}_loss": value for name, value in losses.items()}
        self.log(logged)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logged)
        self._keep_best(loss)
        return logged

    def training_collate(self, samples: Sequence[Any]) -> dict[str, Tensor]:
        """Joins samples to a batch."""
        collate: Any = self.data_collator
        batch: dict[str, Tensor] = collate(samples)
        return batch

    def _keep_best(self, loss: float) -> None:
        folder = Path(str(self.args.output_dir)) / checkpointing.BEST
        is_best = checkpointing.is_best(folder, 0.0, loss)
        self.accelerator.wait_for_everyone()
        if is_best:
            self.export_to(folder)
            if self.args.should_save:
                checkpointing.note_best(folder, self.state.global_step, 0.0, loss)
        self._since = time.perf_counter()
