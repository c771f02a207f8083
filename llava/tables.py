"""Tables and lists of images as people have them, and the names and labels in them. Imports no torch.

A table is CSV (comma, semicolon, tab or bar; with or without a byte-order mark; UTF-8 or UTF-16), JSONL, or JSON (a
list of objects, alone or under ``data``). A list is a ``.txt`` file with one name a line.
"""

import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import unquote, urlsplit

from llava.cli import note
from llava.errors import DataError, OptionError
from llava.files import file_errors, read_text, text_encoding
from llava.labels import FAKE, LABELS, REAL

CSV_SUFFIXES = (".csv", ".tsv")
TABLE_SUFFIXES = (*CSV_SUFFIXES, ".jsonl", ".json")
LIST_SUFFIXES = (".txt", *TABLE_SUFFIXES)

_DELIMITERS = (",", ";", "\t", "|")
_HEAD = 1 << 16
"""Of a table, what its form is told by."""
_LIST_OF_OBJECTS = re.compile(r"\s*\[\s*\{")

IMAGE_HEADERS = (
    *("image", "img", "path", "file", "filename", "filepath", "file_path", "file_name", "image_path", "img_path"),
    *("imagepath", "imgpath", "image_file", "img_file", "image_name", "img_name", "picture", "photo"),
)
"""Column names that mean the image; the first goes before the others."""
_CLASS_HEADERS = (
    *("label", "labels", "class", "target", "y", "gt", "ground_truth", "truth", "class_label", "label_name"),
    *("class_name", "category", "verdict"),
)
_FAKE_HEADERS = (
    *("is_fake", "fake", "is_ai", "ai", "ai_generated", "is_ai_generated", "is_generated", "generated", "is_synthetic"),
    *("synthetic", "is_manipulated", "manipulated", "is_tampered", "tampered", "is_forged", "forged", "is_deepfake"),
)
_REAL_HEADERS = ("is_real", "real", "is_authentic", "authentic", "is_natural", "is_pristine", "is_genuine", "genuine")
LABEL_HEADERS = (*_CLASS_HEADERS, *_FAKE_HEADERS, *_REAL_HEADERS)
"""Column names that mean the class; the first goes before the others."""

_WORDS = {
    **dict.fromkeys(("real", "authentic", "natural", "nature", "pristine", "genuine", "0_real", "non_fake"), REAL),
    **dict.fromkeys(("not_fake", "bona_fide", "bonafide", "camera"), REAL),
    **dict.fromkeys(("fake", "ai", "ai_generated", "aigenerated", "aigc", "generated", "synthetic", "tampered"), FAKE),
    **dict.fromkeys(("manipulated", "forged", "deepfake", "1_fake", "synthesized", "machine_generated", "gan"), FAKE),
}
"""What the field's words mean, by ``_folded``."""
_NUMBERS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}
_YES_NO = {"true": 1, "false": 0, "yes": 1, "no": 0, "t": 1, "f": 0, "y": 1, "n": 0}

LABEL_MAP_HELP = "what labels of a table mean, where they are not the field's words, e.g. original=real,df=fake"


# --- rows


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        where: File and line, for messages.
        values: By the column's name as it stands in the file.
    """

    where: str
    values: Mapping[str, Any]


def read_rows(path: Path) -> Iterator[Row]:
    """Yields the rows of a table.

    Raises:
        UserError: It cannot be read, or is not of the form that its ending says.
    """
    suffix = path.suffix.lower()
    if suffix == ".json":
        yield from _json_rows(read_text(path), path)
        return
    with _open_text(path) as lines:
        head = lines.read(_HEAD)
        lines.seek(0)
        if suffix != ".jsonl":
            yield from _csv_rows(lines, head, path)
        elif _LIST_OF_OBJECTS.match(head):
            yield from _json_rows(lines.read(), path)
        else:
            yield from _jsonl_rows(lines, path)


@contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    """Opens a text as ``read_text`` reads it, to be gone through; line ends stay as they are."""
    with file_errors(path, "read"):
        with path.open("rb") as start:
            encoding = text_encoding(start.read(_HEAD))
        try:
            with path.open(encoding=encoding, newline="") as text:
                yield text
        except UnicodeDecodeError:
            raise DataError(f"{path} is not text in UTF-8 or UTF-16; save it again as UTF-8") from None


def _csv_rows(lines: TextIO, head: str, path: Path) -> Iterator[Row]:
    first, _, rest = head.partition("\n")
    skipped = 0
    delimiter = None
    if first.strip().lower().startswith("sep=") and len(first.rstrip("\r\n")) >= 5:  # a spreadsheet's own hint
        delimiter, head, skipped = first.strip("\r\n")[4], rest, 1
        lines.readline()
    reader = csv.DictReader(lines, delimiter=delimiter or _delimiter(head), strict=False)
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num + skipped}"
            if None in row:
                raise DataError(f"{where}: there are more values than columns")
            yield Row(where, row)
    except csv.Error as error:
        raise DataError(f"{path}, after line {reader.line_num + skipped}: this is no CSV: {error}") from None


def _delimiter(text: str) -> str:
    """The delimiter that finds most known columns in the header, and then most columns."""

    def found(delimiter: str) -> tuple[int, int]:
        try:
            header = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
        except csv.Error:
            return (0, 0)
        known = {_folded(name) for name in header} & {*IMAGE_HEADERS, *LABEL_HEADERS}
        return (len(known), len(header))

    return max(_DELIMITERS, key=found)


def _jsonl_rows(lines: TextIO, path: Path) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield Row(where, _object(_parsed(line, where), where))


def _json_rows(text: str, path: Path) -> Iterator[Row]:
    values = _parsed(text, str(path))
    if isinstance(values, dict) and isinstance(values.get("data"), list):
        values = values["data"]
    if not isinstance(values, list):
        raise DataError(f"{path} must hold a list of objects, alone or under data")
    for number, value in enumerate(values, start=1):
        where = f"{path}, entry {number}"
        yield Row(where, _object(value, where))


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise DataError(f"{where}: this is no usable JSON: it is nested too deeply") from None
    except ValueError as error:
        raise DataError(f"{where}: this is not JSON: {error}") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: this is no object")
    return value


# --- columns


@dataclass(frozen=True)
class Columns:
    """Where a table has what is needed.

    Attributes:
        image: Column of the image.
        label: Column of the class; None where the table has none.
    """

    image: str
    label: str | None

    @classmethod
    def find(cls, names: Iterable[str], where: str, *, needs_label: bool = True) -> "Columns":
        """Finds the columns by their names.

        Args:
            names: The table's columns.
            where: For messages.
            needs_label: Whether a table without classes is refused.

        Raises:
            DataError: A column is missing, or several could be meant.
        """
        columns = [str(name) for name in names if name is not None]
        image = find_column(columns, IMAGE_HEADERS, "image", where)
        label = find_column(columns, LABEL_HEADERS, "label", where)
        missing = [
            f"the column {role} (or {', '.join(others[1:7])} …)"
            for role, found, others in (("image", image, IMAGE_HEADERS), ("label", label, LABEL_HEADERS))
            if found is None and (role == "image" or needs_label)
        ]
        if image is None or missing:
            raise DataError(f"{where} needs {' and '.join(missing)}; it has {', '.join(columns) or 'none'}")
        return cls(image, label)

    @property
    def own(self) -> frozenset[str]:
        """The columns that are found here."""
        return frozenset(name for name in (self.image, self.label) if name is not None)


def find_column(columns: Sequence[str], known: Sequence[str], role: str, where: str) -> str | None:
    """Returns the column that has one of the known names; None if there is none.

    Args:
        columns: The table's columns.
        known: What the column may be called; the first goes before the others.
        role: What it holds, for messages.
        where: For messages.

    Raises:
        DataError: Several could be meant.
    """
    found = [name for name in columns if _folded(name) in known]
    first = [name for name in found if _folded(name) == known[0]]
    if len(first) == 1:
        return first[0]
    if len(found) > 1:
        raise DataError(f"{where}: {', '.join(found)} could each be the column {role}; name one of them {role}")
    return found[0] if found else None


def _folded(text: str) -> str:
    return text.strip().strip("\ufeff\"'").strip().lower().replace("-", "_").replace(" ", "_")


# --- labels


def parse_label_map(text: str) -> dict[str, int]:
    """Reads ``word=real,word=fake``.

    Raises:
        OptionError: A part has another form, or a word means both.
    """
    meanings: dict[str, int] = {}
    for part in text.split(","):
        word, equals, meaning = part.rpartition("=")
        if not equals or not word.strip() or meaning.strip().lower() not in LABELS:
            raise OptionError(f"--label-map needs word=real or word=fake, divided by commas, not {part!r}")
        number = LABELS.index(meaning.strip().lower())
        if meanings.setdefault(word.strip().lower(), number) != number:
            raise OptionError(f"--label-map: {word.strip()!r} cannot mean both real and fake")
    return meanings


def read_label(value: object, column: str | None, meanings: Mapping[str, int], where: str) -> int:
    """Returns the class of a table's label: 0 real, 1 fake.

    Args:
        value: The label.
        column: Its column's name, which can say what true or 1 means.
        meanings: What further words mean, in lower case; goes before all else.
        where: For messages.

    Raises:
        DataError: It means neither, or could mean both.
    """
    plain = str(value).strip()
    if plain.lower() in meanings:
        return meanings[plain.lower()]
    word = _folded(plain)
    header = _folded(column or "")
    if word in _WORDS:
        return _WORDS[word]
    if word in _NUMBERS:
        return 1 - _NUMBERS[word] if header in _REAL_HEADERS else _NUMBERS[word]
    if word in _YES_NO and header in (*_FAKE_HEADERS, *_REAL_HEADERS):
        return 1 - _YES_NO[word] if header in _REAL_HEADERS else _YES_NO[word]
    raise DataError(
        f"{where}: the label must be real, fake, 0 (real) or 1 (fake), or one of the field's words, not {value!r}; "
        "say what it means with --label-map, for example --label-map original=real,edited=fake"
    )


# --- names

_URL = re.compile(r"https?:/", re.IGNORECASE)


def is_url(text: str) -> bool:
    """Whether a text is an address on the web, also where a path has lost one of its slashes."""
    return bool(_URL.match(text))


@dataclass
class NameFinder:
    """Finds files by names that were written on another system.

    Attributes:
        folder: Where relative names start.
        respelled: How many names were found under another spelling.
    """

    folder: Path
    respelled: int = 0
    _first: tuple[str, Path] | None = field(default=None, repr=False)
    _listings: dict[Path, list[dict[str, list[str]]]] = field(default_factory=dict, repr=False)

    def find(self, name: str) -> Path:
        """Returns a name's path: as it stands, or else by the one file that it can mean.

        Tried are blanks at the ends, ``file://``, ``~``, Windows separators, and, part by part, another Unicode
        composition and another case, each where a single file fits. A name that fits none is returned as it stands,
        and so is an address on the web.
        """
        if is_url(name.strip()):
            return Path(name.strip())
        plain = self.folder / name
        if _exists(plain):
            return plain
        for candidate in _spellings(name):
            found = self._walk(self.folder / candidate)
            if found is not None:
                self.respelled += 1
                self._first = self._first or (name, found)
                return found
        return self.folder / name.strip()

    def report(self, where: object) -> None:
        """Says which names were found under another spelling."""
        if self._first:
            name, path = self._first
            note(f"{where}: {self.respelled} names were found under another spelling, such as {name!r}: {path}")

    def _walk(self, path: Path) -> Path | None:
        if _exists(path):
            return path
        here = Path(path.anchor)
        for part in path.parts[1 if path.anchor else 0 :]:
            if not _exists(here / part):
                near = self._near(here, part)
                if near is None:
                    return None
                part = near
            here /= part
        return here

    def _near(self, folder: Path, name: str) -> str | None:
        if folder not in self._listings:
            self._listings[folder] = _by_spelling(folder)
        composed = unicodedata.normalize("NFC", name)
        exactly, caseless = self._listings[folder]
        same = exactly.get(composed) or caseless.get(composed.casefold(), [])
        return same[0] if len(same) == 1 else None


def _by_spelling(folder: Path) -> list[dict[str, list[str]]]:
    """The entries of a folder by their composed names, and by these in any case."""
    exactly: dict[str, list[str]] = {}
    caseless: dict[str, list[str]] = {}
    try:
        for entry in folder.iterdir():
            composed = unicodedata.normalize("NFC", entry.name)
            exactly.setdefault(composed, []).append(entry.name)
            caseless.setdefault(composed.casefold(), []).append(entry.name)
    except (OSError, ValueError):
        return [{}, {}]
    return [exactly, caseless]


def _spellings(name: str) -> Iterator[str]:
    """Yields what a name can stand for, as paths of this system."""
    stripped = name.strip().strip("\"'").strip() or name
    if stripped.lower().startswith("file:"):
        parts = urlsplit(stripped)
        stripped = unquote(parts.path)
    if stripped.startswith("~"):
        stripped = _with_home(stripped)
    yield stripped
    if "\\" in stripped:
        yield stripped.replace("\\", "/")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _with_home(name: str) -> str:
    try:
        return str(Path(name).expanduser())
    except RuntimeError:  # the home of somebody who is not known here
        return name


def read_names(path: Path) -> list[Path]:
    """Returns the images that a ``.txt`` list or a table names.

    Raises:
        UserError: It cannot be read, or a table has no column of images.
    """
    return [Path(name) for name in read_sources(path)]


def read_sources(path: Path) -> list[Path | str]:
    """Returns the images that a ``.txt`` list or a table names; addresses on the web are texts.

    Raises:
        UserError: It cannot be read, or a table has no column of images.
    """
    return list(stream_sources(path))


def stream_sources(path: Path) -> Iterator[Path | str]:
    """Yields what ``read_sources`` returns; all but ``.json`` is read as it is gone through.

    Raises:
        UserError: As there.
    """
    finder = NameFinder(path.parent)
    for name in _table_names(path) if path.suffix.lower() in TABLE_SUFFIXES else _listed_names(path):
        yield name.strip() if is_url(name.strip()) else finder.find(name)
    finder.report(path)


def _listed_names(path: Path) -> Iterator[str]:
    with file_errors(path, "read"):
        with path.open("rb") as start:
            encoding = text_encoding(start.read(512))
        # Names need not be UTF-8: what is not stands for its bytes, as in every path.
        with path.open(encoding=encoding, errors="surrogateescape" if encoding == "utf-8-sig" else "replace") as text:
            for line in text:
                yield from (name for name in line.splitlines() if name.strip())


def _table_names(path: Path) -> Iterator[str]:
    for row in read_rows(path):
        yield image_name(row, Columns.find(row.values, row.where, needs_label=False))


def image_name(row: Row, columns: Columns) -> str:
    """Returns the image of a row, as it stands there.

    Raises:
        DataError: There is none.
    """
    name = row.values.get(columns.image)
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{row.where}: there is no image")
    return name
