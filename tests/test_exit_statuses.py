"""How commands end: one table of statuses, in code and in the docs; quietly where nobody reads; at once on Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from llava import cli, interrupts
from llava.errors import DataError
from llava.interrupts import is_own_program
from tests.trained import picture
from tests.training_runs import ROOT

PYTHON = [sys.executable, "-m"]


def run(*words, cwd=None, **given):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENAI_API_KEY": "none"}
    return subprocess.run(
        [*PYTHON, *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, **given
    )


def test_the_docs_have_the_table_of_the_code():
    page = (ROOT / "docs" / "inference.md").read_text("utf-8")
    table = page.partition("## Exit status")[2].partition("\n## ")[0]
    assert {
        int(number): text for number, text in re.findall(r"^\| (\d+) \| (.*) \|$", table, re.M)
    } == cli.EXIT_STATUSES


@pytest.mark.parametrize(("done", "left_out", "status"), [(3, 0, 0), (0, 0, 0), (0, 2, 1), (3, 2, 3)])
def test_what_was_left_out_decides(done, left_out, status):
    assert cli.exit_status(done=done, left_out=left_out) == status


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (None, 0, ""),
        (DataError("wrong"), 1, "error: wrong\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (MemoryError(), 1, "error: there is not enough memory; lower the batch size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "error: there is not enough memory"),
    ],
)
def test_every_end_has_its_status(error, status, said, capsys):
    def command():
        if error is not None:
            raise error

    assert cli.run_cli(command) == status
    assert capsys.readouterr().err.startswith(said)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images of both classes, one torn and one of no class, and answers, one of them no annotation."""
    root = tmp_path_factory.mktemp("statuses")
    for number, name in enumerate(("tree/real/a.png", "tree/fake/b.png", "tree/c.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(root / name)
    (root / "tree" / "fake" / "torn.png").write_bytes(b"torn")
    (root / "bad").mkdir()
    (root / "bad" / "torn.png").write_bytes(b"torn")
    good = json.dumps({"Answer": "The image is fake.", "Forgery Attributes": {"Low Image Quality": "It is soft."}})
    lines = []
    for name, text in (("b.png", good), ("c.png", "I'm sorry, but I can't.")):
        body = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
        lines.append(json.dumps({"custom_id": name, "response": {"status_code": 200, "body": body}}))
    (root / "some.jsonl").write_text("\n".join(lines))
    (root / "none.jsonl").write_text(lines[1])
    (root / "all.jsonl").write_text(lines[0])
    reasoning = {"b.png": {"Low Image Quality": "It is soft."}, "c.png": {"Low Image Quality": None}}
    (root / "r.json").write_text(json.dumps(reasoning))
    return root


READ = ["output_to_reasoning", "--label", "fake", "--output", "o.json", "--input"]
ASK = ["get_jsonl", "--label", "fake", "--output-folder", "rq", "--image-folder"]
TREE = ["from_folder", "--to", "train", "--output", "t.json", "--input"]
COT = ["build_cot", "--form", "reasoning", "--output", "cot.json", "--reasoning"]


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ([*READ, "all.jsonl"], 0),
        ([*READ, "some.jsonl"], 3),
        ([*READ, "none.jsonl"], 1),
        ([*READ, "lost.jsonl"], 1),
        ([*READ], 2),
        ([*ASK, "tree/real"], 0),
        ([*ASK, "tree/fake"], 3),
        ([*ASK, "bad"], 1),
        ([*TREE, "tree/real"], 1),
        ([*TREE, "tree"], 3),
        ([*COT, "r.json"], 3),
        ([*COT, "lost.json"], 1),
        (["validate", "lost.json"], 1),
        (["validate"], 2),
        (["batch_api", "fly"], 2),
    ],
)
def test_commands_end_as_the_table_says(words, status, folder):
    done = run(f"mmfr_generation.{words[0]}", *words[1:], cwd=folder)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", ["llava --help", "llava data --help", "llava --version", "mmfr_generation.prompts"])
def test_a_closed_pipe_ends_quietly(words):
    reading, writing = os.pipe()
    os.close(reading)  # whoever was to read has gone
    command = [*PYTHON, *words.split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=environment, text=True, check=False)
    os.close(writing)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "own"),
    [
        (["python", "-m", "llava.train.train", "--x"], True),
        (["python", "-X", "dev", "-m", "mmfr_generation.get_jsonl"], True),
        (["python", "/usr/bin/forgery", "detect"], True),
        (["python", str(ROOT / "scripts" / "merge_lora_weights.py")], True),
        (["python", "-m", "pytest", "llava"], False),
        (["python", "-c", "import llava"], False),
        (["python", "own.py", "-m", "llava"], False),
        (["python"], False),
    ],
)
def test_only_own_programs_change_what_ctrl_c_does(words, own):
    assert is_own_program(words) is own


SLOW_IMPORT = """
import sys, time
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy":
            print("importing", flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Slow())
sys.orig_argv[1:] = ["-m", "mmfr_generation.validate"]
import mmfr_generation.validate
"""


def test_ctrl_c_while_libraries_are_imported_ends_with_130_and_no_traceback():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A test run in the background may have been started with Ctrl-C ignored, which its children inherit.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen([sys.executable, "-c", SLOW_IMPORT], env=environment, preexec_fn=heard, **pipes)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    assert process.communicate(timeout=50)[1] == "interrupted\n"
    assert process.returncode == cli.INTERRUPTED and time.monotonic() - begin < 30


def test_work_that_has_begun_clears_up_on_ctrl_c(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "llava"])
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupts.leave_at_once()
        assert signal.getsignal(signal.SIGINT) is interrupts._leave
        assert cli.run_cli(lambda: os.kill(os.getpid(), signal.SIGINT) or time.sleep(5)) == 130
    finally:
        signal.signal(signal.SIGINT, before)
