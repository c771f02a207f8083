"""Joining data sets: every image is found from the joined file, and the share is of each set."""

import json

import pytest

from llava.demo import join
from llava.demo.tower_data import RECORDS_FILE


@pytest.fixture
def sets(tmp_path):
    for name, count in (("rendered", 40), ("photographs/small", 20)):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "a").mkdir()
        records = [{"id": f"{name}{i}", "image": f"a/{i}.png", "conversations": []} for i in range(count)]
        for record in records:
            (folder / record["image"]).touch()
        (folder / RECORDS_FILE).write_text(json.dumps(records))
    return [tmp_path / "rendered", tmp_path / "photographs" / "small"]


def joined(file):
    return json.loads(file.read_text())


def test_all_records_and_their_images_are_there(sets, tmp_path, capsys):
    out = tmp_path / "rendered.json"
    assert join.main([*map(str, sets), "--out", str(out)]) == 0
    records = joined(out)
    assert len({record["id"] for record in records}) == 60 and "60 records" in capsys.readouterr().out
    assert all((out.parent / record["image"]).is_file() for record in records)
    assert {record["image"].split("/")[0] for record in records[:20]} == {"rendered", "photographs"}


def test_a_share_is_taken_of_each_set_and_a_seed_repeats_it(sets, tmp_path):
    first, again, other = (tmp_path / f"{name}.json" for name in ("first", "again", "other"))
    for out, seed in ((first, 1), (again, 1), (other, 2)):
        join.join(sets, out, 0.25, seed)
    assert joined(first) == joined(again) != joined(other)
    assert sorted(record["id"][:8] for record in joined(first)) == ["photogra"] * 5 + ["rendered"] * 10


def test_the_rest_is_what_was_not_taken(sets, tmp_path):
    first, rest, whole = (tmp_path / f"{name}.json" for name in ("first", "rest", "whole"))
    assert join.main([*map(str, sets), "--out", str(first), "--share", "0.25", "--rest", str(rest)]) == 0
    join.join(sets, whole, 1.0, 0)
    ids = [[record["id"] for record in joined(file)] for file in (first, rest, whole)]
    assert len(ids[0]) == 15 and len(ids[1]) == 45 and sorted(ids[0] + ids[1]) == sorted(ids[2])
    assert all((tmp_path / record["image"]).is_file() for record in joined(rest))


@pytest.mark.parametrize("content", ['{"a": 1}', "[", "[1]"])
def test_what_is_no_list_of_records_is_named(tmp_path, capsys, content):
    (tmp_path / RECORDS_FILE).write_text(content)
    assert join.main([str(tmp_path), "--out", str(tmp_path / "out.json")]) == 1
    assert str(tmp_path / RECORDS_FILE) in capsys.readouterr().err


def test_a_share_of_nothing_is_refused(sets, tmp_path, capsys):
    assert join.main([*map(str, sets), "--out", str(tmp_path / "out.json"), "--share", "0"]) == 1
    assert "--share must be above 0" in capsys.readouterr().err
