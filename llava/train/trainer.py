"""The training loop: transformers' Trainer with this model's losses, order, optimizer groups, logs and checkpoints."""

import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ProgressCallback, TrainerState

from llava.constants import IGNORE_INDEX
from llava.data.collator import FEATURES, Sample
from llava.data.dataset import SupervisedDataset
from llava.gpu_ceilings import gpu_ceilings
from llava.model.language_model.llava_llama import LlavaOutput
from llava.model.llava_arch import TowerOutputs
from llava.model.probability_mapper import ProbabilityMapper
from llava.train.arguments import TrainingArguments
from llava.train.flops import BatchSize, Passes, TrainingFlops
from llava.train.lora import PROJECTORS, optimizer_groups, trainable_tensors

logger = logging.getLogger(__name__)

BEST = "best"
"""Folder of the best model so far, below the output folder."""
WEIGHTS_FILE = "trainable.safetensors"
WHOLE_FILE = "whole.json"
"""Written last into a checkpoint: without it, the checkpoint is not whole."""
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_COUNTS = (
    "lm_sum",
    "tokens",
    "mapper_sum",
    "rows",
    "correct",
    "verdicts",
    "positions",
    "squares",
    "places",
    "padded_squares",
    "images",
)
"""What is summed between two logs, see ``ForgeryTrainer._count``."""


class ForgeryTrainer(transformers.Trainer):
    """Trains a model with both losses.

    Args:
        model: The model, in PEFT's wrapper if it has adapters.
        args: Options.
        collator: Makes a batch of samples.
        train_dataset: Samples to train on.
        eval_dataset: Samples to validate on, or None.
        mapper: The model's probability mapper.
        order: Gives a sampler for the training samples, from the micro-batch and the micro-batches of an optimizer
            step; None for a random order.
        judge: Gives the verdict, 0 or 1 or None, on each of some validation samples; see ``llava.train.validation``.
        export: Writes the model's tensors (by their names in memory) as a folder.
        export_trained_only: Whether it needs the trained tensors alone.
        num_image_tokens: Positions that an image takes in the language model.
        towers_are_cached: Whether the samples bring what the towers say, so that these do not run.
    """

    args: TrainingArguments
    control: Any
    optimizer: Any

    def __init__(
        self,
        *,
        model: nn.Module,
        args: TrainingArguments,
        collator: Callable[[list[Sample]], dict[str, Tensor]],
        train_dataset: SupervisedDataset,
        eval_dataset: SupervisedDataset | None,
        mapper: ProbabilityMapper,
        order: Callable[[SupervisedDataset, int, int], Sampler[int]] | None,
        judge: Callable[[list[Sample]], list[int | None]] | None,
        export: Callable[[Mapping[str, Tensor], Path], None],
        export_trained_only: bool,
        num_image_tokens: int,
        towers_are_cached: bool = False,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
        )
        # The losses are averaged here, so that the Trainer need not know over how much.
        self.model_accepts_loss_kwargs = False
        self.mapper = mapper
        self.order = order
        self.judge = judge
        self.export = export
        self.export_trained_only = export_trained_only
        self.num_image_tokens = num_image_tokens
        self.towers_are_cached = towers_are_cached
        self._flops: TrainingFlops | None = None
        self._step_tokens = self._step_rows = 1.0
        self._micro_batches = 1
        self._sums: Tensor | None = None
        self._since = time.perf_counter()

    # --- order and optimizer

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.order is None:
            return super()._get_train_sampler(dataset)
        assert isinstance(dataset, SupervisedDataset)
        rounds = self.args.world_size * self.args.gradient_accumulation_steps
        return self.order(dataset, self.args.train_batch_size, rounds)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Makes the optimizer with the groups of ``optimizer_groups``."""
        if self.optimizer is not None:
            return self.optimizer
        args = self.args
        rates = {} if args.mm_projector_lr is None else dict.fromkeys(PROJECTORS, args.mm_projector_lr)
        if args.tower_lr is not None:
            rates |= dict.fromkeys(("vision_tower", "dino_tower"), args.tower_lr)
        groups = optimizer_groups(
            self.model, learning_rate=args.learning_rate, weight_decay=args.weight_decay, rates=rates
        )
        kind, options = self.get_optimizer_cls_and_kwargs(args, self.model)
        self.optimizer = kind(groups, **options)
        return self.optimizer

    # --- losses

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, None]:
        """Takes an optimizer step's micro-batches, and counts what the losses are averaged over."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._micro_batches = max(1, len(batches))
        if self.args.loss_average == "global_batch" and batches:
            tokens = sum((batch["labels"][:, 1:] != IGNORE_INDEX).sum() for batch in batches)
            rows = self._matching_rows(batches) if self._rows_known_before() else 0
            counts = torch.stack([torch.as_tensor(count, dtype=torch.float64) for count in (tokens, rows)])
            total = self.accelerator.reduce(counts.to(device), "sum").tolist()
            self._step_tokens, self._step_rows = max(1.0, total[0]), max(1.0, total[1])
        return batches, None

    def _rows_known_before(self) -> bool:
        """Whether the rows that match must be counted before the step.

        They need not if the step is one micro-batch and they are searched in predictions: then the forward tells in
        time.
        """
        return self.mapper.search == "labels" or self._micro_batches > 1

    @torch.no_grad()
    def _matching_rows(self, batches: Sequence[Mapping[str, Tensor]]) -> int | Tensor:
        """Counts a step's rows in which the mapper finds the verdict.

        Where it searches predictions, the model must be asked, with the dropout that it will have in the step itself.
        """
        if self.mapper.search == "labels":
            found = (self.mapper.positions_in_labels(batch["labels"], batch["forgery_labels"]) for batch in batches)
            return sum((positions >= 0).sum() for positions in found)
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        rows: list[Tensor] = []
        with torch.random.fork_rng(devices), self.compute_loss_context_manager():
            self.model_wrapped.train()
            for batch in batches:
                output = self._forward(self.model_wrapped, batch)
                assert output.mapper_rows is not None
                rows.append(output.mapper_rows)
        return torch.stack(rows).sum()

    @staticmethod
    def _forward(model: nn.Module, batch: Mapping[str, Tensor]) -> LlavaOutput:
        inputs = dict(batch)
        seen = [inputs.pop(name, None) for name in FEATURES]
        if any(part is not None for part in seen):
            kind = next(parameter.dtype for parameter in model.parameters() if parameter.requires_grad)
            seen = [None if part is None else part.to(kind) for part in seen]
            inputs["tower_outputs"] = TowerOutputs(*seen)  # type: ignore[assignment]
        return model(**inputs, loss_only=True, use_cache=False)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Returns a micro-batch's share of the loss.

        It is scaled so that the Trainer's mean over micro-batches and devices is the mean over the optimizer step's
        tokens and rows, or over micro-batches if that is asked for.
        """
        output = self._forward(model, inputs)
        assert output.lm_loss is not None and output.mapper_loss is not None and output.mapper_rows is not None
        assert output.labels is not None and output.loss is not None
        tokens = (output.labels[:, 1:] != IGNORE_INDEX).sum()
        lm_sum, mapper_sum = output.lm_loss * tokens, output.mapper_loss * output.mapper_rows
        self._count(inputs, output, tokens, lm_sum, mapper_sum)
        loss = output.loss
        if self.args.loss_average == "global_batch":
            if self.mapper.search != "labels" and self._micro_batches == 1:
                rows = self.accelerator.reduce(output.mapper_rows.to(torch.float64), "sum")
                self._step_rows = max(1.0, float(rows))
            weight = self.accelerator.unwrap_model(model).config.cpm_weight
            share = lm_sum / self._step_tokens + weight * mapper_sum / self._step_rows
            loss = share * self.args.world_size * self._micro_batches
        return (loss, output) if return_outputs else loss

    # --- logs

    def _count(self, inputs: Any, output: LlavaOutput, tokens: Tensor, lm_sum: Tensor, mapper_sum: Tensor) -> None:
        assert output.labels is not None and output.mapper_rows is not None and output.mapper_correct is not None
        images_B = (inputs["input_ids"] < 0).sum(dim=1)
        lengths_B = inputs["attention_mask"].sum(dim=1) + images_B * (self.num_image_tokens - 1)
        rows, width = output.labels.shape
        counts = (
            lm_sum.detach(),
            tokens,
            mapper_sum.detach(),
            output.mapper_rows,
            output.mapper_correct,
            (inputs["forgery_labels"] != IGNORE_INDEX).sum(),
            lengths_B.sum(),
            lengths_B.square().sum(),
            torch.tensor(rows * width),
            torch.tensor(rows * width**2),
            images_B.sum(),
        )
        # Summed where they are, so that no step waits for the device.
        summed = torch.stack([count.to(lm_sum.device, torch.float32) for count in counts])
        self._sums = summed if self._sums is None else self._sums + summed

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to each training log the losses apart, the verdict's figures, and speeds.

        ``verdict_accuracy_teacher_forced`` is no measure of skill: the reasoning that stands before the verdict gives
        it away.
        """
        if "loss" in logs and self._sums is not None:
            sums = self._reduced(self._sums)
            self._refuse_divergence(sums)
            seconds = time.perf_counter() - self._since
            logs.update(describe_counts(sums, seconds))
            logs.update(self._utilisation(sums, seconds))
            self._sums = None
            self._since = time.perf_counter()
        super().log(logs, start_time)

    def _reduced(self, sums: Tensor) -> dict[str, float]:
        return dict(zip(_COUNTS, self.accelerator.reduce(sums, "sum").tolist(), strict=True))

    def _refuse_unlogged_divergence(self) -> None:
        """As ``_refuse_divergence``, for the steps since the last log, before something is written."""
        if self._sums is not None:
            self._refuse_divergence(self._reduced(self._sums))

    def _refuse_divergence(self, sums: Mapping[str, float]) -> None:
        """Stops a run that cannot recover, before it saves over checkpoints of better days.

        With fp16, steps whose numbers are too large are left out, so that a run does recover.

        Raises:
            ValueError: A loss is no finite number.
        """
        for name, value in (("lm_loss", sums["lm_sum"]), ("mapper_loss", sums["mapper_sum"])):
            if not math.isfinite(value) and not self.args.fp16:
                if not self.is_world_process_zero():
                    raise SystemExit(1)  # all processes find the same, and one says it
                raise ValueError(
                    f"the {name} is {value} at step {self.state.global_step}, so the training was stopped; begin "
                    f"anew with a lower --learning_rate (earlier checkpoints stay in {self.args.output_dir})"
                )

    def _utilisation(self, sums: Mapping[str, float], seconds: float) -> dict[str, float]:
        """TFLOP/s of one device: ``mfu`` by six FLOPs a weight and token, ``hfu`` by what is computed.

        Where the device's peak is known, they are shares of that.
        """
        if self._flops is None:
            # Built late, since checkpointing is switched on when training begins.
            self._flops = TrainingFlops(self.model)
            if self.towers_are_cached:
                self._flops.costs["towers"] = Passes()
        searches = 0 if self.mapper.search == "labels" else int(sums["places"])
        scored, images = int(sums["tokens"] + sums["rows"]), int(sums["images"])
        needed = BatchSize(images, int(sums["positions"]), int(sums["squares"]), scored)
        computed = BatchSize(images, int(sums["places"]), int(sums["padded_squares"]), scored, searches)
        twice = self.args.loss_average == "global_batch" and searches and self._micro_batches > 1
        done = self._flops.computed(computed)
        if twice:
            done += sum(part.forward for part in self._flops.by_part(computed).values())
        each = seconds * self.args.world_size
        rates = {"mfu": self._flops.conventional(needed) / each, "hfu": done / each}
        ceilings = gpu_ceilings(self.args.device) if self.args.bf16 or self.args.fp16 else None
        if ceilings is None:
            return {f"{name}_tflops": rate / 1e12 for name, rate in rates.items()}
        return {name: rate / ceilings.throughput for name, rate in rates.items()}

    # --- validation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Returns the losses over the validation samples, and the accuracy of the verdicts that the model gives itself.

        The best model so far, by accuracy and then by loss, is kept in ``<output_dir>/best``.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        assert isinstance(dataset, SupervisedDataset) and self.judge is not None
        self.model.eval()
        sums = torch.zeros(6, dtype=torch.float64)
        rank, world, size = self.args.process_index, self.args.world_size, self.args.per_device_eval_batch_size
        # Every process runs equally many batches, since sharded models wait for each other.
        rounds = math.ceil(len(dataset) / (world * size))
        for number in tqdm(range(rounds), desc="validation", disable=rank != 0, leave=False):
            first = (number * world + rank) * size
            indices = range(first, min(first + size, len(dataset)))
            samples = [dataset[index] for index in indices] or [_without_targets(dataset[0])]
            sums += self._judge_batch(samples)
        total = self.accelerator.reduce(sums.to(self.args.device, torch.float32), "sum").tolist()
        lm, tokens, mapper, rows, right, judged = total
        metrics = {
            "loss": lm / max(1, tokens) + self._cpm_weight() * mapper / max(1, rows),
            "lm_loss": lm / max(1, tokens),
            "mapper_loss": mapper / max(1, rows),
            "verdict_accuracy": right / max(1, judged),
        }
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._keep_if_best(metrics[f"{metric_key_prefix}_verdict_accuracy"], metrics[f"{metric_key_prefix}_loss"])
        self._since = time.perf_counter()
        return metrics

    @torch.no_grad()
    def _judge_batch(self, samples: list[Sample]) -> Tensor:
        assert self.data_collator is not None and self.judge is not None
        batch = self._prepare_inputs(self.data_collator(samples))
        with self.compute_loss_context_manager():
            output = self._forward(self.model, batch)
        assert output.lm_loss is not None and output.mapper_loss is not None and output.mapper_rows is not None
        assert output.labels is not None
        tokens = (output.labels[:, 1:] != IGNORE_INDEX).sum()
        verdicts = self.judge(samples)
        known = [sample.forgery_label for sample in samples]
        right = sum(said == label for said, label in zip(verdicts, known, strict=True) if label != IGNORE_INDEX)
        judged = sum(label != IGNORE_INDEX for label in known)
        counts = (
            output.lm_loss * tokens,
            tokens,
            output.mapper_loss * output.mapper_rows,
            output.mapper_rows,
            right,
            judged,
        )
        return torch.stack([torch.as_tensor(count).double().cpu() for count in counts])

    def _cpm_weight(self) -> float:
        return self.accelerator.unwrap_model(self.model).config.cpm_weight

    def _keep_if_best(self, accuracy: float, loss: float) -> None:
        folder = Path(self.args.output_dir) / BEST
        note = folder.with_suffix(".json")
        before = json.loads(note.read_text("utf-8")) if note.is_file() else None
        self.accelerator.wait_for_everyone()
        if before is not None and (before["verdict_accuracy"], -before["loss"]) >= (accuracy, -loss):
            return
        self.export_to(folder)
        if self.args.should_save:
            values = {"step": self.state.global_step, "verdict_accuracy": accuracy, "loss": loss}
            write_text(note, json.dumps(values, indent=2) + "\n")

    # --- checkpoints

    def export_to(self, folder: Path) -> None:
        """Writes the model as a folder that ``load_pretrained_model`` opens."""
        self._refuse_unlogged_divergence()
        tensors = self._gathered(trained_only=self.export_trained_only)
        if self.args.should_save:
            self.export(tensors, folder)
        self.accelerator.wait_for_everyone()

    def _gathered(self, *, trained_only: bool) -> dict[str, Tensor]:
        """The model's tensors by their names in memory; whole on the writing process alone if they are sharded."""
        names = set(trainable_tensors(self.model))
        if self.is_deepspeed_enabled and self.model_wrapped is not self.model:
            engine = self.model_wrapped
            if engine.zero_optimization_stage() == 3:
                tensors = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=trained_only) or {}
            else:
                tensors = self.accelerator.get_state_dict(engine)
        else:
            tensors = self.model.state_dict()
        return {name: tensor for name, tensor in tensors.items() if name in names or not trained_only}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the trained tensors into a checkpoint's folder."""
        folder = Path(output_dir or self.args.output_dir)
        tensors = self._gathered(trained_only=True)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
            save_file(kept, folder / WEIGHTS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        weights = load_file(Path(resume_from_checkpoint) / WEIGHTS_FILE)
        own = trainable_tensors(self.model)
        if {name: tensor.shape for name, tensor in weights.items()} != {name: p.shape for name, p in own.items()}:
            raise ValueError(
                f"{resume_from_checkpoint} holds other trained parameters than this run trains; go on with the options "
                "that the run was begun with"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(weights[name])

    def end_progress_bar(self) -> None:
        """Ends the line of the progress bar, so that what is said next stands on its own."""
        if not self.is_world_process_zero():
            print(file=sys.stderr)  # the bar is another process's
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.close()

    def load_finished(self, checkpoint: Path) -> None:
        """Takes weights and log from a run's last checkpoint, after which there is nothing to train."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Saves, marks the checkpoint as whole, and only then removes older ones."""
        self._refuse_unlogged_divergence()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            why = error if isinstance(error, OSError) else f"is the disk full? ({error})"
            raise OSError(f"{folder} could not be written, earlier checkpoints are untouched: {why}") from error
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark = {"step": self.state.global_step, "bytes": _sizes(folder)}
            write_text(folder / WHOLE_FILE, json.dumps(mark) + "\n")
            remove_old_checkpoints(Path(self.args.output_dir), limit)


def describe_counts(sums: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Turns what was summed between two logs into figures."""
    return {
        "lm_loss": sums["lm_sum"] / max(1, sums["tokens"]),
        "mapper_loss": sums["mapper_sum"] / max(1, sums["rows"]),
        "mapper_rows_share": sums["rows"] / max(1, sums["verdicts"]),
        "verdict_accuracy_teacher_forced": sums["correct"] / max(1, sums["rows"]),
        "tokens_per_s": sums["positions"] / seconds,
        "images_per_s": sums["images"] / seconds,
        "padding_share": 1 - sums["positions"] / max(1, sums["places"]),
    }


def numbered_checkpoints(folder: Path) -> list[Path]:
    """Returns a run's checkpoints, oldest first."""
    found = [
        (int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _CHECKPOINT.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def whole_checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints of a run that were written to their end and lost nothing since, oldest first."""
    return [path for path in numbered_checkpoints(folder) if _is_whole(path)]


def _is_whole(checkpoint: Path) -> bool:
    try:
        mark = json.loads((checkpoint / WHOLE_FILE).read_text("utf-8"))
        return mark.get("bytes", {}).items() <= _sizes(checkpoint).items()
    except (OSError, ValueError):
        return False


def _sizes(folder: Path) -> dict[str, int]:
    """The bytes of each file, which a machine that breaks down can cut after they were written."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def is_finished(checkpoint: Path) -> bool:
    """Whether a checkpoint was written after a run's last step."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return state.global_step >= state.max_steps


def remove_old_checkpoints(folder: Path, limit: int | None) -> None:
    """Removes all but the newest ``limit`` whole checkpoints."""
    if limit is not None and limit > 0:
        for path in whole_checkpoints(folder)[:-limit]:
            shutil.rmtree(path)


def write_text(file: Path, text: str) -> None:
    """Writes a file that appears only when it is whole."""
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def _without_targets(sample: Sample) -> Sample:
    """A sample that no figure counts."""
    labels = torch.full_like(sample.labels, IGNORE_INDEX)
    return Sample(sample.input_ids, labels, sample.image, IGNORE_INDEX)
