"""Very many images: lists that are gone through, files that are known again, and batches out of turn."""

import argparse
import itertools
import json
import os
import tracemalloc
from collections import deque
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from forgery_eval import inference
from forgery_eval.fingerprints import file_identity
from forgery_eval.names import NameTable
from forgery_eval.store import AnswersFile, Prediction, Run, RunStore, Shards, read_run
from llava import ForgeryReport
from llava.errors import DataError
from llava.images import list_images, walk_images
from llava.tables import read_sources, stream_sources

RUN = Run({"weights": "a"}, {}, batch_size=2)
IDS = ["a", "b", "c", "d", "e"]


def test_a_list_is_read_as_it_is_gone_through(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("one.png\r\n\ntwo words.png\nhttps://a.example/x.png\n\n", encoding="utf-8-sig")
    assert read_sources(names) == [tmp_path / "one.png", tmp_path / "two words.png", "https://a.example/x.png"]
    names.write_bytes("grün.png\n".encode("utf-16"))
    assert read_sources(names) == [tmp_path / "grün.png"]
    with names.open("w") as stream:
        stream.writelines(f"{number}.png\n" for number in range(200_000))
        stream.flush()
        first = list(itertools.islice(stream_sources(names), 3))
    assert first == [tmp_path / f"{number}.png" for number in range(3)]


def test_a_folder_is_walked_in_order_of_path(tmp_path):
    for name in ("b/2.png", "b.png", "a/z/1.png", "a/1.png", "b-1.png", "B/1.png", "a.b/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list(walk_images(tmp_path)) == sorted(tmp_path.rglob("*.png"))
    assert next(list_images(tmp_path)) == tmp_path / "B/1.png"


def test_a_changed_image_is_analysed_again(tmp_path):
    image, other = tmp_path / "a.png", tmp_path / "b.png"
    image.write_bytes(b"one")
    other.write_bytes(b"two")
    report = ForgeryReport("real", 0.25, "verdict")
    for hashed in (False, True):
        path = tmp_path / f"answers-{hashed}.jsonl"

        def write(answers, *files):
            told = [{"identity": file_identity(str(file), contents=hashed)} for file in files]  # noqa: B023
            answers.write([(str(file), report) for file in files], told)

        with closing(AnswersFile(path, {})) as answers:
            write(answers, image, other)
        before = path.read_bytes()
        # A new time alone makes it another file only where contents are not asked for.
        os.utime(image, ns=(1, 10**18 + hashed))
        with closing(AnswersFile(path, {})) as answers:
            assert done(answers, image, other) == ([image, other] if hashed else [other])
        assert (path.read_bytes() == before) == hashed
        image.write_bytes(b"other")
        with closing(AnswersFile(path, {})) as answers:
            assert done(answers, image, other) == [other]
            write(answers, image)
        assert [json.loads(line)["image"] for line in path.read_text().splitlines()] == [str(other), str(image)]
        # What is not there now, for example since a disk is away, keeps its answer.
        image.rename(tmp_path / "away")
        with closing(AnswersFile(path, {})) as answers:
            assert done(answers, image, other) == [image, other]
        image.write_bytes(b"one")


def done(answers: AnswersFile, *files: Path) -> list[Path]:
    assert len(answers.done) == sum(1 for _ in answers.lines())
    return [file for file in files if answers.done.get(str(file)) is not None]


def batch(number: int) -> list[Prediction]:
    return [Prediction(name, 0) for name in IDS[2 * number : 2 * number + 2]]


def test_batches_out_of_turn_are_merged_in_order(tmp_path):
    with closing(RunStore(tmp_path, RUN, IDS)) as store, closing(Shards(store)) as shards:
        assert shards.missing == [0, 1, 2]
        shards.write(1, 2, store.records(batch(2)))
        shards.write(0, 0, store.records(batch(0)))
    # Killed here: what was finished is known again, whoever had it, and a torn line is done again.
    folder = tmp_path / f"{RUN.key}.shards"
    with (folder / "worker-0.jsonl").open("a") as torn:
        torn.write('{"batch": 1, "predic')
    with closing(RunStore(tmp_path, RUN, IDS)) as store, closing(Shards(store)) as shards:
        assert (shards.missing, shards.count, store.done) == ([1], 3, 0)
        shards.write(0, 1, store.records(batch(1)))
        shards.merge()
    assert list(read_run(store.path)[1]) == IDS
    whole = store.path.read_bytes()
    assert not shards.folder.exists()
    with closing(RunStore(tmp_path / "straight", RUN, IDS)) as straight:
        for number in range(3):
            straight.write(batch(number))
    assert straight.path.read_bytes() == whole


def test_a_kill_while_merging_repeats_nothing(tmp_path):
    with closing(RunStore(tmp_path, RUN, IDS)) as store, closing(Shards(store)) as shards:
        for number in (2, 1, 0):
            shards.write(0, number, store.records(batch(number)))
        # The first batch and half of the second are in the run's file, and the shards are still there.
        store.append([asdict(prediction) for prediction in [*batch(0), *batch(1)[:1]]])
    with closing(RunStore(tmp_path, RUN, IDS)) as store, closing(Shards(store)) as shards:
        assert (shards.missing, store.done, shards.count) == ([], 2, 3)
        shards.merge()
    assert list(read_run(store.path)[1]) == IDS


def test_shards_of_other_batches_are_not_taken(tmp_path):
    """The run's file, which says the batch size, was removed, and its shards were not."""
    with closing(RunStore(tmp_path, RUN, IDS)) as store, closing(Shards(store)) as shards:
        shards.write(0, 1, store.records(batch(1)))
    store.path.unlink()
    larger = replace(RUN, batch_size=3)
    with closing(RunStore(tmp_path, larger, IDS)) as store, closing(Shards(store)) as shards:
        assert (shards.missing, shards.count) == ([0, 1], 0)
        shards.merge()
    assert not shards.folder.exists()
    shards.folder.mkdir()
    (shards.folder / "worker-0.jsonl").write_text('{"batch": 0}\n')
    with closing(RunStore(tmp_path, larger, IDS)) as store, pytest.raises(DataError, match="remove the folder"):
        Shards(store)


def test_names_are_kept_out_of_memory():
    with closing(NameTable()) as names:
        assert [names.add(name) for name in ("a", "b", "a", "bild_\udcfc")] == [True, True, False, True]
        names.add("c", "broken")
        names.add("c", "whole")
        assert (len(names), names.get("a"), names.get("c"), names.get("d")) == (4, "", "broken", None)
        assert names.get("bild_\udcfc") == ""


def test_each_image_of_lists_and_folders_is_taken_once(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / name).touch()
    names = tmp_path / "names.txt"
    names.write_text("folder/b.png\nfolder/a.png\nfolder/./b.png\nfolder\\a.png\n")
    for paths, expected in (
        ([names], "ba"),
        ([names, tmp_path / "folder"], "ba"),
        ([tmp_path / "folder", names], "ab"),
    ):
        arguments = argparse.Namespace(img_path=paths, allow_urls=False)
        assert [item.stem for item in inference._all_images(arguments)] == list(expected)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".txt"])
def test_lists_and_tables_are_not_read_whole(tmp_path, suffix):
    names = tmp_path / f"names{suffix}"
    line = {".csv": "{0}.png,{0}\n", ".jsonl": '{{"image": "{0}.png"}}\n', ".txt": "{0}.png\n"}[suffix]
    with names.open("w") as stream:
        stream.write("image,number\n" if suffix == ".csv" else "")
        stream.writelines(line.format(number) for number in range(20_000))
    found = stream_sources(names)
    assert next(found) == tmp_path / "0.png"
    tracemalloc.start()
    last = deque(itertools.islice(found, 2000), maxlen=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert last[0] == tmp_path / "2000.png" and peak < 2e6


def test_a_table_in_another_encoding_says_so(tmp_path):
    table = tmp_path / "table.csv"
    table.write_bytes(b"image,label\n" + b"a.png,real\n" * 9000 + b"gr\xfcn.png,real\n")
    with pytest.raises(DataError, match="save it again as UTF-8"):
        list(stream_sources(table))


def test_the_first_images_are_there_before_a_million_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "_COUNTED", 5)
    names = tmp_path / "names.txt"
    names.write_text("".join(f"{number}.png\n" for number in range(9)))
    gone: list[Path] = []
    seen: dict = {}

    def watched(path):
        for name in stream_sources(path):
            gone.append(name)
            yield name

    def run(self, items, total):
        seen.update(total=total, before=len(gone), items=list(items))
        return 0

    monkeypatch.setattr(inference, "stream_sources", watched)
    monkeypatch.setattr(inference._Inference, "run", run)
    assert inference.run(["--img_path", str(names)]) == 0
    assert (seen["total"], seen["before"], len(seen["items"])) == (None, 5, 9)
