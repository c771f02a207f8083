"""Fairness: what is not the image says nothing about the class."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.ensemble import RandomForestClassifier

from mmfr_generation.synthetic.__main__ import main
from mmfr_generation.synthetic.card import auc

COUNT = 2000
WIDEN = 2.81 / 1.96
"""Makes a 95 % interval of one cue that of ten cues together (Bonferroni)."""


@pytest.fixture(scope="module", params=["none", pytest.param("mixed", marks=pytest.mark.slow)])
def data(tmp_path_factory, request) -> Path:
    out = tmp_path_factory.mktemp("fairness") / "d"
    counts = ["--train", str(COUNT), "--eval", "0", "--size", "64", "--seed", "77"]
    assert main(["--out", str(out), *counts, "--delivery", request.param]) == 0
    return out


@pytest.fixture(scope="module")
def entries(data) -> list[tuple[Path, bool]]:
    """Paths and classes in the order of the training file."""
    conversations = json.loads((data / "forgery_reasoning_cot.json").read_text("utf-8"))
    return [(data / c["image"], "image is fake." in c["conversations"][1]["value"]) for c in conversations]


def leak(features: list[list[float]], fake: list[bool]) -> tuple[float, float]:
    """Returns the AUC of a forest trained on every second image and tested on the others, and its half-width."""
    x, y = np.asarray(features, np.float64), np.asarray(fake)
    turn = np.random.default_rng(0).permutation(len(y))
    train, test = turn[::2], turn[1::2]
    forest = RandomForestClassifier(200, min_samples_leaf=10, random_state=0, n_jobs=1).fit(x[train], y[train])
    scores = forest.predict_proba(x[test])[:, 1]
    area, half = auc(scores[~y[test]], scores[y[test]])
    return area, half * WIDEN


def carries_nothing(features: list[list[float]], fake: list[bool]) -> None:
    area, half = leak(features, fake)
    assert area - half <= 0.5 <= area + half, (area, half)
    assert half < 0.06


def tables(path: Path) -> list[float]:
    with Image.open(path) as image:
        stored = getattr(image, "quantization", None) or {}
        sampling = [float(x) for layer in getattr(image, "layer", []) for x in layer[1:3]]
    values = [float(x) for key in (0, 1) for x in stored.get(key, [0.0] * 64)]
    return values + (sampling + [0.0] * 6)[:6]


def metadata(path: Path) -> list[float]:
    with Image.open(path) as image:
        named = sorted(f"{key}={value!r}" for key, value in image.info.items())
        exif = len(image.getexif())
        mode, form = image.mode, image.format
    text = json.dumps([named, exif, mode, form])
    return [float(len(text)), float(sum(map(ord, text))), float(exif), float(path.stat().st_mode)]


def size_in_pixels(path: Path) -> list[float]:
    with Image.open(path) as image:
        return [float(x) for x in image.size]


def mean_colour(path: Path) -> list[float]:
    with Image.open(path) as image:
        return [float(x) for x in np.asarray(image.convert("RGB")).mean(axis=(0, 1))]


CUES: dict[str, Callable[[Path], list[float]]] = {
    "file type": lambda path: [float(path.suffix == suffix) for suffix in (".png", ".jpg", ".webp", ".avif")],
    "size in pixels": size_in_pixels,
    "compression tables": tables,
    "metadata": metadata,
    "name": lambda path: [float(ord(c)) for c in path.stem],
    "length of the name": lambda path: [float(len(path.name))],
    "mean colour": mean_colour,
}


@pytest.mark.parametrize("cue", CUES)
def test_a_cue_beside_the_image_carries_nothing(entries, cue):
    carries_nothing([CUES[cue](path) for path, _ in entries], [fake for _, fake in entries])


def test_what_happened_to_an_image_carries_nothing(data):
    records = [json.loads(line) for line in (data / "manifest.jsonl").read_text("utf-8").splitlines()]
    if "delivery" not in records[0]:
        assert all("delivery" not in record for record in records)
        return
    names = sorted({step["step"] for record in records for step in record["delivery"]})
    assert len(names) == 11
    steps = [[step["step"] for step in record["delivery"]] for record in records]
    features = [[float(len(own)), *(float(own.count(name)) for name in names)] for own in steps]
    carries_nothing(features, [record["label"] == "fake" for record in records])


def test_the_order_of_the_training_file_carries_nothing(entries):
    fake = [fake for _, fake in entries]
    features = [
        [float(k), float(k % 2), float(k % 3), float(k > 0 and fake[k - 1]), float(k > 1 and fake[k - 2])]
        for k in range(len(fake))
    ]
    carries_nothing(features, fake)


def test_the_order_of_the_manifest_and_of_writing_carries_nothing(data, entries):
    fakes = {path.name: fake for path, fake in entries}
    records = [json.loads(line) for line in (data / "manifest.jsonl").read_text("utf-8").splitlines()]
    listed = [fakes[Path(record["image"]).name] for record in records]
    carries_nothing([[float(k), float(k % 2)] for k in range(COUNT)], listed)


def test_classes_are_equally_many(entries):
    assert sum(fake for _, fake in entries) == len(entries) // 2 == COUNT // 2


def jpeg_segments(data: bytes) -> list[int]:
    """Returns the markers before the image's data; what follows must end with the image."""
    assert data[:2] == b"\xff\xd8" and data[-2:] == b"\xff\xd9"
    markers, at = [], 2
    while not markers or markers[-1] != 0xDA:
        assert data[at] == 0xFF
        markers.append(data[at + 1])
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return markers


def png_chunks(data: bytes) -> list[bytes]:
    names, at = [], 8
    while at < len(data):
        names.append(data[at + 4 : at + 8])
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return names


def test_files_hold_nothing_beside_the_image(entries):
    jfif, tables_, frame, codes, scan = 0xE0, 0xDB, 0xC0, 0xC4, 0xDA
    for path, _ in entries[:200]:
        data = path.read_bytes()
        if path.suffix == ".jpg":
            assert set(jpeg_segments(data)) == {jfif, tables_, frame, codes, scan}
            assert data.count(b"\xff\xd9") == 1
        elif path.suffix == ".png":
            assert set(png_chunks(data)) == {b"IHDR", b"IDAT", b"IEND"}
        else:
            with Image.open(path) as image:
                assert not image.getexif() and not {"exif", "icc_profile", "xmp"} & {
                    k for k, v in image.info.items() if v
                }


def noise_level(path: Path) -> list[float]:
    with Image.open(path) as image:
        grey = np.asarray(image.convert("L"), np.float32)
    rest = np.abs(grey[1:-1, 1:-1] - (grey[1:-1, 2:] + grey[1:-1, :-2] + grey[2:, 1:-1] + grey[:-2, 1:-1]) / 4)
    return [float(np.median(rest)), float(rest.std())]


@pytest.mark.parametrize("cue", [noise_level, lambda path: [float(path.stat().st_size), float(path.suffix == ".png")]])
def test_neither_noise_nor_file_size_decides(entries, cue):
    area, _ = leak([cue(path) for path, _ in entries], [fake for _, fake in entries])
    assert area < 0.75


def test_the_measure_finds_a_leak_where_there_is_one(entries):
    rng = np.random.default_rng(0)
    fake = [fake for _, fake in entries]
    area, half = leak([[float(f) + rng.normal(0, 2)] for f in fake], fake)
    assert area - half > 0.5
