"""Training files: what is read, and what is refused with file and row."""

import json
import subprocess
import sys

import pytest

from llava.data.records import Record, read_records
from llava.errors import DataError
from llava.systems.fakereasoning.answer import FORMAT, write_answer
from tests.conftest import GOLDENS

REAL, FAKE = (write_answer(label, form="verdict") for label in ("real", "fake"))


def row(**changes):
    turns = [{"from": "human", "value": "<image>\nWell?"}, {"from": "gpt", "value": FAKE}]
    record = {"id": "7", "image": "a.png", "conversations": turns, **changes}
    return {key: value for key, value in record.items() if value is not ...}


def turns(*values, speakers=("human", "gpt")):
    return [{"from": speakers[index % 2], "value": value} for index, value in enumerate(values)]


def written(tmp_path, text, name="train.json"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def refused(tmp_path, text):
    path = written(tmp_path, text)
    with pytest.raises(DataError) as caught:
        read_records([path])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_the_reference_rows_are_read():
    records = read_records([GOLDENS / "train_mixed.json"])
    assert [record.image for record in records] == [
        "img0.png",
        "img1.png",
        "img2.png",
        None,
        None,
        "img2.png",
        "img2.png",
    ]
    assert [record.forgery_label(FORMAT) for record in records] == [1, 0, 1, 0, 0, 0, -100]
    assert records[3].turns[0] == {"from": "human", "value": "Is this naïve 图 sentence real or fake?"}
    assert records[6].verdict(FORMAT).problem == "there is no <CONCLUSION>"
    assert records[0].origin == f"{GOLDENS / 'train_mixed.json'}, row 1"


@pytest.mark.parametrize("layout", ["list", "lines", "lines with gaps", "pretty list", "byte order mark"])
def test_lists_and_lines_give_the_same(tmp_path, layout):
    rows = [row(), row(image="b.png"), row(image=..., conversations=turns("So?", REAL))]
    lines = "\n".join(map(json.dumps, rows))
    text = {
        "list": json.dumps(rows),
        "lines": lines,
        "lines with gaps": f"\n{lines}\n\n".replace("}\n{", "}\r\n\r\n{"),
        "pretty list": f"\n {json.dumps(rows, indent=2)}\n",
        "byte order mark": f"\ufeff{json.dumps(rows)}",
    }[layout]
    path = written(tmp_path, text)
    records = read_records([path])
    assert [record.image for record in records] == ["a.png", "b.png", None]
    assert [record.origin for record in records] == [f"{path}, row {number}" for number in (1, 2, 3)]


def test_several_files_follow_each_other(tmp_path):
    one, two = written(tmp_path, json.dumps([row()]), "1.json"), written(tmp_path, json.dumps(row()), "2.jsonl")
    assert [record.origin for record in read_records([one, two])] == [f"{one}, row 1", f"{two}, row 1"]
    assert read_records([]) == []


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ("[1]", "must be an object"),
        (row(conversations=...), "no conversations"),
        (row(conversations=[]), "no conversations"),
        (row(conversations={"from": "human"}), "no conversations"),
        (row(conversations=["hello", "you"]), "turn 1: a turn must be an object"),
        (row(conversations=turns("<image>\nWell?", FAKE, speakers=("user", "gpt"))), "turn 1: unknown speaker 'user'"),
        (row(conversations=[{"value": "<image> x"}, {"from": "gpt", "value": FAKE}]), "unknown speaker None"),
        (row(conversations=turns(FAKE, "<image>", speakers=("gpt", "human"))), "turn 1: human and gpt must take turns"),
        (row(conversations=turns("<image>", "again", speakers=("human", "human"))), "turn 2: human and gpt must take"),
        (row(conversations=turns("<image>")), "without an answer"),
        (row(conversations=turns("<image>", FAKE, "And?")), "without an answer"),
        (row(conversations=turns("<image>", None)), "turn 2: the value must be a text"),
        (row(conversations=turns("<image>", "  \n")), "turn 2: the value must be a text"),
        (row(conversations=turns(["<image>"], FAKE)), "turn 1: the value must be a text"),
        (row(conversations=turns("<image> \ud83d", FAKE)), "surrogate"),
        (row(image="\ud83d.png"), "the image has half a surrogate"),
        (row(image=3), "not 3"),
        (row(image=["a.png", "b.png"]), "one file's path"),
        (row(image=""), "one file's path"),
        (row(image=...), "names no image"),
        (row(image=None), "names no image"),
        (row(conversations=turns("Well?", FAKE)), "stands 0 times"),
        (row(conversations=turns("<image><image>", FAKE)), "stands 2 times"),
        (row(conversations=turns("<image>", FAKE, "<image>", FAKE)), "stands 2 times"),
        (row(conversations=turns("Well?", f"<image> {FAKE}")), "an answer holds <image>"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, second, said):
    message = refused(tmp_path, json.dumps([row(), second]))
    assert "row 2" in message and said in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("[]", "is empty"),
        ("[ ]\n", "is empty"),
        ("hello", "row 1: this is not JSON"),
        ('"hello"', "row 1: a record must be an object"),
        ("{'image': 1}", "row 1: this is not JSON"),
        ('{"a.png": {"Low Image Quality": null}}', "row 1: there are no conversations"),
        (f"{json.dumps(row())}\n{{", "row 2: this is not JSON"),
        (f"[{json.dumps(row())},\n {{", "row 2: this is not JSON: Expecting property name"),
        (f"[{json.dumps(row())}", "breaks off after row 1"),
        (f"[{json.dumps(row())},", "breaks off in row 2"),
        ("[", "breaks off"),
        (f"[{json.dumps(row())} {json.dumps(row())}]", "breaks off after row 1"),
        (f"[{json.dumps(row())}]\n[{json.dumps(row())}]", "after the end of the list"),
        (f"[{json.dumps(row())},]", "row 2: this is not JSON"),
        ("[" * 100_000, "row 1"),
        (f'[{{"image": {"9" * 5000}}}]', "row 1"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, said):
    assert said in refused(tmp_path, text)


def test_a_json_error_names_the_line(tmp_path):
    assert "line 3, column" in refused(tmp_path, f"[\n{json.dumps(row())},\n{{bad}}]")


def test_repeated_keys_would_lose_a_value(tmp_path):
    text = json.dumps([row(), row()])
    again = text[:-2] + ', "image": "b.png"}]'
    assert "row 2: the key 'image' stands twice" in refused(tmp_path, again)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="no data file"):
        read_records([tmp_path / "absent.json"])
    with pytest.raises(DataError, match="cannot be read"):
        read_records([tmp_path])
    (tmp_path / "picture.json").write_bytes(b"[\xff\xd8]")
    with pytest.raises(DataError, match="not text in UTF-8 or UTF-16"):
        read_records([tmp_path / "picture.json"])


ANSWER = FAKE.replace('"', '""')


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.json", json.dumps({"data": [row(image=..., file="été.png")], "version": 1}, ensure_ascii=False)),
        ("t.jsonl", json.dumps(row(image=..., img_path="été.png"), ensure_ascii=False) + "\r\n"),
        ("t.csv", f'sep=;\r\nPath;Question;Answer\r\nété.png;Well?;"{ANSWER}"\r\n'),
        ("t.csv", f'"file name","prompt","response","label"\n"été.png","<image>\nWell?","{ANSWER}","fake"\n'),
        ("t.TSV", f'img\thuman\tgpt\r\nété.png\tWell?\t"{ANSWER}"\r\n'),
    ],
)
def test_training_lists_are_read_as_every_table(tmp_path, encoding, name, text):
    (tmp_path / name).write_bytes(text.encode(encoding))
    (record,) = read_records([tmp_path / name])
    assert (record.image, record.turns) == ("été.png", read_records([written(tmp_path, json.dumps(row()))])[0].turns)
    assert record.forgery_label(FORMAT) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image,label\na.png,fake\n", "line 2 needs the columns question and answer .*from-folder --to train"),
        ("image,query,prompt,answer\na,b,c,d\n", "query, prompt could each be the column question"),
        ("image,question,answer\n,<image> Well?,x\n", "line 2: a question shows <image>, but the record names no"),
        ("image,question,answer\na.png,Well?,\n", "line 2, turn 2: the value must be a text"),
        ("image,question,answer\na.png,Well?\n", "line 2, turn 2: the value must be a text"),
        ("image,question,answer\na.png,Well?,x,y\n", "line 2: there are more values than columns"),
        ("image,question,answer\n", "is empty"),
        ("file,path,question,answer\na,b,c,d\n", "file, path could each be the column image"),
    ],
)
def test_a_table_that_is_no_training_list_is_explained(tmp_path, text, said):
    with pytest.raises(DataError, match=said):
        read_records([written(tmp_path, text, "t.csv")])


def test_a_text_record_may_have_any_other_key(tmp_path):
    path = written(tmp_path, json.dumps(row(image=..., file="notes.pdf", conversations=turns("So?", REAL))))
    assert read_records([path])[0].image is None


def concluding(*answers):
    pieces = [text for answer in answers for text in ("Well?", answer)]
    return Record(None, tuple(turns(*pieces)), "x")


@pytest.mark.parametrize(
    ("answers", "label"),
    [
        ((FAKE,), 1),
        ((REAL,), 0),
        (("It shows a car.", FAKE), 1),
        ((REAL, "The texture is natural."), 0),
        ((FAKE, FAKE), 1),
        ((FAKE, REAL), -100),
        (("This image is fake.",), -100),
        ((f"{FAKE} {REAL}",), -100),
        ((FAKE, FAKE.replace("fake", "perhaps fake")), -100),
    ],
)
def test_the_label_is_what_the_conclusions_say(answers, label):
    record = concluding(*answers)
    assert record.forgery_label(FORMAT) == label
    assert bool(record.verdict(FORMAT).problem) == (label == -100)


def test_reading_records_needs_no_torch():
    code = "import sys, llava.data.records; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
