"""What every training here shares: checkpoints that count only when complete, and weights that are numbers."""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.trainer_callback import ProgressCallback

from llava.files import write_json
from llava.train import checkpointing

LOG_FILE = "log.json"


class SavingTrainer(transformers.Trainer):
    """Transformers' Trainer with this project's checkpoints.

    A child says in ``trained_state`` what a checkpoint holds, and in ``load_state`` how it is read.
    """

    optimizer: Any

    def trained_state(self) -> dict[str, Tensor]:
        """Returns what training changes, by the names in memory; every process takes part."""
        raise NotImplementedError

    def load_state(self, checkpoint: Path) -> None:
        """Reads what ``trained_state`` gave."""
        raise NotImplementedError

    def export_to(self, folder: Path) -> None:
        """Writes the model as a folder that its system opens; every process takes part."""
        raise NotImplementedError

    def reduced(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Returns what all processes counted together."""
        total = self.accelerator.reduce(torch.stack([*sums.values()]), "sum")
        return dict(zip(sums, total.tolist(), strict=True))

    def check_state(self) -> None:
        """Checks what was trained, since a loss can be finite where its gradient, and so the next weights, are not.

        Raises:
            UserError: Something is NaN or infinite.
        """
        wrong = checkpointing.not_finite(self.model, self.optimizer)
        found = torch.tensor(float(len(wrong)), device=self.args.device)
        if float(self.accelerator.reduce(found, "sum")) == 0:
            return
        if not self.is_world_process_zero():
            raise SystemExit(1)
        checkpointing.refuse_not_finite(wrong, step=self.state.global_step, output=Path(self.args.output_dir))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes what is trained into a checkpoint's folder."""
        tensors = self.trained_state()
        if self.args.should_save:
            checkpointing.write_trained(tensors, Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.load_state(Path(resume_from_checkpoint))

    def load_finished(self, checkpoint: Path) -> None:
        """Takes weights and log from a run's last checkpoint, after which there is nothing to train."""
        self.load_state(checkpoint)
        self.state = checkpointing.read_state(checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Saves, marks the checkpoint as complete, and only then removes older ones."""
        self.check_state()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            with checkpointing.new_checkpoint(folder):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        # Other processes write their random states and shards into the same folder.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpointing.mark_complete(folder, self.state.global_step)
            checkpointing.remove_old_checkpoints(Path(str(self.args.output_dir)), limit)

    def end_progress_bar(self) -> None:
        """Ends the line of the progress bar, so that the next message stands on a line of its own."""
        if not self.is_world_process_zero():
            print(file=sys.stderr)  # the bar is another process's
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.close()

    def trial_export(self) -> None:
        """Writes, opens and removes the final folder once, so that a run does not fail at its end."""
        trial = Path(str(self.args.output_dir)) / checkpointing.TRIAL
        self.export_to(trial)
        if self.args.should_save:
            shutil.rmtree(trial)
        self.accelerator.wait_for_everyone()

    def run_to_end(self, checkpoint: Path | None) -> Path:
        """Trains from a checkpoint or from the start; writes and returns the final folder."""
        output = Path(str(self.args.output_dir))
        if checkpoint is not None and checkpointing.is_finished(checkpoint):
            self.load_finished(checkpoint)
        else:
            try:
                self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            except BaseException:
                self.end_progress_bar()
                raise
        final = output / checkpointing.FINAL
        self.export_to(final)
        if self.args.should_save:
            write_json(output / LOG_FILE, self.state.log_history, indent=2)
            print(f"the trained model is in {final}")
        return final
