"""Measures LoRA steps of one checkpoint by transformers and PEFT alone, and as trained here; last comes a JSON object.

The checkpoint is a random LLaVA with a CLIP tower alone, in transformers' layout, so that both can open it:

- ``plain``: ``LlavaForConditionalGeneration`` with PEFT's LoRA, its own loss over all positions, and torch's AdamW;
  bfloat16 is autocast over float32 weights;
- ``ours``: as ``forgery train`` does it; bfloat16 has frozen weights of 16 bits too.

Both train LoRA on the language model's linear layers and the projector whole, on the same rows of one length, on a CPU.
Each way runs in a process of its own. ``peak_bytes`` is the most memory that the process held (resident) less what
it held once everything was imported; ``step_s`` is the fastest step but the first. The loss before the first step,
without dropout, and the norm of the projector's gradient show that it is one model. Run from the repository's root:

    python -m scripts.bench.training_peers --size mid
"""

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from llava.cli import OptionParser, run_cli
from llava.errors import OptionError
from scripts.bench.peers import write_checkpoint
from scripts.bench_inference import SIZES, rounded
from scripts.bench_training import PROMPT_TOKENS

DTYPES = ("float32", "bfloat16")
PATCH = 14
RANK, ALPHA, DROPOUT = 128, 256, 0.05
"""Of LoRA, as published for FakeReasoning."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = OptionParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="tiny", help="default: tiny")
    parser.add_argument("--batch-size", type=int, default=4, help="rows a step (default: 4)")
    parser.add_argument("--length", type=int, default=763, help="positions of each row, the image's too (default: 763)")
    parser.add_argument("--steps", type=int, default=3, help="steps measured, after one (default: 3)")
    return parser.parse_args(arguments)


def image_tokens(size: str) -> int:
    """Returns how many positions an image takes."""
    return int((SIZES[size]["pixels"] // PATCH) ** 2)


def random_batch(arguments: argparse.Namespace, placeholder: int, repeated: int) -> tuple[dict[str, Any], Any]:
    """Returns ids and labels of conversations about one image each, and the pixels, the same for every way.

    Args:
        arguments: The command line.
        placeholder: Id that stands for the image.
        repeated: How often it stands there.
    """
    import torch

    numbers = torch.Generator().manual_seed(0)
    count = arguments.length - image_tokens(arguments.size) + 1
    ids = torch.randint(3, 31_000, (arguments.batch_size, count), generator=numbers)
    labels = ids.clone()
    labels[:, :PROMPT_TOKENS] = -100
    middle = PROMPT_TOKENS // 2
    image = torch.full((arguments.batch_size, repeated), placeholder)
    side = SIZES[arguments.size]["pixels"]
    input_ids = torch.cat((ids[:, :middle], image, ids[:, middle + 1 :]), dim=1)
    words = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": torch.cat((labels[:, :middle], torch.full_like(image, -100), labels[:, middle + 1 :]), dim=1),
    }
    return words, torch.randn((arguments.batch_size, 3, side, side), generator=numbers)


def plain_way(folder: Path, dtype: str, arguments: argparse.Namespace) -> tuple[Any, Callable[[], Any], Any]:
    """Returns the model, what gives its loss, and the optimizer, by transformers and PEFT alone."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    settings = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=DROPOUT,
        target_modules=r".*language_model.*_proj",
        modules_to_save=["multi_modal_projector"],
    )
    adapted = get_peft_model(model, settings)
    words, pixels = random_batch(arguments, model.config.image_token_id, image_tokens(arguments.size))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    return (
        adapted,
        lambda: adapted(**words, pixel_values=pixels).loss,
        torch.optim.AdamW(trained, lr=2e-5, weight_decay=0.0),
    )


def our_way(folder: Path, dtype: str, arguments: argparse.Namespace) -> tuple[Any, Callable[[], Any], Any]:
    """Returns the same as trained here."""
    import torch

    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.model.builder import load_pretrained_model
    from llava.train.lora import apply_lora, choose_trainable, optimizer_groups

    _, model, _, _ = load_pretrained_model(folder, device="cpu", dtype=dtype)
    adapted = apply_lora(model, rank=RANK, alpha=ALPHA, dropout=DROPOUT)
    choose_trainable(adapted, {"lora", "mm_projector"})
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    words, pixels = random_batch(arguments, IMAGE_TOKEN_INDEX, 1)
    groups = optimizer_groups(adapted, learning_rate=2e-5, weight_decay=0.0, rates={})
    return (
        adapted,
        lambda: adapted(**words, images=pixels, loss_only=True, use_cache=False).loss,
        torch.optim.AdamW(groups, fused=True),
    )


WAYS = {"plain": plain_way, "ours": our_way}


def measure(way: str, dtype: str, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Trains some steps in this process, and returns what they took."""
    import peft
    import torch
    import transformers

    import llava.train.lora
    from scripts.bench_inference import peak_bytes, seconds

    assert peft and transformers and llava.train.lora  # imported before memory is counted
    cpu = torch.device("cpu")
    before = peak_bytes(cpu)
    torch.manual_seed(0)
    model, loss_of, optimizer = WAYS[way](folder, dtype, arguments)
    losses: list[float] = []

    def step(*, updates: bool = True) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = loss_of()
        loss.backward()
        losses.append(float(loss.detach()))
        if updates:
            optimizer.step()
            optimizer.zero_grad()

    model.eval()
    step(updates=False)
    projector = [p for name, p in model.named_parameters() if "projector" in name and p.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in projector])
    optimizer.zero_grad()
    model.train()
    step()
    return {
        "step_s": min(seconds(step, cpu) for _ in range(arguments.steps)),
        "peak_bytes": peak_bytes(cpu) - before,
        "loss": losses[0],
        "last_loss": losses[-1],
        "projector_gradient_norm": float(norm),
    }


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns what a function returns in a process that has done nothing else."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def versions() -> dict[str, Any]:
    """Returns what the numbers depend on beside the machine."""
    import peft
    import torch
    import transformers

    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def bench(arguments: argparse.Namespace) -> None:
    """Measures and prints.

    Raises:
        OptionError: A number is too small.
    """
    least = image_tokens(arguments.size) + PROMPT_TOKENS
    if min(arguments.batch_size, arguments.steps) < 1 or arguments.length < least:
        raise OptionError(f"batch size and steps must be at least 1, and the length at least {least}")
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        in_own_process(write_checkpoint, Path(name), arguments.size)
        for way in WAYS:
            for dtype in DTYPES:
                values = in_own_process(measure, way, dtype, Path(name) / "model", arguments)
                for key, value in values.items():
                    found.setdefault(key, {}).setdefault(way, {})[dtype] = value
    step, peak = found["step_s"], found["peak_bytes"]
    result = {
        "size": arguments.size,
        "machine": f"{platform.machine()} CPU",
        **in_own_process(versions),
        "batch_size": arguments.batch_size,
        "length": arguments.length,
        "steps": arguments.steps,
        **found,
        "faster_than": {dtype: step["plain"][dtype] / step["ours"]["bfloat16"] for dtype in DTYPES},
        "share_of_memory": {dtype: peak["ours"]["bfloat16"] / peak["plain"][dtype] for dtype in DTYPES},
    }
    print(json.dumps(rounded(result)))


if __name__ == "__main__":
    sys.exit(run_cli(lambda: bench(parse_arguments())))
