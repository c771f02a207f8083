"""The command: the published tree, the same bytes whoever writes them, and no surprise when it is stopped."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava.cli import run_cli
from llava.systems.fakereasoning.answer import QUESTION, parse_answer
from mmfr_generation.synthetic.__main__ import main
from mmfr_generation.synthetic.generators import GENERATORS

COUNTS = ("--train", "70", "--eval", "1", "--size", "64", "--seed", "5")
ROOT = Path(__file__).resolve().parents[3]


def command(out: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "mmfr_generation.synthetic", "--out", str(out), *arguments]


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(out, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=300)


def tree(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def manifest(root: Path) -> list[dict]:
    return [json.loads(line) for line in (root / "manifest.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "a new" / "folder"
    done = run(out, *COUNTS, "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("written: ") and str(out) in done.stdout
    return out


def test_the_generator_needs_no_torch():
    code = "import sys, mmfr_generation.synthetic.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_library_that_is_missing_is_named():
    code = "import sys; sys.modules['scipy'] = None; import mmfr_generation.synthetic.__main__"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.startswith("error: scipy is not installed") and "fakereasoning[synthetic]" in done.stderr


def test_two_workers_write_the_same_bytes_as_one(written, tmp_path):
    assert run(tmp_path / "two", *COUNTS, "--workers", "2").returncode == 0
    assert tree(tmp_path / "two") == tree(written)


def test_a_killed_run_is_resumed_to_the_same_bytes(written, tmp_path):
    out = tmp_path / "killed"
    process = subprocess.Popen(command(out, *COUNTS, "--workers", "2"), cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(out.glob("*/*/*.*"))) < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.jsonl").exists()
    assert run(out, *COUNTS, "--workers", "2").returncode == 0
    assert tree(out) == tree(written)


def test_a_second_run_mends_what_is_missing(written, tmp_path):
    out = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(written), str(out)], check=True)
    removed = [next(out.glob("laion/*/*")), next(out.glob("masks/**/*.png")), out / "laion_reasoning.json"]
    for path in removed:
        path.unlink()
    assert run(out, *COUNTS, "--workers", "1").returncode == 0
    assert tree(out) == tree(written)


def test_the_tree_is_the_published_one(written):
    top = {path.name for path in written.iterdir()}
    assert top == {
        "diffusiondb",
        "laion",
        "evaluation_sets",
        "masks",
        "diffusiondb_reasoning.json",
        "laion_reasoning.json",
        "forgery_reasoning_cot.json",
        "forgery_reasoning_cot_reasoning.json",
        "forgery_reasoning_cot_verdict.json",
        "manifest.jsonl",
        "dataset.json",
        "card.md",
        "contact_sheet.png",
    }
    assert [path.name for path in (written / "diffusiondb").iterdir()] == ["part-000001"]
    assert [path.name for path in (written / "laion").iterdir()] == ["00000"]
    sets = {path.name: path for path in (written / "evaluation_sets").iterdir()}
    assert set(sets) == set(GENERATORS)
    for name, folder in sets.items():
        assert {path.name for path in folder.iterdir()} == {"0_real", "1_fake", f"{name}_reasoning.json"}
        assert len(list((folder / "0_real").iterdir())) == len(list((folder / "1_fake").iterdir())) == 1


def test_annotation_and_files_agree(written):
    records = manifest(written)
    assert len(records) == 70 + 2 * len(GENERATORS)
    files = {str(p.relative_to(written)) for p in written.rglob("*") if p.suffix in (".jpg", ".png")}
    images = {r["image"] for r in records}
    masks = {name for r in records for name in r["masks"].values()}
    assert files == images | masks | {"contact_sheet.png"}
    for record in records:
        for name in record["masks"].values():
            with Image.open(written / name) as mask:
                values = np.unique(np.asarray(mask))
                assert mask.size == (64, 64) and mask.mode == "L" and set(values) == {0, 255}
    for label, name in (("fake", "diffusiondb"), ("real", "laion")):
        reasoning = json.loads((written / f"{name}_reasoning.json").read_text("utf-8"))
        assert reasoning == {
            r["image"]: r["attributes"] for r in records if r["split"] == "train" and r["label"] == label
        }
        assert len(reasoning) == 35 and all(key.startswith(f"{name}/") for key in reasoning)
    for name in GENERATORS:
        reasoning = json.loads((written / f"evaluation_sets/{name}/{name}_reasoning.json").read_text("utf-8"))
        assert sorted(key.rsplit("/", 1)[0] for key in reasoning) == [f"{name}/0_real", f"{name}/1_fake"]
        assert all((written / "evaluation_sets" / key).is_file() for key in reasoning)


@pytest.mark.parametrize("form", ["", "_reasoning", "_verdict"])
def test_training_conversations_are_those_of_the_paper(written, form):
    stages = {"": 4, "_reasoning": 2, "_verdict": 1}[form]
    entries = json.loads((written / f"forgery_reasoning_cot{form}.json").read_text("utf-8"))
    by_image = {r["image"]: r for r in manifest(written)}
    assert len(entries) == 70
    for entry in entries:
        human, gpt = entry["conversations"]
        assert human == {"from": "human", "value": f"<image>\n{QUESTION}"}
        parsed = parse_answer(gpt["value"])
        assert parsed.verdict == by_image[entry["image"]]["label"] and len(parsed.stages) == stages
        assert parsed.stages.get("CAPTION", by_image[entry["image"]]["caption"]) == by_image[entry["image"]]["caption"]


def test_no_image_occurs_twice(written):
    digests = [hashlib.sha256((written / r["image"]).read_bytes()).hexdigest() for r in manifest(written)]
    assert len(set(digests)) == len(digests)


def test_the_card_names_every_generator_and_its_leak(written):
    card = (written / "card.md").read_text("utf-8")
    assert "--train 70 --eval 1 --size 64 --seed 5" in card
    for name, generator in GENERATORS.items():
        assert f"| {name} | {generator.mechanism} | {generator.role} |" in card


@pytest.mark.parametrize(("train", "evaluate"), [(7, 3), (0, 1), (1, 0), (33, 0)])
def test_any_counts_work(tmp_path, train, evaluate):
    counts = ("--train", str(train), "--eval", str(evaluate), "--size", "65", "--workers", "1")
    assert main(["--out", str(tmp_path / "d"), *counts]) == 0
    records = manifest(tmp_path / "d")
    training = [r for r in records if r["split"] == "train"]
    assert len(training) == train and sum(r["label"] == "fake" for r in training) == train // 2
    for name in GENERATORS:
        members = [r["label"] for r in records if r["set"] == name]
        assert sorted(members) == ["fake"] * evaluate + ["real"] * evaluate


def test_a_larger_run_keeps_the_images_of_a_smaller_one(written, tmp_path):
    assert main(["--out", str(tmp_path / "d"), "--train", "4", "--eval", "0", "--size", "64", "--seed", "5"]) == 0
    small, large = tree(tmp_path / "d"), tree(written)
    assert all(large[name] == digest for name, digest in small.items() if name.startswith(("laion/", "diffusiondb/")))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--train", "4", "--eval", "0", "--size", "63"], "64 to 512"),
        (["--train", "4", "--eval", "0", "--size", "513"], "64 to 512"),
        (["--train", "-1", "--eval", "1"], "0 or more"),
        (["--train", "0", "--eval", "0"], "not both 0"),
        (["--train", "4", "--eval", "0", "--seed", "-1"], "seed"),
        (["--train", "4", "--eval", "0", "--workers", "0"], "workers"),
        (["--train", "four", "--eval", "0"], "invalid int"),
        (["--train", "4", "--eval", "0", "--colour", "red"], "--colour"),
        (["--eval", "0"], "--train"),
    ],
)
def test_wrong_flags_stop_with_one_sentence(tmp_path, capsys, arguments, said):
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path / "d"), *arguments])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert said in message and len(message.splitlines()) == 1
    assert not (tmp_path / "d").exists()


def status(arguments: list[str]) -> int:
    return run_cli(lambda: main(arguments))


def only_message(capsys) -> str:
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    return line


def test_another_run_in_the_same_folder_is_refused(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--train", "2", "--eval", "0", "--size", "64"]) == 0
    before = tree(tmp_path)
    assert status(["--out", str(tmp_path), "--train", "2", "--eval", "0", "--size", "64", "--seed", "1"]) == 1
    assert "seed 0, not 1" in only_message(capsys)
    assert tree(tmp_path) == before


def test_a_folder_with_other_files_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert status(["--out", str(tmp_path), "--train", "2", "--eval", "0"]) == 1
    assert "not empty" in only_message(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert status(["--out", str(tmp_path / "file" / "d"), "--train", "2", "--eval", "0"]) == 1
    assert "cannot be written" in only_message(capsys)


def test_a_full_disk_stops_with_one_sentence_and_the_run_can_be_resumed(tmp_path, capsys, monkeypatch):
    arguments = ["--out", str(tmp_path / "d"), "--train", "40", "--eval", "0", "--size", "64", "--workers", "1"]
    fsync, written = os.fsync, []

    def fill(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) > 38:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fill)
    assert status(arguments) == 1
    assert "the disk is full" in only_message(capsys)
    monkeypatch.setattr(os, "fsync", fsync)
    assert main(arguments) == 0
    assert len(manifest(tmp_path / "d")) == 40


def test_a_damaged_record_is_named(tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--train", "2", "--eval", "0", "--size", "64"]
    assert main(arguments) == 0
    (tmp_path / "manifest.jsonl").write_text('{"image": ')
    assert status(arguments) == 1
    assert "manifest.jsonl is damaged" in only_message(capsys)
