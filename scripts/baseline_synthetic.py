"""Baselines on MMFR-Synthetic: what simple detectors reach, per generator and per strength.

    python scripts/baseline_synthetic.py --data D [--epochs 3] [--threads 1]

Three detectors are trained on the training tree and tested on the evaluation sets: a logistic regression on ten
statistics, gradient-boosted trees on hand-made residual and spectrum features, and a small convolutional network. The
last line is one JSON object. Accuracies are balanced: the mean of that on reals and that on fakes.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional as F

from llava.cli import OptionParser, run_cli
from llava.errors import DataError
from llava.files import file_errors
from llava.images import load_image
from llava.systems.baseline.cnn import SmallCnn

Array = npt.NDArray[Any]
STRENGTH_EDGES = (0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Images:
    """One split, decoded.

    Attributes:
        pixels_NHWC: uint8.
        fake: Bool, shape (N,).
        bytes: File sizes, shape (N,).
        records: The manifest's lines.
    """

    pixels_NHWC: Array
    fake: Array
    bytes: Array
    records: list[dict[str, Any]]


def load(root: Path, split: str) -> Images:
    """Reads the images of a split.

    Raises:
        DataError: The folder has no manifest or no such images.
        FileError: A file cannot be read.
    """
    manifest = root / "manifest.jsonl"
    if not manifest.is_file():
        raise DataError(f"{manifest} is missing; make it with python -m mmfr_generation.synthetic")
    with file_errors(manifest, "read"):
        lines = manifest.read_bytes().splitlines()
    try:
        records = [record for record in map(json.loads, lines) if record["split"] == split]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{manifest} is no manifest of python -m mmfr_generation.synthetic") from None
    if len({r["label"] for r in records}) < 2:
        raise DataError(f"{root} has no {split} images of both classes")
    pixels = []
    for record in records:
        pixels.append(np.asarray(load_image(root / record["image"])))
    sizes = np.asarray([(root / r["image"]).stat().st_size for r in records], np.float64)
    return Images(np.stack(pixels), np.asarray([r["label"] == "fake" for r in records]), sizes, records)


def _planes(pixels_HWC: Array) -> tuple[Array, Array, Array]:
    red, green, blue = pixels_HWC.astype(np.float32).transpose(2, 0, 1) / 255
    return 0.299 * red + 0.587 * green + 0.114 * blue, red - green, blue - green


def _residual(plane: Array) -> Array:
    """Returns what a pixel adds to the mean of its four neighbours."""
    around = plane[1:-1, 2:] + plane[1:-1, :-2] + plane[2:, 1:-1] + plane[:-2, 1:-1]
    return plane[1:-1, 1:-1] - around / 4


def _power(plane: Array) -> Array:
    """Returns the log power spectrum, rows from 0 to the sampling rate, columns to its half."""
    window = np.hanning(plane.shape[0])[:, None] * np.hanning(plane.shape[1])[None, :]
    return np.log(np.abs(np.fft.rfft2((plane - plane.mean()) * window)) ** 2 + 1e-9)


@lru_cache(maxsize=8)
def _frequency(shape: tuple[int, ...]) -> Array:
    rows = np.abs(np.fft.fftfreq(shape[0]))[:, None]
    return np.sqrt(rows**2 + np.linspace(0, 0.5, shape[1])[None, :] ** 2)


@lru_cache(maxsize=8)
def _rings(shape: tuple[int, ...]) -> list[tuple[Array, ...]]:
    """Returns the indices of twelve rings of the spectrum."""
    frequency = _frequency(shape)
    return [((frequency >= f) & (frequency < f + 0.05)).nonzero() for f in np.arange(0.05, 0.65, 0.05)]


def _lag(plane: Array, dy: int, dx: int) -> float:
    """Returns the correlation of a plane with itself moved."""
    a = plane[: plane.shape[0] - dy, : plane.shape[1] - dx]
    b = plane[dy:, dx:]
    return float((a * b).mean() / (plane.var() + 1e-9))


def ten_statistics(pixels_HWC: Array, size: float) -> list[float]:
    """Returns ten global statistics: brightness, contrast, colour, noise, sharpness, spectrum, and file size."""
    grey, rg, bg = _planes(pixels_HWC)
    rest = _residual(grey)
    spectrum = _power(grey)
    frequency = _frequency(spectrum.shape)
    high, low = spectrum[frequency > 0.35].mean(), spectrum[(frequency > 0.05) & (frequency < 0.15)].mean()
    return [
        float(grey.mean()),
        float(grey.std()),
        float(np.abs(rg).mean() + np.abs(bg).mean()),
        float(np.log(rest.std() + 1e-6)),
        float(np.log(np.median(np.abs(rest)) + 1e-4)),
        float(np.log((rest**4).mean() / (rest.var() ** 2 + 1e-12))),
        _lag(rest, 0, 1),
        float(high - low),
        float(np.log(_residual(rg).std() + 1e-6)),
        float(np.log(size)),
    ]


def hand_made_features(pixels_HWC: Array, size: float) -> list[float]:
    """Returns residual, correlation, phase, spectrum and histogram features of one image."""
    out = ten_statistics(pixels_HWC, size)[:-1]
    grey, rg, bg = _planes(pixels_HWC)
    for plane in (grey, rg, bg):
        rest = _residual(plane)
        flat = np.sort(np.abs(rest).ravel())
        out += [float(np.log(flat[int(q * (len(flat) - 1))] + 1e-4)) for q in (0.1, 0.25, 0.5, 0.75, 0.95, 0.995)]
        out += [
            _lag(rest, dy, dx) for dy, dx in ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (2, 2), (0, 3), (0, 4), (4, 0))
        ]
        out += [_phase_spread(rest, period) for period in (2, 3, 4, 8)]
        spectrum = _power(plane)
        rings = [spectrum[ring] for ring in _rings(spectrum.shape)]
        out += [float(ring.mean()) for ring in rings]
        out += [float(ring.max() - np.median(ring)) for ring in rings]
    local = _local_deviation(_residual(grey))
    out += [float(np.log(np.quantile(local, q) + 1e-4)) for q in (0.02, 0.1, 0.5, 0.9, 0.98)]
    out += [float(len(np.unique(pixels_HWC[..., c]))) for c in range(3)]
    out += [_level_gaps(pixels_HWC[..., c]) for c in range(3)]
    rests = [_residual(pixels_HWC[..., c].astype(np.float32)).ravel() for c in range(3)]
    return out + [float(np.corrcoef(rests[a], rests[b] + 1e-6)[0, 1]) for a, b in ((0, 1), (1, 2), (0, 2))]


def _phase_spread(rest: Array, period: int) -> float:
    """Returns how much the mean residual strength differs between the phases of a grid."""
    rows, cols = rest.shape[0] // period * period, rest.shape[1] // period * period
    cells = np.abs(rest[:rows, :cols]).reshape(rows // period, period, cols // period, period).mean(axis=(0, 2))
    return float(cells.std() / (cells.mean() + 1e-6))


def _local_deviation(rest: Array, side: int = 8) -> Array:
    rows, cols = rest.shape[0] // side * side, rest.shape[1] // side * side
    return rest[:rows, :cols].reshape(rows // side, side, cols // side, side).std(axis=(1, 3)).ravel()


def _level_gaps(channel: Array) -> float:
    """Returns how rough a channel's histogram is, as few levels make it."""
    histogram = np.bincount(channel.ravel(), minlength=256).astype(np.float64)
    return float(np.abs(np.diff(histogram)).sum() / histogram.sum())


def score_features(
    train: Images, test: Images, features: Callable[[Array, float], list[float]], classifier: Any
) -> Array:
    """Fits a classifier on features of the training images; returns P(fake) of the test images."""
    inputs = [
        np.nan_to_num(np.asarray([features(p, s) for p, s in zip(x.pixels_NHWC, x.bytes, strict=True)]))
        for x in (train, test)
    ]
    classifier.fit(inputs[0], train.fake)
    return np.asarray(classifier.predict_proba(inputs[1])[:, 1])


def _batch(images: Images, index: Array) -> Tensor:
    """Returns images in [0, 1], cut to even sides, shape (N, 3, H, W)."""
    picked = images.pixels_NHWC[index]
    even = picked[:, : picked.shape[1] // 2 * 2, : picked.shape[2] // 2 * 2]
    return torch.from_numpy(np.ascontiguousarray(even)).permute(0, 3, 1, 2).float() / 255


def score_network(train: Images, test: Images, epochs: float, seed: int) -> Array:
    """Trains the network; returns P(fake) of the test images."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    network = SmallCnn()
    rate, batch = 2e-3, 48
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.02)
    start, steps = time.monotonic(), max(1, round(epochs * len(train.fake) / batch))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50) * (0.5 + 0.5 * float(np.cos(np.pi * step / steps)))
        index = rng.integers(0, len(train.fake), batch)
        pixels = _batch(train, index).contiguous(memory_format=torch.channels_last)
        if rng.random() < 0.5:
            pixels = pixels.flip(3)
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(pixels)
        target = torch.from_numpy(train.fake[index]).float()
        loss = F.binary_cross_entropy_with_logits(logits.float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.monotonic() - start
    print(f"network: {steps * batch} images seen in {seconds:.0f} s, last loss {loss.item():.3f}")
    network.eval()
    scores = []
    with torch.inference_mode():
        for index in np.array_split(np.arange(len(test.fake)), max(1, len(test.fake) // 64)):
            scores.append(torch.sigmoid(network(_batch(test, index))).numpy())
    return np.concatenate(scores)


def report(test: Images, scores: Array) -> dict[str, Any]:
    """Returns balanced accuracies: by role, generator and strength, the last two among fakes of seen generators too."""
    right = (scores > 0.5) == test.fake
    role = np.asarray([r["split_role"] for r in test.records])
    sets = np.asarray([r["set"] for r in test.records])
    strength = np.asarray([r["strength"] or 0.0 for r in test.records])

    def balanced(fakes: Array, reals: Array) -> float | None:
        if not (fakes & test.fake).any() or not (reals & ~test.fake).any():
            return None
        return round(float(right[fakes & test.fake].mean() + right[reals & ~test.fake].mean()) / 2, 4)

    everywhere = np.ones_like(test.fake)
    bins = {f"{low:g}-{high:g}": (strength >= low) & (strength < high) for low, high in pairwise(STRENGTH_EDGES)} | {
        "1": strength == 1.0
    }
    roles = dict.fromkeys(role.tolist())
    return {
        "all": balanced(everywhere, everywhere),
        "reals": round(float(right[~test.fake].mean()), 4),
        "role": {name: balanced(role == name, role == name) for name in roles},
        "unseen": balanced(role != "seen", role != "seen"),
        "strength": {name: balanced(inside, everywhere) for name, inside in bins.items()},
        "full_strength_by_role": {name: balanced((role == name) & bins["1"], role == name) for name in roles},
        "generator": {name: balanced(sets == name, everywhere) for name in dict.fromkeys(sets.tolist())},
    }


def show(results: dict[str, dict[str, Any]]) -> None:
    """Prints a table with a row for each metric and a column for each detector."""
    names = list(results)
    print(f"{'balanced accuracy':34}" + "".join(f"{name:>12}" for name in names))
    for section in ("role", "full_strength_by_role", "strength", "generator"):
        for row in results[names[0]][section]:
            cells = (results[name][section][row] for name in names)
            label = f"full: {row}" if section.startswith("full") else row
            print(f"{label:34}" + "".join(f"{'-' if c is None else format(c, '.3f'):>12}" for c in cells))
    for row in ("unseen", "all"):
        print(f"{row:34}" + "".join(f"{results[name][row]:>12.3f}" for name in names))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = OptionParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder made by python -m mmfr_generation.synthetic")
    parser.add_argument("--epochs", type=float, default=3.0, help="passes of the network's training (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="threads of the detectors (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the network and the trees (default 0)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the baselines as the arguments say and returns what the JSON line holds."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    train, test = load(arguments.data, "train"), load(arguments.data, "evaluation")
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    trees = HistGradientBoostingClassifier(max_iter=300, learning_rate=0.08, random_state=arguments.seed)
    with threadpool_limits(arguments.threads):
        results = {
            "linear": report(test, score_features(train, test, ten_statistics, linear)),
            "trees": report(test, score_features(train, test, hand_made_features, trees)),
            "network": report(test, score_network(train, test, arguments.epochs, arguments.seed)),
        }
    show(results)
    line = {"train": len(train.fake), "test": len(test.fake), "epochs": arguments.epochs, **results}
    print(json.dumps(line))
    return line


def run() -> int:
    """Runs the command; returns its exit status."""

    def command() -> None:
        main()

    return run_cli(command)


if __name__ == "__main__":
    sys.exit(run())
