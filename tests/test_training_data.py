"""Training data: what is wrong with them is said before a weight is trained, and never trained in silence."""

import json
import logging
import random
import re
import shutil

import pytest

from llava.cli import run_cli
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.data import image_check
from llava.data.checks import KINDS, check_records
from llava.data.image_check import cache_file, open_images
from llava.data.lengths import default_length, model_positions
from llava.data.records import read_records
from llava.data.show_samples import main as show
from llava.data.summary import Measured, describe_data, find_contradictions
from llava.errors import DataError, OptionError, UserError
from llava.model.builder import load_tokenizer
from llava.screening import find_caption_fault, find_evidence_fault
from llava.systems.fakereasoning.answer import FORMAT, QUESTION, SUMMARY, write_answer
from llava.train.run_data import check_same_data, digest_records, write_run_data
from llava.train.train import main as train
from mmfr_generation.validate import main as validate
from tests.conftest import GOLDENS
from tests.trained import change_config, picture
from tests.training_runs import LORA, options, train_here, write_records

BASE = ["--tokenizer", str(GOLDENS / "base"), "--num_image_tokens", "4"]
FAKE, REAL = (write_answer(label, form="verdict") for label in ("fake", "real"))


def cot(label="fake", caption="A cat on a mat.", sentence="It is soft.", attribute=None):
    attribute = attribute or {"fake": "Low Image Quality", "real": "High Image Quality"}[label]
    stages = {
        "SUMMARY": SUMMARY,
        "CAPTION": caption,
        "REASONING": f"From low-level perspective: {attribute}: {sentence}",
    }
    parts = [f"<{name}> {text} </{name}>" for name, text in stages.items()]
    return "\n\n".join([*parts, write_answer(label, form="verdict")])


def row(image="a.png", answer=FAKE, question=f"<image>\n{QUESTION}"):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": turns} if image else {"conversations": turns}


@pytest.fixture
def folder(tmp_path):
    """A folder of four images, and a way to write a training file beside it."""
    (tmp_path / "images").mkdir()
    for number, name in enumerate(("a", "b", "c", "d")):
        picture(number).save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def written(folder, rows, name="train.json"):
    path = folder / name
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in rows]
    path.write_text("\n".join(lines) if name.endswith("l") else f"[{','.join(lines)}]", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(GOLDENS / "base")


@pytest.fixture
def check(tokenizer):
    def run(path, **changes):
        faults = {}
        records = read_records([path], faults)
        given = {
            "tokenizer": tokenizer,
            "template": conv_templates["v1"],
            "max_length": 2048,
            "placeholder_tokens": {IMAGE_TOKEN_INDEX: 4},
            "answer_format": FORMAT,
            "image_folder": path.parent / "images",
            "drop_invalid": False,
            "faults": faults,
            "opened": path.parent / "cache" / "opened.jsonl",
        }
        return check_records(records, **{**given, **changes})

    return run


# --- images


BAD_IMAGES = {
    "page.png": (b"<!DOCTYPE html><html>not found</html>", "no image in a known format"),
    "empty.png": (b"", "the file is empty"),
    "torn.png": (None, ""),
    "text.jpg": (b"404", "no image in a known format"),
    "half.png": (b"\x89PNG\r\n\x1a\n", ""),
}


def spoil(folder):
    for name, (content, _) in BAD_IMAGES.items():
        whole = (folder / "images" / "d.png").read_bytes()
        (folder / "images" / name).write_bytes(whole[: len(whole) // 2] if content is None else content)


def test_images_that_do_not_open_are_named_with_their_rows(folder, check):
    spoil(folder)
    path = written(folder, [row(), *map(row, BAD_IMAGES), row("b.png", REAL)])
    with pytest.raises(DataError) as caught:
        check(path)
    message = str(caught.value)
    assert "5 of 7 records cannot be trained on (5 images that do not open)" in message
    for number, (name, (_, reason)) in enumerate(BAD_IMAGES.items(), start=2):
        assert f"row {number}: the image does not open: {folder / 'images' / name}: {reason}" in message


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_every_kind_of_fault_is_dropped_and_counted(name, folder, check, caplog):
    spoil(folder)
    rows = [
        row(),
        {"image": "a.png"},
        row("lost.png"),
        row("page.png"),
        row("b.png", "No conclusion."),
        row("b.png", cot(caption="I'm sorry, but I can't help with that.")),
        row("b.png", f"{'long ' * 3000}{REAL}"),
        row("b.png", f"{REAL}</s>"),
        {**row("b.png", REAL), "cate": "deepfake", "label": 0},
        row("b.png", REAL),
        row("c.png", FAKE, "no mark"),
    ]
    path = written(folder, [*rows, "{broken"] if name.endswith("l") else rows, name)
    with caplog.at_level(logging.WARNING):
        kept = check(path, drop_invalid=True)
    assert [record.image for record in kept] == ["a.png", "b.png"]
    counts = {meaning: int(re.search(rf"(\d+) {re.escape(meaning)}", caplog.text)[1]) for meaning in KINDS.values()}
    assert counts.pop(KINDS["layout"]) == (3 if name.endswith("l") else 2)
    assert set(counts.values()) == {1}
    assert f"of {len(rows) + name.endswith('l')} records" in caplog.text


def test_what_opened_is_not_opened_again(folder, monkeypatch):
    opened = []
    load = image_check.load_image
    monkeypatch.setattr(image_check, "load_image", lambda path: opened.append(path.name) or load(path))
    images, kept = folder / "images", folder / "cache" / "opened.jsonl"
    paths = [images / name for name in ("a.png", "b.png", "c.png", "a.png")]
    spoil(folder)
    first = open_images([*paths, images / "page.png"], kept)
    assert sorted(opened) == ["a.png", "b.png", "c.png", "page.png"]
    assert [path.name for path, image in first.items() if image.problem] == ["page.png"]
    opened.clear()
    assert open_images(paths, kept) == {path: first[path] for path in paths}
    shutil.copy(images / "b.png", images / "copy.png")  # known by its bytes
    (images / "c.png").write_bytes((images / "d.png").read_bytes())  # another picture under an old name
    (images / "page.png").write_bytes((images / "a.png").read_bytes())  # mended
    again = open_images([images / "copy.png", images / "c.png", images / "page.png"], kept)
    assert opened == ["c.png"] and not any(image.problem for image in again.values())
    with kept.open("ab") as stream:
        stream.write(b'{"path": "torn')
    opened.clear()
    assert len(open_images([*paths, images / "d.png"], kept)) == 4 and not opened


def test_a_cache_that_cannot_be_written_costs_only_time(folder, capsys, monkeypatch):
    (folder / "file").write_text("")
    monkeypatch.setenv("FORGERY_CACHE", str(folder / "file"))
    found = open_images([folder / "images" / "a.png"], cache_file(folder / "images"))
    assert not found[folder / "images" / "a.png"].problem
    assert "is not kept" in capsys.readouterr().err


def test_training_stops_before_its_first_step_at_an_image_that_does_not_open(trained, folder, capsys):
    spoil(folder)
    path = written(folder, [row(), row("b.png", REAL), row("page.png", REAL)])
    assert train(options(folder / "run", trained, path)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: 1 of 3 records cannot be trained on (1 images that do not open)")
    assert f"{path}, row 3" in error and not (folder / "run").exists()


# --- the summary


def measured_of(check, path, **changes):
    measured = Measured()
    return check(path, measured=measured, **changes), measured


def test_the_summary_says_what_the_data_hold(folder, check):
    path = written(folder, [row(), row("b.png", cot()), row("c.png", cot("real")), row(None, REAL, "Well?")])
    records, measured = measured_of(check, path)
    first, lengths = describe_data(records, FORMAT, measured, max_length=2048, positions=4096)
    assert first == "training data: 4 records, 3 with an image; verdicts: 2 fake, 2 real"
    longest = max(measured.tokens.values())
    assert f"longest {longest} tokens; cut off after 2048: 0 answers (0.0%)" in lengths
    *_, warning = describe_data(records, FORMAT, measured, max_length=longest - 1, positions=longest - 2)
    assert "warning: 2 records are longer than" in warning or "warning: 1 records are longer than" in warning
    assert f"--model_max_length {longest - 2}" in warning
    *_, one_class = describe_data(records[:2], FORMAT, measured, max_length=2048, positions=4096)
    assert one_class == "warning: all verdicts are fake, so a model learns to say fake of every image"


def test_lengths_follow_the_models_positions():
    assert default_length({"max_position_embeddings": 512}) == 512
    assert default_length({"max_position_embeddings": 4096}) == 2048
    assert default_length({"max_position_embeddings": 4096, "tokenizer_model_max_length": 4096}) == 4096
    assert default_length({"max_position_embeddings": 512, "tokenizer_model_max_length": 2048}) == 512
    assert default_length({}) == 2048
    stretched = {"max_position_embeddings": 512, "rope_scaling": {"type": "linear", "factor": 4.0}}
    assert model_positions(stretched) == 2048 == default_length(stretched)
    assert model_positions({**stretched, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}) == 512


def test_training_is_cut_at_the_models_positions_and_shown_so(trained, folder, capsys):
    model = shutil.copytree(trained, folder / "model")
    change_config(model, max_position_embeddings=64, tokenizer_model_max_length=2048)
    path = written(folder, [row(), row("b.png", cot("real"))])
    assert train(options(folder / "run", model, path)) == 1
    said = capsys.readouterr().err
    assert re.search(r"row 2: .*(first 64 tokens|after 64 is cut off)", said)
    assert show([str(path), "--model_name_or_path", str(model)]) == 0
    assert re.search(r"problem: .*(first 64 tokens|after 64 is cut off)", capsys.readouterr().out)


# --- contradictions


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row(), row("a.png", REAL)], ["row 1 and {path}, row 2: a.png is called real and fake"]),
        ([row(), row("same.png", REAL)], ["a.png, the same image as same.png, is called real and fake"]),
        ([row("0_real/a.png"), row("b.png", REAL)], ["0_real/a.png is called fake and lies in a folder of real"]),
        ([row("1_fake/a.png", REAL), row("b.png")], ["1_fake/a.png is called real and lies in a folder of fake"]),
        ([row(), row("a.png"), row("b.png", REAL), row("real/fake/a.png")], []),
    ],
)
def test_contradictions_are_found(rows, said, folder, check):
    images = folder / "images"
    for name in ("same.png", "0_real/a.png", "1_fake/a.png", "real/fake/a.png"):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images / "a.png", images / name)
    path = written(folder, rows)
    records, measured = measured_of(check, path)
    found = find_contradictions(records, FORMAT, measured.digests)
    assert len(found) == len(said)
    assert all(text.format(path=path) in one for text, one in zip(said, found, strict=True))


def test_contradictions_stop_a_training_unless_allowed(trained, folder, capsys, caplog):
    path = written(folder, [row(), row("a.png", REAL), row("b.png", REAL)])
    assert train(options(folder / "run", trained, path)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: 1 contradictions in the training data") and "--allow_contradictions" in error
    with caplog.at_level(logging.INFO):
        train_here(folder / "run", trained, path, **LORA, max_steps=1, allow_contradictions=True)
    assert "warning: 1 contradictions" in caplog.text
    assert "training data: 3 records, 3 with an image; verdicts: 1 fake, 2 real" in caplog.text


# --- texts


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            cot(caption="I'm sorry, but I can't assist with that."),
            "an answer must not be learnt: the annotator refused",
        ),
        (cot(caption="Okay, let me look at it. A cat."), "CAPTION must not be learnt: it thinks aloud"),
        (cot(caption='{"caption": "A cat."}'), "CAPTION must not be learnt: it is JSON"),
        (cot(caption="An AI-generated image of a cat."), "CAPTION must not be learnt: a caption that says"),
        (cot(caption="Cat."), "CAPTION must not be learnt: it is empty or a single word"),
        (cot(sentence="This image is real."), "REASONING, Low Image Quality must not be learnt: it gives the image"),
        (cot(sentence="Soft."), "Low Image Quality must not be learnt: it is empty or a single word"),
        (cot(sentence=""), "Low Image Quality must not be learnt: it is empty"),
        (cot(sentence="<b>It is soft.</b>"), "must not be learnt: it holds a tag"),
        (cot(sentence="It is soft.<|im_end|>"), "special token"),
        (cot(attribute="High Image Quality"), "REASONING names High Image Quality, and the image is fake"),
        (f"<think>Hm.</think>{FAKE}", "an answer must not be learnt: it thinks aloud"),
        (cot(), ""),
        (cot("real", caption="A soft portrait of a house, perhaps a real one."), ""),
        (cot(sentence="It is softer than if this image were real."), ""),
    ],
)
def test_train_show_and_validate_say_the_same_of_a_text(answer, said, folder, check, capsys):
    path = written(folder, [row("b.png", REAL), row("a.png", answer)])
    if said:
        with pytest.raises(DataError, match=re.escape(said)):
            check(path)
    else:
        assert len(check(path)) == 2
    assert show([str(path), *BASE, "-n", "2"]) == 0
    shown = capsys.readouterr().out
    assert (said in shown) if said else ("problem" not in shown)
    status = validate([str(path), "--image-folder", str(folder / "images")])
    told = capsys.readouterr().out
    assert status == bool(said) and ("row 2" in told) == bool(said)
    assert "REASONING names" in said or said in told


@pytest.mark.parametrize("token", ["</s>", "<s>", "<unk>"])
def test_a_tokenizers_mark_in_a_turn_is_refused(token, folder, check):
    path = written(folder, [row(question=f"<image>\nWell {token}?"), row("b.png", f"{REAL} {token} and so on")])
    with pytest.raises(DataError, match=f"2 of 2 records.*row 1: a turn holds {token}, which means something else"):
        check(path)


def test_screening_lets_plain_texts_pass():
    for text in (
        "A sorry-looking dog lies on the floor, and a man can't help it.",
        "Well, a stone well stands in a yard.",
        "Here is where the road ends.",
        "The analysis: numbers on a board <3",
        "The user manual lies open on a desk.",
    ):
        assert find_caption_fault(text) is None, text
        assert find_evidence_fault(text, "real") is None, text
    assert find_evidence_fault("The image is real estate advertising.", "fake") is None
    assert find_evidence_fault("One asks whether this image is real or fake.", "fake") is None


# --- one reading of a file


def test_train_show_and_validate_read_the_same_files(folder, check, capsys, monkeypatch):
    (folder / "up").mkdir()
    shutil.copy(folder / "images" / "d.png", folder / "up" / "e.png")
    rows = [
        row(str(folder / "images" / "a.png")),
        row("../up/e.png", REAL),
        row(None, REAL, "Well?"),
        row("b.png", "?"),
    ]
    data = json.dumps({"data": rows})
    lines = "\n".join(map(json.dumps, rows))
    for name, text in {
        "list.json": json.dumps(rows),
        "lines.jsonl": lines,
        "under.json": data,
        "l.json": lines,
    }.items():
        path = folder / name
        path.write_text(text, encoding="utf-8-sig")
        with pytest.raises(DataError, match=f"1 of 4 records.*{re.escape(name)}, row 4: there is no <CONCLUSION>"):
            check(path)
        assert show([str(path), *BASE, "-n", "4", "--image_folder", str(folder / "images")]) == 0
        shown = capsys.readouterr().out
        assert shown.count("problem:") == 1 and f"{name}, row 4: b.png" in shown and "(not in" not in shown
        assert validate([str(path), "--image-folder", str(folder / "images")]) == 1
        told = capsys.readouterr().out
        assert "entries: 4\nfaults: 1\n" in told and f"{name}, row 4 (b.png): there is no <CONCLUSION>" in told


@pytest.mark.parametrize("text", ["[]", "", " \n", '{"data": []}', "{}"])
def test_an_empty_list_is_a_fault(text, folder, capsys):
    (folder / "train.json").write_text(text)
    command = [str(folder / "train.json"), "--image-folder", str(folder)]
    status = run_cli(lambda: validate(command))
    said = capsys.readouterr()
    assert status == 1 or text == "{}"
    assert "is empty" in said.err or "entries: 0" in said.out or "conversations" in said.err


# --- a run that has begun


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[1].update(row("b.png", cot("real"))), "1 changed (FILE, row 2)"),
        (lambda rows: rows.pop(1), "1 gone (FILE, row 3)"),
        (lambda rows: rows.insert(0, row("d.png", REAL)), "1 new (FILE, row 4)"),
        (lambda rows: rows.reverse(), "only their order"),
    ],
)
def test_a_resumed_run_says_which_records_changed(change, said, folder):
    rows = [row(), row("b.png", REAL), row("c.png")]
    before = read_records([written(folder, rows)])
    write_run_data(folder, before)
    run = {"data": digest_records(before)}
    check_same_data(folder, before, run, accept=False)
    change(rows)
    now = read_records([written(folder, rows)])
    with pytest.raises(OptionError) as caught:
        check_same_data(folder, now, run, accept=False)
    message = str(caught.value)
    assert "--accept_changed_data" in message
    assert said.split(" ")[1] in message if "row" in said else said in message
    check_same_data(folder, now, run, accept=True)
    (folder / "data.json").write_text("[")
    with pytest.raises(OptionError, match=r"data\.json, which would say in what, is missing or damaged"):
        check_same_data(folder, now, run, accept=False)


def test_a_bad_record_can_be_replaced_in_a_run_that_has_begun(trained, tmp_path, capsys, caplog):
    path = write_records(tmp_path, count=8)
    run = {**LORA, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "resume": "auto"}
    train_here(tmp_path / "run", trained, path, **run)
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    rows = json.loads(path.read_text())
    rows[2]["conversations"][1]["value"] = cot("real")
    path.write_text(json.dumps(rows))
    assert train(options(tmp_path / "run", trained, path, **run)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"1 changed ({path}, row 3)" in error and "--accept_changed_data" in error
    with caplog.at_level(logging.INFO):
        train_here(tmp_path / "run", trained, path, **run, accept_changed_data=True)
    assert "the run goes on with the records of now" in caplog.text and "resuming from" in caplog.text
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"] == digest_records(read_records([path]))


def test_a_validation_share_needs_the_same_number_of_records(trained, tmp_path, capsys):
    path = write_records(tmp_path, count=8)
    share = {"validation_share": 0.25, "eval_strategy": "steps", "eval_steps": 2, "validation_verdict": "score"}
    run = {**LORA, **share, "max_steps": 2, "save_strategy": "steps", "save_steps": 2, "resume": "auto"}
    train_here(tmp_path / "run", trained, path, **run)
    path.write_text(json.dumps(json.loads(path.read_text())[:-1]))
    assert train(options(tmp_path / "run", trained, path, **run, accept_changed_data=True)) == 1
    assert "--validation_share would choose other records" in capsys.readouterr().err


# --- five hundred damaged files


def damaged(text: str, choice: random.Random) -> bytes:
    """A training file with pieces cut, doubled, moved or replaced, or in another encoding."""
    noise = ["{", "}", "[", "]", '"', ",", "\\", "\0", "é", "<image>", "</s>", "null", "\n", "<CONCLUSION>", "9" * 400]
    for _ in range(choice.randint(1, 4)):
        at = choice.randrange(len(text))
        kind = choice.randrange(4)
        if kind == 0:
            text = text[:at] + text[at + choice.randint(1, 40) :]
        elif kind == 1:
            text = text[:at] + choice.choice(noise) + text[at:]
        elif kind == 2:
            text = text[:at] + text[at : at + 60] + text[at:]
        else:
            text = text.replace(*choice.choice([("gpt", "human"), ("real", "fake"), ("image", "img"), (".png", "")]), 1)
    return text.encode(choice.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"]), "replace")


def test_five_hundred_damaged_files_are_right_or_one_sentence(folder, check, capsys):
    rows = [row(), row("b.png", cot("real")), row("c.png", cot()), row(None, REAL, "Well?"), row("d.png", REAL)]
    sound = [json.dumps(rows), "\n".join(map(json.dumps, rows)), json.dumps({"data": rows}, indent=1)]
    choice = random.Random(23)
    outcomes = {"right": 0, "said": 0}
    for number in range(500):
        path = folder / f"train{number % 3}.{'jsonl' if number % 3 == 1 else 'json'}"
        path.write_bytes(damaged(sound[number % 3], choice))
        drops = bool(number % 2)
        try:
            kept = check(path, drop_invalid=drops)
            # What is kept is sound, and nothing is left out in silence.
            assert all(record.verdict(FORMAT).verdict and not record.problem(FORMAT) for record in kept)
            outcomes["right"] += 1
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 5000
            outcomes["said"] += 1
        if number % 5 == 0:
            assert run_cli(lambda: validate([str(path), "--image-folder", str(folder / "images")])) in (0, 1)  # noqa: B023
            assert "Traceback" not in capsys.readouterr().err
    assert min(outcomes.values()) > 50, outcomes
