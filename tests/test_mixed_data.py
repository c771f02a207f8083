"""Training data of several systems: each read in its own words, rewritten, labels checked, folders told apart."""

import json
import shutil
from pathlib import Path

import pytest

from llava.__main__ import main as forgery
from llava.data.records import read_records
from llava.data.rewriting import rewrite_records
from llava.errors import DataError
from llava.systems import registry

CLUE = Path(__file__).parent / "data" / "goldens_fakevlm" / "fakeclue"
VLM, REASONING = (registry.answer_format(name) for name in ("fakevlm", "fakereasoning"))
TAGGED = (
    "<SUMMARY> I tell whether it is real or fake, by 'this image is real' or 'this image is fake'. </SUMMARY>\n\n"
    "<CAPTION> A real delight of a house. </CAPTION>\n\n<REASONING> The windows do not line up. </REASONING>\n\n"
    "<CONCLUSION> This image is fake. </CONCLUSION>"
)
CLUES = "This is a real image. The grain is even."


def write(folder: Path, *records: dict, name: str = "train.json") -> Path:
    (folder / name).write_text(json.dumps(records))
    return folder / name


def record(answer: str, image: str | None = "a.png", **more) -> dict:
    mark = "<image>" if image else ""
    turns = [{"from": "human", "value": f"{mark}Is it?"}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **({"image": image} if image else {}), **more}


def test_an_answer_is_read_in_its_own_words(tmp_path):
    tagged, clues = read_records([write(tmp_path, record(TAGGED), record(CLUES))])
    assert tagged.verdict(VLM).verdict == tagged.verdict(REASONING).verdict == "fake"
    assert clues.verdict(VLM).verdict == "real"
    # It has no CONCLUSION, at which FakeReasoning's score could be trained; rewritten it has.
    assert clues.verdict(REASONING).verdict is None
    assert registry.words_of(clues.answers, REASONING) is VLM


def test_answers_are_rewritten_both_ways(tmp_path):
    records = read_records([write(tmp_path, record(TAGGED), record(CLUES), record("Where?"))])
    tagged, clues, neither = rewrite_records(records, VLM)
    assert tagged.answers == ["This is a fake image. The windows do not line up."]
    assert tagged.turns[0]["value"] == "<image>\nDoes the image looks real/fake?"
    assert clues is records[1] and neither is records[2]
    tagged, clues, _ = rewrite_records(records, REASONING)
    assert tagged is records[0]
    assert clues.answers[0].startswith("<REASONING> The grain is even. </REASONING>")
    assert clues.answers[0].endswith("<CONCLUSION> This image is real. </CONCLUSION>")


def test_further_turns_stay(tmp_path):
    given = record(CLUES)
    given["conversations"] += [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "At the left."}]
    (rewritten,) = rewrite_records(read_records([write(tmp_path, given)]), REASONING)
    assert [turn["value"] for turn in rewritten.turns[2:]] == ["Where?", "At the left."]


def test_an_answer_that_cannot_be_rewritten_is_named(tmp_path):
    records = read_records([write(tmp_path, record("This is a real image. It has a <CAPTION> tag."))])
    with pytest.raises(DataError, match=r"train.json, row 1: its answer cannot be rewritten"):
        rewrite_records(records, REASONING)


def test_the_command_converts_and_keeps_what_else_a_record_has(tmp_path, capsys):
    files = [
        write(tmp_path, record(TAGGED, system_prompt="Look. "), record(CLUES, None)),
        CLUE / "data_json/train.json",
    ]
    out = tmp_path / "all.json"
    assert forgery(["data", "convert", *map(str, files), "--to", "fakevlm", "--out", str(out)]) == 0
    assert "5 records, 1 of them rewritten" in capsys.readouterr().out
    again = read_records([out])
    assert again[0].system_prompt == "Look. " and again[1].image is None
    assert [one.verdict(VLM).verdict for one in again] == ["fake", "real", "fake", "real", "fake"]


def test_a_label_against_the_answer_is_refused(tmp_path, capsys):
    file = write(tmp_path, record(CLUES, label=0, cate="doc"))
    assert forgery(["data", "convert", str(file), "--to", "fakevlm", "--out", str(tmp_path / "o.json")]) == 1
    assert "row 1: its answer says real, but its label fake" in capsys.readouterr().err
    assert not (tmp_path / "o.json").exists()
    with pytest.raises(DataError, match=r"label must be 1 \(real\) or 0 \(fake\), not 'fake'"):
        read_records([write(tmp_path, record(CLUES, label="fake", cate="doc"))])
    assert read_records([write(tmp_path, record(CLUES, label="anything"))])[0].label is None


def test_the_command_overwrites_none_of_its_files(tmp_path, capsys):
    file = write(tmp_path, record(CLUES))
    assert forgery(["data", "convert", str(file), "--to", "fakevlm", "--out", str(file)]) == 1
    assert "is one of the files that are read" in capsys.readouterr().err


def test_fakeclue_is_validated(tmp_path, capsys):
    shutil.copytree(CLUE, tmp_path / "clue")
    file, images = tmp_path / "clue/data_json/train.json", tmp_path / "clue/train"
    assert forgery(["data", "validate", str(file), "--image-folder", str(images)]) == 0
    rows = json.loads(file.read_text())
    rows[1]["label"] = 0
    file.write_text(json.dumps(rows))
    assert forgery(["data", "validate", str(file), "--image-folder", str(images)]) == 1
    assert "its answer says real, its label fake" in capsys.readouterr().out
