"""The training loop: transformers' Trainer with this model's losses, order, optimizer groups, logs and checkpoints."""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm
from transformers.trainer_callback import ProgressCallback

from llava.constants import IGNORE_INDEX
from llava.data.collator import FEATURES, Sample
from llava.data.dataset import SupervisedDataset
from llava.model.language_model.llava_llama import LlavaOutput
from llava.model.llava_arch import TowerOutputs
from llava.model.probability_mapper import ProbabilityMapper
from llava.train import checkpointing
from llava.train.arguments import TrainingArguments
from llava.train.flops import Passes, TrainingFlops
from llava.train.logging import COUNTS, check_finite, describe_counts, utilisation
from llava.train.lora import PROJECTORS, optimizer_groups


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
        predict: Gives the verdict, 0 or 1 or None, on each of some validation samples; see ``llava.train.validation``.
        export: Writes the model's tensors (by their names in memory) as a folder.
        export_trained_only: Whether it needs the trained tensors alone.
        num_image_tokens: Positions that an image takes in the language model.
        towers_are_cached: Whether the samples bring the outputs of the towers, so that these do not run.
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
        predict: Callable[[list[Sample]], list[int | None]] | None,
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
        self.predict_verdicts = predict
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
        # A mean of means over micro-batches would weigh a token more where its micro-batch is short. So each
        # micro-batch's sum is divided by the count over the whole step, on all devices, which must be known before
        # the first backward.
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

        Where it searches predictions, that takes a forward with the dropout that the step itself will have.
        """
        if self.mapper.search == "labels":
            found = (self.mapper.positions_in_labels(batch["labels"], batch["forgery_labels"]) for batch in batches)
            return sum((positions >= 0).sum() for positions in found)
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        rows: list[Tensor] = []
        # The fork gives the random state back afterwards, so that the step's own forward draws the same dropout.
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
            # The Trainer divides by the micro-batches and the gradients' all-reduce by the devices: taken back here.
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
        """Adds to each training log both losses, the verdict's metrics, speeds and utilisation."""
        if "loss" in logs and self._sums is not None:
            sums = self._reduced(self._sums)
            self._check_sums(sums)
            seconds = time.perf_counter() - self._since
            logs.update(describe_counts(sums, seconds))
            logs.update(self._utilisation(sums, seconds))
            self._sums = None
            self._since = time.perf_counter()
        super().log(logs, start_time)

    def _reduced(self, sums: Tensor) -> dict[str, float]:
        return dict(zip(COUNTS, self.accelerator.reduce(sums, "sum").tolist(), strict=True))

    def _check_sums(self, sums: Mapping[str, float]) -> None:
        if self.args.fp16:
            return  # its loss scaling leaves out steps whose numbers are too large, so the run does recover
        step, output = self.state.global_step, Path(self.args.output_dir)
        check_finite(sums, step=step, output=output, is_main=self.is_world_process_zero())

    def _check_unlogged(self) -> None:
        """Checks the steps since the last log, before something is written."""
        if self._sums is not None:
            self._check_sums(self._reduced(self._sums))

    def _utilisation(self, sums: Mapping[str, float], seconds: float) -> dict[str, float]:
        if self._flops is None:
            # Built late, since checkpointing is switched on when training begins.
            self._flops = TrainingFlops(self.model)
            if self.towers_are_cached:
                self._flops.costs["towers"] = Passes()
        searches = self.mapper.search != "labels"
        return utilisation(
            self._flops,
            sums,
            seconds * self.args.world_size,
            searches=searches,
            searches_twice=self.args.loss_average == "global_batch" and searches and self._micro_batches > 1,
            device=self.args.device,
            half_precision=self.args.bf16 or self.args.fp16,
        )

    # --- validation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Returns the losses over the validation samples, and the accuracy of the model's own verdicts.

        The best model so far, by accuracy and then by loss, is kept in ``<output_dir>/best``.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        assert isinstance(dataset, SupervisedDataset) and self.predict_verdicts is not None
        self.model.eval()
        sums = torch.zeros(6, dtype=torch.float64)
        rank, world, size = self.args.process_index, self.args.world_size, self.args.per_device_eval_batch_size
        # Every process runs equally many batches, since sharded models wait for each other.
        rounds = math.ceil(len(dataset) / (world * size))
        for number in tqdm(range(rounds), desc="validation", disable=rank != 0, leave=False):
            first = (number * world + rank) * size
            indices = range(first, min(first + size, len(dataset)))
            samples = [dataset[index] for index in indices] or [_without_targets(dataset[0])]
            sums += self._evaluate_batch(samples)
        total = self.accelerator.reduce(sums.to(self.args.device, torch.float32), "sum").tolist()
        lm, tokens, mapper, rows, right, labelled = total
        metrics = {
            "loss": lm / max(1, tokens) + self._cpm_weight() * mapper / max(1, rows),
            "lm_loss": lm / max(1, tokens),
            "mapper_loss": mapper / max(1, rows),
            "verdict_accuracy": right / max(1, labelled),
        }
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._keep_if_best(metrics[f"{metric_key_prefix}_verdict_accuracy"], metrics[f"{metric_key_prefix}_loss"])
        self._since = time.perf_counter()
        return metrics

    @torch.no_grad()
    def _evaluate_batch(self, samples: list[Sample]) -> Tensor:
        assert self.data_collator is not None and self.predict_verdicts is not None
        batch = self._prepare_inputs(self.data_collator(samples))
        with self.compute_loss_context_manager():
            output = self._forward(self.model, batch)
        assert output.lm_loss is not None and output.mapper_loss is not None and output.mapper_rows is not None
        assert output.labels is not None
        tokens = (output.labels[:, 1:] != IGNORE_INDEX).sum()
        verdicts = self.predict_verdicts(samples)
        known = [sample.forgery_label for sample in samples]
        right = sum(verdict == label for verdict, label in zip(verdicts, known, strict=True) if label != IGNORE_INDEX)
        labelled = sum(label != IGNORE_INDEX for label in known)
        counts = (
            output.lm_loss * tokens,
            tokens,
            output.mapper_loss * output.mapper_rows,
            output.mapper_rows,
            right,
            labelled,
        )
        return torch.stack([torch.as_tensor(count).double().cpu() for count in counts])

    def _cpm_weight(self) -> float:
        return self.accelerator.unwrap_model(self.model).config.cpm_weight

    def _keep_if_best(self, accuracy: float, loss: float) -> None:
        folder = Path(self.args.output_dir) / checkpointing.BEST
        is_best = checkpointing.is_best(folder, accuracy, loss)
        self.accelerator.wait_for_everyone()  # all have read the note before one writes it
        if is_best:
            self.export_to(folder)
            if self.args.should_save:
                checkpointing.note_best(folder, self.state.global_step, accuracy, loss)

    # --- checkpoints

    def export_to(self, folder: Path) -> None:
        """Writes the model as a folder that ``load_pretrained_model`` opens."""
        self._check_unlogged()
        tensors = self._gathered(trained_only=self.export_trained_only)
        if self.args.should_save:
            self.export(tensors, folder)
        self.accelerator.wait_for_everyone()

    def _gathered(self, *, trained_only: bool) -> dict[str, Tensor]:
        """The model's tensors by their names in memory; complete on the writing process alone if they are sharded."""
        is_wrapped = self.is_deepspeed_enabled and self.model_wrapped is not self.model
        engine = self.model_wrapped if is_wrapped else None
        get_state_dict = self.accelerator.get_state_dict
        return checkpointing.gather_tensors(self.model, engine, get_state_dict, trained_only=trained_only)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the trained tensors into a checkpoint's folder."""
        tensors = self._gathered(trained_only=True)
        if self.args.should_save:
            checkpointing.write_trained(tensors, Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpointing.load_trained(self.model, Path(resume_from_checkpoint))

    def load_finished(self, checkpoint: Path) -> None:
        """Takes weights and log from a run's last checkpoint, after which there is nothing to train."""
        checkpointing.load_trained(self.model, checkpoint)
        self.state = checkpointing.read_state(checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Saves, marks the checkpoint as complete, and only then removes older ones."""
        self._check_unlogged()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            with checkpointing.new_checkpoint(folder):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        # Other processes write their random states and shards into the same folder.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpointing.mark_complete(folder, self.state.global_step)
            checkpointing.remove_old_checkpoints(Path(self.args.output_dir), limit)

    def end_progress_bar(self) -> None:
        """Ends the line of the progress bar, so that the next message stands on a line of its own."""
        if not self.is_world_process_zero():
            print(file=sys.stderr)  # the bar is another process's
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.close()


def _without_targets(sample: Sample) -> Sample:
    """A sample that no metric counts."""
    labels = torch.full_like(sample.labels, IGNORE_INDEX)
    return Sample(sample.input_ids, labels, sample.image, IGNORE_INDEX)
