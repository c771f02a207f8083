"""Checkpoints of a run: which are complete, what is written into them, and what is read back."""

import json
import logging
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from llava.errors import CheckpointError, FileError, OptionError, UserError
from llava.files import read_json, write_json
from llava.model.checkpoint_files import list_keys
from llava.train.lora import trainable_tensors
from llava.train.option_names import current_name

logger = logging.getLogger(__name__)

BEST, FINAL, TRIAL = "best", "final", "trial"
"""Folders below the output folder: the best model so far, the trained one, and one that only tries to be written."""
RUN_FILE = "run.json"
"""Describes the run that an output folder holds."""
WEIGHTS_FILE = "trainable.safetensors"
COMPLETE_FILE = "whole.json"
"""Written last into a checkpoint: without it, the checkpoint is not complete."""
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_DISK_FAILURES = re.compile("PytorchStreamWriter|unexpected pos|file write failed|iostream", re.IGNORECASE)
"""What torch says, by a plain ``RuntimeError``, where a file takes no more bytes."""


# --- which checkpoints there are


def numbered_checkpoints(folder: Path) -> list[Path]:
    """Returns a run's checkpoints, complete or not, oldest first."""
    found = [
        (int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _CHECKPOINT.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def complete_checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints of a run that were written to their end and lost nothing since, oldest first."""
    return [path for path in numbered_checkpoints(folder) if _is_complete(path)]


def _is_complete(checkpoint: Path) -> bool:
    try:
        mark = json.loads((checkpoint / COMPLETE_FILE).read_text("utf-8"))
        return mark["bytes"].items() <= _sizes(checkpoint).items()
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False  # the mark is missing, cut off or no mark


def _sizes(folder: Path) -> dict[str, int]:
    """The bytes of each file, which a machine that breaks down can cut after they were written."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def resume_checkpoint(output: Path, resume: str) -> Path | None:
    """Returns the checkpoint to resume from, or None to start.

    Args:
        output: The run's folder.
        resume: ``auto``, a checkpoint's folder, or empty.

    Raises:
        OptionError: The folder holds a run that is not to be resumed, or there is no such checkpoint.
    """
    if resume not in ("", "auto"):
        checkpoint = Path(resume)
        if checkpoint not in complete_checkpoints(checkpoint.parent):
            raise OptionError(f"--resume {resume}: this is no complete checkpoint")
        return checkpoint
    complete = complete_checkpoints(output)
    if resume == "auto":
        _say_what_is_damaged(output, complete)
        if (output / RUN_FILE).is_file():
            _remove_leftovers(output)
        return complete[-1] if complete else None
    if complete or (output / FINAL).exists():
        raise OptionError(f"{output} holds a run already; --resume auto resumes it, or name another --output_dir")
    return None


def _say_what_is_damaged(output: Path, complete: list[Path]) -> None:
    """Warns of checkpoints that are newer than what is resumed from, since their steps are trained again."""
    found = numbered_checkpoints(output)
    newer = found[found.index(complete[-1]) + 1 :] if complete else found
    if newer:
        taken = f"going on from {complete[-1].name}" if complete else "there is no other, so training starts anew"
        names = ", ".join(path.name for path in newer)
        logger.warning("%s in %s: damaged, or not written to the end; %s", names, output, taken)


def _remove_leftovers(output: Path) -> None:
    """Removes what a run that was killed had only begun to write."""
    complete = complete_checkpoints(output)
    leftovers = [path for path in numbered_checkpoints(output) if path not in complete]
    for name in (FINAL, BEST, TRIAL):
        leftovers += [*output.glob(f".{name}.*"), *output.glob(f"..{name}.*")]
    for path in [*leftovers, output / TRIAL]:
        shutil.rmtree(path, ignore_errors=True)


def check_same_run(file: Path, run: Mapping[str, Any], *, but: Collection[str] = ()) -> None:
    """Compares a run with the one that a folder holds, but for some of what describes it.

    Raises:
        OptionError: They differ; the message says in what.
        CheckpointError: The file that describes it is damaged.
    """
    before = read_json(file) if file.is_file() else {}
    if not isinstance(before, dict):
        raise CheckpointError(f"{file} describes no run; start in another --output_dir")
    before = {current_name(name): value for name, value in before.items()}  # of a run by an older version
    other = [
        f"{name} was {before[name]!r}, is {value!r}"
        for name, value in run.items()
        if name not in but and before.get(name, value) != value
    ]
    if other:
        raise OptionError(
            f"{file.parent} holds a run with other options, which cannot be resumed: {'; '.join(other)}. Finish it "
            f"with its own; to train on (more epochs, other data, another ZeRO stage), start a run in another "
            f"--output_dir from its result: --model_name_or_path {file.parent / FINAL}"
        )


def is_finished(checkpoint: Path) -> bool:
    """Whether a checkpoint was written after a run's last step."""
    state = read_state(checkpoint)
    return state.global_step >= state.max_steps


def read_state(checkpoint: Path) -> TrainerState:
    """Returns the step, log and random draws of a checkpoint."""
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


# --- writing and reading


@contextmanager
def disk_errors(folder: Path, note: str = "") -> Iterator[None]:
    """Turns a disk that takes no more, as torch and safetensors report it, into a ``FileError``.

    Other exceptions pass: they are bugs, and so is a ``RuntimeError`` that speaks of something else.

    Args:
        folder: What is written.
        note: Put after "could not be written".
    """
    try:
        yield
    except OSError as error:
        raise FileError(f"{folder} could not be written{note}: {error.__cause__ or error}") from error
    except (RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not _DISK_FAILURES.search(str(error)):
            raise
        raise FileError(f"{folder} could not be written{note}: is the disk full? ({error})") from error


@contextmanager
def new_checkpoint(folder: Path) -> Iterator[None]:
    """Removes the checkpoint that is written in the block if the disk refuses it.

    Raises:
        FileError: It was refused.
    """
    try:
        with disk_errors(folder, ", earlier checkpoints are untouched"):
            yield
    except FileError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def mark_complete(checkpoint: Path, step: int) -> None:
    """Makes a checkpoint count, after all of its other files are written."""
    write_json(checkpoint / COMPLETE_FILE, {"step": step, "bytes": _sizes(checkpoint)}, indent=None)


def remove_old_checkpoints(folder: Path, limit: int | None) -> None:
    """Removes all but the newest ``limit`` complete checkpoints."""
    if limit is not None and limit > 0:
        for path in complete_checkpoints(folder)[:-limit]:
            shutil.rmtree(path)


def not_finite(model: nn.Module, optimizer: Any) -> list[str]:
    """Names this process's trained parameters, and those of its optimizer's states, that hold NaN or infinity."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    wrong = [name for name, parameter in trainable_tensors(model).items() if not _is_finite(parameter)]
    for parameter, values in getattr(optimizer, "state", {}).items():
        if any(isinstance(value, Tensor) and not _is_finite(value) for value in values.values()):
            wrong.append(f"the optimizer's state of {names.get(id(parameter), 'a shard')}")
    return wrong


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def refuse_not_finite(wrong: list[str], *, step: int, output: Path) -> None:
    """Stops a run before it writes what no training can go on from.

    Args:
        wrong: What ``not_finite`` found; empty if nothing, or only in other processes.
        step: The step, for the message.
        output: Where earlier checkpoints are, for the message.

    Raises:
        UserError: Always.
    """
    names = f" ({list_keys(wrong, 3)})" if wrong else ""
    raise UserError(
        f"after step {step} trained weights are NaN or infinite{names}, so nothing more was written and the training "
        f"was stopped: a gradient was no finite number. Start again with a lower --learning_rate, or in float32 or "
        f"bf16; earlier checkpoints stay in {output}"
    )


def write_trained(tensors: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Writes the trained tensors into a checkpoint's folder."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    # Cloned, since safetensors refuses tensors that share memory.
    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(kept, checkpoint / WEIGHTS_FILE)


def load_trained(own: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Reads the trained tensors of a checkpoint into those of a model, by their names.

    Raises:
        CheckpointError: The model trains other parameters.
    """
    weights = load_file(checkpoint / WEIGHTS_FILE)
    damaged = [name for name, tensor in weights.items() if not _is_finite(tensor)]
    if damaged:
        raise CheckpointError(
            f"{checkpoint} holds weights that are NaN or infinite ({list_keys(damaged, 3)}); remove this folder, so "
            "that --resume auto takes the checkpoint before it, or start again with a lower --learning_rate"
        )
    if {name: tensor.shape for name, tensor in weights.items()} != {name: p.shape for name, p in own.items()}:
        raise CheckpointError(
            f"{checkpoint} holds other trained parameters than this run trains; resume with the options that the run "
            "was started with"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def gather_tensors(model: nn.Module, engine: Any, get_state_dict: Any, *, trained_only: bool) -> dict[str, Tensor]:
    """Returns a model's tensors by their names in memory.

    Args:
        model: The model.
        engine: DeepSpeed's engine around it, or None.
        get_state_dict: Accelerate's function of that name.
        trained_only: Leave out what is not trained.
    """
    names = set(trainable_tensors(model))
    if engine is None:
        tensors = model.state_dict()
    elif engine.zero_optimization_stage() == 3:
        # Each process holds a part of every tensor, so all must take part in joining them, and only the writing
        # process gets the result; the others get nothing.
        tensors = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=trained_only) or {}
    else:
        tensors = get_state_dict(engine)
    return {name: tensor for name, tensor in tensors.items() if name in names or not trained_only}


# --- the best model


def is_best(folder: Path, accuracy: float, loss: float) -> bool:
    """Whether a model is better, by accuracy and then by loss, than the one that a folder holds."""
    note = folder.with_suffix(".json")
    if not note.is_file():
        return True
    before = read_json(note)
    return (accuracy, -loss) > (before["verdict_accuracy"], -before["loss"])


def note_best(folder: Path, step: int, accuracy: float, loss: float) -> None:
    """Writes beside the best model's folder how good it is."""
    write_json(folder.with_suffix(".json"), {"step": step, "verdict_accuracy": accuracy, "loss": loss}, indent=2)
