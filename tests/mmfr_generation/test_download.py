"""A tar in pieces comes out whole, whatever the pieces, and nothing leaves the folder."""

import errno
import hashlib
import io
import json
import random
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from llava.errors import UserError
from mmfr_generation.download import PART_SETS, main, parts_of
from mmfr_generation.published import sources
from mmfr_generation.published.tar_stream import Cut, PartReader, read_members, skip_padding
from mmfr_generation.published.unpacker import RefusedMember, safe_target
from tests.mmfr_generation.annotation_helpers import REPOSITORY, script_environment


def contents(count=40, seed=1, largest=3000):
    """Members of all sizes, some with long or unusual names."""
    chance = random.Random(seed)
    names = {f"dataset/diffusiondb/part-000001/{number:04d}.png": None for number in range(count)}
    names["dataset/" + "long/" * 30 + "x.png"] = None
    names["dataset/évaluation sets/ünïcode 😀.png"] = None
    names["dataset/empty.png"] = b""
    names["dataset/block.png"] = b"b" * 512
    names["dataset/says ustar.bin"] = (b"ustar  \0" * 200) + b"\0" * 300 + b"ustar\x0000"
    keys = list(names)
    chance.shuffle(keys)
    return {key: names[key] if names[key] is not None else chance.randbytes(chance.randint(1, largest)) for key in keys}


def tar_of(files, layout=tarfile.GNU_FORMAT, more=()):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=layout) as archive:
        folder = tarfile.TarInfo("dataset/")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for member, data in more:
            archive.addfile(member, io.BytesIO(data) if data is not None else None)
    return buffer.getvalue()


def split(data, sizes, folder, first=1):
    folder.mkdir(parents=True, exist_ok=True)
    at = 0
    for number, size in enumerate(sizes, start=first):
        (folder / f"dataset.part{number}.tar").write_bytes(data[at : at + size])
        at += size
    assert at >= len(data)
    return folder


def odd_sizes(data, count, seed=0):
    chance = random.Random(seed)
    marks = sorted(chance.sample(range(1, len(data)), count - 1))
    return [end - begin for begin, end in zip([0, *marks], [*marks, len(data)], strict=True)]


def unpacked(folder):
    """Everything that was written, but for the account."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith(".mmfr_download"):
            found[name] = path.read_bytes()
    return found


def run(parts, source, output, *more):
    return main(["--parts", parts, "--from-folder", str(source), "--output-folder", str(output), *more])


@pytest.mark.parametrize("layout", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("count", [1, 2, 7, 50, 86])
def test_all_parts_give_every_member(layout, count, tmp_path):
    files = contents()
    data = tar_of(files, layout)
    split(data, odd_sizes(data, count, seed=count), tmp_path / "parts")
    assert run(f"1-{count}", tmp_path / "parts", tmp_path / "out") == 0
    assert unpacked(tmp_path / "out") == files
    assert len(list((tmp_path / "parts").iterdir())) == count


@pytest.mark.parametrize("layout", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_any_cut_gives_whole_members_only(layout, tmp_path, capsys):
    """Reads from every byte of a small archive on, and up to every byte: no member is torn or misnamed."""
    files = contents(count=3, largest=700)
    if layout == tarfile.USTAR_FORMAT:
        files = {name.replace("long/", "l/"): data for name, data in files.items() if name.isascii()}
    data = tar_of(files, layout)
    order = list(files)
    for begin in range(1, len(data), 37):
        end = len(data) - (begin * 7919) % (len(data) - begin)
        reader = PartReader([5], lambda part, begin=begin, end=end: io.BytesIO(data[begin:end]))
        found, skipped = {}, 0
        for item in read_members(reader, at_header=False):
            if isinstance(item, Cut):
                skipped += item.size
                continue
            content = reader.read(item.size)
            skip_padding(reader, item.size)
            if item.kind == "file" and len(content) == item.size:
                found[item.name] = content
        assert found.items() <= files.items()
        positions = [order.index(name) for name in found]
        assert positions == list(range(positions[0], positions[0] + len(positions))) if positions else True
        # Only what is cut may be missing: one member at each end, and a long-named one behind the first.
        whole = sum(
            1
            for name in files
            if _span(data, files, layout)[name][0] >= begin and _span(data, files, layout)[name][1] <= end
        )
        assert len(found) >= whole - 1


_SPANS = {}


def _span(data, files, layout):
    """First and last byte of each member, its long name included."""
    if layout not in _SPANS:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            members = archive.getmembers()
        _SPANS[layout] = {m.name: (m.offset, m.offset_data + m.size) for m in members}
    return _SPANS[layout]


def test_a_range_names_what_is_cut(tmp_path, capsys):
    files = contents(count=60)
    data = tar_of(files)
    split(data, odd_sizes(data, 9, seed=3), tmp_path / "parts")
    assert run("3-6", tmp_path / "parts", tmp_path / "out") == 0
    told = capsys.readouterr().out
    assert unpacked(tmp_path / "out").items() < files.items()
    assert "cut members, not written: 2" in told
    assert "part 2 is needed for it" in told
    assert "part 7 is needed for it" in told
    sizes = odd_sizes(data, 9, seed=3)
    begin, end = sum(sizes[:2]), sum(sizes[:6])
    spans = {name: span for name, span in _one_span(data).items() if name in files}
    inside = {name for name, (first, last) in spans.items() if begin <= first and last <= end}
    assert set(unpacked(tmp_path / "out")) == inside
    cut = next(name for name, (first, last) in spans.items() if first < end < last)
    assert f"part 6: {cut} is cut" in told
    # The rest later: what was cut is made whole, and nothing is lost.
    assert run("1-9", tmp_path / "parts", tmp_path / "out") == 0
    assert unpacked(tmp_path / "out") == files
    assert "cut members" not in capsys.readouterr().out


def _one_span(data):
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {m.name: (m.offset, m.offset_data + m.size) for m in archive.getmembers()}


@pytest.mark.parametrize("seed", range(8))
def test_parts_in_any_order_come_to_the_same(seed, tmp_path):
    files = contents(count=15, seed=seed, largest=2500)
    data = tar_of(files)
    count = 12
    split(data, odd_sizes(data, count, seed), tmp_path / "parts")
    chance = random.Random(seed)
    for _ in range(6):
        first = chance.randint(1, count)
        assert run(f"{first}-{chance.randint(first, count)}", tmp_path / "parts", tmp_path / "out") == 0
        assert unpacked(tmp_path / "out").items() <= files.items()
    assert run("1-12", tmp_path / "parts", tmp_path / "out") == 0
    assert unpacked(tmp_path / "out") == files


def evil(name, kind=tarfile.REGTYPE, link="", data=b"evil"):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    member.size = len(data) if kind == tarfile.REGTYPE else 0
    return member, data if kind == tarfile.REGTYPE else None


def test_nothing_leaves_the_folder(tmp_path, capsys):
    files = {"dataset/good.png": b"good"}
    outside = tmp_path / "outside"
    outside.mkdir()
    bad = [
        evil("dataset/a file that is called a folder/"),
        evil("../escape.png"),
        evil("dataset/../../escape.png"),
        evil(f"{tmp_path}/escape.png"),
        evil("dataset/link", tarfile.SYMTYPE, str(outside)),
        evil("dataset/link/escape.png"),
        evil("dataset/hard", tarfile.LNKTYPE, "/etc/passwd"),
        evil("dataset/pipe", tarfile.FIFOTYPE),
        evil("dataset/device", tarfile.CHRTYPE),
        evil("dataset/good.png/below.png"),
        evil("C:\\escape.png"),
        evil("..\\escape.png"),
        evil(".mmfr_download/state.json"),
        evil("dataset/" + "n" * 300),
    ]
    data = tar_of(files, more=bad)
    split(data, [len(data)], tmp_path / "parts")
    out = tmp_path / "deep" / "out"
    (out / "dataset").mkdir(parents=True)
    (out / "dataset" / "there").symlink_to(outside)
    assert run("1", tmp_path / "parts", out) == 3
    told = capsys.readouterr().out
    assert "refused members, not written: 12" in told and "damaged" not in told
    assert unpacked(out) == {"dataset/good.png": b"good", "dataset/link/escape.png": b"evil"}
    assert not list(outside.iterdir())
    assert not list(tmp_path.rglob("escape.png"))[1:]
    with pytest.raises(RefusedMember):
        safe_target(out, "dataset/there/x.png")


def test_damage_is_named_and_stepped_over(tmp_path, capsys):
    files = contents(count=30)
    data = bytearray(tar_of(files))
    spans = _one_span(bytes(data))
    broken = list(files)[12]
    data[spans[broken][0] + 150] ^= 0xFF
    split(bytes(data), odd_sizes(data, 4), tmp_path / "parts")
    assert run("1-4", tmp_path / "parts", tmp_path / "out") == 3
    told = capsys.readouterr().out
    assert "damaged places: 1" in told
    found = unpacked(tmp_path / "out")
    assert files.keys() - found.keys() == {broken}
    assert found.items() <= files.items()


def test_what_went_missing_is_written_again(tmp_path, capsys):
    files = contents(count=30)
    data = tar_of(files)
    split(data, odd_sizes(data, 5), tmp_path / "parts")
    run("1-5", tmp_path / "parts", tmp_path / "out")
    name = list(files)[9]
    (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / list(files)[20]).write_bytes(b"short")
    assert run("1-5", tmp_path / "parts", tmp_path / "out") == 0
    assert unpacked(tmp_path / "out") == files


def test_a_done_part_is_not_read_again(tmp_path):
    files = contents(count=30)
    data = tar_of(files)
    split(data, odd_sizes(data, 5), tmp_path / "parts")
    run("1-5", tmp_path / "parts", tmp_path / "out")
    for path in (tmp_path / "parts").iterdir():
        path.write_bytes(b"\xff" * path.stat().st_size)
    assert run("1-5", tmp_path / "parts", tmp_path / "out") == 0
    assert unpacked(tmp_path / "out") == files


def test_parts_are_deleted_only_when_asked_and_safe(tmp_path, capsys):
    files = contents(count=60)
    data = tar_of(files)
    split(data, odd_sizes(data, 9, seed=3), tmp_path / "parts")
    assert run("3-6", tmp_path / "parts", tmp_path / "out", "--delete-parts") == 0
    left = {path.name for path in (tmp_path / "parts").iterdir()}
    assert left == {f"dataset.part{number}.tar" for number in (1, 2, 3, 6, 7, 8, 9)}
    assert run("1-9", tmp_path / "parts", tmp_path / "out2") == 3
    assert "parts that were not read: 2" in capsys.readouterr().out


def test_a_part_of_another_size_is_refused(tmp_path):
    files = contents()
    data = tar_of(files)
    split(data, odd_sizes(data, 3), tmp_path / "parts")
    run("1-2", tmp_path / "parts", tmp_path / "out")
    with (tmp_path / "parts" / "dataset.part2.tar").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="part 2 has"):
        run("1-3", tmp_path / "parts", tmp_path / "out")


def test_a_full_disk_stops_with_a_sentence_and_goes_on_later(tmp_path, monkeypatch, capsys):
    files = contents(count=30)
    data = tar_of(files)
    split(data, odd_sizes(data, 3), tmp_path / "parts")
    command = [sys.executable, "-c", FULL_DISK, "--parts", "1-3", "--from-folder", "parts", "--output-folder", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=script_environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: out/") and "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert 0 < len(unpacked(tmp_path / "out")) < len(files)
    assert run("1-3", tmp_path / "parts", tmp_path / "out") == 0
    assert unpacked(tmp_path / "out") == files


FULL_DISK = f"""
import os, errno, sys
from llava.cli import run_cli
from mmfr_generation import download
count, fsync = 0, os.fsync
def full(descriptor):
    global count
    count += 1
    if count > 40:
        raise OSError({errno.ENOSPC}, os.strerror({errno.ENOSPC}), "out/x")
    fsync(descriptor)
os.fsync = full
sys.exit(run_cli(download.main))
"""


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_anywhere_it_ends_in_the_same(kills, tmp_path, monkeypatch):
    files = contents(count=100 * kills, largest=20_000)
    data = tar_of(files)
    split(data, odd_sizes(data, 7), tmp_path / "parts")
    script = str(REPOSITORY / "mmfr_generation" / "download.py")
    command = [sys.executable, script, "--parts", "2-7", "--from-folder", "parts", "--output-folder", "out"]
    whole = subprocess.run([*command[:-1], "whole"], cwd=tmp_path, env=script_environment(), capture_output=True)
    assert whole.returncode == 0
    chance, died = random.Random(kills), 0
    while died < kills:
        process = subprocess.Popen(command, cwd=tmp_path, env=script_environment(), stderr=subprocess.DEVNULL)
        log = tmp_path / "out" / ".mmfr_download" / "members.jsonl"
        size = log.stat().st_size if log.exists() else 0
        while process.poll() is None and (not log.exists() or log.stat().st_size <= size):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.04))
        process.kill()
        if process.wait() == -9:
            died += 1
        else:
            shutil.rmtree(tmp_path / "out")  # it had ended: begin again until enough runs were killed
    assert subprocess.run(command, cwd=tmp_path, env=script_environment(), stderr=subprocess.DEVNULL).returncode == 0
    again = subprocess.run(command, cwd=tmp_path, env=script_environment(), capture_output=True)
    assert unpacked(tmp_path / "out") == unpacked(tmp_path / "whole")
    assert again.stdout.replace(b" in out", b"") == whole.stdout.replace(b" in whole", b"")


def test_parts_are_what_they_are_said_to_be():
    assert PART_SETS["smoke"] == (70,)
    assert PART_SETS["eval"] == tuple(range(70, 80))
    assert sorted((*PART_SETS["train"], *PART_SETS["eval"])) == list(PART_SETS["all"]) == list(range(1, 87))
    assert parts_of("3, 70-72,1") == (1, 3, 70, 71, 72)


@pytest.mark.parametrize("text", ["", "0", "87", "5-3", "1-", "train,1", "1;2", "²"])
def test_wrong_parts_are_explained(text, tmp_path, run_script):
    done = run_script("download", f"--parts={text}", "--from-folder", ".", cwd=tmp_path)
    assert done.returncode == 2
    assert "such as 1,70-72" in done.stderr


def test_missing_parts_are_named(tmp_path, capsys):
    files = contents()
    data = tar_of(files)
    split(data, odd_sizes(data, 10), tmp_path / "parts", first=70)
    (tmp_path / "parts" / "dataset.part74.tar").unlink()
    assert run("eval", tmp_path / "parts", tmp_path / "out") == 3
    assert "parts that were not read: 1\n  part 74" in capsys.readouterr().out
    assert unpacked(tmp_path / "out").items() < files.items()


class Hub(ThreadingHTTPServer):
    """A local hub with one data set, as far as a download needs it."""

    daemon_threads = True

    def __init__(self, repository, parts):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repository, self.parts = repository, parts
        self.revision = "a" * 40
        self.sent, self.cut_at, self.spoil = [], {}, set()
        self.hold_name, self.hold_at, self.released = "", 0, threading.Event()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.do_GET()

    def do_GET(self):
        hub = self.server
        path = self.path.split("?")[0]
        if path.startswith((f"/api/datasets/{hub.repository}/tree/", f"/api/datasets/{hub.repository}/paths-info/")):
            entries = [{"type": "file", "path": n, "size": len(d), "oid": "b" * 40} for n, d in hub.parts.items()]
            return self.send(200, json.dumps(entries).encode(), {"content-type": "application/json"})
        if path.startswith(f"/api/datasets/{hub.repository}"):
            files = [
                {
                    "rfilename": name,
                    "size": len(data),
                    "lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130},
                }
                for name, data in hub.parts.items()
            ]
            body = {"id": hub.repository, "sha": hub.revision, "siblings": files, "private": False, "tags": []}
            return self.send(200, json.dumps(body).encode(), {"content-type": "application/json"})
        name = path.rsplit("/", 1)[-1]
        if name not in hub.parts or not path.startswith(f"/datasets/{hub.repository}/resolve/"):
            return self.send(404, b"", {"x-error-code": "EntryNotFound"})
        data = hub.parts[name]
        headers = {
            "etag": f'"{hashlib.sha256(data).hexdigest()}"',
            "x-repo-commit": hub.revision,
            "accept-ranges": "bytes",
        }
        first, last = 0, len(data)
        if "range" in self.headers:
            first = int(self.headers["range"].removeprefix("bytes=").removesuffix("-"))
            headers["content-range"] = f"bytes {first}-{last - 1}/{len(data)}"
        if self.command == "GET":
            hub.sent.append((name, first))
        if name in hub.spoil:
            data = data[:-1] + b"?"
        status = 206 if "range" in self.headers else 200
        hold = hub.hold_at if name == hub.hold_name else None
        return self.send(status, data[first:last], headers, hub.cut_at.pop((name, first), None), hold)

    def send(self, status, body, headers, cut=None, hold=None):
        self.send_response(status)
        for key, value in {"content-length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            if hold is not None:
                self.wfile.write(body[:hold])
                self.server.released.wait(60)
                return
            self.wfile.write(body[:cut])
            if cut is not None:
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()


@pytest.fixture
def hub(tmp_path):
    files = contents(count=60)
    before = len(tar_of(files).rstrip(b"\0"))
    files["dataset/large.bin"] = random.Random(2).randbytes(40_000_000)
    data = tar_of(files)
    sizes = odd_sizes(data[:before], 9, seed=3)
    folder = split(data, [*sizes, len(data) - before], tmp_path / "source", first=70)
    parts = {path.name: path.read_bytes() for path in folder.iterdir()}
    with Hub("AnnaGao/MMFR-Dataset", parts) as running:
        running.files = files
        running.environment = script_environment(
            HF_ENDPOINT=f"http://127.0.0.1:{running.server_port}", HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "hf")
        )
        yield running


@pytest.fixture
def fetch(hub, tmp_path, run_script):
    def run(*arguments):
        return run_script("download", *arguments, "--output_folder=out", cwd=tmp_path, **hub.environment)

    return run


def test_from_the_hub_only_what_is_asked_for(hub, fetch, tmp_path):
    done = fetch("--parts", "smoke", "--keep-parts")
    assert done.returncode == 0, done.stderr
    assert {name for name, _ in hub.sent} == {"dataset.part70.tar"}
    kept = tmp_path / "out" / ".mmfr_download" / "parts"
    assert (kept / "dataset.part70.tar").exists()
    done = fetch("--parts", "eval")
    assert done.returncode == 0, done.stderr
    parts = [f"dataset.part{number}.tar" for number in range(70, 80)]
    assert hub.sent == [(name, 0) for name in parts]
    assert unpacked(tmp_path / "out") == hub.files
    assert not list(kept.glob("*.tar"))
    assert fetch("--parts", "eval").returncode == 0
    assert len(hub.sent) == 10


def test_a_broken_download_is_resumed(hub, fetch, tmp_path):
    hub.cut_at = {("dataset.part79.tar", 0): 35 << 20, ("dataset.part72.tar", 0): 5}
    assert fetch("--parts", "eval").returncode == 0
    assert unpacked(tmp_path / "out") == hub.files
    begin, resumed = [first for name, first in hub.sent if name == "dataset.part79.tar"]
    assert begin == 0 and 20 << 20 < resumed <= 35 << 20
    assert not list((tmp_path / "out" / ".mmfr_download").rglob("*.partial"))


def test_a_killed_download_is_resumed(hub, tmp_path):
    hub.hold_name, hub.hold_at = "dataset.part79.tar", 35 << 20
    command = [
        sys.executable,
        str(REPOSITORY / "mmfr_generation" / "download.py"),
        "--parts=eval",
        "--output-folder=out",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, env=hub.environment, stderr=subprocess.DEVNULL)
    partial = tmp_path / "out" / ".mmfr_download" / "parts" / "dataset.part79.tar.partial"
    deadline = time.monotonic() + 60
    while (not partial.exists() or partial.stat().st_size < 20 << 20) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9
    hub.hold_name = ""
    hub.released.set()
    size = partial.stat().st_size
    assert size >= 20 << 20
    done = subprocess.run(command, cwd=tmp_path, env=hub.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert unpacked(tmp_path / "out") == hub.files
    assert len(hub.sent) == 11 and hub.sent[-1] == ("dataset.part79.tar", size)


def test_a_damaged_part_is_not_unpacked(hub, fetch, tmp_path):
    hub.spoil = {"dataset.part71.tar"}
    done = fetch("--parts", "eval")
    assert done.returncode == 1
    assert "part 71 arrived damaged" in done.stderr
    assert "Traceback" not in done.stderr
    hub.spoil = set()
    assert fetch("--parts", "eval").returncode == 0
    assert unpacked(tmp_path / "out") == hub.files


def test_an_unknown_data_set_and_a_lost_hub_are_explained(fetch, tmp_path, run_script):
    done = fetch("--parts", "smoke", "--repo-id", "no/such")
    assert done.returncode == 1
    assert done.stderr.startswith("error: no/such could not be fetched from the hub")
    lost = run_script(
        "download", "--parts", "smoke", cwd=tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0", HF_HOME="hf"
    )
    assert lost.returncode == 1
    assert "could not be fetched from the hub" in lost.stderr
    assert "Traceback" not in done.stderr + lost.stderr


def test_too_little_room_is_said_before_the_download(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    source = sources.HubSource.__new__(sources.HubSource)
    source.paths = {70: tmp_path / "p" / "dataset.part70.tar"}
    source._files = {70: SimpleNamespace(rfilename="dataset.part70.tar", size=1000, lfs=None)}
    with pytest.raises(UserError, match=r"part 70 needs 1,000 more bytes, but only 10 are free"):
        source.fetch(70)
