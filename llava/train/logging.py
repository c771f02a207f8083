"""What a training log says: metrics from what was counted, utilisation of the device, and why a failing run stops."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from llava.errors import UserError
from llava.gpu_ceilings import gpu_ceilings
from llava.systems.base import TrainingObjective
from llava.train.flops import BatchSize, TrainingFlops

Sums = Mapping[str, float]
"""What was summed over steps and processes: ``<term>_total`` and ``<term>_items`` of each loss with the objective's own
values, and the sizes of the batches."""
_TOTAL, _ITEMS = "_total", "_items"


def mean_losses(sums: Sums) -> dict[str, float]:
    """Returns the mean of each loss over its items, by its name."""
    names = [name.removesuffix(_TOTAL) for name in sums if name.endswith(_TOTAL)]
    return {name: sums[f"{name}{_TOTAL}"] / max(1, sums[f"{name}{_ITEMS}"]) for name in names}


def describe_sums(sums: Sums, seconds: float, objective: TrainingObjective | None) -> dict[str, float]:
    """Turns what was summed between two logs into metrics."""
    own = {} if objective is None else objective.metrics(sums)
    return {
        **{f"{name}_loss": loss for name, loss in mean_losses(sums).items()},
        **own,
        "tokens_per_s": sums["positions"] / seconds,
        "images_per_s": sums["images"] / seconds,
        "padding_share": 1 - sums["positions"] / max(1, sums["padded_positions"]),
    }


def check_finite(sums: Sums, *, step: int, output: Path, is_main: bool) -> None:
    """Stops a run that cannot recover, before it overwrites checkpoints of better days.

    Args:
        sums: What was summed over all processes.
        step: The step, for the message.
        output: Where earlier checkpoints are, for the message.
        is_main: Whether this process tells the user; all of them find the same.

    Raises:
        UserError: A loss is no finite number.
        SystemExit: The same, in a process that leaves the message to another.
    """
    for name, value in mean_losses(sums).items():
        if math.isfinite(value):
            continue
        if not is_main:
            raise SystemExit(1)
        raise UserError(
            f"the {name}_loss is {value} at step {step}, so the training was stopped; start again with a lower "
            f"--learning_rate (earlier checkpoints stay in {output})"
        )


def utilisation(
    flops: TrainingFlops,
    sums: Sums,
    device_seconds: float,
    *,
    searches: bool,
    searches_twice: bool,
    device: torch.device,
    half_precision: bool,
) -> dict[str, float]:
    """Returns the FLOP/s of one device: ``mfu`` by six FLOPs a weight and token, ``hfu`` by what is computed.

    Where the device's peak is known, they are shares of it, else they are given in TFLOP/s.

    Args:
        flops: Of the model.
        sums: What was summed over all devices.
        device_seconds: Time of all devices together.
        searches: Whether the logits of all positions are searched for the verdict.
        searches_twice: Whether a forward before the step finds out which rows match.
        device: The device.
        half_precision: Whether it multiplies 16-bit numbers, for which the peak holds.
    """
    scored = int(sum(count for name, count in sums.items() if name.endswith(_ITEMS)))
    images = int(sums["images"])
    searched = int(sums["padded_positions"]) if searches else 0
    needed = BatchSize(images, int(sums["positions"]), int(sums["squares"]), scored)
    computed = BatchSize(images, int(sums["padded_positions"]), int(sums["padded_squares"]), scored, searched)
    done = flops.computed(computed)
    if searches_twice:
        done += sum(part.forward for part in flops.by_part(computed).values())
    rates = {"mfu": flops.conventional(needed) / device_seconds, "hfu": done / device_seconds}
    ceilings = gpu_ceilings(device) if half_precision else None
    if ceilings is None:
        return {f"{name}_tflops": rate / 1e12 for name, rate in rates.items()}
    return {name: rate / ceilings.throughput for name, rate in rates.items()}
