"""The run store: every prediction is on disk before the next batch is judged, and a killed run goes on.

A run is known by a key: a digest of the weights' contents, the settings, the prompt and the images. Its file is
``<key>.jsonl``; the first line says what the key stands for, each further line is one prediction, in the order of the
samples. Batches are formed from the whole list, and only whole batches are kept when a run goes on, so that each image
is always judged beside the same others.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from forgery_eval.files import claim
from llava.systems.fakereasoning.answer import parse_answer

_READERS = 4
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Prediction:
    """What was said of one image.

    Attributes:
        id: The sample's.
        label: The truth, 0 real, 1 fake.
        verdict: ``real``, ``fake``, or None where the text says neither.
        fake_probability: P(fake), None where there is none.
        answer_probability: P(fake) at the answer's verdict where ``fake_probability`` was read without the answer.
        score_source: Where the probability was read.
        text: The answer.
        stages: Its stages.
        attributes: Sentence of each attribute that it names.
        error: Why the image could not be judged; empty if it was.
        seconds: Its share of its batch's time.
    """

    id: str
    label: int
    verdict: str | None = None
    fake_probability: float | None = None
    score_source: str | None = None
    answer_probability: float | None = None
    text: str = ""
    stages: dict[str, str] = field(default_factory=dict)
    attributes: dict[str, str] = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Run:
    """What predictions depend on.

    Attributes:
        settings: Weights, options, prompt, images, as plain JSON values.
        chosen: Which samples were asked for; they are chosen again when the run is scored again.
        batch_size: Images at a time.
    """

    settings: Mapping[str, Any]
    chosen: Mapping[str, Any]
    batch_size: int

    @property
    def key(self) -> str:
        """Digest of the settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]


class RunStore:
    """A run's file, open to go on.

    Args:
        folder: Where runs lie.
        run: What is run; if its file is there already, the batch size is the file's.
        ids: Of all samples, in order.

    Attributes:
        path: The file.
        done: Number of samples, from the first on, that need not be judged again.
        batch_size: Images at a time.

    Raises:
        ValueError: The file does not belong to the run, or another process writes it.
    """

    def __init__(self, folder: Path, run: Run, ids: Sequence[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{run.key}.jsonl"
        self.batch_size, self.done = run.batch_size, 0
        self._stream = self.path.open("ab")
        try:
            claim(self._stream, self.path)
            kept = self._whole_lines()
            if kept:
                self._check(kept, run, ids)
        except ValueError:
            self._stream.close()
            raise
        self._stream.truncate(sum(map(len, kept[: 1 + self.done])))
        if not kept:
            self._append([asdict(run)])

    def _whole_lines(self) -> list[bytes]:
        lines = self.path.read_bytes().splitlines(keepends=True)
        return lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]

    def _check(self, lines: list[bytes], run: Run, ids: Sequence[str]) -> None:
        damaged = ValueError(f"{self.path} does not hold this run's predictions in order; remove it to start afresh")
        try:
            header, *found = map(json.loads, lines)
            if header["settings"] != run.settings or [entry["id"] for entry in found] != list(ids[: len(found)]):
                raise damaged
            self.batch_size = int(header["batch_size"])
        except (ValueError, KeyError, TypeError):
            raise damaged from None
        whole = len(found) == len(ids)
        self.done = len(found) if whole else len(found) // self.batch_size * self.batch_size

    def write(self, batch: Sequence[Prediction]) -> None:
        """Adds a batch, and returns when it is on disk."""
        self._append([asdict(prediction) for prediction in batch])

    def _append(self, entries: list[dict[str, Any]]) -> None:
        lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        self._stream.write("".join(lines).encode("utf-8", "backslashreplace"))
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


def read_run(path: Path) -> tuple[dict[str, Any], dict[str, Prediction]]:
    """Reads predictions, one JSON object a line, of this or any other program.

    Each line must have ``id`` (as in the data set) and one or more of ``fake_probability`` (0 to 1), ``verdict``
    (real or fake) and ``text`` (an answer in the published format, from which a missing verdict and missing stages
    are read). Further fields are those of ``Prediction``. A torn last line is left out.

    Returns:
        What the first line says of the run (empty for a foreign file), and the predictions by id.

    Raises:
        ValueError: A line is no prediction, or an id stands twice.
    """
    header: dict[str, Any] = {}
    found: dict[str, Prediction] = {}
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise ValueError(f"{place}: this is not JSON") from None
        if number == 1 and isinstance(entry, dict) and "settings" in entry and "id" not in entry:
            header = entry
            continue
        prediction = _prediction(entry, place)
        if prediction.id in found:
            raise ValueError(f"{place}: the id {prediction.id!r} stands more than once")
        found[prediction.id] = prediction
    return header, found


def _prediction(entry: Any, place: str) -> Prediction:
    said = ("fake_probability", "verdict", "text", "error")
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
        raise ValueError(f"{place}: a prediction needs an id")
    if not any(name in entry for name in said):
        raise ValueError(f"{place}: a prediction needs one of {', '.join(said)}")
    verdict, text = entry.get("verdict"), entry.get("text") or ""
    if verdict not in (None, "real", "fake"):
        raise ValueError(f"{place}: the verdict must be real, fake or null, not {verdict!r}")
    source, seconds = entry.get("score_source"), entry.get("seconds") or 0
    if not isinstance(text, str) or not isinstance(source, str | None):
        raise ValueError(f"{place}: text and score_source must be texts")
    if not isinstance(seconds, int | float):
        raise ValueError(f"{place}: seconds must be a number, not {seconds!r}")
    parsed = parse_answer(text)
    return Prediction(
        id=entry["id"],
        label=-1,
        verdict=verdict if "verdict" in entry else parsed.verdict,
        fake_probability=_probability(entry, "fake_probability", place),
        score_source=source,
        answer_probability=_probability(entry, "answer_probability", place),
        text=text,
        stages=_texts(entry, "stages", parsed.stages, place),
        attributes=_texts(entry, "attributes", parsed.attributes, place),
        error=str(entry.get("error") or ""),
        seconds=float(seconds),
    )


def _probability(entry: Mapping[str, Any], name: str, place: str) -> float | None:
    given = entry.get(name)
    if given is not None and not (isinstance(given, int | float) and 0 <= given <= 1):
        raise ValueError(f"{place}: {name} must be from 0 to 1, not {given!r}")
    return given


def _texts(entry: Mapping[str, Any], name: str, default: dict[str, str], place: str) -> dict[str, str]:
    given = entry.get(name, default)
    if not isinstance(given, dict) or not all(isinstance(text, str) for text in given.values()):
        raise ValueError(f"{place}: {name} must be an object of texts")
    return given


def weights_digest(paths: Iterable[str | None]) -> str:
    """Returns a digest of the contents of model files and folders.

    Names are those inside each folder, so that a moved model is the same one. What is no path here (a hub id that is
    not in the cache) stands for itself.
    """
    files: list[Path] = []
    names: list[str] = []
    for place, path in enumerate(paths):
        root = Path(path).expanduser() if path else None
        if root is None or not root.exists():
            names.append(f"{place}:{path}")
            continue
        inside = sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else [root]
        files += inside
        names += [f"{place}:{file.relative_to(root) if root.is_dir() else ''}" for file in inside]
    return _digest([*names, *file_digests(files, "hashing the weights")])


def images_digest(ids: Sequence[str], images: Sequence[Path]) -> str:
    """Returns a digest of the samples' ids and of the contents of their images."""
    return _digest([*ids, *file_digests(images, "hashing the images")])


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()


def file_digests(files: Sequence[Path], what: str) -> Iterator[str]:
    """Yields the digest of each file's contents, in order; an empty one for a file that cannot be read."""
    with ThreadPoolExecutor(_READERS) as readers:
        yield from tqdm(readers.map(_file_digest, files), desc=what, total=len(files), unit=" files", leave=False)


def _file_digest(file: Path) -> str:
    digest = hashlib.sha256()
    try:
        if not file.is_file():  # a pipe would be waited for
            return ""
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    except OSError:
        return ""
    return digest.hexdigest()
