"""Any tree or table becomes an evaluation set or a training file that the validator finds sound."""

import errno
import json
import re

import pytest

from llava.errors import DataError, FileError
from llava.systems.fakereasoning.answer import parse_answer
from mmfr_generation import from_folder, validate
from mmfr_generation.from_folder import main
from tests.mmfr_generation.annotation_helpers import noise_image

TREE = ["real/a.jpg", "real/deep/b.jpg", "FAKE/c.png", "other/1_fake/d.webp"]


def verdicts(path):
    return {r["image"]: parse_answer(r["conversations"][1]["value"]).verdict for r in json.loads(path.read_text())}


def names_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("way", ["copy", "hardlink", "symlink"])
def test_a_tree_becomes_an_evaluation_set(way, make_images, tmp_path):
    root = make_images(TREE)
    reasoning = {
        "photos/FAKE/c.png": {"Low Image Quality": "It is soft."},
        "real/a.jpg": {"High Image Quality": "It is sharp."},
    }
    (tmp_path / "r.json").write_text(json.dumps(reasoning))
    arguments = ["--input", str(root), "--to=eval", "--output", str(tmp_path / "sets"), "--set_name", "mine"]
    assert main([*arguments, "--reasoning", str(tmp_path / "r.json"), "--files", way]) == 0
    names = ["0_real/a.jpg", "0_real/deep__b.jpg", "1_fake/c.png", "1_fake/other__d.webp", "mine_reasoning.json"]
    assert names_in(tmp_path / "sets" / "mine") == names
    assert json.loads((tmp_path / "sets" / "mine" / "mine_reasoning.json").read_text()) == {
        "mine/0_real/a.jpg": {"High Image Quality": "It is sharp."},
        "mine/1_fake/c.png": {"Low Image Quality": "It is soft."},
    }
    assert (tmp_path / "sets/mine/0_real/deep__b.jpg").read_bytes() == (root / "real/deep/b.jpg").read_bytes()
    assert (tmp_path / "sets/mine/1_fake/c.png").is_symlink() == (way == "symlink")
    assert validate.main([str(tmp_path / "sets")]) == 0


def test_a_tree_becomes_a_training_file(make_images, tmp_path):
    root = make_images(TREE)
    out = tmp_path / "train.json"
    common = ["--input", str(root), "--to", "train", "--output", str(out)]
    assert main(common) == 0
    assert verdicts(out) == {
        "real/a.jpg": "real",
        "real/deep/b.jpg": "real",
        "FAKE/c.png": "fake",
        "other/1_fake/d.webp": "fake",
    }
    assert validate.main([str(out), "--image-folder", str(root)]) == 0
    reasoning = {
        "photos/FAKE/c.png": {"Low Image Quality": "It is soft."},
        "real/a.jpg": {"Low Image Quality": "wrong class"},
    }
    (tmp_path / "r.json").write_text(json.dumps(reasoning))
    (tmp_path / "c.json").write_text(json.dumps({"FAKE/c.png": "A car."}))
    assert main([*common, "--reasoning", str(tmp_path / "r.json"), "--captions", str(tmp_path / "c.json")]) == 3
    assert verdicts(out) == {"FAKE/c.png": "fake"}
    stages = parse_answer(json.loads(out.read_text())[0]["conversations"][1]["value"]).stages
    assert stages["CAPTION"] == "A car."
    dropped = [json.loads(line) for line in (tmp_path / "train.json.dropped.jsonl").read_text().splitlines()]
    assert [entry["image"] for entry in dropped] == ["other/1_fake/d.webp", "real/a.jpg", "real/deep/b.jpg"]
    assert main([*common, "--reasoning", str(tmp_path / "r.json"), "--form", "verdict"]) == 0
    assert len(verdicts(out)) == 4


def test_a_table(make_images, tmp_path, capsys):
    root = make_images(["x/1.png", "x/2.png", "3.png"])
    (root / "torn.png").write_bytes(b"no")
    table = tmp_path / "t.csv"
    table.write_text(
        "\ufeffLabel, Image ,caption\n"
        '0,x/1.png,"A, b"\nFAKE,x/2.png,\nmaybe,3.png,\n1,lost.png,\n1,../t.csv,\n1,torn.png,\n'
        f"1,{root}/3.png,\n1,x/2.png,\n1,,\n",
        encoding="utf-8",
    )
    out = tmp_path / "o.json"
    common = ["--input", str(table), "--image-folder", str(root), "--to=train", "--output", str(out)]
    assert main([*common, "--form", "verdict"]) == 3
    assert verdicts(out) == {"x/1.png": "real", "x/2.png": "fake", "3.png": "fake"}
    told = capsys.readouterr().err
    assert "left out: 6 images" in told
    for reason in (
        "the label must be real, fake, 0 (real) or 1 (fake), or one of the field's words, not 'maybe'",
        "lost.png: there is no such file",
        "torn.png: no image in a known format",
        "line 6, ../t.csv: it is not a path below",
        "x/2.png: it is listed more than once",
        "no image",
    ):
        assert reason in told
    turned = ["--real-words", "1", "--fake_words", "0"]
    main([*common, "--form", "verdict", *turned])
    assert verdicts(out) == {"x/1.png": "fake", "x/2.png": "fake", "3.png": "real"}


def test_images_of_no_class_are_named(make_images, tmp_path, capsys):
    root = make_images(["real/a.png", "b.png", "fake/real/c.png"])
    assert main(["--input", str(root), "--to", "train", "--output", str(tmp_path / "o.json")]) == 3
    assert list(verdicts(tmp_path / "o.json")) == ["real/a.png"]
    told = capsys.readouterr().err
    assert "left out: 2 images" in told
    assert "b.png" in told and "fake/real/c.png" in told


def test_an_existing_set_and_equal_names_are_refused(make_images, tmp_path, run_script):
    make_images(["real/a.png", "fake/b.png"])
    common = ["--input", "photos", "--to", "eval", "--output", "sets"]
    assert run_script("from_folder", *common, cwd=tmp_path).returncode == 0
    before = names_in(tmp_path / "sets")
    again = run_script("from_folder", *common, cwd=tmp_path)
    assert again.returncode == 1
    assert "is there already" in again.stderr
    assert names_in(tmp_path / "sets") == before
    (tmp_path / "photos/x/real").mkdir(parents=True)
    noise_image(9).save(tmp_path / "photos/x/real/a.png")
    noise_image(8).save(tmp_path / "photos/real/x__a.png")
    clash = run_script("from_folder", *common, "--set-name", "n", cwd=tmp_path)
    assert clash.returncode == 1
    assert "would both be named 0_real/x__a.png" in clash.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--input", "lost.csv"], "there is no file or folder lost.csv"),
        (["--input", "columns.csv"], "needs the column image"),
        (["--input", "bytes.csv"], "is not text in UTF-8 or UTF-16"),
        (["--input", "empty"], "gives no usable image"),
        (["--input", "columns.csv", "--real-words", "fake"], "cannot mean both"),
    ],
)
def test_wrong_use_is_explained(arguments, told, tmp_path, run_script):
    (tmp_path / "empty").mkdir()
    (tmp_path / "columns.csv").write_text("a,b\n1,2\n")
    (tmp_path / "bytes.csv").write_bytes(b"image,label\n\xff,1\n")
    done = run_script("from_folder", *arguments, "--to", "train", "--output", "o.json", cwd=tmp_path)
    assert done.returncode == 1
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_reasoning_names_that_fit_no_image_are_said(make_images, tmp_path, capsys):
    root = make_images(["real/a.png", "fake/b.png"])
    common = ["--input", str(root), "--to", "train", "--output", str(tmp_path / "o.json"), "--form", "verdict"]
    for names, option in ((["x/real/a.png", "fake/b.jpg"], "--reasoning"), (["a.png"], "--captions")):
        entries = {
            name: {"Low Image Quality": "It is soft."} if option == "--reasoning" else "A car." for name in names
        }
        (tmp_path / "e.json").write_text(json.dumps(entries))
        with pytest.raises(DataError, match=f"none of the {len(names)} names in {option} fits an image, such as"):
            main([*common, option, str(tmp_path / "e.json")])
    (tmp_path / "e.json").write_text(json.dumps({"photos/real/a.png": "A car.", "lost.png": "A cat."}))
    assert main([*common, "--captions", str(tmp_path / "e.json")]) == 0
    assert "note: 1 of 2 names in --captions fit no image\n  lost.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("picture_id,label\n1,fake\n", "needs the column image"),
        ("image,score\na.png,1\n", "needs the column label"),
        ("image,label\na.png,maybe\n", "gives no usable image (the first that was left out: "),
    ],
)
def test_a_table_that_cannot_be_used_says_why(table, said, make_images, tmp_path):
    root = make_images(["a.png"])
    (root / "t.csv").write_text(table)
    with pytest.raises(DataError, match=re.escape(said)):
        main(["--input", str(root / "t.csv"), "--to", "train", "--output", str(tmp_path / "o.json")])


def test_a_full_disk_and_a_source_that_cannot_be_read_name_the_right_path(make_images, tmp_path, monkeypatch):
    root = make_images(["real/a.png", "fake/b.png"])
    common = ["--input", str(root), "--to", "eval", "--output", str(tmp_path / "sets")]

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(source))

    monkeypatch.setitem(from_folder.PLACING, "copy", full)
    with pytest.raises(FileError, match=r"sets/photos cannot be written: the disk is full"):
        main(common)

    def gone(source, target):
        source.unlink()
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(source))

    monkeypatch.setitem(from_folder.PLACING, "copy", gone)
    with pytest.raises(FileError, match=r"there is no file or folder .*real/a\.png|.*fake/b\.png"):
        main(common)
