"""What was predicted, on disk before the next batch is analysed, so that a killed run resumes.

An evaluation's run is known by a key: a digest of the weights' contents, the settings, the prompt and the images, but
of neither batches nor workers. Its
file is ``<key>.jsonl``; the first line says what the key stands for, each further line is one prediction, in the order
of the samples. Batches are formed from the whole list, and only whole batches are kept when a run resumes, so that each
image is always analysed beside the same others. Masks lie beside the file, see ``masks``.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from forgery_eval.answers import DEFAULT_SYSTEM, AnswerKind
from forgery_eval.fingerprints import file_identity
from forgery_eval.masks import write_mask
from forgery_eval.names import NameTable
from llava.cli import note
from llava.errors import DataError
from llava.files import JsonlLog, digest_json, file_errors
from llava.labels import FAKE, LABELS, REAL, parse_label

if TYPE_CHECKING:
    from llava import ForgeryReport

_KEY_LENGTH = 16


@dataclass(frozen=True)
class Prediction:
    """What was predicted of one image.

    Attributes:
        id: The sample's.
        label: The truth, 0 real, 1 fake.
        verdict: ``real``, ``fake``, or None where the text says neither.
        fake_probability: P(fake), None where there is none.
        score_source: Where the probability was read.
        answer_probability: P(fake) at the answer's verdict where ``fake_probability`` was read without the answer.
        text: The answer.
        stages: Its stages.
        attributes: Sentence of each attribute that it names.
        mask: File of the mask, relative to the predictions' folder; None where there is none.
        tag: Kind of image or forgery that the system named.
        details: Further values that only this system gives.
        abstained: Whether the system declined to give a verdict.
        abstained_because: Why it did.
        error: Why the image could not be analysed; empty if it was.
        seconds: Its share of its batch's time; 0 where a worker analysed it.
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
    mask: str | None = None
    tag: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    abstained: bool = False
    abstained_because: str = ""
    error: str = ""
    seconds: float = 0.0

    @classmethod
    def from_report(cls, id: str, label: int, report: "ForgeryReport", seconds: float) -> "Prediction":
        """Returns the prediction that a report makes."""
        shared = {item.name for item in fields(cls)} & set(report.__dataclass_fields__) - {"label", "mask"}
        values = {name: getattr(report, name) for name in shared}
        return cls(id=id, label=label, verdict=report.said, seconds=round(seconds, 4), **values)


@dataclass(frozen=True)
class Run:
    """What predictions depend on.

    Attributes:
        settings: System, weights, options, prompt, images, as plain JSON values.
        chosen: Which samples were asked for; they are chosen again when the run is scored again.
        batch_size: Images at a time.
    """

    settings: Mapping[str, Any]
    chosen: Mapping[str, Any]
    batch_size: int

    @property
    def key(self) -> str:
        """Digest of the settings."""
        return digest_json(self.settings)[:_KEY_LENGTH]


class RunStore:
    """A run's file, open to resume.

    Args:
        folder: Where runs lie.
        run: What is run; if its file is there already, the batch size is the file's.
        ids: Of all samples, in order.

    Attributes:
        path: The file.
        ids: Of all samples, in order.
        done: Number of samples, from the first on, that need not be analysed again.
        batch_size: Images at a time.

    Raises:
        DataError: The file does not belong to the run.
        FileError: Another process writes it, or it cannot be written.
    """

    def __init__(self, folder: Path, run: Run, ids: Sequence[str]) -> None:
        self.path = folder / f"{run.key}.jsonl"
        self.batch_size = run.batch_size
        self.ids = ids
        self._run = run
        self._lines = 0
        self._log = JsonlLog(self.path, self._read)
        if not self._lines:
            self._log.append(asdict(run))
        found = max(0, self._lines - 1)
        self.done = found if found == len(ids) else found // self.batch_size * self.batch_size
        self._log.keep(1 + self.done)

    def _read(self, number: int, record: dict[str, Any]) -> None:
        """Checks a line that is there: the header, then a prediction of each sample in order."""
        index = number - 2
        if index < 0:
            size = record.get("batch_size")
            belongs = record.get("settings") == self._run.settings and isinstance(size, int) and size > 0
            self.batch_size = size if belongs and isinstance(size, int) else self.batch_size
        else:
            belongs = index < len(self.ids) and record.get("id") == self.ids[index]
        if not belongs:
            raise DataError(f"{self.path} does not hold this run's predictions in order; remove it to start again")
        self._lines = number

    def write(self, batch: Sequence[Prediction], masks: Mapping[str, np.ndarray] | None = None) -> None:
        """Adds a batch, and returns when it is on disk; its masks are there before the lines that name them.

        Args:
            batch: The predictions.
            masks: Masks by the predictions' ids.
        """
        self.append(self.records(batch, masks))

    def records(
        self, batch: Sequence[Prediction], masks: Mapping[str, np.ndarray] | None = None
    ) -> list[dict[str, Any]]:
        """Writes a batch's masks, and returns the lines that name them."""
        written = {name: write_mask(self.path.parent, self._run.key, name, m) for name, m in (masks or {}).items()}
        return [asdict(replace(prediction, mask=written.get(prediction.id))) for prediction in batch]

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Adds lines of ``records``."""
        self._log.append(*records)

    def close(self) -> None:
        """Closes the file."""
        self._log.close()


class Shards:
    """Batches of a run that several workers finish in any order: a file a worker, until all are merged in order.

    What a killed run has left is taken up, whatever the number of its workers, and by a run without workers too.

    Args:
        store: The run's store. What is merged goes there, and the shards lie beside it.

    Raises:
        DataError: A file there is no shard.
        FileError: A shard cannot be read or written.
    """

    def __init__(self, store: RunStore) -> None:
        self.folder = store.path.with_suffix(".shards")
        self._store = store
        self._logs: dict[str, JsonlLog] = {}
        self._found: dict[int, list[dict[str, Any]]] = {}
        # A store whose last batch is not whole has all samples.
        self._first = -(-store.done // store.batch_size)
        self._end = -(-len(store.ids) // store.batch_size)
        try:
            for file in sorted(self.folder.glob("*.jsonl")):
                self._open(file.stem)
        except BaseException:
            self.close()
            raise

    def _open(self, name: str) -> JsonlLog:
        if name not in self._logs:
            self._logs[name] = JsonlLog(self.folder / f"{name}.jsonl", self._read)
        return self._logs[name]

    def _read(self, line: int, record: dict[str, Any]) -> None:
        """Takes a batch up if it is one of this run's; if the run's file was removed, batches can be of other sizes."""
        number, predictions = record.get("batch"), record.get("predictions")
        if not (isinstance(number, int) and isinstance(predictions, list)):
            raise DataError(f"{self.folder}: a file there is no shard (line {line}); remove the folder to start again")
        if number >= self._first and [one.get("id") for one in predictions] == list(self._ids_of(number)):
            self._found[number] = predictions

    def _ids_of(self, number: int) -> Sequence[str]:
        size = self._store.batch_size
        return self._store.ids[number * size : (number + 1) * size]

    @property
    def missing(self) -> list[int]:
        """Numbers of the batches that are in no file."""
        return [number for number in range(self._first, self._end) if number not in self._found]

    @property
    def count(self) -> int:
        """How many samples the shards have that the run's file has not."""
        return sum(map(len, self._found.values()))

    def write(self, worker: int, number: int, records: list[dict[str, Any]]) -> None:
        """Adds a batch to a worker's shard, and returns when it is on disk."""
        self._open(f"worker-{worker}").append({"batch": number, "predictions": records})
        self._found[number] = records

    def merge(self) -> None:
        """Adds the batches to the run's file, in order, and removes the shards; none may be missing."""
        self._store.append([record for number in sorted(self._found) for record in self._found[number]])
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Closes the shards."""
        for shard in self._logs.values():
            shard.close()


_ANSWER_START = b'{"image": '
"""Of every line of answers; what is torn and does not begin like this was not written here."""


class AnswersFile:
    """Answers of inference on disk, one JSON line an image, written as they come.

    Every line names the run that wrote it: a digest of model and settings.

    A line also has the identity of the image's file. Where another file stands there now, the line is dropped on
    opening, so that the image is analysed again; where none does, the line stays.

    Args:
        path: The file; it is made if need be. What is no regular file (a pipe) is only written to, without masks.
        settings: What the answers depend on.

    Attributes:
        path: The file.
        run: Digest of the settings.
        done: The images that have a line, each with its ``error``.
        dtype: What the model computes in, in every line; set by ``set_dtype``.

    Raises:
        DataError: The file holds answers of another run, or is no such file.
        FileError: Another process writes it, or it cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._changed: set[int] = set()
        self._dtypes: set[str] = set()
        self.dtype: dict[str, Any] = {}
        self.run = digest_json(settings)[:_KEY_LENGTH]
        self.done = NameTable()
        self._stores_masks = not path.exists() or path.is_file()
        self._log = JsonlLog(path, self._read, start=_ANSWER_START)
        if self._changed:
            note(f"{len(self._changed)} images changed after they were analysed, and are analysed again")
            self._log.rewrite(lambda number: number not in self._changed)

    def _read(self, number: int, record: dict[str, Any]) -> None:
        run, image, error = record.get("run"), record.get("image"), record.get("error", "")
        if not (isinstance(run, str) and isinstance(image, str) and isinstance(error, str)):
            raise DataError(f"{self.path}, line {number}: this is no line of answers; name another file")
        if run != self.run:
            raise DataError(
                f"{self.path} holds answers of another model or other settings (line {number}); "
                "name another file or remove it"
            )
        if isinstance(record.get("dtype"), str):
            self._dtypes.add(record["dtype"])
        known = record.get("identity")
        now = None if known is None else file_identity(image, contents=isinstance(known, str))
        if now is None or now == known:
            self.done.add(image, error)
        else:
            self._changed.add(number)

    def set_dtype(self, used: str | None, *, is_automatic: bool) -> None:
        """Says what the model computes in, before the first line is written.

        Args:
            used: Name of the dtype; None for a model that does not say it.
            is_automatic: Whether it was chosen for this machine.

        Raises:
            DataError: The file holds answers that were computed in another one.
        """
        others = self._dtypes - {used}
        if used is not None and others:
            raise DataError(
                f"{self.path} holds answers computed in {', '.join(sorted(others))}, and these would be in {used}; "
                f"name another file, or --dtype {min(others)}"
            )
        self.dtype = {} if used is None else {"dtype": used, "dtype_is_automatic": is_automatic}

    def write(
        self, batch: "Sequence[tuple[str, ForgeryReport]]", told: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        """Adds a line for each image, and returns when they are on disk; masks are there before them.

        Args:
            batch: Name of each image, and its report.
            told: What else stands in each line: ``provenance``, what the file says of its origin, and ``identity``,
                see ``file_identity``.
        """
        others: Sequence[Mapping[str, Any]] = [{}] * len(batch) if told is None else told
        records = [self._record(*named, other) for named, other in zip(batch, others, strict=True)]
        self._log.append(*records)

    def _record(self, image: str, report: "ForgeryReport", told: Mapping[str, Any]) -> dict[str, Any]:
        mask = None
        if report.mask is not None and self._stores_masks:
            mask = write_mask(self.path.parent, self.run, image, report.mask)
        defaults = {"mask": mask, "provenance": None}
        return {"image": image, **report.to_dict(), **defaults, **told, **self.dtype, "run": self.run}

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yields the lines of images that are done, in the file's order."""
        if len(self.done):
            with file_errors(self.path, "read"), self.path.open("rb") as lines:
                for line in lines:
                    yield json.loads(line)

    def close(self) -> None:
        """Closes the file."""
        self._log.close()
        self.done.close()


# --- reading predictions, of this or any other program


def read_run(path: Path, answer_format: str | None = None) -> tuple[dict[str, Any], dict[str, Prediction]]:
    """Reads predictions, one JSON object a line, of this or any other program.

    Each line must have ``id`` (as in the data set) and one or more of ``fake_probability`` (0 to 1), ``verdict``
    (real or fake) and ``text`` (an answer, from which a missing verdict and missing stages are read). Further fields
    are those of ``Prediction``. Lines of ``inference.py --json`` have ``image`` instead of the id. A torn
    last line is left out.

    Args:
        path: The file.
        answer_format: System in whose words the texts are; by default the run's, see ``system_of``.

    Returns:
        What the first line says of the run (empty for another program's file), and the predictions by id.

    Raises:
        DataError: A line is no prediction or of another run than those before it, or an id stands twice.
        FileError: The file cannot be read.
        OptionError: The system is not known here.
    """
    header: dict[str, Any] = {}
    predictions: dict[str, Prediction] = {}
    kind: AnswerKind | None = None
    run: Any = None
    with file_errors(path, "read"):
        lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        location = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                break
            raise DataError(f"{location}: this is not JSON") from None
        if number == 1 and isinstance(entry, dict) and "settings" in entry and "id" not in entry:
            header = entry
            continue
        if number == 1 and isinstance(entry, dict) and "run" in entry:
            run = entry["run"]  # every answer of inference names its run and its system
            header = {"settings": {"system": entry.get("system")}}
        kind = kind or AnswerKind.of(answer_format or system_of(header))
        prediction = _prediction(entry, kind, location)
        if entry.get("run") != run:
            raise DataError(f"{location}: this is an answer of another model or other settings than those before it")
        if prediction.id in predictions:
            raise DataError(f"{location}: the id {prediction.id!r} stands more than once")
        predictions[prediction.id] = prediction
    return header, predictions


def system_of(header: Mapping[str, Any]) -> str:
    """Returns the system that a run's first line names, or the default one."""
    settings = header.get("settings")
    name = settings.get("system") if isinstance(settings, Mapping) else None
    return str(name or DEFAULT_SYSTEM)


def _prediction(entry: Any, kind: AnswerKind, location: str) -> Prediction:
    needed = ("fake_probability", "verdict", "text", "error")
    if isinstance(entry, dict) and "id" not in entry and "image" in entry:
        # A line of inference's answers, whose label is what the text says unless it is a detector's.
        own = entry.get("answer_label")
        said = entry.get("label") if own is None else own or None
        entry = {**entry, "id": entry["image"], "verdict": said, "label": None}
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
        raise DataError(f"{location}: a prediction needs an id")
    if not any(name in entry for name in needed):
        raise DataError(f"{location}: a prediction needs one of {', '.join(needed)}")
    verdict, text = entry.get("verdict"), entry.get("text") or ""
    if verdict not in (None, *LABELS):
        raise DataError(f"{location}: the verdict must be real, fake or null, not {verdict!r}")
    source, seconds = entry.get("score_source"), entry.get("seconds") or 0
    if not isinstance(text, str) or not isinstance(source, str | None):
        raise DataError(f"{location}: text and score_source must be texts")
    if not isinstance(seconds, int | float):
        raise DataError(f"{location}: seconds must be a number, not {seconds!r}")
    parsed = kind.parse(text)
    details = entry.get("details")
    return Prediction(
        id=entry["id"],
        label=_given_label(entry.get("label")),
        verdict=verdict if "verdict" in entry else parsed.verdict,
        fake_probability=_probability(entry, "fake_probability", location),
        score_source=source,
        answer_probability=_probability(entry, "answer_probability", location),
        text=text,
        stages=_texts(entry, "stages", parsed.stages, location),
        attributes=_texts(entry, "attributes", parsed.attributes, location),
        mask=str(entry["mask"]) if entry.get("mask") else None,
        tag=str(entry.get("tag") or ""),
        details=details if isinstance(details, dict) else {},
        abstained=bool(entry.get("abstained")),
        abstained_because=str(entry.get("abstained_because") or ""),
        error=str(entry.get("error") or _no_number(entry)),
        seconds=float(seconds),
    )


def _given_label(value: Any) -> int:
    """The truth that a line itself gives, or -1 where it gives none."""
    label = value if isinstance(value, int) else parse_label(value) if isinstance(value, str) else None
    return label if label in (REAL, FAKE) else -1


def _probability(entry: Mapping[str, Any], name: str, location: str) -> float | None:
    given = entry.get(name)
    if given is not None and (isinstance(given, bool) or not isinstance(given, int | float)):
        raise DataError(f"{location}: {name} must be a number from 0 to 1, not {json.dumps(given)}")
    if given is None or not math.isfinite(given):
        return None
    if not 0 <= given <= 1:
        raise DataError(f"{location}: {name} must be from 0 to 1, not {given!r}")
    return given


def _no_number(entry: Mapping[str, Any]) -> str:
    """What is wrong with scores that are NaN or infinite; empty where none is."""
    names = ("fake_probability", "answer_probability")
    wrong = [name for name in names if isinstance(entry.get(name), float) and not math.isfinite(entry[name])]
    return f"{' and '.join(wrong)} is no number" if wrong else ""


def _texts(entry: Mapping[str, Any], name: str, default: dict[str, str], location: str) -> dict[str, str]:
    given = entry.get(name, default)
    if not isinstance(given, dict) or not all(isinstance(text, str) for text in given.values()):
        raise DataError(f"{location}: {name} must be an object of texts")
    return given
