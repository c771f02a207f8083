"""What a sample looks like to people."""

import json
import re
import shutil

import pytest

from llava.cli import run_cli
from llava.conversation import conv_templates
from llava.data.prompting import fill_template, tokenize_conversation
from llava.data.records import read_records
from llava.data.show_samples import build_parser, run, spans
from llava.model.builder import load_tokenizer
from tests.conftest import GOLDENS

FILE = str(GOLDENS / "train_mixed.json")
BASE = ["--tokenizer", str(GOLDENS / "base"), "--num_image_tokens", "25"]
ANSI = re.compile(r"\033\[\d+m")


@pytest.fixture
def shown(capsys):
    def show(*arguments, file=FILE):
        run(build_parser().parse_args([str(file), *BASE, *arguments]))
        return capsys.readouterr().out

    return show


def test_supervised_text_is_marked(shown):
    text = shown("-n", "3")
    answers = [record.turns[1]["value"] for record in read_records([GOLDENS / "train_mixed.json"])[:3]]
    assert re.findall(r"\[\[(.*?)\]\]", text, flags=re.DOTALL) == [f" {answer}</s>" for answer in answers]
    assert text.count("<image: 25 tokens>\nIs this image real or fake?") == 3
    assert "row 1: img0.png, verdict fake, 212 tokens, 115 of them supervised" in text
    assert "3 of 7 records shown; verdicts of all: 2 fake, 1 no verdict, 4 real" in text
    assert not ANSI.search(text)


def test_masked_text_is_grey(shown):
    text = shown("-n", "1", "--color", "always")
    answer = read_records([GOLDENS / "train_mixed.json"])[0].turns[1]["value"]
    assert f"ASSISTANT:\033[0m {answer}</s>\n" in text
    assert "\033[2m<s> A chat" in text and "[[" not in text
    assert ANSI.sub("", text) == re.sub(r"\[\[|\]\]", "", shown("-n", "1", "--color", "never"))


def test_both_answers_of_two_turns_are_marked(shown):
    text = shown("-n", "7")
    assert "[[ <CONCLUSION> This image is real. </CONCLUSION></s>]]USER: Please look closely. ASSISTANT:[[ The " in text
    assert "row 4: no image, verdict real" in text and "naïve 图 sentence" in text


def test_what_is_wrong_is_said(shown, tmp_path):
    assert "problem: there is no <CONCLUSION>" in shown("-n", "7")
    cut = shown("-n", "1", "--max-length", "180", "--image_folder", str(tmp_path))
    assert "cut off after 180 tokens: 32 more" in cut and "problem: its verdict is token 205" in cut
    assert f"img0.png (not in {tmp_path})" in cut
    assert "not in" not in shown("-n", "1", "--image_folder", str(GOLDENS / "images"))


def test_a_name_that_no_disk_takes_is_missing(shown, tmp_path):
    record = json.loads((GOLDENS / "train.json").read_text("utf-8"))[0] | {"image": f"{'x' * 5000}.png"}
    (tmp_path / "train.json").write_text(json.dumps([record]), encoding="utf-8")
    assert f".png (not in {tmp_path})" in shown("--image_folder", str(tmp_path), file=tmp_path / "train.json")


def test_the_number_of_samples(shown, capsys):
    assert shown("-n", "0").startswith("0 of 7 records shown")
    assert "7 of 7 records shown" in shown("-n", "99")
    assert shown().count("[[") == 3
    for wrong in ("-1", "two", "1.5"):
        with pytest.raises(SystemExit):
            build_parser().parse_args([FILE, *BASE, f"-n={wrong}"])
        assert "number of samples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([FILE + "x", *BASE], "there is no data file"),
        ([str(GOLDENS / "dino.pth"), *BASE], "not text in UTF-8"),
        ([FILE, "--tokenizer", str(GOLDENS / "clip")], "has no tokenizer"),
        ([FILE, "--model-name-or-path", "/absent"], "there is no folder /absent"),
    ],
)
def test_wrong_paths_are_explained(arguments, said, capsys):
    assert run_cli(lambda: run(build_parser().parse_args(arguments))) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_model_says_its_length(capsys):
    arguments = [FILE, "--model_name_or_path", str(GOLDENS / "base"), "--version", "llava_v1"]
    run(build_parser().parse_args(arguments))
    text = capsys.readouterr().out
    assert "curious human" in text and "cut off" not in text


def test_a_model_says_how_many_positions_an_image_takes(trained, tmp_path, capsys):
    config = json.loads((trained / "config.json").read_text())
    grid = config["vision_tower_config"]["image_size"] // config["vision_tower_config"]["patch_size"]
    arguments = [FILE, "-n", "1", "--model_name_or_path", str(trained)]
    run(build_parser().parse_args(arguments))
    assert f"<image: {grid**2} tokens>" in capsys.readouterr().out
    run(build_parser().parse_args([*arguments, "--num_image_tokens", "7"]))
    assert "<image: 7 tokens>" in capsys.readouterr().out
    del config["vision_tower_config"]
    shutil.copytree(trained, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    run(build_parser().parse_args([*arguments[:-1], str(tmp_path / "model")]))
    assert "<image: 576 tokens>" in capsys.readouterr().out
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({"vision_tower_config": {"type": "clip"}, "vocab_size": "x"})
    )
    assert run_cli(lambda: run(build_parser().parse_args([*arguments[:-1], str(tmp_path / "model")]))) == 1
    assert "config.json is wrong: " in capsys.readouterr().err


def test_the_spans_spell_the_whole_prompt():
    tokenizer = load_tokenizer(GOLDENS / "base")
    for record in read_records([GOLDENS / "train_mixed.json"]):
        conversation = fill_template(record.turns, conv_templates["v1"])
        found = list(spans(tokenize_conversation(conversation, tokenizer), tokenizer))
        spelled = "".join("<image>" if kind == "image" else text for kind, text in found)
        assert spelled == f"<s> {conversation.get_prompt()}"


@pytest.mark.parametrize(("value", "coloured"), [("1", False), ("", True)])
def test_no_color_is_respected_on_a_terminal(shown, monkeypatch, value, coloured):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", value)
    assert bool(ANSI.search(shown("-n", "1"))) is coloured
    assert ANSI.search(shown("-n", "1", "--color", "always"))
