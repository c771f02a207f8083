"""Writes a whole benchmark: many workers, resumable, the same bytes however it was interrupted.

Workers take shards of the list of images in turn, write the images themselves, and leave a record of each finished
shard.
"""

import io
import math
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
from PIL import Image

from llava.cli import progress
from llava.errors import DataError, OptionError, UserError
from llava.files import atomic_write, file_errors, read_json, read_jsonl, write_json, write_jsonl
from llava.interrupts import uninterrupted
from llava.labels import FAKE, REAL
from mmfr_generation.synthetic import layout
from mmfr_generation.synthetic.card import write_card
from mmfr_generation.synthetic.delivery import DELIVERIES, Delivery
from mmfr_generation.synthetic.generators import GENERATORS
from mmfr_generation.synthetic.sample import MAX_SIZE, MIN_SIZE, Key, Sample, make_sample

FORMAT = 1
_RUN_FILE = "dataset.json"
_SHARDS = ".shards"
_SHARD_SIZE = 32

_BYTES_A_PIXEL = 0.9
"""Of the written images, masks and annotation, measured on 24,000 images of 112 pixels."""


@dataclass(frozen=True)
class KeyRange(Sequence[Key]):
    """Keys that are made when they are asked for, so that a large set is planned without holding them all.

    Attributes:
        length: How many there are.
        key: Makes the key at an index.
    """

    length: int
    key: Callable[[int], Key]

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> Key: ...
    @overload
    def __getitem__(self, index: slice) -> list[Key]: ...
    def __getitem__(self, index: int | slice) -> Key | list[Key]:
        """Returns a key, or those of a slice."""
        if isinstance(index, slice):
            return [self.key(k) for k in range(*index.indices(self.length))]
        if not -self.length <= index < self.length:
            raise IndexError(index)
        return self.key(index % self.length)


class Job(Protocol):
    """A data set that can be written: a list of images, each a pure function of its key. It is sent to processes."""

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        ...

    def identity(self) -> dict[str, Any]:
        """Returns what the images depend on, as plain JSON values; a folder holds one such set."""
        ...

    def keys(self) -> Sequence[Key]:
        """Returns the key of every image, in the order of writing."""
        ...

    def make(self, key: Key) -> Sample:
        """Makes an image."""
        ...

    def key_of(self, record: dict[str, Any]) -> Key:
        """Returns the key of a line of the manifest."""
        ...

    def card(self, records: list[dict[str, Any]], out: Path) -> dict[str, bytes]:
        """Returns the files that describe the written set, by name."""
        ...


@dataclass(frozen=True)
class Run:
    """What is to be written.

    Attributes:
        train: Images of the training tree; half of them are fakes, and of an odd number one more is real.
        eval: Real images, and as many fakes, in each evaluation set.
        size: Side of the images in pixels, 64 to 512.
        seed: Decides everything; 0 or more.
        delivery: What happens to the images after they were made.

    Raises:
        OptionError: A number is out of its range, or there is no such delivery.
    """

    train: int
    eval: int
    size: int
    seed: int
    delivery: Delivery = "none"

    def __post_init__(self) -> None:
        if self.train < 0 or self.eval < 0 or self.train + self.eval == 0:
            raise OptionError("train and eval must be 0 or more, and not both 0")
        if not MIN_SIZE <= self.size <= MAX_SIZE:
            raise OptionError(f"size must be {MIN_SIZE} to {MAX_SIZE} pixels, not {self.size}")
        if self.seed < 0:
            raise OptionError(f"seed must be 0 or more, not {self.seed}")
        if self.delivery not in DELIVERIES:
            raise OptionError(f"delivery must be one of {', '.join(DELIVERIES)}, not {self.delivery!r}")

    def identity(self) -> dict[str, Any]:
        """Returns what the images depend on; without a delivery as it always was."""
        values = asdict(self)
        if self.delivery == "none":
            del values["delivery"]
        return values

    def keys(self) -> Sequence[Key]:
        """Returns the key of every image; the classes take turns."""
        return KeyRange(self.train + 2 * self.eval * len(GENERATORS), self._key)

    def _key(self, index: int) -> Key:
        if index < self.train:
            return Key(self.seed, self.size, "train", "", index % 2, index // 2, self.delivery)
        place, image = divmod(index - self.train, 2 * self.eval)
        label = (REAL, FAKE)[image % 2]
        return Key(self.seed, self.size, "evaluation", list(GENERATORS)[place], label, image // 2, self.delivery)

    def make(self, key: Key) -> Sample:
        """Renders an image."""
        return make_sample(key)

    def key_of(self, record: dict[str, Any]) -> Key:
        """Returns the key of a line of the manifest."""
        return read_key(record, self.delivery)

    def card(self, records: list[dict[str, Any]], out: Path) -> dict[str, bytes]:
        """Returns the data card and the contact sheet."""
        return write_card(self.seed, self.size, records, out, self.delivery)


def read_key(record: dict[str, Any], delivery: Delivery) -> Key:
    """Returns the key that a line of a manifest names."""
    label = FAKE if record["label"] == "fake" else REAL
    return Key(record["seed"], record["size"], record["split"], record["set"] or "", label, record["index"], delivery)


def write_dataset(run: Job, out: Path, workers: int) -> None:
    """Writes a data set, or what is missing of it.

    Args:
        run: What to write.
        out: Its folder: new, empty, or that of the same run.
        workers: Processes that render; the bytes do not depend on it.

    Raises:
        UserError: The folder is not empty and of another run, cannot be written, or is full; or a worker died.
    """
    with file_errors(out, "written"):
        keys = run.keys()
        _check_room(run, len(keys), out)
        _reserve(run, out)
        known = _known(run, out)
        pending = [
            number
            for number in range(math.ceil(len(keys) / _SHARD_SIZE))
            if not all(_complete(known.get(key), out) for key in _shard(keys, number))
        ]
        with progress(total=len(keys), unit="image", smoothing=0.05) as bar:
            bar.update(len(keys) - sum(len(_shard(keys, number)) for number in pending))
            for count in _render(run, pending, out, workers):
                bar.update(count)
        known |= _known(run, out)
        records = [known[key] for key in keys]
        _finish(run, records, out)
    print(describe(records, out))


def describe(records: Sequence[dict[str, Any]], out: Path) -> str:
    """Says what was written, and where."""
    training = sum(record["split"] == "train" for record in records)
    lines = [f"written: {len(records)} images in {out}; {layout.MANIFEST} has a line for each"]
    if training:
        lines.append(f"  {training} to train on: {out / layout.TRAINING_FILES['cot']}, with the image folder {out}")
    if training < len(records):
        lines.append(f"  {len(records) - training} to evaluate on: {out / layout.EVALUATION}")
    return "\n".join(lines)


def _check_room(run: Job, count: int, out: Path) -> None:
    """Refuses a set for which the disk has no room, before anything is made."""
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    needed, free = count * run.size**2 * _BYTES_A_PIXEL, shutil.disk_usage(there).free
    if needed > free and out.is_dir():
        needed -= sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    if needed > free:
        raise DataError(
            f"{count} images of {run.size} pixels need about {needed / 1e9:.1f} GB, and {there} has {free / 1e9:.1f} "
            "GB free; write fewer or smaller images, or to another disk"
        )


def _reserve(run: Job, out: Path) -> None:
    """Makes the folder this run's own, or checks that it already is."""
    path = out / _RUN_FILE
    if out.is_dir() and any(out.iterdir()) and not path.is_file() and not (out / _SHARDS).is_dir():
        raise DataError(f"{out} is not empty and holds no such benchmark; choose another folder")
    (out / _SHARDS).mkdir(parents=True, exist_ok=True)
    wanted = {"format": FORMAT, **run.identity()}
    if not path.exists():
        write_json(path, wanted, indent=None)
    saved = read_json(path)
    if not isinstance(saved, dict):
        raise DataError(f"{path} is damaged; choose another folder")
    if saved != wanted:
        differing = [
            f"{name} {saved.get(name)}, not {wanted.get(name)}"
            for name in {**wanted, **saved}
            if saved.get(name) != wanted.get(name)
        ]
        raise DataError(f"{out} holds another run ({'; '.join(differing)}); choose another folder")


def _shard(keys: Sequence[Key], number: int) -> Sequence[Key]:
    return keys[number * _SHARD_SIZE : (number + 1) * _SHARD_SIZE]


def _known(run: Job, out: Path) -> dict[Key, dict[str, Any]]:
    """Reads the records of what is finished, from the manifest and from the shards."""
    known: dict[Key, dict[str, Any]] = {}
    for path in [out / layout.MANIFEST, *sorted((out / _SHARDS).glob("*.jsonl"))]:
        if path.is_file():
            try:
                known |= {run.key_of(record): record for _, record in read_jsonl(path)}
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{path} is damaged; delete it and run the same command again") from None
    return known


def _complete(record: dict[str, Any] | None, out: Path) -> bool:
    return record is not None and all((out / name).is_file() for name in [record["image"], *record["masks"].values()])


def _render(run: Job, pending: list[int], out: Path, workers: int) -> Iterator[int]:
    """Renders shards, here or in processes; yields the number of images as they are done."""
    if min(workers, len(pending)) <= 1:
        keys = run.keys()
        for number in pending:
            yield from _render_shard(run, number, _shard(keys, number), out)
        return
    context = multiprocessing.get_context("spawn")
    sources: list[Connection] = []
    processes = []
    for k in range(min(workers, len(pending))):
        source, sink = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(run, pending[k::workers], out, sink), daemon=True)
        with uninterrupted():  # Ctrl-C is for this process, which ends the others
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
        UserError: A worker could not write, or died.
    """
    while sources:
        for source in wait(sources):
            assert isinstance(source, Connection)
            try:
                message = source.recv()
            except EOFError:
                raise DataError("a worker died; run the same command again to resume") from None
            if isinstance(message, UserError):
                raise message
            if message is None:
                sources.remove(source)
            else:
                yield message


def _work(run: Job, shards: list[int], out: Path, sink: Connection) -> None:
    """Renders shards in a process of its own: reports counts, then None, or the error that stopped it."""
    try:
        keys = run.keys()
        for number in shards:
            for count in _render_shard(run, number, _shard(keys, number), out):
                sink.send(count)
        sink.send(None)
    except BrokenPipeError:
        return
    except UserError as error:
        sink.send(error)
    except KeyboardInterrupt:
        return


def _render_shard(run: Job, number: int, keys: Sequence[Key], out: Path) -> Iterator[int]:
    records = []
    for key in keys:
        records.append(_write_sample(run, key, out))
        yield 1
    write_jsonl(out / _SHARDS / f"{number:07d}.jsonl", records)


def _write_sample(run: Job, key: Key, out: Path) -> dict[str, Any]:
    """Writes an image with its masks and returns its record."""
    sample = run.make(key)
    image = layout.image_path(key, sample.stem, sample.suffix)
    masks = {}
    for fault, mask in sample.masks.items():
        masks[fault] = layout.mask_path(image, fault)
        buffer = io.BytesIO()
        Image.fromarray(mask.astype(np.uint8) * 255).save(buffer, "PNG")
        atomic_write(out / masks[fault], buffer.getvalue())
    atomic_write(out / image, sample.data)
    return {"image": image, **sample.truth, "masks": masks}


def _finish(run: Job, records: list[dict[str, Any]], out: Path) -> None:
    """Writes the annotation and the card from the records of all images, and clears up."""
    for name, text in layout.annotation_files(records).items():
        atomic_write(out / name, text)
    for name, data in run.card(records, out).items():
        atomic_write(out / name, data)
    shutil.rmtree(out / _SHARDS)
