"""The training loop: transformers' Trainer with this model's losses, order, optimizer groups, logs and checkpoints."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from llava.cli import progress
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.collator import Sample
from llava.data.dataset import SupervisedDataset
from llava.model.branches import is_projector, is_tower
from llava.model.language_model.llava_llama import LlavaOutput
from llava.model.objective import LM, LossTerm
from llava.systems.base import TrainingObjective
from llava.train import checkpointing
from llava.train.arguments import TrainingArguments
from llava.train.flops import Passes, TrainingFlops
from llava.train.logging import check_finite, describe_sums, mean_losses, utilisation
from llava.train.lora import optimizer_groups, parameter_part, trainable_tensors
from llava.train.saving_trainer import SavingTrainer


class ForgeryTrainer(SavingTrainer):
    """Trains a model with the language model's loss and those of its system's objective.

    Args:
        model: The model, in PEFT's wrapper if it has adapters.
        args: Options.
        collator: Makes a batch of samples.
        train_dataset: Samples to train on.
        eval_dataset: Samples to validate on, or None.
        objective: What the model's system is trained for beside its words, or None.
        order: Gives a sampler for the training samples, from the micro-batch and the micro-batches of an optimizer
            step; None for a random order.
        predict: Gives the verdict, 0 or 1 or None, on each of some validation samples; see ``llava.train.validation``.
        export: Writes the model's tensors (by their names in memory) as a folder.
        export_trained_only: Whether it needs the trained tensors alone.
        placeholder_tokens: How many positions each placeholder id becomes.
        towers_are_cached: Whether the samples bring the outputs of the towers, so that these do not run.
    """

    args: TrainingArguments
    control: Any

    def __init__(
        self,
        *,
        model: nn.Module,
        args: TrainingArguments,
        collator: Callable[[list[Sample]], dict[str, Tensor]],
        train_dataset: SupervisedDataset,
        eval_dataset: SupervisedDataset | None,
        objective: TrainingObjective | None,
        order: Callable[[SupervisedDataset, int, int], Sampler[int]] | None,
        predict: Callable[[list[Sample]], list[int | None]] | None,
        export: Callable[[Mapping[str, Tensor], Path], None],
        export_trained_only: bool,
        placeholder_tokens: Mapping[int, int],
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
        self.objective = objective
        self.order = order
        self.predict_verdicts = predict
        self.export = export
        self.export_trained_only = export_trained_only
        self.placeholder_tokens = placeholder_tokens
        self.towers_are_cached = towers_are_cached
        self._flops: TrainingFlops | None = None
        self._step_items: dict[str, float] = {}
        self._micro_batches = 1
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}
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
        parts = {parameter_part(name) for name, _ in self.model.named_parameters()}
        rates: dict[str, float] = {}
        if args.mm_projector_lr is not None:
            rates |= dict.fromkeys(filter(is_projector, parts), args.mm_projector_lr)
        if args.tower_lr is not None:
            rates |= dict.fromkeys(filter(is_tower, parts), args.tower_lr)
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
        self._step_items = {}
        if self.args.loss_average == "global_batch" and batches:
            items = self._count_items(batches)
            counts = torch.stack([torch.as_tensor(count, dtype=torch.float64) for count in items.values()])
            total = self.accelerator.reduce(counts.to(device), "sum").tolist()
            self._step_items = {name: max(1.0, count) for name, count in zip(items, total, strict=True)}
        return batches, None

    def _count_items(self, batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Counts over how many items a step averages each loss; those that its one forward tells in time are left out.

        What no label tells takes a forward before the step, with the dropout that the step itself will have.
        """
        items: dict[str, Any] = {LM: sum((batch["labels"][:, 1:] != IGNORE_INDEX).sum() for batch in batches)}
        known = [{} if self.objective is None else self.objective.count(batch) for batch in batches]
        # In one order on all processes, since their counts are summed by position.
        unknown = sorted({name for counts in known for name, count in counts.items() if count is None})
        items |= {name: sum(counts[name] for counts in known) for name in known[0] if name not in unknown}
        if unknown and self._micro_batches > 1:
            found = self._items_by_forward(batches)
            items |= {name: sum(terms[name].items for terms in found) for name in unknown}
        return items

    @torch.no_grad()
    def _items_by_forward(self, batches: Sequence[Mapping[str, Any]]) -> list[dict[str, LossTerm]]:
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        found = []
        # The fork gives the random state back afterwards, so that the step's own forward draws the same dropout.
        with torch.random.fork_rng(devices), self.compute_loss_context_manager():
            self.model_wrapped.train()
            for batch in batches:
                terms = self._forward(self.model_wrapped, batch).terms
                assert terms is not None
                found.append(terms)
        return found

    @staticmethod
    def _forward(model: nn.Module, batch: Mapping[str, Any]) -> LlavaOutput:
        inputs = dict(batch)
        if "tower_outputs" in inputs:
            dtype = next(parameter.dtype for parameter in model.parameters() if parameter.requires_grad)
            inputs["tower_outputs"] = {name: values.to(dtype) for name, values in inputs["tower_outputs"].items()}
        return model(**inputs, loss_only=True, use_cache=False)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Returns a micro-batch's share of the loss.

        It is scaled so that the Trainer's mean over micro-batches and devices is the mean over the optimizer step's
        items (tokens, rows with a verdict), or over micro-batches if that is asked for.
        """
        output = self._forward(model, inputs)
        assert output.terms is not None and output.loss is not None
        self._add_to_sums(inputs, output)
        loss = output.loss
        if self.args.loss_average == "global_batch":
            share = sum(term.weight * term.total / self._items_of(name, term) for name, term in output.terms.items())
            # The Trainer divides by the micro-batches and the gradients' all-reduce by the devices: taken back here.
            loss = share * self.args.world_size * self._micro_batches
        return (loss, output) if return_outputs else loss

    def _items_of(self, name: str, term: LossTerm) -> float:
        """Items of the whole step that a loss is averaged over; from the forward where the step is one micro-batch."""
        if name not in self._step_items:
            total = float(self.accelerator.reduce(term.items.to(torch.float64), "sum"))
            return max(1.0, total)
        return self._step_items[name]

    # --- logs

    def _add_to_sums(self, inputs: Any, output: LlavaOutput) -> None:
        assert output.terms is not None and output.labels is not None
        ids_BT = inputs["input_ids"]
        added_B = sum((ids_BT == index).sum(dim=1) * (size - 1) for index, size in self.placeholder_tokens.items())
        lengths_B = inputs["attention_mask"].sum(dim=1) + added_B
        rows, width = output.labels.shape
        counts: dict[str, Tensor] = {
            "positions": lengths_B.sum(),
            "squares": lengths_B.square().sum(),
            "padded_positions": torch.tensor(rows * width),
            "padded_squares": torch.tensor(rows * width**2),
            "images": (ids_BT == IMAGE_TOKEN_INDEX).sum(),
        }
        for name, term in output.terms.items():
            counts |= {f"{name}_total": term.total.detach(), f"{name}_items": term.items}
            counts |= {f"{name}_{value}": count for value, count in term.values.items()}
        # Summed where they are, so that no step waits for the device.
        device = output.terms[LM].total.device
        for name, count in counts.items():
            self._sums[name] = count.to(device, torch.float32) + self._sums.get(name, 0.0)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to each training log every loss, the verdict's metrics, speeds and utilisation."""
        if "loss" in logs and self._sums:
            sums = self.reduced(self._sums)
            self._check_sums(sums)
            seconds = time.perf_counter() - self._since
            logs.update(describe_sums(sums, seconds, self.objective))
            logs.update(self._utilisation(sums, seconds))
            self._sums = {}
            self._since = time.perf_counter()
        super().log(logs, start_time)

    def _check_sums(self, sums: Mapping[str, float]) -> None:
        if self.args.fp16:
            return  # its loss scaling leaves out steps whose numbers are too large, so the run does recover
        step, output = self.state.global_step, Path(self.args.output_dir)
        check_finite(sums, step=step, output=output, is_main=self.is_world_process_zero())

    def check_state(self) -> None:
        """Checks the steps since the last log, and the weights, before something is written."""
        if self._sums:
            self._check_sums(self.reduced(self._sums))
        super().check_state()

    def _utilisation(self, sums: Mapping[str, float], seconds: float) -> dict[str, float]:
        if self._flops is None:
            # Built late, since checkpointing is switched on when training begins.
            self._flops = TrainingFlops(self.model)
            if self.towers_are_cached:
                self._flops.costs["towers"] = Passes()
        searches = self.objective is not None and self.objective.searches_predictions
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
        sums: dict[str, Tensor] = {}
        rank, world, size = self.args.process_index, self.args.world_size, self.args.per_device_eval_batch_size
        # Every process runs equally many batches, since sharded models wait for each other.
        rounds = math.ceil(len(dataset) / (world * size))
        for number in progress(range(rounds), desc="validation", disable=rank != 0, leave=False):
            first = (number * world + rank) * size
            indices = range(first, min(first + size, len(dataset)))
            samples = [dataset[index] for index in indices] or [_without_targets(dataset[0])]
            for name, value in self._evaluate_batch(samples).items():
                sums[name] = value + sums.get(name, 0.0)
        totals = self.reduced({name: value.to(self.args.device, torch.float32) for name, value in sums.items()})
        losses = mean_losses(totals)
        metrics = {
            "loss": sum(self._weights[name] * loss for name, loss in losses.items()),
            **{f"{name}_loss": loss for name, loss in losses.items()},
            "verdict_accuracy": totals["right"] / max(1, totals["labelled"]),
        }
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._keep_if_best(metrics[f"{metric_key_prefix}_verdict_accuracy"], metrics[f"{metric_key_prefix}_loss"])
        self._since = time.perf_counter()
        return metrics

    @torch.no_grad()
    def _evaluate_batch(self, samples: list[Sample]) -> dict[str, Tensor]:
        assert self.data_collator is not None and self.predict_verdicts is not None
        batch = self._prepare_inputs(self.data_collator(samples))
        with self.compute_loss_context_manager():
            terms = self._forward(self.model, batch).terms
        assert terms is not None
        self._weights = {name: term.weight for name, term in terms.items()}
        verdicts = self.predict_verdicts(samples)
        known = [sample.forgery_label for sample in samples]
        right = sum(verdict == label for verdict, label in zip(verdicts, known, strict=True) if label != IGNORE_INDEX)
        labelled = sum(label != IGNORE_INDEX for label in known)
        counts: dict[str, Any] = {"right": right, "labelled": labelled}
        for name, term in terms.items():
            counts |= {f"{name}_total": term.total, f"{name}_items": term.items}
        return {name: torch.as_tensor(count).double().cpu() for name, count in counts.items()}

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
        """Writes the model as a folder that ``load_pretrained_model`` opens.

        Raises:
            UserError: Trained weights are NaN or infinite.
        """
        self.check_state()
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

    def trained_state(self) -> dict[str, Tensor]:
        """Returns the trained tensors by their names in memory."""
        return self._gathered(trained_only=True)

    def load_state(self, checkpoint: Path) -> None:
        """Reads the trained tensors of a checkpoint."""
        checkpointing.load_trained(trainable_tensors(self.model), checkpoint)


def _without_targets(sample: Sample) -> Sample:
    """A sample that no metric counts."""
    labels = torch.full_like(sample.labels, IGNORE_INDEX)
    return Sample(sample.input_ids, labels, sample.image, IGNORE_INDEX)
