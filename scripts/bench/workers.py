"""Measures two workers on two cores against one, over the same images; prints one line of JSON last.

Each worker has one thread and a random model of its own, in float32. Rates are those after all workers have opened
their models; what a whole run takes, the start of Ray and the opening included, is told too. The reports of both must
be equal. From the repository's root:

    python -m scripts.bench.workers
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.cli import OptionParser, log, positive_int, run_cli
from llava.errors import DataError
from scripts.bench_inference import SIZES, build_system


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="mid", help="default: mid")
    parser.add_argument("--images", type=positive_int, default=24, help="default: 24")
    parser.add_argument("--batch", type=positive_int, default=2, help="images at a time (default: 2)")
    parser.add_argument("--workers", type=positive_int, default=2, help="compared with one (default: 2)")
    return parser.parse_args(arguments)


def write_images(folder: Path, count: int, side: int) -> list[Path]:
    """Writes random images of one size."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    files = [folder / f"{number:05}.png" for number in range(count)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(file)
    return files


def measure(model: Path, files: Sequence[Path], batch: int, workers: int) -> tuple[dict[str, float], list[Any]]:
    """Analyses the images with so many workers; returns rates and the reports in order."""
    from forgery_eval.inference import parse_arguments as detect
    from forgery_eval.model_options import analyze_options
    from forgery_eval.workers import WorkerPool, split

    words = ["--img_path", str(files[0]), "--model-path", str(model), "--device", "cpu", "--dtype", "float32"]
    arguments = detect([*words, "--score-only", "--workers", str(workers)])
    options = analyze_options(arguments)
    start = time.perf_counter()
    with WorkerPool(arguments, options, abstain=False) as pool:
        pool.wait_until_open()
        opened = time.perf_counter()
        done = list(pool.analyze_in_order(split(files, batch), Path, options))
        end = time.perf_counter()
    reports = [report.to_dict() for one in done for report in one.result.reports]
    rates = {
        "images_per_s": len(files) / (end - opened),
        "images_per_s_with_start": len(files) / (end - start),
        "start_s": opened - start,
    }
    return rates, reports


def bench(arguments: argparse.Namespace) -> None:
    """Measures and prints.

    Raises:
        DataError: The reports differ.
    """
    import torch

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_images(folder, arguments.images, SIZES[arguments.size]["pixels"])
        build_system(SIZES[arguments.size], torch.device("cpu"), torch.float32).model.save_pretrained(folder / "model")
        found = {}
        for workers in (1, arguments.workers):
            found[workers] = measure(folder / "model", files, arguments.batch, workers)
            log(f"{workers} workers: {found[workers][0]['images_per_s']:.2f} images/s")
    (one, reports), (several, others) = found[1], found[arguments.workers]
    if reports != others or any(report["error"] for report in reports):
        raise DataError("the reports differ, or some images could not be analysed")
    speedup = {name: several[name] / one[name] for name in ("images_per_s", "images_per_s_with_start")}
    figures = {"1": one, str(arguments.workers): several, "speedup": speedup["images_per_s"]}
    figures["speedup_with_start"] = speedup["images_per_s_with_start"]
    about = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__, "equal": True}
    print(json.dumps({**vars(arguments), **about, **_rounded(figures)}))


def _rounded(value: Any) -> Any:
    return {name: _rounded(one) for name, one in value.items()} if isinstance(value, dict) else round(value, 3)


if __name__ == "__main__":
    sys.exit(run_cli(lambda: bench(parse_arguments())))
