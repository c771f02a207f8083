"""Measures evaluation of a random model against one-at-a-time loops; the last line printed is one JSON object.

Three ways over the same images: evaluation at its defaults (analysis in batches, run store, CLIP's text tower once and
batched), a loop that analyses one image at a time and keeps CLIP, and the same loop loading CLIP for each pair of
texts, as the authors do. The loops compute the text metrics and CSS only. Where all compute in float32, the answers
must be equal. Run from the repository's root:

    python -m scripts.bench_eval --size mid
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from llava.cli import OptionParser, run_cli
from llava.errors import OptionError
from scripts.bench_inference import SIZES, build_system, rounded

CLIP_SIZES = {"tiny": (64, 2), "large": (768, 12)}
"""Width and layers of the text tower; ``large`` is that of openai/clip-vit-large-patch14-336."""
REFERENCE = "The shadows do not agree with the light, edges are jagged, and the texture of the skin is waxy."


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = OptionParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="tiny", help="default: tiny")
    parser.add_argument("--clip-size", choices=CLIP_SIZES, default="large", help="default: large")
    parser.add_argument("--images", type=int, default=64, help="default: 64")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens an answer (default: 64)")
    parser.add_argument("--device", default="auto", help="auto (default), cuda, cpu")
    dtypes = ("float32", "bfloat16")
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="of evaluation; loops are in float32")
    return parser.parse_args(arguments)


def write_clip(folder: Path, size: str, tokenizer: Any) -> None:
    """Writes a random CLIP model with a text tower of a size, as large on disk as a published one of that size."""
    from transformers import CLIPConfig, CLIPModel

    width, layers = CLIP_SIZES[size]
    text = {
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "projection_dim": width,
    }
    vision_width, vision_layers = (1024, 24) if size == "large" else (64, 2)
    vision = {
        "hidden_size": vision_width,
        "intermediate_size": 4 * vision_width,
        "num_hidden_layers": vision_layers,
        "num_attention_heads": vision_width // 64,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": width,
    }
    end = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    CLIPModel(CLIPConfig(text_config={**text, **end}, vision_config=vision, projection_dim=width)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)


class WholeClip:
    """A complete CLIP model that compares two texts at a time, as the authors use it."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer, CLIPModel

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = CLIPModel.from_pretrained(folder).eval()

    def compare(self, text: str, reference: str) -> float:
        """Returns the cosine of the two texts' embeddings."""
        import torch

        longest = self.model.config.text_config.max_position_embeddings
        batch = self.tokenizer(
            [text, reference], padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        with torch.no_grad():
            hidden = self.model.text_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            first, second = self.model.text_projection(hidden.pooler_output)
        return float(torch.nn.functional.cosine_similarity(first, second, dim=0))


class Stages:
    """Adds up how long each stage takes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times a block."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def summary(self, images: int) -> dict[str, Any]:
        """Returns images/s, and the share of each stage."""
        total = sum(self.seconds.values())
        return {"images_per_s": images / total, "shares": {name: value / total for name, value in self.seconds.items()}}


def evaluate(detector: Any, samples: Sequence[Any], options: Any, clip_folder: Path, folder: Path) -> tuple[Any, Any]:
    """Evaluates as the command does at its defaults; returns the stages and the texts."""
    from forgery_eval.answers import DEFAULT_SYSTEM, AnswerKind
    from forgery_eval.fingerprints import images_digest
    from forgery_eval.metrics.scoring import Scoring, Similarity, score
    from forgery_eval.metrics.similarity import TextSimilarity
    from forgery_eval.pages.report import report_page
    from forgery_eval.runner import fill_store
    from forgery_eval.store import Run, RunStore, read_run

    stages, ids = Stages(), [sample.id for sample in samples]
    with stages("hash"):
        settings = {"images": images_digest(ids, [sample.image for sample in samples])}
    run = Run(settings, {}, detector.system.batch_size(options))
    with stages("analyze"), closing(RunStore(folder, run, ids)) as store:
        fill_store(detector, samples, options, store)
    with stages("load clip"):
        clip = TextSimilarity(str(clip_folder))
    predictions = [read_run(store.path)[1][sample.id] for sample in samples]
    with stages("texts"):
        answers = AnswerKind.of(DEFAULT_SYSTEM)
        rows = score(samples, predictions, answers, similarity=Similarity(clip.cut, clip.chunked))
    with stages("metrics"):
        metrics = Scoring.of(rows, answers).all_metrics(rows)
    with stages("report"):
        about = {"protocol": "", "data": "", "run": run.key, "calibration": None}
        report_page({**about, **metrics}, rows)
    return stages, [prediction.text for prediction in predictions]


def plain_loop(detector: Any, samples: Sequence[Any], options: Any, clip_folder: Path, *, keep: bool) -> Any:
    """Analyses and compares one image at a time; returns the stages and the texts."""
    from forgery_eval.metrics.reasoning import text_metrics

    stages, texts = Stages(), []
    clip: WholeClip | None = None
    for sample in samples:
        with stages("analyze"):
            report = detector.analyze(sample.image, **vars(options))
        if clip is None or not keep:
            with stages("load clip"):
                clip = WholeClip(clip_folder)
        with stages("texts"):
            text_metrics(report.reasoning, sample.reference)
            clip.compare(report.reasoning, sample.reference)
        texts.append(report.text)
    return stages, texts


def bench(arguments: argparse.Namespace) -> None:
    """Measures and prints.

    Raises:
        OptionError: A number is too small.
        RuntimeError: Answers differ.
    """
    import numpy as np
    import torch
    from PIL import Image

    from forgery_eval.benchmarks import open_benchmark
    from llava.detector import ForgeryDetector
    from llava.model.builder import resolve_device
    from llava.model.cpu_bfloat16 import lay_out

    if arguments.images < 2 or arguments.new_tokens < 2:
        raise OptionError("images and new tokens must be at least 2")
    torch.manual_seed(0)
    device = torch.device(resolve_device(arguments.device))
    system = build_system(SIZES[arguments.size], device, torch.float32)
    detector, options = ForgeryDetector(system), system.options(max_new_tokens=arguments.new_tokens)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = []
        for number in range(arguments.images):
            pixels = rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.jpg")
            rows.append({"image": f"{number}.jpg", "label": number % 2, "reference": REFERENCE})
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        samples = open_benchmark(folder / "data.jsonl")
        write_clip(folder / "clip", arguments.clip_size, clip_tokenizer())
        detector.analyze(samples[0].image, max_new_tokens=2)  # the first call of a kernel is slow
        fast = detector
        if arguments.dtype != "float32":
            torch.manual_seed(0)
            rounded_system = build_system(SIZES[arguments.size], device, getattr(torch, arguments.dtype))
            lay_out(rounded_system.model)
            fast = ForgeryDetector(rounded_system)
            fast.analyze(samples[0].image, max_new_tokens=2)
        ways = {"eval": evaluate(fast, samples, options, folder / "clip", folder / "predictions")}
        for way, keep in (("loop_keeping_clip", True), ("loop_reloading_clip", False)):
            ways[way] = plain_loop(detector, samples, options, folder / "clip", keep=keep)
    if arguments.dtype == "float32" and len({tuple(texts) for _, texts in ways.values()}) > 1:
        raise RuntimeError("the ways gave different answers")
    measured = {way: stages.summary(arguments.images) for way, (stages, _) in ways.items()}
    speed = {way: found["images_per_s"] for way, found in measured.items()}
    result = {
        "size": arguments.size,
        "clip_size": arguments.clip_size,
        "images": arguments.images,
        "new_tokens": arguments.new_tokens,
        "dtype": arguments.dtype,
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "batch_size": system.batch_size(options),
        **measured,
        "eval_over_loop_keeping_clip": speed["eval"] / speed["loop_keeping_clip"],
        "eval_over_loop_reloading_clip": speed["eval"] / speed["loop_reloading_clip"],
    }
    print(json.dumps(rounded(result)))


def clip_tokenizer() -> Any:
    """Returns a byte-level tokenizer with CLIP's two marks."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    begin, end = "<|startoftext|>", "<|endoftext|>"
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[begin, end], initial_alphabet=alphabet)
    raw.train_from_iterator([REFERENCE], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=begin, eos_token=end, pad_token=end)


if __name__ == "__main__":
    sys.exit(run_cli(lambda: bench(parse_arguments())))
