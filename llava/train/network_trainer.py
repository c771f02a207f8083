"""The loop of a plain network: cross-entropy over its classes, an order that resumes, validation, checkpoints."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler

from llava.cli import progress
from llava.data.labelled import LabelledImage
from llava.errors import DataError, ImageReadError
from llava.images import load_image
from llava.systems.base import NetworkTraining
from llava.train import checkpointing
from llava.train.arguments import TrainingArguments
from llava.train.logging import check_finite
from llava.train.saving_trainer import SavingTrainer

_PADDED = -1
"""Label of what only fills the last batch of a process."""


class NetworkSample(NamedTuple):
    """What a network takes for one image, and its class."""

    pixels: Tensor
    label: int


class LabelledDataset(Dataset[NetworkSample]):
    """Labelled images as a network takes them.

    Args:
        images: The images.
        training: Prepares them.
        seed: Of augmentation and of a video's frames, with the number of the draw; None for images as they are used.
    """

    def __init__(self, images: Sequence[LabelledImage], training: NetworkTraining, seed: int | None) -> None:
        self.images = images
        self.training = training
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: int) -> NetworkSample:
        """Returns a sample.

        Args:
            draw: The image's index, plus the length for each epoch before: one draw is the same in every process.

        Raises:
            DataError: Its image cannot be read.
        """
        image = self.images[draw % len(self.images)]
        random = None if self.seed is None else Random(f"{self.seed}/{draw}")
        try:
            pixels = load_image(image.choose(random))
        except ImageReadError as error:
            raise DataError(f"{image.origin}: {error}") from error
        return NetworkSample(self.training.prepare(pixels, random), image.label)


class DrawSampler(Sampler[int]):
    """Gives each epoch's draws in random order, by seed and epoch alone, so that a resumed run finds it again."""

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose draws come next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.length, generator=generator)
        return iter((order + self.epoch * self.length).tolist())


def collate_samples(samples: Sequence[NetworkSample]) -> dict[str, Tensor]:
    """Returns ``pixels`` ``[B, …]`` and ``classes`` ``[B]``."""
    pixels = torch.stack([sample.pixels for sample in samples])
    return {"pixels": pixels, "classes": torch.tensor([sample.label for sample in samples])}


class NetworkTrainer(SavingTrainer):
    """Trains a plain network.

    Args:
        training: The network and how it is trained.
        args: Options.
        train_dataset: Images to train on.
        eval_dataset: Images to validate on, or None.
        export: Writes the network as a folder.
        published_optimizer: Whether the network's own optimizer goes before the one that the options name.
    """

    args: TrainingArguments
    control: Any

    def __init__(
        self,
        training: NetworkTraining,
        args: TrainingArguments,
        *,
        train_dataset: LabelledDataset,
        eval_dataset: LabelledDataset | None,
        export: Callable[[Path], None],
        published_optimizer: bool,
    ) -> None:
        super().__init__(
            model=training.network,
            args=args,
            data_collator=collate_samples,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
        )
        self.model_accepts_loss_kwargs = False
        self.training = training
        self.export = export
        self.published_optimizer = published_optimizer
        self._sums: dict[str, Tensor] = {}
        self._since = time.perf_counter()

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        return DrawSampler(len(dataset), self.args.seed if self.args.data_seed is None else self.args.data_seed)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Makes the network's own optimizer, or else the one that the options name."""
        if self.optimizer is None and self.published_optimizer:
            self.optimizer = self.training.optimizer(self.args.learning_rate, self.args.weight_decay)
        made: torch.optim.Optimizer = self.optimizer or super().create_optimizer(model)
        return made

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Returns the mean cross-entropy of a micro-batch."""
        logits_BK = model(inputs["pixels"]).float()
        loss = F.cross_entropy(logits_BK, inputs["classes"])
        count = torch.tensor(float(len(logits_BK)), device=loss.device)
        right = (logits_BK.argmax(1) == inputs["classes"]).sum().float()
        for name, value in (("class_total", loss.detach() * count), ("class_items", count), ("right", right)):
            self._sums[name] = value + self._sums.get(name, 0.0)
        return (loss, logits_BK) if return_outputs else loss

    # --- logs and checks

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to each training log the accuracy on the images since the last one, and the speed."""
        if "loss" in logs and self._sums:
            sums = self._checked_sums()
            seconds = time.perf_counter() - self._since
            logs |= {
                "accuracy": sums["right"] / sums["class_items"],
                "images_per_s": sums["class_items"] / seconds,
            }
            self._sums, self._since = {}, time.perf_counter()
        super().log(logs, start_time)

    def _checked_sums(self) -> dict[str, float]:
        sums = self.reduced(self._sums)
        if not self.args.fp16:  # whose scaling of the loss leaves out steps that are not finite
            output, is_main = Path(str(self.args.output_dir)), self.is_world_process_zero()
            check_finite(sums, step=self.state.global_step, output=output, is_main=is_main)
        return sums

    def check_state(self) -> None:
        """Checks the steps since the last log, and the weights, before something is written."""
        if self._sums:
            self._checked_sums()
        super().check_state()

    # --- validation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Returns the loss and the metrics of ``class_metrics`` over the validation images.

        The best network so far, by balanced accuracy and then by loss, is kept in ``<output_dir>/best``.
        """
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        logits_NK, classes_N = self._predict(dataset)
        metrics = {"loss": float(F.cross_entropy(logits_NK, classes_N)), **class_metrics(logits_NK, classes_N)}
        logged = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(logged)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logged)
        folder = Path(str(self.args.output_dir)) / checkpointing.BEST
        is_best = checkpointing.is_best(folder, metrics["balanced_accuracy"], metrics["loss"])
        self.accelerator.wait_for_everyone()  # all have read the note before one writes it
        if is_best:
            self.export_to(folder)
            if self.args.should_save:
                checkpointing.note_best(folder, self.state.global_step, metrics["balanced_accuracy"], metrics["loss"])
        self._since = time.perf_counter()
        return logged

    @torch.no_grad()
    def _predict(self, dataset: LabelledDataset) -> tuple[Tensor, Tensor]:
        """Returns logits and classes of all images; every process has all."""
        was_training = self.model.training
        self.model.eval()
        rank, world, size = self.args.process_index, self.args.world_size, self.args.per_device_eval_batch_size
        logits, classes = [], []
        rounds = math.ceil(len(dataset) / (world * size))
        for number in progress(range(rounds), desc="validation", disable=rank != 0, leave=False):
            first = (number * world + rank) * size
            kept = [dataset[index] for index in range(first, min(first + size, len(dataset)))]
            filler = [NetworkSample(dataset[0].pixels, _PADDED)] * (size - len(kept)) if world > 1 else []
            batch = self._prepare_inputs(collate_samples([*kept, *filler]))
            with self.compute_loss_context_manager():
                found = self.model(batch["pixels"]).float()
            logits.append(self.accelerator.gather(found).cpu())
            classes.append(self.accelerator.gather(batch["classes"]).cpu())
        self.model.train(was_training)
        all_logits, all_classes = torch.cat(logits), torch.cat(classes)
        return all_logits[all_classes != _PADDED], all_classes[all_classes != _PADDED]

    # --- checkpoints

    def _own_state(self) -> dict[str, Tensor]:
        frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in frozen}

    def trained_state(self) -> dict[str, Tensor]:
        """Returns trained parameters and all buffers, such as a batch norm's statistics."""
        return self._own_state()

    def load_state(self, checkpoint: Path) -> None:
        """Reads trained parameters and buffers of a checkpoint."""
        checkpointing.load_trained(self._own_state(), checkpoint)

    def export_to(self, folder: Path) -> None:
        """Writes the network as a folder.

        Raises:
            UserError: Trained weights are NaN or infinite.
        """
        self.check_state()
        if self.args.should_save:
            self.export(folder)
        self.accelerator.wait_for_everyone()


def class_metrics(logits_NK: Tensor, classes_N: Tensor) -> Mapping[str, float]:
    """Returns accuracy, balanced accuracy over the classes that occur, and for two classes the area under the ROC."""
    predicted_N = logits_NK.argmax(1)
    recalls = [(predicted_N[classes_N == k] == k).double().mean() for k in classes_N.unique().tolist()]
    metrics = {
        "accuracy": float((predicted_N == classes_N).double().mean()),
        "balanced_accuracy": float(torch.stack(recalls).mean()),
    }
    if logits_NK.shape[1] == 2 and len(recalls) == 2:
        scores_N = (logits_NK[:, 1] - logits_NK[:, 0]).double()
        metrics["auroc"] = _auroc(scores_N[classes_N == 1], scores_N[classes_N == 0])
    return metrics


def _auroc(positives_M: Tensor, negatives_N: Tensor) -> float:
    """Share of pairs in which the positive has the higher score, ties counted half."""
    ordered = negatives_N.sort().values
    below = torch.searchsorted(ordered, positives_M, right=False)
    not_above = torch.searchsorted(ordered, positives_M, right=True)
    return float((below + not_above).double().mean() / 2 / len(ordered))
