"""Damaged images and tables, many of them: each gives a result or a named error, in time and in little memory."""

import io
import json
import random
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from forgery_eval.benchmarks import open_benchmark
from forgery_eval.store import read_run
from llava import ForgeryDetector, ForgeryReport
from llava.data.records import read_records
from llava.errors import UserError
from llava.images import list_images
from llava.systems.base import AnalyzeOptions
from llava.tables import read_rows
from mmfr_generation.from_folder import read_table

ROOT = Path(__file__).parents[1]
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "PPM", "TGA", "ICO", "JPEG2000")
SUFFIXES = ("png", "jpg", "tif", "heic", "gif", "bmp", "webp", "jp2")
SIZES = {"GIF": (6, "<HH"), "BMP": (18, "<II"), "TGA": (12, "<HH")}
"""Where a header without a checksum has width and height."""


class Mean:
    """Calls bright images fake."""

    name = "Mean"
    answer_format = None
    options = AnalyzeOptions

    def prepare(self, image):
        return float(np.asarray(image.reduce(max(1, max(image.size) // 64))).mean() / 255)

    def batch_size(self, options):
        return 4

    def analyze_batch(self, prepared, options):
        return [ForgeryReport("fake" if mean >= 0.5 else "real", mean, "detector") for mean in prepared]


def encoded(seed: int, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def mutated(content: bytes, kind: str, random_: random.Random) -> bytes:
    """Flips bits anywhere or in the header, cuts, appends, or claims a size that is hardly allowed, or too large."""
    changed = bytearray(content)
    way = random_.randrange(5)
    if way == 0:
        return bytes(changed[: random_.randrange(len(changed))])
    if way == 1 and kind in SIZES:
        offset, form = SIZES[kind]
        side = random_.choice((12_000, 40_000)).to_bytes(4 if "I" in form else 2, "little")
        changed[offset : offset + 2 * len(side)] = side * 2
        return bytes(changed)
    if way == 1 and kind == "PPM":
        return content.replace(b"40 30", random_.choice((b"12000 12000", b"90000 90000")), 1)
    span = len(changed) if way == 2 else min(64, len(changed))
    for _ in range(random_.randint(1, 20)):
        changed[random_.randrange(span)] ^= 1 << random_.randrange(8)
    return bytes(changed) if way < 4 else bytes(changed) + random_.randbytes(50)


def peak_memory() -> int:
    """This program's largest resident size in bytes; `ru_maxrss` would also count the process that started it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024


def analyse_mutated(folder: str, count: int) -> None:
    """Analyses mutated images, one at a time, and prints how it went; runs in a process of its own."""
    random_ = random.Random(14)
    whole = [encoded(seed, kind) for seed, kind in enumerate(FORMATS)]
    files = []
    for number in range(count):
        kind = number % len(FORMATS)
        files.append(Path(folder) / f"{number}.{random_.choice(SUFFIXES)}")
        files[-1].write_bytes(mutated(whole[kind], FORMATS[kind], random_))
    found, longest, last = [], 0.0, time.monotonic()
    for file, report in zip(files, ForgeryDetector(Mean()).analyze_many(files, batch_size=1), strict=True):
        now = time.monotonic()
        longest, last = max(longest, now - last), now
        assert (report.fake_probability is None) == bool(report.error)
        assert not report.error or file.name in report.error, report.error
        found.append(bool(report.error))
    memory = peak_memory()
    print(json.dumps({"reports": len(found), "errors": sum(found), "longest": longest, "memory": memory}))


@pytest.mark.parametrize("count", [96, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutated_images_are_analysed_or_named(tmp_path, count):
    code = f"from tests.test_mutated_inputs import analyse_mutated; analyse_mutated({str(tmp_path)!r}, {count})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["reports"] == count and 0 < told["errors"] < count
    assert told["longest"] < 10 and told["memory"] < 1.5e9, told


TURNS = [{"from": "human", "value": "<image>\nWell?"}, {"from": "gpt", "value": "It is fake."}]
ROWS = [
    {"id": f"{n}.png", "image": f"{n}.png", "label": n % 2, "fake_probability": 0.5, "conversations": TURNS}
    for n in range(4)
]
TABLES = {
    "csv": "image,label,question,answer\n" + "".join(f'{n}.png,{n % 2},Well?,"It is, {n}"\n' for n in range(4)),
    "jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    "json": json.dumps(ROWS),
    "txt": "".join(f"{n}.png\n" for n in range(4)),
}


def from_folder(file: Path) -> list:
    return list(read_table(file, file.parent, {}, []))


def training(file: Path) -> list:
    return read_records([file])


READERS = (list_images, open_benchmark, read_rows, from_folder, training, read_run)
"""Of lists, of evaluation sets, of tables, of the data sets of one's own, of training, and of predictions."""


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_a_table_that_is_whole_is_read(tmp_path, reader):
    kind = "csv" if reader in (from_folder, list_images) else "jsonl"
    (tmp_path / f"t.{kind}").write_text(TABLES[kind])
    found = reader(tmp_path / f"t.{kind}")
    assert len(found[1] if reader is read_run else list(found)) == 4


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutated_tables_are_read_or_explained_by_every_reader(tmp_path, count):
    random_ = random.Random(14)
    for number in range(count):
        suffix = list(TABLES)[number % 4]
        content = bytearray(TABLES[suffix].encode())
        for _ in range(random_.randint(1, 6)):
            content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
        if number % 3 == 0:
            content = content[: random_.randint(1, len(content))]
        if number % 7 == 0:
            content = bytearray(bytes(content).decode("latin-1").encode("utf-16"))
        file = tmp_path / f"{number}.{suffix}"
        file.write_bytes(bytes(content))
        for read in READERS:
            start = time.monotonic()
            try:
                list(read(file))
            except UserError as error:
                assert str(error)
            assert time.monotonic() - start < 10
