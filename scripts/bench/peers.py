"""Measures other ways to run the same checkpoint over the same images; the last line printed is one JSON object.

The checkpoint is a random LLaVA with a CLIP tower alone, in transformers' layout, so that everybody can open it:

- ``authors``: transformers' ``generate`` in float32, one image at a time, each text compared by a CLIP that is kept;
- ``transformers``: the same ``generate`` in bfloat16 and in batches;
- ``ours``: ``ForgeryDetector.analyze_many`` in bfloat16 and in batches.

All read the same files and make equally many new tokens. The float32 answers of the first images are compared, which
shows that it is one model. Size 13b writes 27 GB into the temporary folder. Run from the repository's root:

    python -m scripts.bench.peers --size mid
"""

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llava.cli import OptionParser, run_cli
from llava.errors import OptionError
from scripts.bench_eval import CLIP_SIZES, REFERENCE, WholeClip, clip_tokenizer, write_clip
from scripts.bench_inference import SIZES, clip_only_model, rounded, seconds

COMPARED_IMAGES, COMPARED_TOKENS = 2, 4
"""Images and new tokens whose float32 answers are compared."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = OptionParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="tiny", help="default: tiny")
    parser.add_argument("--clip-size", choices=CLIP_SIZES, default="large", help="CLIP that compares (default: large)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 16], help="default: 1 8 16")
    parser.add_argument("--images", type=int, default=16, help="default: 16")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens an answer (default: 64)")
    parser.add_argument("--device", default="auto", help="auto (default), cuda, cpu")
    return parser.parse_args(arguments)


class Transformers:
    """The checkpoint as transformers runs it.

    Args:
        folder: The checkpoint.
        device: Where it computes.
        dtype: What it computes in.
    """

    def __init__(self, folder: Path, device: Any, dtype: Any) -> None:
        from transformers import AutoImageProcessor, LlavaForConditionalGeneration, LlavaProcessor

        from llava.systems.fakevlm.answer import QUESTION

        self.model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device).eval()
        self.processor = LlavaProcessor.from_pretrained(folder)
        self.processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.prompt = f"<image>{QUESTION}"

    def answer(self, images: Sequence[Any], new_tokens: int) -> list[str]:
        """Returns greedy answers to one batch."""
        import torch

        words = self.processor(images=list(images), text=[self.prompt] * len(images), return_tensors="pt")
        inputs = words.to(self.model.device, self.model.dtype)
        with torch.no_grad():
            ids = self.model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
        texts: list[str] = self.processor.tokenizer.batch_decode(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return [text.strip() for text in texts]


def write_checkpoint(folder: Path, size: str) -> None:
    """Writes the random model in transformers' layout."""
    from llava.model.saving import save_published

    model = clip_only_model(SIZES[size])
    assert model.tokenizer is not None
    model.tokenizer.save_pretrained(folder / "tokenizer")
    save_published(model, folder / "model", model.config.to_dict(), folder / "tokenizer")


def rates(images: Sequence[Any], sizes: Sequence[int], device: Any, run: Callable[[int], Any]) -> dict[int, float]:
    """Returns images/s by batch size; the first call of a kernel is slow and not counted."""
    run(sizes[0])
    return {size: len(images) / seconds(partial(run, size), device) for size in sizes}


def authors_way(
    folder: Path, images: Sequence[Any], arguments: argparse.Namespace, device: Any
) -> tuple[float, list[str]]:
    """Returns images/s, and short answers to the first images."""
    import torch

    plain, clip = Transformers(folder / "model", device, torch.float32), WholeClip(folder / "clip")

    def loop() -> None:
        for image in images:
            clip.compare(plain.answer([image], arguments.new_tokens)[0], REFERENCE)

    answers = [plain.answer([image], COMPARED_TOKENS)[0] for image in images[:COMPARED_IMAGES]]
    return len(images) / seconds(loop, device), answers


def transformers_way(
    folder: Path, images: Sequence[Any], arguments: argparse.Namespace, device: Any
) -> dict[int, float]:
    """Returns images/s by batch size."""
    import torch

    batched = Transformers(folder / "model", device, torch.bfloat16)

    def run(size: int) -> None:
        for start in range(0, len(images), size):
            batched.answer(images[start : start + size], arguments.new_tokens)

    return rates(images, arguments.batch_sizes, device, run)


def our_way(
    folder: Path, images: Sequence[Any], arguments: argparse.Namespace, device: Any
) -> tuple[dict[int, float], list[str]]:
    """Returns images/s by batch size, and short float32 answers to the first images."""
    from llava.detector import ForgeryDetector

    exact = ForgeryDetector.from_pretrained(folder / "model", device=device, dtype="float32")
    answers = [image.text for image in exact.analyze_many(images[:COMPARED_IMAGES], max_new_tokens=COMPARED_TOKENS)]
    detector = ForgeryDetector.from_pretrained(folder / "model", device=device, dtype="bfloat16")

    def run(size: int) -> None:
        list(detector.analyze_many(images, batch_size=size, max_new_tokens=arguments.new_tokens))

    return rates(images, arguments.batch_sizes, device, run), answers


def measure(folder: Path, images: Sequence[Any], arguments: argparse.Namespace, device: Any) -> dict[str, Any]:
    """Measures the three ways one after the other."""
    write_clip(folder / "clip", arguments.clip_size, clip_tokenizer())
    authors, theirs = authors_way(folder, images, arguments, device)
    transformers = transformers_way(folder, images, arguments, device)
    ours, own = our_way(folder, images, arguments, device)
    return {
        "images_per_s": {"authors": authors, "transformers": transformers, "ours": ours},
        "equal_answers": sum(first == second for first, second in zip(theirs, own, strict=True)) / len(own),
        "ours_over_authors": max(ours.values()) / authors,
        "ours_over_transformers": max(ours.values()) / max(transformers.values()),
    }


def bench(arguments: argparse.Namespace) -> None:
    """Measures and prints.

    Raises:
        OptionError: A number is too small.
    """
    import numpy as np
    import torch
    from PIL import Image

    from llava.model.builder import resolve_device

    if min(arguments.batch_sizes) < 1 or arguments.images < COMPARED_IMAGES or arguments.new_tokens < COMPARED_TOKENS:
        raise OptionError(f"batch sizes must be at least 1, images {COMPARED_IMAGES} and new tokens {COMPARED_TOKENS}")
    torch.manual_seed(0)
    device = resolve_device(arguments.device)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)) for _ in range(arguments.images)]
    with tempfile.TemporaryDirectory() as name:
        write_checkpoint(Path(name), arguments.size)
        measured = measure(Path(name), images, arguments, device)
    result = {
        "size": arguments.size,
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "images": arguments.images,
        "new_tokens": arguments.new_tokens,
        **measured,
    }
    print(json.dumps(rounded(result)))


if __name__ == "__main__":
    sys.exit(run_cli(lambda: bench(parse_arguments())))
