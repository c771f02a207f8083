"""Unpacks parts into a folder and keeps account of it, so that a kill at any point costs a few seconds of work."""

import contextlib
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

from llava.cli import format_list, progress
from llava.errors import DataError
from llava.files import JsonlLog, atomic_file, file_errors, read_json, write_json
from mmfr_generation.published.sources import Source
from mmfr_generation.published.tar_stream import Cut, Member, PartReader, read_members, skip_padding

WORK_FOLDER = ".mmfr_download"
"""Folder below the output that holds what is needed to resume."""

_CHUNK = 1 << 20
_SECONDS_BETWEEN_NOTES = 2.0


class RefusedMember(DataError):
    """A member that must not be written; the text says why."""


@dataclass
class PartState:
    """What is known of a part.

    Attributes:
        size: In bytes.
        done: Whether every member that begins in it, and can be written, is on disk.
        first: Offset of its first header; None if it is not known or there is none.
        head: What is known of the member whose end lies in it and whose beginning was missing.
        tail: Name of the member that begins in it and whose end was missing.
        tail_offset: Where that member begins.
        tail_until: Number of the last part that was read for that member.
    """

    size: int
    done: bool = False
    first: int | None = None
    head: str = ""
    tail: str = ""
    tail_offset: int = 0
    tail_until: int = 0


@dataclass
class Account:
    """What the log says of all members, read line by line.

    Attributes:
        members: Part and size of each member that was written, by its path.
        refused: Members that were refused in a part, with the reason.
        damage: Damaged bytes at an offset of a part.
    """

    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    refused: dict[tuple[int, str], str] = field(default_factory=dict)
    damage: dict[tuple[int, int], str] = field(default_factory=dict)

    def add(self, record: dict[str, Any]) -> None:
        """Takes in one line of the log."""
        part = record["part"]
        if "begun" in record:  # the part is read from its first header again
            self.refused = {key: text for key, text in self.refused.items() if key[0] != part}
            self.damage = {key: text for key, text in self.damage.items() if key[0] != part}
        elif "refused" in record:
            self.refused[part, record["path"]] = f"{record['path']!r}: {record['refused']}"
        elif "damage" in record:
            self.damage[part, record["offset"]] = f"part {part}, byte {record['offset']:,}: {record['damage']}"
        else:
            self.members[record["path"]] = (part, record["size"])


class Unpacker:
    """Unpacks parts into a folder and keeps account of it, so that a kill at any point costs a few seconds of work.

    Two files say what is done. The log has a line for each member, appended when the member is on disk. The state has
    a summary of each part and the last header that was reached; it is written every few seconds, so after a kill the
    members after that header are written a second time, with the same bytes.

    Args:
        source: Where the parts come from.
        output: Where the members go.

    Raises:
        DataError: A part has another size than in an earlier run.
    """

    def __init__(self, source: Source, output: Path) -> None:
        self._source = source
        self._output = output
        self._log_path = output / WORK_FOLDER / "members.jsonl"
        self._account = Account()
        self._state_path = output / WORK_FOLDER / "state.json"
        self._parts: dict[int, PartState] = {}
        self._here: tuple[int, int] | None = None
        if self._state_path.exists():
            state = read_json(self._state_path)
            self._parts = {int(number): PartState(**part) for number, part in state["parts"].items()}
            self._here = tuple(state["here"]) if state["here"] else None
        for number in source.sizes.keys() & self._parts.keys():
            if source.sizes[number] != self._parts[number].size:
                raise DataError(
                    f"part {number} has {source.sizes[number]:,} bytes, in an earlier run it had "
                    f"{self._parts[number].size:,}; name an empty output folder"
                )

    def run(self, wanted: Iterable[int], *, delete_parts: bool) -> None:
        """Unpacks the members that begin in the wanted parts.

        Args:
            wanted: Numbers of parts; a member that continues in the next part is complete only if that one is wanted.
            delete_parts: Whether to delete each part once everything in it is on disk.

        Raises:
            UserError: A part cannot be fetched, or the output cannot be written.
        """
        runs = _without_gaps(frozenset(wanted) & self._source.sizes.keys())
        self._account = Account()
        with (
            file_errors(self._output, "written"),
            JsonlLog(self._log_path, lambda _, record: self._account.add(record)) as log,
        ):
            self._plan_missing()
            total = sum(self._source.sizes[part] for run in runs for part in run if self._needed(part, run))
            with progress(total=total, desc="unpacking", unit="B", unit_scale=True, unit_divisor=1024) as bar:
                for run in runs:
                    for part in run:
                        if self._needed(part, run):
                            self._unpack_from(part, run, log, bar, delete_parts)
        if delete_parts:
            for part in (part for run in runs for part in run):
                self._discard(part)

    def summary(self, wanted: Iterable[int]) -> tuple[str, bool]:
        """Reports on the wanted parts after a run.

        Returns:
            The text, and whether nothing was refused, damaged or missing. A member that is cut because the part
            before or after it was not wanted is no fault.
        """
        wanted = frozenset(wanted)
        members = {path: place for path, place in self._account.members.items() if place[0] in wanted}
        refused = [text for (part, _), text in sorted(self._account.refused.items()) if part in wanted]
        damage = [text for (part, _), text in sorted(self._account.damage.items()) if part in wanted]
        lines = [f"files: {len(members)} ({sum(size for _, size in members.values()):,} bytes) in {self._output}"]
        cut = []
        for number in sorted(wanted):
            part = self._parts.get(number)
            if part and part.head:
                cut.append(f"part {number}: {part.head}; part {number - 1} is needed for it")
            if part and part.tail:
                cut.append(f"part {number}: {part.tail} is cut; part {part.tail_until + 1} is needed for it")
        unread = [number for number in sorted(wanted) if number not in self._parts or not self._parts[number].done]
        missing = sorted(path for path, (_, size) in members.items() if not self._is_there(path, size))
        for title, names in (
            ("cut members, not written", cut),
            ("refused members, not written", refused),
            ("damaged places", damage),
            ("members that are missing or have another size; the same command writes them again", missing),
            ("parts that were not read", [f"part {number}" for number in unread]),
        ):
            if names:
                lines.append(f"{title}: {len(names)}\n{format_list(names)}")
        return "\n".join(lines), not (refused or damage or missing or unread)

    def _unpack_from(self, start: int, run: Sequence[int], log: JsonlLog, bar: Any, delete_parts: bool) -> None:
        """Unpacks from a part until a member begins in a part that needs no reading."""
        offset, at_header, fresh = self._where_to_begin(start)
        reader = PartReader([part for part in run if part >= start], self._open, offset, bar.update)
        entered = None
        noted = time.monotonic()
        with contextlib.closing(reader):
            for item in read_members(reader, at_header=at_header):
                part = item.at[0]
                if isinstance(item, Cut) and item.where == "start":
                    self._state(part).head = f"{item.what} ({item.size:,} bytes)"
                    continue
                if isinstance(item, Cut) and item.where == "damage":
                    damage = f"{item.what} ({item.size:,} bytes)"
                    self._record(log, {"part": part, "damage": damage, "offset": item.at[1]})
                    continue
                if part != entered:
                    # The first member that begins in a part proves that all members of the parts before it are done.
                    passed = [number for number in reader.opened if number < part]
                    self._finish(passed)
                    self._clear_heads([*passed, part], start)
                    if part != start and not self._needed(part, run):
                        self._note(None)
                        return
                    self._enter(item.at, log, fresh=fresh or part != start, start=start)
                    entered = part
                    if delete_parts:
                        for number in passed:
                            self._discard(number)
                self._take(reader, item, log)
                if time.monotonic() - noted > _SECONDS_BETWEEN_NOTES:
                    self._note(reader.position(reader.absolute))
                    noted = time.monotonic()
            self._finish(reader.opened)
            self._clear_heads(reader.opened, start)
            self._note(None)

    def _where_to_begin(self, part: int) -> tuple[int, bool, bool]:
        """Returns the offset at which to read a part, whether a header is there, and whether all of it is read."""
        state = self._state(part)
        if self._here is not None and self._here[0] == part:  # where a run was stopped
            return self._here[1], True, False
        if state.done and state.tail:  # only the member that was cut is missing
            return state.tail_offset, True, False
        if state.first is not None:
            return state.first, True, True
        return 0, part == 1, True  # any other part begins in the middle of a member, as a rule

    def _enter(self, at: tuple[int, int], log: JsonlLog, *, fresh: bool, start: int) -> None:
        """Notes that the members that begin in a part are now being written."""
        part, offset = at
        state = self._state(part)
        state.done, state.tail = False, ""
        if part != start or state.first is None:
            state.first = offset
        if fresh:
            self._record(log, {"part": part, "begun": True})
        self._note(at)

    def _take(self, reader: PartReader, item: Member | Cut, log: JsonlLog) -> None:
        """Writes one member, or notes why not, and leaves the reader after its data."""
        if isinstance(item, Cut):
            self._note_tail(item.what, item.at, reader)
            return
        target = None
        try:
            target = self._target(item)
        except (RefusedMember, FileExistsError, NotADirectoryError) as error:
            self._record(log, {"part": item.at[0], "path": item.name, "refused": str(error)})
        if _copy(reader, item.size, target) < item.size:
            self._note_tail(item.name, item.at, reader)
            return
        skip_padding(reader, item.size)
        if target is not None:
            path = target.relative_to(self._output).as_posix()
            self._record(log, {"part": item.at[0], "path": path, "size": item.size})

    def _record(self, log: JsonlLog, record: dict[str, Any]) -> None:
        log.append(record)
        self._account.add(record)

    def _target(self, member: Member) -> Path | None:
        """Returns where a member's data goes, its folder made; None for a member that is a folder itself."""
        if member.kind not in {"file", "folder"}:
            raise RefusedMember(f"it is a {member.kind}")
        target = safe_target(self._output, member.name)
        if member.kind == "folder":
            target.mkdir(parents=True, exist_ok=True)
            return None
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_file():  # writing through a link to a device would not replace it
            raise RefusedMember("a folder or device of this name is there")
        return target

    def _needed(self, part: int, run: Sequence[int]) -> bool:
        """Whether a part must be read: it was never done, or its cut last member can now be completed."""
        state = self._parts.get(part)
        return state is None or not state.done or bool(state.tail and state.tail_until + 1 in run)

    def _plan_missing(self) -> None:
        """Marks parts as not done whose members are not on disk as they were written."""
        members = self._account.members.items()
        for part in {part for path, (part, size) in members if not self._is_there(path, size)} & self._parts.keys():
            self._parts[part].done = False
            if self._here is not None and self._here[0] == part:
                self._here = None

    def _is_there(self, path: str, size: int) -> bool:
        target = self._output / path
        return target.is_file() and target.stat().st_size == size

    def _note_tail(self, name: str, at: tuple[int, int], reader: PartReader) -> None:
        state = self._state(at[0])
        state.tail, state.tail_offset, state.tail_until = name, at[1], reader.opened[-1]

    def _finish(self, parts: Iterable[int]) -> None:
        for part in parts:
            self._state(part).done = True

    def _clear_heads(self, parts: Iterable[int], start: int) -> None:
        """Notes that the parts after the first one were read together with the part before."""
        for part in parts:
            if part != start:
                self._state(part).head = ""

    def _discard(self, part: int) -> None:
        """Deletes a part, unless a member is cut in it, which a later run may complete."""
        state = self._state(part)
        if state.done and not state.head and not state.tail:
            self._source.discard(part)

    def _state(self, part: int) -> PartState:
        if part not in self._parts:
            self._parts[part] = PartState(self._source.sizes[part])
        return self._parts[part]

    def _open(self, part: int) -> BinaryIO:
        self._state(part)
        path = self._source.fetch(part)
        with file_errors(path, "read"):
            return path.open("rb")

    def _note(self, here: tuple[int, int] | None) -> None:
        """Writes the account; everything before ``here``, where a header stands, is on disk."""
        self._here = here
        parts = {str(number): asdict(self._parts[number]) for number in sorted(self._parts)}
        write_json(self._state_path, {"here": here, "parts": parts})


def safe_target(output: Path, name: str) -> Path:
    """Returns where a member of this name goes.

    Raises:
        RefusedMember: The name is absolute, leads out of the output folder, or is not valid for a file.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or PureWindowsPath(name).drive or "\\" in name:
        raise RefusedMember("its name is absolute or not a plain path")
    if ".." in path.parts:
        raise RefusedMember("its name leads out of the output folder")
    if not path.parts or "\0" in name or any(len(os.fsencode(part)) > 255 for part in path.parts):
        raise RefusedMember("its name is not valid for a file")
    if path.parts[0] == WORK_FOLDER:
        raise RefusedMember("its name is reserved for the account")
    target = output / path
    if not target.parent.resolve().is_relative_to(output.resolve()):
        raise RefusedMember("a link in the output folder leads out of it")
    return target


class _CutShort(Exception):
    """A member's data ended before its size."""


def _copy(reader: PartReader, size: int, target: Path | None) -> int:
    """Copies a member's data into a file, or skips it if there is no target; returns how many bytes there were."""
    taken = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(_CutShort))
        file = stack.enter_context(atomic_file(target)) if target else None
        while taken < size:
            piece = reader.read(min(_CHUNK, size - taken))
            if not piece:
                raise _CutShort
            if file is not None:
                file.write(piece)
            taken += len(piece)
    return taken


def _without_gaps(parts: Iterable[int]) -> list[list[int]]:
    """Splits numbers into runs of neighbours."""
    runs: list[list[int]] = []
    for part in sorted(parts):
        if runs and runs[-1][-1] == part - 1:
            runs[-1].append(part)
        else:
            runs.append([part])
    return runs
