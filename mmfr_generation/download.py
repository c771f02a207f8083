"""Fetches the published MMFR-Dataset, or takes its parts from a folder, and unpacks just what was asked for.

The data set is one tar archive in 86 pieces. They are read as one stream, each piece when it is its turn; the whole
archive is never put together. What is needed to go on after a stop is kept in ``<output>/.mmfr_download``.
"""

import argparse
import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO, Protocol

from tqdm import tqdm

from llava.cli import format_list
from llava.errors import UserError
from mmfr_generation.command_line import Parser, run_script
from mmfr_generation.files import JsonLog, only_one_at_work, read_json, replaced_when_complete, sha256_of, write_json
from mmfr_generation.tar_stream import Cut, Member, PartReader, read_members, skip_padding

REPOSITORY = "AnnaGao/MMFR-Dataset"
PART_COUNT = 86
PART_SETS: dict[str, tuple[int, ...]] = {
    "smoke": (70,),
    "eval": tuple(range(70, 80)),
    "train": (*range(1, 70), *range(80, 87)),
    "all": tuple(range(1, 87)),
}
"""Parts of each choice: 1-69 hold diffusiondb and the training file, 70-79 the evaluation sets, 80-86 laion."""

_PART_NAME = re.compile(r"(?:.*/)?dataset\.part0*(\d+)\.tar")
_WORK_FOLDER = ".mmfr_download"
_CHUNK = 1 << 20
_RANGE = 32 << 20
_TRIES = 4
_SECONDS_BETWEEN_NOTES = 2.0


class Refused(ValueError):
    """A member that must not be written; the text says why."""


class Source(Protocol):
    """Where the parts come from."""

    def available(self) -> frozenset[int]:
        """Returns the numbers of the parts that there are."""

    def size(self, part: int) -> int:
        """Returns the size of a part in bytes."""

    def fetch(self, part: int) -> Path:
        """Returns a part as a file, whole and checked."""

    def discard(self, part: int) -> None:
        """Deletes a part from the disk if it is there."""


class FolderSource:
    """Parts that are on disk already.

    Args:
        folder: Folder with files named ``dataset.part<number>.tar``.

    Raises:
        UserError: There is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}")
        self._paths = {
            int(match[1]): path for path in sorted(folder.iterdir()) if (match := _PART_NAME.fullmatch(path.name))
        }

    def available(self) -> frozenset[int]:
        """Returns the numbers of the parts in the folder."""
        return frozenset(self._paths)

    def size(self, part: int) -> int:
        """Returns the size of a part in bytes."""
        return self._paths[part].stat().st_size

    def fetch(self, part: int) -> Path:
        """Returns the path of a part."""
        return self._paths[part]

    def discard(self, part: int) -> None:
        """Deletes a part."""
        self._paths[part].unlink(missing_ok=True)


class HubSource:
    """Parts on the hub; each is downloaded when it is its turn, and a download that broke off goes on where it was.

    Args:
        repository: Hub id of the data set.
        revision: Branch, tag or commit.
        folder: Where downloaded parts are put.

    Raises:
        UserError: The hub cannot be reached, or has no such data set.
    """

    def __init__(self, repository: str, revision: str, folder: Path) -> None:
        from huggingface_hub import HfApi

        self.repository = repository
        self._folder = folder
        info = _hub_call(repository, lambda: HfApi().dataset_info(repository, revision=revision, files_metadata=True))
        self.revision = info.sha or revision
        self._files = {
            int(match[1]): file
            for file in info.siblings or []
            if (match := _PART_NAME.fullmatch(file.rfilename)) and file.size is not None
        }
        if not self._files:
            raise UserError(f"{repository} at {revision} holds no file dataset.part<number>.tar")

    def available(self) -> frozenset[int]:
        """Returns the numbers of the parts on the hub."""
        return frozenset(self._files)

    def size(self, part: int) -> int:
        """Returns the size of a part in bytes."""
        return int(self._files[part].size)

    def fetch(self, part: int) -> Path:
        """Downloads a part, goes on with one that broke off, and checks its size and hash.

        Raises:
            UserError: There is too little room on the disk, the hub fails, or the part is damaged.
        """
        file, path = self._files[part], self._path(part)
        if path.exists():
            return path
        partial = path.with_name(path.name + ".partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        missing = file.size - partial.stat().st_size
        free = shutil.disk_usage(self._folder).free
        if free < missing:
            raise UserError(
                f"part {part} needs {missing:,} more bytes, but only {free:,} are free in {self._folder}; make room, "
                "then run the same command again: what is done is kept"
            )
        failures = 0
        while (begun := partial.stat().st_size) < file.size:
            try:
                _hub_call(self.repository, lambda: self._append(part, partial))
            except UserError:
                failures = failures + 1 if partial.stat().st_size == begun else 1
                if failures == _TRIES:
                    raise
                time.sleep(failures)
        expected = file.lfs.sha256 if file.lfs else None
        if partial.stat().st_size != file.size or (expected and sha256_of(partial) != expected):
            partial.unlink()
            raise UserError(f"part {part} arrived damaged and was removed; run the same command again")
        partial.replace(path)
        return path

    def _append(self, part: int, partial: Path) -> None:
        """Downloads what is missing at the end of a partial file."""
        from huggingface_hub import HfFileSystem

        file = self._files[part]
        begun = partial.stat().st_size
        bar = tqdm(total=file.size, initial=begun, desc=file.rfilename, unit="B", unit_scale=True, unit_divisor=1024)
        remote = HfFileSystem().open(
            f"datasets/{self.repository}@{self.revision}/{file.rfilename}",
            "rb",
            block_size=_RANGE,
            cache_type="none",
            size=file.size,
        )
        with bar, remote, partial.open("ab", buffering=0) as target:
            remote.seek(begun)
            while piece := remote.read(_RANGE):
                target.write(piece)
                bar.update(len(piece))

    def discard(self, part: int) -> None:
        """Deletes a downloaded part."""
        self._path(part).unlink(missing_ok=True)

    def _path(self, part: int) -> Path:
        return self._folder / str(self._files[part].rfilename)


def _hub_call(repository: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        # The hub's client raises exceptions of several libraries; one with a number is the operating system's own.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        first_line = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise UserError(
            f"{repository} could not be fetched from the hub: {first_line}; "
            "what is done is kept, and the same command goes on from here"
        ) from None


@dataclass
class PartState:
    """What is known of a part that has been looked at.

    Attributes:
        size: In bytes.
        done: Whether every member that begins in it, and can be taken, is on disk.
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


class Unpacker:
    """Unpacks parts into a folder and keeps account of it, so that a kill at any point costs a few seconds of work.

    Args:
        source: Where the parts come from.
        output: Where the members go.

    Raises:
        UserError: A part has another size than in an earlier run.
    """

    def __init__(self, source: Source, output: Path) -> None:
        self._source = source
        self._output = output
        self._members_path = output / _WORK_FOLDER / "members.jsonl"
        self._state_path = output / _WORK_FOLDER / "state.json"
        self._parts: dict[int, PartState] = {}
        self._here: tuple[int, int] | None = None
        if self._state_path.exists():
            state = read_json(self._state_path)
            self._parts = {int(number): PartState(**part) for number, part in state["parts"].items()}
            self._here = tuple(state["here"]) if state["here"] else None
        for number in source.available() & self._parts.keys():
            if source.size(number) != self._parts[number].size:
                raise UserError(
                    f"part {number} has {source.size(number):,} bytes, in an earlier run it had "
                    f"{self._parts[number].size:,}; take an empty output folder"
                )

    def run(self, wanted: Iterable[int], *, delete_parts: bool) -> None:
        """Unpacks the members that begin in the wanted parts.

        Args:
            wanted: Numbers of parts; a member that goes on in the next part is whole only if that one is wanted too.
            delete_parts: Whether to delete each part once everything in it is on disk.
        """
        runs = _without_gaps(frozenset(wanted) & self._source.available())
        with JsonLog(self._members_path) as log:
            self._read_damaged_again(log)
            total = sum(self._source.size(part) for run in runs for part in run if self._needed(part, run))
            with tqdm(total=total, desc="unpacking", unit="B", unit_scale=True, unit_divisor=1024) as bar:
                for run in runs:
                    for part in run:
                        if self._needed(part, run):
                            self._unpack_from(part, run, log, bar, delete_parts)
        if delete_parts:
            for part in (part for run in runs for part in run):
                self._discard(part)

    def summary(self, wanted: Iterable[int]) -> tuple[str, bool]:
        """Says what is on disk of the wanted parts and what is not.

        Returns:
            The text, and whether all is well: nothing refused, damaged or missing. A member that is cut because the
            part before or behind was not asked for is no fault.
        """
        wanted = sorted(wanted)
        with JsonLog(self._members_path) as log:
            members, refused, damage = _account(log.records, frozenset(wanted))
        lines = [f"files: {len(members)} ({sum(size for _, size in members.values()):,} bytes) in {self._output}"]
        cut = []
        for number in wanted:
            part = self._parts.get(number)
            if part and part.head:
                cut.append(f"part {number}: {part.head}; part {number - 1} is needed for it")
            if part and part.tail:
                cut.append(f"part {number}: {part.tail} is cut; part {part.tail_until + 1} is needed for it")
        unread = [number for number in wanted if number not in self._parts or not self._parts[number].done]
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

    def _unpack_from(self, start: int, run: Sequence[int], log: JsonLog, bar: Any, delete_parts: bool) -> None:
        """Unpacks from a part on until a member begins in a part that needs no reading."""
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
                    log.append({"part": part, "damage": f"{item.what} ({item.size:,} bytes)", "offset": item.at[1]})
                    continue
                if part != entered:
                    behind = [number for number in reader.opened if number < part]
                    self._finish(behind)
                    self._clear_heads([*behind, part], start)
                    if part != start and not self._needed(part, run):
                        self._note(None)
                        return
                    self._enter(item.at, log, fresh=fresh or part != start, start=start)
                    entered = part
                    if delete_parts:
                        for number in behind:
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
        if self._here is not None and self._here[0] == part:
            return self._here[1], True, False
        if state.done and state.tail:
            return state.tail_offset, True, False
        if state.first is not None:
            return state.first, True, True
        return 0, part == 1, True

    def _enter(self, at: tuple[int, int], log: JsonLog, *, fresh: bool, start: int) -> None:
        """Notes that the members that begin in a part are now being written."""
        part, offset = at
        state = self._state(part)
        state.done, state.tail = False, ""
        if part != start or state.first is None:
            state.first = offset
        if fresh:
            log.append({"part": part, "begun": True})
        self._note(at)

    def _take(self, reader: PartReader, item: Member | Cut, log: JsonLog) -> None:
        """Writes one member, or notes why not, and leaves the reader behind it."""
        if isinstance(item, Cut):
            self._note_tail(item.what, item.at, reader)
            return
        target = None
        try:
            target = self._target(item)
        except (Refused, FileExistsError, NotADirectoryError) as error:
            log.append({"part": item.at[0], "path": item.name, "refused": str(error)})
        if _copy(reader, item.size, target) < item.size:
            self._note_tail(item.name, item.at, reader)
            return
        skip_padding(reader, item.size)
        if target is not None:
            path = target.relative_to(self._output).as_posix()
            log.append({"part": item.at[0], "path": path, "size": item.size})

    def _target(self, member: Member) -> Path | None:
        """Returns where a member's data goes, its folder made; None for a member that is a folder itself."""
        if member.kind not in {"file", "folder"}:
            raise Refused(f"it is a {member.kind}")
        target = safe_target(self._output, member.name)
        if member.kind == "folder":
            target.mkdir(parents=True, exist_ok=True)
            return None
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir() and not target.is_symlink():
            raise Refused("a folder of this name is there")
        return target

    def _needed(self, part: int, run: Sequence[int]) -> bool:
        """Says whether a part must be read: never done, or its cut last member can now be had whole."""
        state = self._parts.get(part)
        return state is None or not state.done or bool(state.tail and state.tail_until + 1 in run)

    def _read_damaged_again(self, log: JsonLog) -> None:
        """Marks parts as not done whose members are not on disk as they were written."""
        members, _, _ = _account(log.records, frozenset(self._parts))
        for part in {part for path, (part, size) in members.items() if not self._is_there(path, size)}:
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
        """Notes that the parts behind the first one were read on from the part before."""
        for part in parts:
            if part != start:
                self._state(part).head = ""

    def _discard(self, part: int) -> None:
        """Deletes a part, unless a member is cut in it, which a later run may have whole."""
        state = self._state(part)
        if state.done and not state.head and not state.tail:
            self._source.discard(part)

    def _state(self, part: int) -> PartState:
        if part not in self._parts:
            self._parts[part] = PartState(self._source.size(part))
        return self._parts[part]

    def _open(self, part: int) -> BinaryIO:
        self._state(part)
        return self._source.fetch(part).open("rb")

    def _note(self, here: tuple[int, int] | None) -> None:
        """Writes the account; everything before ``here``, where a header stands, is on disk."""
        self._here = here
        parts = {str(number): asdict(self._parts[number]) for number in sorted(self._parts)}
        write_json(self._state_path, {"here": here, "parts": parts})


def safe_target(output: Path, name: str) -> Path:
    """Returns where a member of this name goes.

    Raises:
        Refused: The name is absolute, leads out of the output folder, or is none that a file can have.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or PureWindowsPath(name).drive or "\\" in name:
        raise Refused("its name is absolute or not a plain path")
    if ".." in path.parts:
        raise Refused("its name leads out of the output folder")
    if not path.parts or "\0" in name or any(len(os.fsencode(part)) > 255 for part in path.parts):
        raise Refused("its name is none that a file can have")
    if path.parts[0] == _WORK_FOLDER:
        raise Refused("its name is that of the folder for the account")
    target = output / path
    if not target.parent.resolve().is_relative_to(output.resolve()):
        raise Refused("a link in the output folder leads out of it")
    return target


class _CutShort(Exception):
    """A member's data ended before its size."""


def _copy(reader: PartReader, size: int, target: Path | None) -> int:
    """Takes a member's data into a file, or past it if there is no target; returns how many bytes there were."""
    taken = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(_CutShort))
        file = stack.enter_context(replaced_when_complete(target)) if target else None
        while taken < size:
            piece = reader.read(min(_CHUNK, size - taken))
            if not piece:
                raise _CutShort
            if file is not None:
                file.write(piece)
            taken += len(piece)
    return taken


def _account(
    records: Iterable[dict[str, Any]], wanted: frozenset[int]
) -> tuple[dict[str, tuple[int, int]], list[str], list[str]]:
    """Reads the log: part and size of each member that begins in a wanted part, refused members, damaged places."""
    members: dict[str, tuple[int, int]] = {}
    refused: dict[tuple[int, str], str] = {}
    damage: dict[tuple[int, int], str] = {}
    for record in records:
        part = record["part"]
        if "begun" in record:
            refused = {key: text for key, text in refused.items() if key[0] != part}
            damage = {key: text for key, text in damage.items() if key[0] != part}
        elif "refused" in record:
            refused[part, record["path"]] = f"{record['path']!r}: {record['refused']}"
        elif "damage" in record:
            damage[part, record["offset"]] = f"part {part}, byte {record['offset']:,}: {record['damage']}"
        else:
            members[record["path"]] = (part, record["size"])
    return (
        {path: place for path, place in members.items() if place[0] in wanted},
        [text for key, text in sorted(refused.items()) if key[0] in wanted],
        [text for key, text in sorted(damage.items()) if key[0] in wanted],
    )


def _without_gaps(parts: Iterable[int]) -> list[list[int]]:
    """Splits numbers into runs of neighbours."""
    runs: list[list[int]] = []
    for part in sorted(parts):
        if runs and runs[-1][-1] == part - 1:
            runs[-1].append(part)
        else:
            runs.append([part])
    return runs


def parts_of(text: str) -> tuple[int, ...]:
    """Reads ``--parts``: a name of ``PART_SETS``, or numbers and ranges such as ``1,70-72``.

    Raises:
        argparse.ArgumentTypeError: It is neither.
    """
    if text in PART_SETS:
        return PART_SETS[text]
    numbers: set[int] = set()
    for piece in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,3})(?:\s*-\s*(\d{1,3}))?\s*", piece)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last <= PART_COUNT:
            raise argparse.ArgumentTypeError(
                f"{text!r} is neither {', '.join(PART_SETS)} nor numbers from 1 to {PART_COUNT} such as 1,70-72"
            )
        numbers.update(range(first, last + 1))
    return tuple(sorted(numbers))


def build_parser() -> Parser:
    """Returns the options of this script."""
    parser = Parser(
        description="Fetch the published MMFR-Dataset and unpack it. A download that was stopped goes on where it was. "
        "Members that are cut because the part before or behind was not asked for are named and not written."
    )
    parser.add_argument(
        "--parts",
        type=parts_of,
        required=True,
        help="smoke (part 70), eval (70-79: the evaluation sets), train (1-69 and 80-86), all, or numbers: 1,70-72",
    )
    parser.add_argument("--output-folder", type=Path, default=Path("MMFR-Dataset"), help="where the members go")
    parser.add_argument("--from-folder", type=Path, help="take the parts from this folder, and nothing from the hub")
    parser.add_argument("--repo-id", default=REPOSITORY, help="hub id of the data set")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the data set on the hub")
    parser.add_argument(
        "--delete-parts",
        action="store_true",
        default=None,
        help="delete each part once it is unpacked, unless a member is cut in it; by default only downloaded parts",
    )
    parser.add_argument("--keep-parts", dest="delete_parts", action="store_false", default=None, help="keep the parts")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Unpacks the wanted parts; returns 1 if something was refused, damaged or missing."""
    options = build_parser().parse_args(arguments)
    work_folder = options.output_folder / _WORK_FOLDER
    with only_one_at_work(work_folder):
        source: Source
        if options.from_folder:
            source = FolderSource(options.from_folder)
        else:
            source = HubSource(options.repo_id, options.revision, work_folder / "parts")
        delete_parts = options.from_folder is None if options.delete_parts is None else options.delete_parts
        unpacker = Unpacker(source, options.output_folder)
        unpacker.run(options.parts, delete_parts=delete_parts)
        text, well = unpacker.summary(options.parts)
    print(text)
    return 0 if well else 1


if __name__ == "__main__":
    run_script(main)
