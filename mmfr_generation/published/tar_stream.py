"""Reads a tar archive that lies in pieces, from any byte on, without putting the pieces together.

A piece may begin and end anywhere in a member. Reading starts at the next valid header, and what is cut at either end
is reported, never written.
"""

import re
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
"""Bytes of a header; every member's data is padded to a multiple of it."""

_CHUNK = 1 << 20
_MAGIC, _MAGIC_AT = b"ustar", 257
_NAME_FIELD = 100
_LARGEST = 1 << 40
_LARGEST_EXTENSION = 1 << 20
_KNOWN_TYPES = frozenset(b"\x0001234567xgLKS")
_ZEROS = bytes(BLOCK)

Position = tuple[int, int]
"""Number of a part and an offset in it, in bytes."""


class PartReader:
    """Reads parts one after another as if they were one file; a part is opened only when it is reached.

    Args:
        parts: Numbers of the parts, in order and without a gap.
        open_part: Opens a part for reading.
        offset: Where in the first part to begin, in bytes.
        advance: Called with the number of bytes of each read.
    """

    def __init__(
        self,
        parts: Sequence[int],
        open_part: Callable[[int], BinaryIO],
        offset: int = 0,
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._parts = list(parts)
        self._open_part = open_part
        self._advance = advance
        self._starts: list[int] = []
        self._file: BinaryIO | None = None
        self._back = b""
        self._read = offset
        self._first_offset = offset

    def read(self, size: int) -> bytes:
        """Returns the next ``size`` bytes; fewer only at the end of the last part."""
        pieces = [self._back[:size]]
        self._back = self._back[size:]
        missing = size - len(pieces[0])
        while missing and (self._file is not None or self._open_next()):
            assert self._file is not None
            piece = self._file.read(missing)
            if not piece:
                self.close()
                continue
            pieces.append(piece)
            missing -= len(piece)
            self._read += len(piece)
            self._advance(len(piece))
        return b"".join(pieces)

    def unread(self, data: bytes) -> None:
        """Puts bytes back that were read last."""
        self._back = data + self._back

    @property
    def absolute(self) -> int:
        """Offset of the next byte from the start of the first part."""
        return self._read - len(self._back)

    def position(self, absolute: int) -> Position:
        """Returns in which part, and where in it, a byte is that has been read.

        Args:
            absolute: Offset from the start of the first part.
        """
        index = max(0, bisect_right(self._starts, absolute) - 1)
        return self._parts[index], absolute - (self._starts[index] if self._starts else 0)

    def at_end(self) -> bool:
        """Says whether no byte is left; opens the next part if that is needed to know."""
        byte = self.read(1)
        self.unread(byte)
        return not byte

    @property
    def opened(self) -> list[int]:
        """Numbers of the parts that have been opened so far."""
        return self._parts[: len(self._starts)]

    def close(self) -> None:
        """Closes the part that is open."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open_next(self) -> bool:
        index = len(self._starts)
        if index == len(self._parts):
            return False
        self._file = self._open_part(self._parts[index])
        if index == 0:
            self._file.seek(self._first_offset)
            self._starts.append(0)
        else:
            self._starts.append(self._read)
        return True


@dataclass(frozen=True)
class Member:
    """A member whose header is whole; its data stands next in the reader.

    Attributes:
        name: Full name.
        size: Bytes of data that follow.
        kind: ``file``, ``folder``, or what else it is, for example ``symbolic link``.
        at: Where its first header is.
    """

    name: str
    size: int
    kind: str
    at: Position


@dataclass(frozen=True)
class Cut:
    """Bytes of a member that could not be taken.

    Attributes:
        what: Name of the member, or what is known of it.
        where: ``start`` if its beginning is missing, ``end`` if its end is, ``damage`` if neither is the case.
        at: Where the bytes begin.
        size: Number of bytes.
    """

    what: str
    where: str
    at: Position
    size: int


_KINDS = {
    tarfile.SYMTYPE: "symbolic link",
    tarfile.LNKTYPE: "hard link",
    tarfile.CHRTYPE: "character device",
    tarfile.BLKTYPE: "block device",
    tarfile.FIFOTYPE: "pipe",
    tarfile.DIRTYPE: "folder",
    tarfile.REGTYPE: "file",
    tarfile.AREGTYPE: "file",
    tarfile.CONTTYPE: "file",
}


def read_members(reader: PartReader, *, at_header: bool) -> Iterator[Member | Cut]:
    """Yields the members of an archive in order, and what is cut or damaged.

    After each ``Member`` of kind ``file`` its ``size`` bytes of data, and then ``skip_padding``, must be taken from the
    reader before the next one is asked for.

    Args:
        reader: The archive.
        at_header: Whether it stands at a header now. If not, the next valid header is looked for.
    """
    if not at_header:
        yield from _synchronise(reader, "start")
    while True:
        first = reader.absolute
        block = reader.read(BLOCK)
        start = reader.position(first)
        if not block.strip(b"\0"):
            if len(block) < BLOCK:
                return
            continue
        if len(block) < BLOCK:
            yield Cut("a member whose header is cut", "end", start, len(block))
            return
        header = _header(block)
        if header is None:
            reader.unread(block)
            yield from _synchronise(reader, "damage")
            continue
        extension: dict[str, str] = {}
        while header is not None and header.type in {b"L", b"K", b"x", b"g"}:
            header = _read_extension(reader, header, extension)
        if header is None:
            if reader.at_end():
                name = extension.get("path", "a member whose header is cut")
                yield Cut(name, "end", start, reader.absolute - first)
                return
            yield from _synchronise(reader, "damage")
            continue
        yield _member(header, extension, start)


def skip_padding(reader: PartReader, size: int) -> None:
    """Passes over the bytes that fill up the last block of a member of this size."""
    reader.read(-size % BLOCK)


def _member(header: tarfile.TarInfo, extension: dict[str, str], start: Position) -> Member:
    kind = _KINDS.get(header.type, "special file")
    size = int(extension.get("size", header.size)) if kind in {"file", "special file"} else 0
    if any(key.startswith("GNU.sparse") for key in extension):
        kind = "sparse file"
    name = extension.get("path", header.name)
    return Member(name, size, "folder" if kind == "file" and name.endswith("/") else kind, start)


def _header(block: bytes) -> tarfile.TarInfo | None:
    """Returns a header whose checksum is right and whose fields can be, or None."""
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return None
    if block[156] not in _KNOWN_TYPES or not header.name or not 0 <= header.size < _LARGEST or header.mode < 0:
        return None
    return header


def _read_extension(reader: PartReader, header: tarfile.TarInfo, extension: dict[str, str]) -> tarfile.TarInfo | None:
    """Reads a long name or a pax record into ``extension``; returns the header after it, None if there is none."""
    if header.size > _LARGEST_EXTENSION:
        return None
    payload = reader.read(header.size)
    skip_padding(reader, header.size)
    if len(payload) < header.size:
        return None
    if header.type == b"L":
        extension["path"] = payload.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
    elif header.type == b"x":
        extension.update(_pax_records(payload))
    block = reader.read(BLOCK)
    return _header(block) if len(block) == BLOCK else None


def _pax_records(payload: bytes) -> dict[str, str]:
    """Reads pax records, ``<length> <key>=<value>`` and a line break each; stops at the first that is none."""
    records: dict[str, str] = {}
    while payload:
        length, space, _ = payload.partition(b" ")
        if not space or not length.isdigit() or len(length) > 9 or not len(length) < int(length) <= len(payload):
            break
        key, equals, value = payload[len(length) + 1 : int(length) - 1].partition(b"=")
        if not equals:
            break
        records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        payload = payload[int(length) :]
    if not re.fullmatch("[0-9]{1,13}", records.get("size", "0")):
        del records["size"]
    return records


def _synchronise(reader: PartReader, where: str) -> Iterator[Cut]:
    """Goes to the next valid header and reports what was passed over."""
    begin = reader.absolute
    before = b""
    found, empty = False, True
    while not found:
        window = reader.read(_CHUNK)
        at = window.find(_MAGIC, _MAGIC_AT)
        while at >= 0 and at + BLOCK - _MAGIC_AT <= len(window):
            header = _header(window[at - _MAGIC_AT : at - _MAGIC_AT + BLOCK])
            if header is not None:
                empty = empty and not window[: at - _MAGIC_AT].strip(b"\0")
                before = (before + window[: at - _MAGIC_AT])[-BLOCK:]
                reader.unread(window[at - _MAGIC_AT :])
                found = True
                break
            at = window.find(_MAGIC, at + 1)
        if found:
            break
        empty = empty and not window.strip(b"\0")
        if len(window) < BLOCK:
            break
        before = (before + window[: 1 - BLOCK])[-BLOCK:]
        if len(window) < _CHUNK:
            break
        reader.unread(window[1 - BLOCK :])
    skipped = reader.absolute - begin
    what = {"start": "the member that begins in the part before", "damage": "a damaged member or header"}[where]
    if found:
        named = _continues_a_name(reader, before)
        if named:
            what, skipped = f"{what}, {named}", reader.absolute - begin
    # Zeros alone fill up the last block of a member, or end the archive: they are nobody's data.
    if skipped and not (empty and (skipped < BLOCK or not found)):
        yield Cut(what, where, reader.position(begin), skipped)


def _continues_a_name(reader: PartReader, before: bytes) -> str:
    """Passes over a member whose long name stood in what is missing; returns what is known of its name."""
    block = reader.read(BLOCK)
    header = _header(block)
    assert header is not None
    short = block[:_NAME_FIELD].rstrip(b"\0")
    # A writer that puts the full name in front fills this field to its end, or writes ? for what it cannot hold.
    shortened = len(short) >= _NAME_FIELD - 1 or b"?" in short
    named = bool(_pax_records(before.lstrip(b"\0")).get("path")) if before[:1].isdigit() else False
    if header.type in {b"L", b"K", b"x", b"g"} or not (shortened or named):
        reader.unread(block)
        return ""
    missing = header.size if _KINDS.get(header.type) == "file" else 0
    missing += -missing % BLOCK
    while missing and (piece := reader.read(min(missing, _CHUNK))):
        missing -= len(piece)
    return f"whose name begins with {header.name!r}"
