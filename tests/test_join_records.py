"""Joining data sets: every image is found from the joined file, and parts are of each set."""

import json
import re

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


def test_parts_have_their_share_of_each_set_and_nothing_in_common(sets, tmp_path):
    files = {name: tmp_path / f"{name}.json" for name in ("all", "half", "fifth")}
    parts = ["--part", f"{files['half']}=0.5", "--part", f"{files['fifth']}=0.2"]
    assert join.main([*map(str, sets), "--out", str(files["all"]), *parts]) == 0
    ids = {name: [record["id"] for record in joined(file)] for name, file in files.items()}
    assert sorted(i[:8] for i in ids["half"]) == ["photogra"] * 10 + ["rendered"] * 20
    assert sorted(i[:8] for i in ids["fifth"]) == ["photogra"] * 4 + ["rendered"] * 8
    assert len(set(ids["all"])) == 60 and len(set(ids["half"] + ids["fifth"])) == 42
    assert all((tmp_path / record["image"]).is_file() for record in joined(files["fifth"]))


def test_parts_have_no_photograph_in_common_across_sets(sets, tmp_path):
    for folder in sets:
        records = json.loads((folder / RECORDS_FILE).read_text())
        lines = [{"image": r["image"], "photograph": f"{k % 10}.jpg"} for k, r in enumerate(records[:20])]
        # Photographs that only evaluation shows are not dealt, or they would take the place of others.
        lines += [{"image": f"evaluation/{k}.png", "photograph": f"held_{k}.jpg"} for k in range(30)]
        (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    parts = {tmp_path / "half.json": 0.5, tmp_path / "rest.json": 0.5}
    assert join.join(sets, tmp_path / "all.json", 3, parts) == 60
    found = [joined(file) for file in parts]
    assert sorted(record["id"] for part in found for record in part) == sorted(
        record["id"] for record in joined(tmp_path / "all.json")
    )
    numbers = [{int(re.sub(r"\D", "", record["id"])) for record in part} for part in found]
    photographs = [{number % 10 for number in part if number < 20} for part in numbers]
    assert len(photographs[0]) == len(photographs[1]) == 5 and not photographs[0] & photographs[1]
    # Of the first set, twenty images are of no photograph; they are dealt one by one.
    assert [sum(r["id"].startswith("rendered") for r in part) for part in found] == [20, 20]


def test_parts_that_are_a_whole_leave_nothing_out(sets, tmp_path):
    shares = {tmp_path / f"{number}.json": share for number, share in enumerate((0.33, 0.33, 0.34))}
    assert join.join(sets, tmp_path / "all.json", 0, shares) == 60
    assert len({record["id"] for file in shares for record in joined(file)}) == 60


def test_a_seed_repeats_parts_and_order(sets, tmp_path):
    def records(seed):
        part = tmp_path / f"part{seed}.json"
        join.join(sets, tmp_path / "all.json", seed, {part: 0.25})
        return joined(tmp_path / "all.json"), joined(part)

    first = records(1)
    assert first == records(1)
    assert all(one != other for one, other in zip(first, records(2), strict=True))


@pytest.mark.parametrize("content", ['{"a": 1}', "[", "[1]"])
def test_what_is_no_list_of_records_is_named(tmp_path, capsys, content):
    (tmp_path / RECORDS_FILE).write_text(content)
    assert join.main([str(tmp_path), "--out", str(tmp_path / "out.json")]) == 1
    assert str(tmp_path / RECORDS_FILE) in capsys.readouterr().err


@pytest.mark.parametrize("part", ["p.json=0", "p.json=1.5", "p.json", "=0.5"])
def test_a_part_that_is_no_share_of_a_file_is_refused(tmp_path, capsys, part):
    with pytest.raises(SystemExit):
        join.main(["sets", "--out", str(tmp_path / "out.json"), "--part", part])
    assert f"'{part}' is not of the form FILE=SHARE, with a share above 0 and up to 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["p.json=0.7", "q.json=0.7"], "1.4 of the records together"),
        (["p.json=0.5", "p.json=0.2"], "a file of its own"),
    ],
)
def test_parts_that_cannot_be_together_are_refused(sets, tmp_path, capsys, parts, message):
    options = [text for part in parts for text in ("--part", f"{tmp_path}/{part}")]
    assert join.main([*map(str, sets), "--out", str(tmp_path / "out.json"), *options]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out.json").exists()
