"""The inference command as its user runs it."""

import csv
import hashlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from forgery_eval import inference
from forgery_eval.fingerprints import model_fingerprint
from forgery_eval.inference import describe, overlay_path, parse_arguments, run, save_overlay
from forgery_eval.pages import overlay
from forgery_eval.pages.overlay import draw_overlay
from forgery_eval.store import AnswersFile
from llava import ForgeryReport
from llava.abstention import AbstentionRule
from llava.cli import SOME_FAILED
from llava.errors import DataError, FileError, ImageReadError
from llava.images import list_images, load_image
from tests.trained import picture

SCRIPT = Path(__file__).parents[2] / "forgery_eval" / "inference.py"


def damaged(file: Path) -> None:
    picture(3, (200, 200)).save(file)
    file.write_bytes(file.read_bytes()[:2000])


def bomb(file: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(file)


def sixteen_bit(file: Path) -> None:
    Image.fromarray(np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)).save(file)


def turned(file: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(4).save(file, exif=exif)


def moving(file: Path) -> None:
    picture(5).save(file, save_all=True, append_images=[picture(6)])


GOOD_FILES = {
    "plain.jpg": lambda file: picture(1).save(file),
    "grey.png": lambda file: picture(1).convert("L").save(file),
    "palette.png": lambda file: picture(1).convert("P").save(file),
    "alpha.png": lambda file: picture(1).convert("RGBA").save(file),
    "cmyk.jpg": lambda file: picture(1).convert("CMYK").save(file),
    "deep.png": sixteen_bit,
    "turned.jpg": turned,
    "moving.gif": moving,
    "moving.webp": moving,
    "one pixel wide.png": lambda file: picture(2, (1, 300)).save(file),
    "wide.png": lambda file: Image.new("RGB", (30_000, 40), "green").save(file),
    "bild_été_图.png": lambda file: picture(7).save(file),
}
BAD_FILES = {
    "empty.png": (lambda file: file.touch(), "empty"),
    "text.jpg": (lambda file: file.write_text("no image"), "no image in a known format"),
    "cut.png": (damaged, "cut.png: "),
    "bomb.png": (bomb, "DecompressionBombError"),
    "folder.png": (lambda file: file.mkdir(), "Is a directory"),
    "float.tif": (lambda file: Image.fromarray(np.full((20, 30), 0.5, np.float32)).save(file), "floating-point"),
}


@pytest.fixture
def few(tmp_path) -> Path:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for index in range(3):
        picture(index, (60, 20)).save(folder / f"{index}.png")
    picture(9).save(folder / "sub" / "3.JPG", format="JPEG")
    (folder / "notes.md").write_text("no image")
    return folder


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def arguments(trained: Path, images: Path, *more: object) -> list[str]:
    return ["--model-path", str(trained), "--img_path", str(images), "--device", "cpu", *map(str, more)]


def test_a_folder_is_analysed_and_printed(trained, few, capsys):
    assert run(arguments(trained, few)) == 0
    printed = capsys.readouterr().out
    blocks = printed.strip().split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == [str(file) for file in list_images(few)]
    for block in blocks:
        assert "verdict" in block and "P(fake)" in block and "own answer" in block
        assert all(f"  {stage}" in block for stage in ("caption", "reasoning", "conclusion"))
        assert "  summary" not in block  # the same of every image
    assert run(arguments(trained, few, "-v")) == 0
    assert capsys.readouterr().out.count("  summary") == 4


def test_every_kind_of_image_is_analysed_and_every_bad_one_named(trained, tmp_path, capsys):
    for name, write in GOOD_FILES.items():
        write(tmp_path / name)
    for name, (write, _) in BAD_FILES.items():
        write(tmp_path / name)
    names = [*GOOD_FILES, *BAD_FILES, "absent.png"]
    (tmp_path / "list.txt").write_text("\n".join(names) + "\n\n", encoding="utf-8")
    out = tmp_path / "out.jsonl"
    status = run(arguments(trained, tmp_path / "list.txt", "--json", out, "--score-only", "--batch-size", 4))
    assert status == SOME_FAILED
    answers = {Path(entry["image"]).name: entry for entry in lines(out)}
    assert list(answers) == names
    for name in GOOD_FILES:
        assert answers[name]["error"] == "" and 0 <= answers[name]["fake_probability"] <= 1, answers[name]
    errors = capsys.readouterr().err
    for name, (_, reason) in BAD_FILES.items():
        assert reason in answers[name]["error"] and name in answers[name]["error"]
        assert answers[name]["error"] in errors
    assert f"{len(BAD_FILES) + 1} images could not be analysed" in errors


def test_a_file_without_permission_is_named(tmp_path, monkeypatch):
    picture(0).save(tmp_path / "secret.png")

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(ImageReadError, match=r"secret\.png: Permission denied"):
        load_image(tmp_path / "secret.png")


def assert_equal_answers(found: list[dict], wanted: list[dict]) -> None:
    assert [entry["image"] for entry in found] == [entry["image"] for entry in wanted]
    assert [entry["text"] for entry in found] == [entry["text"] for entry in wanted]
    gaps = [abs(a["fake_probability"] - b["fake_probability"]) for a, b in zip(found, wanted, strict=True)]
    assert max(gaps) < 1e-4


@pytest.mark.parametrize("sampled", [[], ["--temperature", "1.2"]], ids=["greedy", "sampled"])
def test_answers_are_resumed_and_nothing_is_done_twice(trained, few, tmp_path, sampled):
    out = tmp_path / "out.jsonl"
    assert run(arguments(trained, few, "--json", out, *sampled)) == 0
    wanted, complete = lines(out), out.read_text()
    first, second, *_ = complete.splitlines(keepends=True)
    out.write_text(first + second[:40])
    assert run(arguments(trained, few, "--json", out, *sampled)) == 0
    assert_equal_answers(lines(out), wanted)
    assert run(arguments(trained, few, "--json", out, *sampled)) == 0
    assert out.read_text().count("\n") == complete.count("\n")


def test_how_fast_answers_come_is_no_other_run(trained, few, tmp_path):
    out = tmp_path / "out.jsonl"
    assert run(arguments(trained, few, "--json", out)) == 0
    wanted, complete = lines(out), out.read_text()
    out.write_text(complete.splitlines(keepends=True)[0])
    assert run(arguments(trained, few, "--json", out, "--decode", "static", "--prompt-lookup", "4")) == 0
    assert_equal_answers(lines(out), wanted)


def test_answers_of_another_run_are_not_mixed(trained, few, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert run(arguments(trained, few, "--json", out, "--score-only")) == 0
    before = out.read_text()
    assert run(arguments(trained, few, "--json", out)) == 1
    assert "another model or other settings" in capsys.readouterr().err
    assert out.read_text() == before
    out.write_text("hello\n")
    assert run(arguments(trained, few, "--json", out)) == 1
    assert "no line of such a file" in capsys.readouterr().err


def test_each_line_says_what_was_computed_in(few, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.jsonl"
    words = ["--img_path", str(few / "0.png"), "--device", "cpu", "--score-only", "--json", str(out)]
    monkeypatch.setattr("llava.model.builder.multiplies_bfloat16", lambda: False)
    assert run(words) == 0
    assert [(line["dtype"], line["dtype_is_automatic"]) for line in lines(out)] == [("float32", True)]
    before = out.read_text()
    monkeypatch.setattr("llava.model.builder.multiplies_bfloat16", lambda: True)
    assert run([*words, "--img_path", str(few / "1.png")]) == 1
    assert "answers computed in float32, and these would be in bfloat16" in capsys.readouterr().err
    assert out.read_text() == before
    assert run([*words[:-1], str(tmp_path / "own.jsonl"), "--dtype", "bfloat16"]) == 0
    line = lines(tmp_path / "own.jsonl")[0]
    assert (line["dtype"], line["dtype_is_automatic"]) == ("bfloat16", False)


def test_a_model_without_a_dtype_leaves_it_out(tmp_path):
    with closing(AnswersFile(tmp_path / "a.jsonl", {})) as file:
        file.set_dtype(None, is_automatic=True)
        file.write([("a", ForgeryReport("real", 0.1, "verdict"))])
    assert "dtype" not in lines(tmp_path / "a.jsonl")[0]


def test_a_replaced_weight_file_makes_another_run(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"one")
    first = model_fingerprint([str(tmp_path)])
    assert model_fingerprint([str(tmp_path)]) == first
    (tmp_path / "model.safetensors").write_bytes(b"two")
    os.utime(tmp_path / "model.safetensors", (1, 1))
    assert model_fingerprint([str(tmp_path)]) != first
    assert model_fingerprint(["owner/name"]) == ["owner/name"]


def test_a_torn_line_is_removed_before_the_next_is_written(tmp_path):
    file = AnswersFile(tmp_path / "a.jsonl", {"x": 1})
    file.write([("a", ForgeryReport("real", 0.1, "verdict"))])
    file.close()
    with (tmp_path / "a.jsonl").open("a") as stream:
        stream.write('{"image": "b", "lab')
    again = AnswersFile(tmp_path / "a.jsonl", {"x": 1})
    assert (again.done.get("a"), len(again.done)) == ("", 1)
    again.write([("b", ForgeryReport("fake", 0.9, "verdict"))])
    again.close()
    assert [entry["image"] for entry in lines(tmp_path / "a.jsonl")] == ["a", "b"]


@pytest.mark.parametrize("text", ["notes without an end of line", '{"accuracy": 0.9}'])
def test_a_file_of_ones_own_is_never_cut(tmp_path, text):
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(DataError, match=r"mine\.json, line 1: this is no line of "):
        AnswersFile(tmp_path / "mine.json", {})
    assert (tmp_path / "mine.json").read_text() == text


def test_no_two_runs_write_one_file(tmp_path):
    file = AnswersFile(tmp_path / "a.jsonl", {"x": 1})
    with pytest.raises(FileError, match=r"another process is writing .*a\.jsonl"):
        AnswersFile(tmp_path / "a.jsonl", {"x": 1})
    file.close()
    AnswersFile(tmp_path / "a.jsonl", {"x": 1}).close()


def test_a_full_disk_is_one_clear_line():
    answers = AnswersFile(Path("/dev/full"), {})
    with pytest.raises(FileError, match="the disk is full; make room"):
        answers.write([("a", ForgeryReport("real", 0.1, "verdict"))])
    with pytest.raises(OSError, match="No space left"):
        answers.close()


def test_what_is_no_file_gets_no_masks():
    answers = AnswersFile(Path("/dev/null"), {})
    answers.write([("a", ForgeryReport("fake", 0.9, "detector", mask=np.ones((2, 2))))])
    answers.close()
    assert not Path("/dev/masks").exists()


def test_earlier_failures_still_count(trained, few, tmp_path, capsys):
    (few / "bad.png").write_text("no image")
    given = arguments(trained, few, "--json", tmp_path / "out.jsonl", "--score-only")
    for _ in range(2):
        assert run(given) == SOME_FAILED
        errors = capsys.readouterr().err
        assert "bad.png: no image in a known format" in errors and "1 images could not be analysed" in errors
    assert len(lines(tmp_path / "out.jsonl")) == 5


def test_names_of_any_bytes_are_analysed_written_and_resumed(trained, tmp_path, capfd):
    name = os.fsdecode(b"odd \xff\xfe.png")
    picture(1).save(tmp_path / "plain.png")
    (tmp_path / "plain.png").rename(tmp_path / name)
    (tmp_path / "list.txt").write_bytes(os.fsencode(name) + b"\r\n")
    given = arguments(trained, tmp_path / "list.txt", "--score-only")
    for _ in range(2):
        assert run([*given, "--json", str(tmp_path / "out.jsonl")]) == 0
        assert [entry["image"] for entry in lines(tmp_path / "out.jsonl")] == [str(tmp_path / name)]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([sys.executable, str(SCRIPT), *given], capture_output=True, check=True, env=environment)
    assert rb"odd \udcff\udcfe.png" in done.stdout


def test_nothing_with_an_image_name_is_skipped_in_silence(trained, tmp_path, capsys):
    (tmp_path / "broken.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    picture(0).save(tmp_path / "good.png")
    assert run(arguments(trained, tmp_path, "--score-only")) == SOME_FAILED
    errors = capsys.readouterr().err
    assert "broken.png: there is no such file" in errors and "pipe.png: a pipe or a device" in errors
    assert "2 images could not be analysed" in errors


def test_a_folder_that_may_not_be_read_is_named(trained, few, monkeypatch, capsys):
    listing = os.scandir

    def scandir(path):
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert list(list_images(few))[-1] == few / "sub"
    assert run(arguments(trained, few, "--score-only")) == SOME_FAILED
    assert f"cannot analyse {few / 'sub'}: Is a directory" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_run_resumes_and_ends_the_same(trained, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(60):
        picture(index, (50, 40)).save(folder / f"{index:03}.png")
    command = [sys.executable, str(SCRIPT), *arguments(trained, folder, "--batch-size", "4", "--json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    once = {"check": True, "env": environment, "cwd": "/", "capture_output": True}
    subprocess.run([*command, str(tmp_path / "unbroken.jsonl")], **once)
    answers = tmp_path / "killed.jsonl"
    waits = itertools.cycle((0.0, 0.3, 0.0, 0.8, 0.2))
    kills = 0
    while kills < 4:
        process = subprocess.Popen(
            [*command, str(answers)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        before = answers.stat().st_size if answers.exists() else 0
        while process.poll() is None and not (answers.exists() and answers.stat().st_size > before):
            time.sleep(0.01)
        time.sleep(next(waits))
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            kills += 1
        else:
            answers.unlink()  # it had ended: start again until four runs were killed
    subprocess.run([*command, str(answers)], check=True, env=environment, cwd="/", capture_output=True)
    assert_equal_answers(lines(answers), lines(tmp_path / "unbroken.jsonl"))


def test_overlays_are_named_after_their_images(trained, few, tmp_path):
    maps = tmp_path / "maps"
    assert run(arguments(trained, few, "--attention-map", maps, "--max_new_tokens", 5)) == 0
    found = sorted(str(file.relative_to(maps)) for file in maps.rglob("*.png"))
    assert found == ["0.png.attention.png", "1.png.attention.png", "2.png.attention.png", "sub/3.JPG.attention.png"]
    assert Image.open(maps / "0.png.attention.png").size == (60, 20)


def test_an_image_that_changes_while_it_is_analysed_stops_nothing(trained, few, tmp_path, monkeypatch, capsys):
    def changing(file, target, attention):
        if file.name == "1.png":
            picture(8, (10, 10)).save(file)
        if file.name == "2.png":
            file.unlink()
        save_overlay(file, target, attention)

    monkeypatch.setattr(inference, "save_overlay", changing)
    given = ["--attention-map", tmp_path / "maps", "--max_new_tokens", 5, "--json", tmp_path / "out.jsonl"]
    assert run(arguments(trained, few, *given)) == SOME_FAILED
    assert len(lines(tmp_path / "out.jsonl")) == 4
    errors = capsys.readouterr().err
    assert "1.png, which changed after it was analysed: the attention has shape" in errors
    assert "2.png: there is no such file" in errors and "2 images could not be analysed" in errors


def test_a_name_too_long_for_an_overlay_stops_nothing(trained, tmp_path, capsys):
    longest, fits = "a" * 251 + ".png", "b" * 237 + ".png"
    for name in (longest, fits):
        picture(1).save(tmp_path / name)
    maps = tmp_path / "maps"
    given = ["--attention-map", maps, "--max_new_tokens", 5, "--json", tmp_path / "out.jsonl"]
    assert run(arguments(trained, tmp_path, *given)) == SOME_FAILED
    assert [entry["error"] for entry in lines(tmp_path / "out.jsonl")] == ["", ""]
    assert [file.name for file in maps.iterdir()] == [f"{fits}.attention.png"]
    assert f"{longest}: the name of its overlay" in capsys.readouterr().err


def test_overlays_of_a_list_keep_their_paths():
    assert overlay_path(Path("/a/x.png"), Path("/a/x.png"), Path("o")) == Path("o/x.png.attention.png")
    assert overlay_path(Path("/a/b/x.png"), Path("/l.txt"), Path("o")) == Path("o/a/b/x.png.attention.png")


def test_an_overlay_lights_the_strongest_attention_and_leaves_the_rest():
    heat = np.zeros((20, 60), dtype=np.float32)
    heat[5:10, 40:50] = 1
    grey = Image.new("RGB", (60, 20), (100, 100, 100))
    drawn = np.asarray(draw_overlay(grey, heat)).astype(int)
    assert (drawn[15, 5] == 100).all()
    assert abs(drawn[7, 45] - 100).max() > 80
    assert (np.asarray(draw_overlay(grey, np.ones((20, 60)))) == 100).all()
    with pytest.raises(ValueError, match="shape"):
        draw_overlay(grey, heat.T)


def test_strips_of_an_overlay_join_without_a_seam(monkeypatch):
    heat = np.random.default_rng(0).random((21, 60), dtype=np.float32)
    whole = np.asarray(draw_overlay(picture(0, (60, 21)), heat))
    monkeypatch.setattr(overlay, "_PIXELS_AT_A_TIME", 60 * 4)
    assert np.array_equal(draw_overlay(picture(0, (60, 21)), heat), whole)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--samples", "2"], "need a temperature"),
        (["--max_new_tokens", "0"], "at least 1"),
        (["--dtype", "int8"], "unknown dtype"),
        (["--conv-mode", "chatml"], "unknown conv_mode"),
        (["--load-8bit", "--load-4bit"], "exclude each other"),
        (["--device", "gpu"], "unknown device 'gpu'"),
        (["--device", "cuda:99"], "no device cuda:99"),
        (["--device", "meta"], "unsupported device 'meta'"),
        (["--attn-implementation", "flash_attention_2"], "needs flash-attn"),
        (["--attn-implementation", "fast"], "fast"),
        (["--device-map", "everywhere"], "everywhere"),
        (["--vision-tower", "/nowhere"], "no folder /nowhere"),
        (["--model-base", "/nowhere"], "no LoRA folder"),
    ],
)
def test_wrong_settings_are_one_clear_line(trained, few, capsys, more, message):
    assert run(arguments(trained, few, *more)) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0]


@pytest.mark.parametrize("more", [["--batch-size", "0"], ["--batch-size", "many"], ["--no-such-flag"]])
def test_wrong_flags_end_with_the_usage(trained, few, more):
    with pytest.raises(SystemExit) as stopped:
        run(arguments(trained, few, *more))
    assert stopped.value.code == 2


def test_paths_that_hold_nothing_are_explained(trained, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text("\n\n")
    for path, message in (
        ("nowhere", "no file or folder"),
        ("empty", "hold no image"),
        ("list.txt", "lists no image"),
    ):
        assert run(arguments(trained, tmp_path / path)) == 1
        assert message in capsys.readouterr().err


def test_the_authors_flags_and_both_spellings_are_understood():
    given = [
        "--model_path",
        "m",
        "--model-base",
        "b",
        "--img-path",
        "i",
        "--conv_mode",
        "llava_v1",
        "--temperature",
        "0.2",
    ]
    parsed = parse_arguments([*given, "--top-p", "0.9", "--num-beams", "1", "--max-new_tokens=512", "--device", "cpu"])
    assert (parsed.model_path, parsed.img_path, parsed.conv_mode) == ("m", [Path("i")], "llava_v1")
    assert (parsed.temperature, parsed.top_p, parsed.num_beams, parsed.max_new_tokens) == (0.2, 0.9, 1, 512)


def test_sampled_answers_are_all_reported(trained, few, capsys):
    assert run(arguments(trained, few / "0.png", "--temperature", "1", "--samples", "3", "--force_summary", "-v")) == 0
    printed = capsys.readouterr().out
    assert len(next(line for line in printed.splitlines() if "of answers" in line).split()) == 2 + 3
    assert "I will determine if the image is real or fake" in printed


def test_both_scores_are_written_and_told_apart(trained, few, tmp_path, capsys):
    assert run(arguments(trained, few / "0.png", "--score", "prompt")) == 0
    printed = capsys.readouterr().out
    assert (
        "(read without an answer)" in printed and "  of answer   " in printed and "not trained to be asked" in printed
    )
    out = tmp_path / "out.jsonl"
    assert run(arguments(trained, few / "0.png", "--score", "prompt", "--json", out)) == 0
    (answer,) = lines(out)
    assert answer["score_source"] == "prompt" and 0 <= answer["answer_probability"] <= 1 and answer["notice"] == ""
    assert run(arguments(trained, few / "0.png", "--score", "answer", "--json", out)) == 1
    assert "other settings" in capsys.readouterr().err


def test_help_answers_without_a_model_or_torch():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(SCRIPT), "--help"], capture_output=True, text=True, cwd="/", check=True
    )
    assert "--attention-map" in done.stdout and "Exit status" in done.stdout
    assert "| torch\n" not in done.stderr


def test_several_paths_and_patterns_are_analysed_once_and_the_rest_is_named(trained, few, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    paths = [str(few / "[01].png"), str(few), "--img_path", str(few / "2.png")]
    assert (
        run(["--model-path", str(trained), "--device", "cpu", "--json", str(out), "--score-only", "--img_path", *paths])
        == 0
    )
    assert [Path(entry["image"]).name for entry in lines(out)] == ["0.png", "1.png", "2.png", "3.JPG"]
    assert "passed over, no image: 1 files (1 .md): notes.md" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["https://example.com/a.jpg", "http://example.com/", "HTTPS://example.com/x?y=1"])
def test_an_address_is_refused_with_the_way(url, capsys):
    assert run(["--img_path", url]) == 1
    said = capsys.readouterr().err
    assert f"error: {url}: addresses are not fetched; download the image" in said and "--allow-urls" in said


def test_many_images_are_a_short_table(trained, few, monkeypatch, capsys):
    monkeypatch.setattr(inference, "_MANY", 3)
    assert run(arguments(trained, few)) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[-1] for row in rows] == [str(file) for file in list_images(few)]
    assert run(arguments(trained, few, "--sort", "score")) == 0
    ordered = capsys.readouterr().out.splitlines()
    assert sorted(ordered) == sorted(rows)
    scores = [float(row.split()[1]) for row in ordered]
    assert scores == sorted(scores, reverse=True)
    assert run(arguments(trained, few, "-v")) == 0
    assert capsys.readouterr().out.count("  verdict") == 4


def table(file: Path) -> list[list[str]]:
    return list(csv.reader(file.open(encoding="utf-8", newline="")))


def test_a_table_has_a_row_an_image_and_earlier_answers_too(trained, few, tmp_path):
    out, rows = tmp_path / "out.jsonl", tmp_path / "out.csv"
    (few / 'bad, "one".png').write_bytes(b"nothing")
    once = arguments(trained, few / "1.png", "--score-only", "--json", out)
    assert run(once) == 0
    assert run(arguments(trained, few, "--score-only", "--json", out, "--csv", rows)) == 3
    header, *found = table(rows)
    assert header == ["image", "verdict", "fake_probability", "error"]
    assert found[0][0] == str(few / "1.png")
    assert {row[0] for row in found} == {str(file) for file in list_images(few)} and len(found) == 5
    assert [row[1:3] for row in found if row[3]] == [["", ""]]
    written = {entry["image"]: entry["fake_probability"] for entry in lines(out)}
    assert all(float(row[2]) == written[row[0]] for row in found if not row[3])
    assert run(arguments(trained, few, "--score-only", "--csv", rows)) == 3
    again = {row[0]: row[1:] for row in table(rows)[1:]}
    assert again.keys() == {row[0] for row in found}
    for name, verdict, score, error in found:
        # The batches differ, and with them the last digits.
        assert [verdict, error] == [again[name][0], again[name][2]]
        assert score == again[name][1] == "" or abs(float(score) - float(again[name][1])) < 1e-6


@pytest.mark.parametrize("name", ["a;b.png", 'q"uote, comma.png', "line\nbreak.png", "=SUM(A1).png"])
def test_a_table_keeps_every_name_as_it_is(trained, few, tmp_path, name):
    rows = tmp_path / "out.csv"
    picture(1, (20, 20)).save(tmp_path / "one.png")
    (tmp_path / "one.png").rename(few / name)
    assert run(arguments(trained, few / name, "--score-only", "--csv", rows)) == 0
    assert [row[0] for row in table(rows)] == ["image", str(few / name)]


def test_a_table_of_failures_alone_has_their_reasons(trained, tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"nothing")
    assert run(arguments(trained, tmp_path, "--score-only", "--csv", tmp_path / "out.csv")) == SOME_FAILED
    _, *found = table(tmp_path / "out.csv")
    assert len(found) == 3 and all(row[1:3] == ["", ""] and "no image" in row[3] for row in found)


def test_a_table_gives_no_verdict_where_none_is_given(trained, few, tmp_path):
    rule = AbstentionRule(None, None, 0.1, 0.9)
    (tmp_path / "rule.json").write_text(json.dumps({"abstention": rule.to_json()}))
    options = ("--score-only", "--csv", tmp_path / "out.csv", "--calibration", tmp_path / "rule.json")
    assert run(arguments(trained, few, *options)) == 0
    assert [row[1:] for row in table(tmp_path / "out.csv")[1:]] == [["", "", ""]] * 4


@pytest.mark.parametrize(
    ("options", "shown"),
    [(("--force_summary",), False), (("--force_summary", "-v"), True), (("--score-only", "-v"), False)],
)
def test_the_constant_stage_is_shown_on_request_alone(trained, few, capsys, options, shown):
    assert run(arguments(trained, few / "0.png", *options)) == 0
    assert ("  summary" in capsys.readouterr().out) == shown


def test_the_constant_stage_is_in_the_answers_file(trained, few, tmp_path, capsys):
    assert run(arguments(trained, few / "0.png", "--json", tmp_path / "out.jsonl")) == 0
    assert lines(tmp_path / "out.jsonl")[0]["stages"]["SUMMARY"]


def test_a_table_of_ones_own_is_never_replaced(trained, few, tmp_path, capsys):
    own = tmp_path / "own.csv"
    own.write_text("image,label\na.png,real\n")
    assert run(arguments(trained, few, "--csv", own)) == 1
    assert "own.csv is no table of this command" in capsys.readouterr().err
    assert own.read_text() == "image,label\na.png,real\n"


def test_standard_input_is_an_image(trained, few, monkeypatch, capsys):
    def piped(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    assert run(arguments(trained, few / "0.png", "--sort", "score")) == 0
    wanted = capsys.readouterr().out.split()[:2]
    piped((few / "0.png").read_bytes())
    assert run(arguments(trained, Path("-"), "--sort", "score")) == 0
    named = f"stdin-{hashlib.sha256((few / '0.png').read_bytes()).hexdigest()[:12]}"
    assert capsys.readouterr().out.split() == [*wanted, named]
    for content, message in ((b"", "it is empty"), (b"text", "no image in a known format")):
        piped(content)
        assert run(arguments(trained, Path("-"))) == 3
        assert message in capsys.readouterr().err
    out, maps = few / "out.jsonl", few / "maps"
    for name, count in (("0.png", 1), ("0.png", 1), ("1.png", 2)):  # named by its content: resumed, never mistaken
        piped((few / name).read_bytes())
        assert run(arguments(trained, Path("-"), "--json", out, "--attention-map", maps)) == 0
        assert len(lines(out)) == len(list(maps.iterdir())) == count
    assert lines(out)[0]["image"] == named and (maps / f"{named}.attention.png").is_file()


def test_quiet_leaves_results_and_errors(default_model, few, capsys):
    (few / "bad.png").write_bytes(b"nothing")
    given = ["--img_path", str(few), "--device", "cpu", "--score-only"]
    assert run(given) == 3
    printed, said = capsys.readouterr()
    assert "note: " in said and "passed over" in said
    assert run([*given, "--quiet"]) == 3
    silent, errors = capsys.readouterr()
    assert silent == printed
    assert [line.split(":")[0] for line in errors.splitlines()] == [
        f"cannot analyse {few / 'bad.png'}",
        "1 images could not be analysed; they are named above",
    ]


def test_names_of_other_systems_are_said(trained, few, capsys):
    assert run(arguments(trained, f"{few}\\SUB\\3.jpg", "--score-only")) == 0
    captured = capsys.readouterr()
    assert str(few / "sub" / "3.JPG") in captured.out
    assert "1 names were found under another spelling" in captured.err


@pytest.mark.slow
def test_five_thousand_files_are_counted_and_resumed(trained, tmp_path):
    folder, out = tmp_path / "many", tmp_path / "out.jsonl"
    folder.mkdir()
    content = io.BytesIO()
    picture(1, (16, 16)).save(content, format="PNG")
    for index in range(5000):
        (folder / f"{index:04}.png").write_bytes(b"bad" if index % 100 == 7 else content.getvalue())
    command = [sys.executable, str(SCRIPT), *arguments(trained, folder, "--score-only", "--json", out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out.exists() and out.stat().st_size > 100_000):
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    before = out.read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    assert before
    resumed = subprocess.run(command, capture_output=True, text=True)
    assert resumed.returncode == 3 and "50 images could not be analysed" in resumed.stderr
    found = [entry["image"] for entry in lines(out)]
    assert len(found) == len(set(found)) == 5000
    assert sum(bool(entry["error"]) for entry in lines(out)) == 50
    assert out.read_bytes().startswith(before)  # what the killed run had written stands as it was


def test_a_model_without_answers_says_so_and_a_soft_mask_is_its_share_from_one_half():
    soft = np.array([[0.2, 0.4], [0.6, 0.9]])
    report = ForgeryReport(None, None, None, mask=soft)
    assert describe("a.png", report).splitlines()[1:] == [
        "  verdict     none: this model gives no verdict",
        "  mask        50.0 % of the image",
    ]
    spoken = ForgeryReport(None, 0.4, "forced", text="Who knows?")
    assert "none: the answer gives no verdict" in describe("a.png", spoken)
