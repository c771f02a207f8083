"""Very many images: lists that are gone through, files that are known again, and batches out of turn."""

import itertools
import json
import os
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from forgery_eval import inference
from forgery_eval.store import AnswersFile, Prediction, Run, RunStore, Shards, read_run
from llava import ForgeryReport
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
    for hashed in (False, True):
        path = tmp_path / f"answers-{hashed}.jsonl"
        with closing(AnswersFile(path, {}, hash_images=hashed)) as answers:
            answers.write([(str(file), ForgeryReport("real", 0.25, "verdict")) for file in (image, other)])
        before = path.read_bytes()
        # A new time alone makes it another file only where contents are not asked for.
        os.utime(image, ns=(1, 10**18 + hashed))
        with closing(AnswersFile(path, {}, hash_images=hashed)) as answers:
            assert set(answers.done) == ({str(image), str(other)} if hashed else {str(other)})
        assert (path.read_bytes() == before) == hashed
        image.write_bytes(b"other")
        with closing(AnswersFile(path, {}, hash_images=hashed)) as answers:
            assert set(answers.done) == {str(other)}
            answers.write([(str(image), ForgeryReport("real", 0.25, "verdict"))])
        assert [json.loads(line)["image"] for line in path.read_text().splitlines()] == [str(other), str(image)]
        image.write_bytes(b"one")


def batch(number: int) -> list[Prediction]:
    return [Prediction(name, 0) for name in IDS[2 * number : 2 * number + 2]]


def test_batches_out_of_turn_are_merged_in_order(tmp_path):
    with closing(RunStore(tmp_path, RUN, IDS)) as store, closing(Shards(store, len(IDS))) as shards:
        assert shards.missing == [0, 1, 2]
        shards.write(1, 2, store.records(batch(2)))
        shards.write(0, 0, store.records(batch(0)))
    # Killed here: what was finished is known again, whoever had it, and a torn line is done again.
    with (tmp_path / f"{RUN.key}.shards" / "worker-0.jsonl").open("a") as torn:
        torn.write('{"batch": 1, "predic')
    with closing(RunStore(tmp_path, RUN, IDS)) as store, closing(Shards(store, len(IDS))) as shards:
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
    with closing(RunStore(tmp_path, RUN, IDS)) as store, closing(Shards(store, len(IDS))) as shards:
        for number in (2, 1, 0):
            shards.write(0, number, store.records(batch(number)))
        # The first batch and half of the second are in the run's file, and the shards are still there.
        store.append([asdict(prediction) for prediction in [*batch(0), *batch(1)[:1]]])
    with closing(RunStore(tmp_path, RUN, IDS)) as store, closing(Shards(store, len(IDS))) as shards:
        assert (shards.missing, store.done, shards.count) == ([], 2, 3)
        shards.merge()
    assert list(read_run(store.path)[1]) == IDS


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
