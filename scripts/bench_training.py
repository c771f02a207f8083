"""Measures training steps of a random model; the last line printed is one JSON object.

One process, LoRA on the language model, projectors and fusion whole, towers frozen, AdamW; conversations of random ids
of varying length, in micro-batches as training makes them, so that padding counts. Batches are made before the clock
runs: reading images is not measured. Sizes are those of bench_inference.py.

Utilisation is given on GPUs whose 16-bit throughput is known: `mfu` takes the conventional 6 N FLOPs a token for the N
weights of the language model, `mfu_needed` the forward and backward that this training needs (frozen weights have no
gradient; towers and fusion count), `hfu` all that was computed, padding and repeated forwards included.
"""

import argparse
import json
import math
import platform
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from llava.cli import OptionParser, run_cli
from llava.errors import OptionError, UserError
from scripts.bench_inference import SIZES, build_system, rounded, seconds

if TYPE_CHECKING:
    from torch import Tensor

    from llava.train.flops import BatchSize

GPUS = 8
"""Of the published run, whose rounds of samples are divided into micro-batches."""
PROMPT_TOKENS = 80
"""Tokens of template and question, the image's placeholder among them."""
ANSWER_TOKENS = (150, 270, 45, 450)
"""Fewest, mean, standard deviation and most tokens of an answer in four stages."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = OptionParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="tiny", help="default: tiny")
    parser.add_argument("--batch-size", type=int, default=8, help="samples a micro-batch (default: 8, as published)")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches a step (default: 2, as published)")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps measured, after one (default: 3)")
    parser.add_argument("--max-length", type=int, default=2048, help="longest sample, in tokens (default: 2048)")
    parser.add_argument("--lora-r", type=int, default=128, help="rank (default: 128, as published; alpha is twice it)")
    parser.add_argument(
        "--alike",
        action="store_true",
        help="micro-batches of similar length (default: of similar total length, as published)",
    )
    parser.add_argument(
        "--cpm-search", choices=("labels", "predictions"), default="predictions", help="default: as published"
    )
    parser.add_argument(
        "--no-gradient-checkpointing", action="store_true", help="keep all activations instead of computing them twice"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cuda, cpu")
    parser.add_argument("--dtype", default="auto", help="auto (bfloat16 on a GPU, float32 on a CPU), or a dtype")
    return parser.parse_args(arguments)


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch.

    Attributes:
        inputs: What the model takes.
        needed: Its size without padding.
        computed: Its size with padding.
    """

    inputs: "dict[str, Tensor]"
    needed: "BatchSize"
    computed: "BatchSize"


def answer_lengths(count: int, longest: int, rng: Any) -> list[int]:
    """Draws the lengths of answers, in tokens; none is longer than ``longest``."""
    fewest, mean, deviation, most = ANSWER_TOKENS
    return rng.normal(mean, deviation, count).round().clip(fewest, min(most, longest)).astype(int).tolist()


def synthetic_sample(answer: int, model: Any) -> Any:
    """Returns a conversation of random ids whose answer ends with a verdict, and random pixels.

    Args:
        answer: Tokens of the answer.
        model: The model, which knows how a verdict is spelled.
    """
    import torch

    from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
    from llava.data.collator import Sample

    verdict = model.verdict_tokens
    label = int(torch.randint(2, ()))
    ids = torch.randint(model.config.vocab_size, (PROMPT_TOKENS + answer,))
    ids[PROMPT_TOKENS // 2] = IMAGE_TOKEN_INDEX
    ending = torch.tensor([*verdict.pattern, verdict.fake if label else verdict.real])
    ids[len(ids) - len(ending) :] = ending
    labels = ids.clone()
    labels[:PROMPT_TOKENS] = IGNORE_INDEX
    side = model.config.pixel_format()["size"]
    return Sample(ids, labels, torch.randn(3, side, side), label)


def image_tokens(model: Any) -> int:
    """Returns how many positions an image takes."""
    return model.get_model().vision_tower.num_patches


def batch_order(answers: Sequence[int], arguments: argparse.Namespace, *, alike: bool) -> list[list[int]]:
    """Divides samples into micro-batches as a run on 8 GPUs would, in random order."""
    import numpy as np

    from llava.data.sampler import ModalityLengthSampler

    width = arguments.batch_size
    lengths = [PROMPT_TOKENS + answer for answer in answers]
    order = list(ModalityLengthSampler(lengths, width, GPUS * arguments.accumulation, by_length=alike))
    batches = [order[start : start + width] for start in range(0, len(order), width)]
    return [batches[index] for index in np.random.default_rng(0).permutation(len(batches))]


def padding_share(answers: Sequence[int], batches: Sequence[Sequence[int]], other_tokens: int) -> float:
    """Returns the share of positions that are padding, every sample having so many tokens beside its answer."""
    longest = sum(len(batch) * (other_tokens + max(answers[index] for index in batch)) for batch in batches)
    return 1 - (sum(answers) + other_tokens * len(answers)) / longest


def micro_batch(answers: Sequence[int], arguments: argparse.Namespace, model: Any) -> MicroBatch:
    """Returns a micro-batch of synthetic conversations whose answers have these lengths."""
    from llava.constants import IGNORE_INDEX
    from llava.data.collator import collate
    from llava.train.flops import BatchSize

    samples = [synthetic_sample(answer, model) for answer in answers]
    batch = collate(samples, 0, arguments.max_length)
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    lengths = [len(sample.input_ids) - 1 + image_tokens(model) for sample in samples]
    scored = int((batch["labels"] != IGNORE_INDEX).sum()) + len(samples)
    searches = arguments.cpm_search == "predictions"
    sizes = [
        BatchSize.of(rows, len(samples), scored, searched=searches * sum(rows))
        for rows in (lengths, [max(lengths)] * len(samples))
    ]
    return MicroBatch(inputs, *sizes)


def trained_model(arguments: argparse.Namespace, device: Any, dtype: Any) -> Any:
    """Returns a random model as the published recipe trains it, with its trained parts in float32."""
    from llava.train.lora import apply_lora, choose_trainable

    model = build_system(SIZES[arguments.size], device, dtype).model
    model.config.cpm_search = arguments.cpm_search
    adapted = apply_lora(model, rank=arguments.lora_r, alpha=2 * arguments.lora_r, dropout=0.05)
    choose_trainable(adapted, {"lora", "mm_projector", "dino_mm_projector", "fusion"})
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if not arguments.no_gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return adapted.train()


@dataclass(frozen=True)
class Measured:
    """What some optimizer steps took: seconds, sizes as in ``MicroBatch``, and the loss of each step."""

    seconds: float
    needed: "BatchSize"
    computed: "BatchSize"
    losses: list[float]


def measure(
    model: Any, steps: Sequence[Sequence[Sequence[int]]], arguments: argparse.Namespace, dtype: Any
) -> Measured:
    """Trains and measures.

    Args:
        model: What ``trained_model`` gives.
        steps: For each step and micro-batch the lengths of the answers; the first step is not measured.
        arguments: The command line.
        dtype: What matrices are multiplied in.
    """
    import torch
    from tqdm import tqdm

    from llava.train.flops import BatchSize
    from llava.train.lora import optimizer_groups

    device = model.device
    groups = optimizer_groups(model, learning_rate=2e-5, weight_decay=0.0, rates={})
    optimizer = torch.optim.AdamW(groups, fused=True)

    losses: list[float] = []

    def step(parts: Sequence[MicroBatch]) -> None:
        total = torch.zeros((), device=device)
        for part in parts:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = model(**part.inputs, loss_only=True).loss / len(parts)
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))

    took, needed, computed = 0.0, BatchSize(), BatchSize()
    for number, lengths in enumerate(tqdm(steps, unit=" steps")):
        parts = [micro_batch(answers, arguments, model.get_base_model()) for answers in lengths]
        spent = seconds(partial(step, parts), device)
        if number > 0:  # the first call of a kernel is slow
            took += spent
            needed = sum((part.needed for part in parts), needed)
            computed = sum((part.computed for part in parts), computed)
    return Measured(took, needed, computed, losses)


def bench(arguments: argparse.Namespace) -> None:
    """Measures and prints.

    Raises:
        OptionError: A number is too small.
        UserError: The loss is not finite.
    """
    import numpy as np
    import torch

    from llava.model.builder import resolve_device

    if min(arguments.batch_size, arguments.accumulation, arguments.steps, arguments.lora_r) < 1:
        raise OptionError("batch size, accumulation, steps and rank must be at least 1")
    device = resolve_device(arguments.device)
    wanted = ("bfloat16" if device.type == "cuda" else "float32") if arguments.dtype == "auto" else arguments.dtype
    dtype = getattr(torch, wanted)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = trained_model(arguments, device, dtype)
    other_tokens = PROMPT_TOKENS - 1 + image_tokens(model.get_base_model())
    longest = arguments.max_length - other_tokens
    if longest < ANSWER_TOKENS[0]:
        raise OptionError(f"the maximal length must be at least {other_tokens + ANSWER_TOKENS[0]}, to leave an answer")
    count = (arguments.steps + 1) * arguments.accumulation
    answers = answer_lengths(max(count, 1000) * arguments.batch_size, longest, np.random.default_rng(0))
    orders = {way: batch_order(answers, arguments, alike=way == "alike") for way in ("published", "alike")}
    chosen = [[answers[index] for index in batch] for batch in orders["alike" if arguments.alike else "published"]]
    steps = [chosen[start : start + arguments.accumulation] for start in range(0, count, arguments.accumulation)]
    measured = measure(model, steps, arguments, dtype)
    if not all(math.isfinite(loss) for loss in measured.losses):
        raise UserError(f"the loss is not finite: {measured.losses}")
    gpu = device.type == "cuda"
    result = {
        "size": arguments.size,
        "machine": torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": wanted,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "lora_r": arguments.lora_r,
        "gradient_checkpointing": not arguments.no_gradient_checkpointing,
        "batch_size": arguments.batch_size,
        "accumulation": arguments.accumulation,
        "steps": arguments.steps,
        **speed(measured, arguments.steps),
        **utilisation(model, measured, known=dtype != torch.float32),
        "padding_share_by_order": {
            way: padding_share(answers, batches, other_tokens) for way, batches in orders.items()
        },
        "peak_bytes": torch.cuda.max_memory_allocated() if gpu else peak_resident_bytes(),
        "first_loss": measured.losses[0],
        "last_loss": measured.losses[-1],
    }
    print(json.dumps(rounded(result)))


def speed(measured: Measured, steps: int) -> dict[str, float]:
    """Returns rates; tokens do not count padding."""
    needed, computed = measured.needed, measured.computed
    return {
        "step_s": measured.seconds / steps,
        "samples_per_s": needed.images / measured.seconds,
        "tokens_per_s": needed.tokens / measured.seconds,
        "tokens_per_sample": needed.tokens / needed.images,
        "padding_share": 1 - needed.tokens / computed.tokens,
    }


def utilisation(model: Any, measured: Measured, *, known: bool) -> dict[str, Any]:
    """Returns FLOP rates, and their shares of what the device can do where that is known."""
    from llava.gpu_ceilings import gpu_ceilings
    from llava.train.flops import TrainingFlops

    flops = TrainingFlops(model)
    done = {
        "mfu": flops.conventional(measured.needed),
        "mfu_needed": flops.needed(measured.needed),
        "hfu": flops.computed(measured.computed),
    }
    parts = flops.by_part(measured.computed)
    ceilings = gpu_ceilings(model.device) if known else None
    return {
        "tflops_per_s": {name: value / measured.seconds / 1e12 for name, value in done.items()},
        **{name: value / measured.seconds / ceilings.throughput if ceilings else None for name, value in done.items()},
        "hfu_by_part": {part: cost.total / done["hfu"] for part, cost in parts.items()},
    }


def peak_resident_bytes() -> int:
    """Returns the most memory that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss also counts what held this process's place before its program began: its parent
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(run_cli(lambda: bench(parse_arguments())))
