"""Writes a whole benchmark: many workers, resumable, the same bytes however it was interrupted.

Every file is written under another name first and then renamed, so that a file is either whole or not there. Workers
take shards of the list of images in turn, write the images themselves, and leave a record of each finished shard.
"""

import errno
import io
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from llava.labels import FAKE, REAL
from mmfr_generation.synthetic import layout
from mmfr_generation.synthetic.card import write_card
from mmfr_generation.synthetic.generators import GENERATORS
from mmfr_generation.synthetic.sample import MAX_SIZE, MIN_SIZE, Key, make_sample

FORMAT = 1
_RUN_FILE = "dataset.json"
_SHARDS = ".shards"
_SHARD_SIZE = 32

Shard = tuple[int, list[Key]]


class DatasetError(Exception):
    """Something that the user can act on; its text is one sentence."""


@dataclass(frozen=True)
class Run:
    """What is to be written.

    Attributes:
        train: Images of the training tree; half of them are fakes, and of an odd number one more is real.
        eval: Real images, and as many fakes, in each evaluation set.
        size: Side of the images in pixels, 64 to 512.
        seed: Decides everything; 0 or more.

    Raises:
        ValueError: A number is out of its range.
    """

    train: int
    eval: int
    size: int
    seed: int

    def __post_init__(self) -> None:
        if self.train < 0 or self.eval < 0 or self.train + self.eval == 0:
            raise ValueError("train and eval must be 0 or more, and not both 0")
        if not MIN_SIZE <= self.size <= MAX_SIZE:
            raise ValueError(f"size must be {MIN_SIZE} to {MAX_SIZE} pixels, not {self.size}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, not {self.seed}")

    def keys(self) -> list[Key]:
        """Returns the key of every image; the classes take turns."""
        training = [Key(self.seed, self.size, "train", "", k % 2, k // 2) for k in range(self.train)]
        evaluation = [
            Key(self.seed, self.size, "evaluation", name, label, k)
            for name in GENERATORS
            for k in range(self.eval)
            for label in (REAL, FAKE)
        ]
        return training + evaluation


def write_dataset(run: Run, out: Path, workers: int) -> None:
    """Writes the benchmark, or what is missing of it.

    Args:
        run: What to write.
        out: Its folder: new, empty, or one that the same run has begun.
        workers: Processes that render; the bytes do not depend on it.

    Raises:
        DatasetError: The folder is not empty and of another run, cannot be written, or is full; or a worker died.
    """
    try:
        _claim(run, out)
        keys, known = run.keys(), _known(out)
        pending = [shard for shard in _shards(keys) if not all(_complete(known.get(key), out) for key in shard[1])]
        with tqdm(total=len(keys), unit="image", smoothing=0.05) as bar:
            bar.update(len(keys) - sum(len(part) for _, part in pending))
            for count in _render(pending, out, workers):
                bar.update(count)
        known |= _known(out)
        _finish(run, [known[key] for key in keys], out)
    except OSError as error:
        raise DatasetError(_explain(error, out)) from error


def _claim(run: Run, out: Path) -> None:
    """Makes the folder this run's own, or finds that it already is."""
    path = out / _RUN_FILE
    if out.is_dir() and any(out.iterdir()) and not path.is_file() and not (out / _SHARDS).is_dir():
        raise DatasetError(f"{out} is not empty and holds no such benchmark; choose another folder")
    (out / _SHARDS).mkdir(parents=True, exist_ok=True)
    wanted = {"format": FORMAT, **asdict(run)}
    if not path.exists():
        _write(path, (json.dumps(wanted) + "\n").encode(), out)
    try:
        found = dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError):
        raise DatasetError(f"{path} is damaged; choose another folder") from None
    if found != wanted:
        differing = [
            f"{name} {found.get(name)}, not {wanted[name]}" for name in wanted if found.get(name) != wanted[name]
        ]
        raise DatasetError(f"{out} holds another run ({'; '.join(differing)}); choose another folder")


def _shards(keys: list[Key]) -> list[Shard]:
    return [(k, keys[at : at + _SHARD_SIZE]) for k, at in enumerate(range(0, len(keys), _SHARD_SIZE))]


def _known(out: Path) -> dict[Key, dict[str, Any]]:
    """Reads the records of what is finished, from the manifest and from the shards."""
    known: dict[Key, dict[str, Any]] = {}
    for path in [out / layout.MANIFEST, *sorted((out / _SHARDS).glob("*.jsonl"))]:
        if path.is_file():
            try:
                records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
                known |= {_key(record): record for record in records}
            except (ValueError, KeyError, TypeError):
                raise DatasetError(f"{path} is damaged; delete it and run the same command again") from None
    return known


def _key(record: dict[str, Any]) -> Key:
    label = FAKE if record["label"] == "fake" else REAL
    return Key(record["seed"], record["size"], record["split"], record["set"] or "", label, record["index"])


def _complete(record: dict[str, Any] | None, out: Path) -> bool:
    return record is not None and all((out / name).is_file() for name in [record["image"], *record["masks"].values()])


def _render(pending: list[Shard], out: Path, workers: int) -> Iterator[int]:
    """Renders shards, here or in processes; yields the number of images as they are done."""
    if min(workers, len(pending)) <= 1:
        for shard in pending:
            yield from _render_shard(shard, out)
        return
    context = multiprocessing.get_context("spawn")
    sources: list[Connection] = []
    processes = []
    for k in range(min(workers, len(pending))):
        source, sink = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(pending[k::workers], out, sink), daemon=True)
        process.start()
        sink.close()
        sources.append(source)
        processes.append(process)
    try:
        yield from _listen(sources)
    finally:
        for process in processes:
            if sources:
                process.terminate()
            process.join()


def _listen(sources: list[Connection]) -> Iterator[int]:
    """Yields what the workers report until the last one is done; leaves ``sources`` empty then.

    Raises:
        OSError: A worker could not write.
        DatasetError: A worker died.
    """
    while sources:
        for source in wait(sources):
            assert isinstance(source, Connection)
            try:
                message = source.recv()
            except EOFError:
                raise DatasetError("a worker died; run the same command again to go on where it stopped") from None
            if isinstance(message, OSError):
                raise message
            if message is None:
                sources.remove(source)
            else:
                yield message


def _work(shards: list[Shard], out: Path, sink: Connection) -> None:
    """Renders shards in a process of its own: reports counts, then None, or the error that stopped it."""
    try:
        for shard in shards:
            for count in _render_shard(shard, out):
                sink.send(count)
        sink.send(None)
    except BrokenPipeError:
        return
    except OSError as error:
        sink.send(OSError(error.errno, error.strerror))
    except KeyboardInterrupt:
        return


def _render_shard(shard: Shard, out: Path) -> Iterator[int]:
    number, keys = shard
    lines = []
    for key in keys:
        lines.append(json.dumps(_write_sample(key, out), ensure_ascii=False) + "\n")
        yield 1
    _write(out / _SHARDS / f"{number:07d}.jsonl", "".join(lines).encode(), out)


def _write_sample(key: Key, out: Path) -> dict[str, Any]:
    """Writes an image with its masks and returns its record."""
    sample = make_sample(key)
    image = layout.image_path(key, sample.stem, sample.suffix)
    masks = {}
    for fault, mask in sample.masks.items():
        masks[fault] = layout.mask_path(image, fault)
        buffer = io.BytesIO()
        Image.fromarray(mask.astype(np.uint8) * 255).save(buffer, "PNG")
        _write(out / masks[fault], buffer.getvalue(), out)
    _write(out / image, sample.data, out)
    return {"image": image, **sample.truth, "masks": masks}


def _write(path: Path, data: bytes, out: Path) -> None:
    """Writes a file at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = out / _SHARDS / f"{os.getpid()}.part"
    part.write_bytes(data)
    part.replace(path)


def _finish(run: Run, records: list[dict[str, Any]], out: Path) -> None:
    """Writes the annotation and the card from the records of all images, and clears up."""
    for name, text in layout.annotation_files(records).items():
        _write(out / name, text.encode(), out)
    for name, data in write_card(run.seed, run.size, records, out).items():
        _write(out / name, data, out)
    shutil.rmtree(out / _SHARDS)


def _explain(error: OSError, out: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space is left for {out}; free some and run the same command again, what is finished is kept"
    return f"cannot write to {out}: {error.strerror or error}"
