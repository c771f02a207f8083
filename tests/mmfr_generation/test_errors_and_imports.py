"""Every script: bad input ends in one line, a bug in a traceback; and no module loads torch."""

import json
import pkgutil
import subprocess
import sys

import pytest

import mmfr_generation
from tests.mmfr_generation.annotation_helpers import script_environment
from tests.mmfr_generation.test_annotation_scripts import make_parts

MODULES = [module.name for module in pkgutil.walk_packages(mmfr_generation.__path__, "mmfr_generation.")]
FOLDERS = ["--input-folder", "requests", "--output-folder", "out"]
GET_JSONL = ["--output-folder", "out", "--label", "fake", "--image-folder"]
READ = ["--label", "fake", "--output", "out.json", "--input"]
COT = ["--form", "verdict", "--output", "out.json", "--reasoning"]
RENDER = ["--train", "2", "--eval", "0", "--workers", "1", "--out"]

SCRIPTS = [
    # script, where a bug is put, sound arguments, bad arguments, what the one line says of them
    ("prompts", "llava.cli.OptionParser.parse_args", [], ["--label", "maybe"], "invalid choice"),
    (
        "get_jsonl",
        "mmfr_generation.images.encode_image",
        [*GET_JSONL, "set/fake"],
        [*GET_JSONL, "lost"],
        "no folder lost",
    ),
    (
        "batch_api",
        "llava.files.digest_file",
        ["run", *FOLDERS],
        ["run", "--input-folder=lost", *FOLDERS[2:]],
        "lost",
    ),
    (
        "output_control",
        "llava.systems.fakereasoning.answer.attribute_name",
        ["a.txt", "--label", "fake"],
        ["set", "--label", "fake"],
        "set cannot be read: Is a directory",
    ),
    (
        "output_to_reasoning",
        "mmfr_generation.api.answers.read_answer",
        [*READ, "answers"],
        [*READ, "lost"],
        "folder lost",
    ),
    ("build_cot", "llava.files.write_json", [*COT, "r.json"], [*COT, "a.txt"], "is not an object of attribute names"),
    ("validate", "mmfr_generation.images.perceptual_hash", ["set"], ["lost.json"], "no file or folder lost.json"),
    (
        "from_folder",
        "llava.images.load_image",
        ["--input", "set", "--to", "train", "--output", "out.json"],
        ["--input", "a.txt", "--to", "train", "--output", "out.json"],
        "a.txt gives no usable image",
    ),
    (
        "download",
        "mmfr_generation.published.unpacker.safe_target",
        ["--parts", "70-71", "--from-folder", "parts"],
        ["--parts", "70", "--from-folder", "lost"],
        "there is no folder lost",
    ),
    (
        "synthetic",
        "mmfr_generation.synthetic.sample.make_sample",
        [*RENDER, "out"],
        [*RENDER, "set"],
        "set is not empty",
    ),
    (
        "synthetic.showcase",
        "mmfr_generation.synthetic.sample.make_sample",
        ["--out", "out"],
        ["--out", "a.txt"],
        "the folder a.txt cannot be made",
    ),
]
BUG = """
import importlib, runpy, sys
script, target, kind, *sys.argv[1:] = sys.argv[1:]
def bug(*given, **named):
    raise {"RuntimeError": RuntimeError, "ValueError": ValueError}[kind]("a bug of ours")
owner, _, name = target.rpartition(".")
try:
    owner = importlib.import_module(owner)
except ModuleNotFoundError:
    module, _, cls = owner.rpartition(".")
    owner = getattr(importlib.import_module(module), cls)
setattr(owner, name, bug)
runpy.run_module(f"mmfr_generation.{script}", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def data(make_images, tmp_path):
    """Sound input for every script, in the working folder."""
    make_images(["real/a.png", "fake/b.png", "0_real/c.png", "1_fake/d.png"], "set")
    make_parts(tmp_path / "parts")
    answer = '{"Answer": "fake", "Forgery Attributes": {"Low Image Quality": "Soft."}}'
    (tmp_path / "a.txt").write_text(answer)
    (tmp_path / "r.json").write_text(json.dumps({"a.png": {"Low Image Quality": "Soft."}}))
    body = {"choices": [{"message": {"content": answer}, "finish_reason": "stop"}]}
    lines = {"answers": {"response": {"status_code": 200, "body": body}}, "requests": {"body": {}}}
    for folder, line in lines.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jsonl").write_text(json.dumps({"custom_id": "a.png", **line}) + "\n")
    return tmp_path


def run(command, folder):
    environment = script_environment(OPENAI_BASE_URL="http://127.0.0.1:9/v1")
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("kind", ["RuntimeError", "ValueError"])
@pytest.mark.parametrize(("script", "target", "sound"), [case[:3] for case in SCRIPTS], ids=[c[0] for c in SCRIPTS])
def test_a_bug_keeps_its_traceback(script, target, sound, kind, data):
    done = run(["-c", BUG, script, target, kind, *sound], data)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr, done.stderr
    assert done.stderr.rstrip().endswith(f"{kind}: a bug of ours")


@pytest.mark.parametrize(("script", "bad", "told"), [(c[0], *c[3:]) for c in SCRIPTS], ids=[c[0] for c in SCRIPTS])
def test_bad_input_ends_in_one_line(script, bad, told, data):
    done = run(["-m", f"mmfr_generation.{script}", *bad], data)
    assert done.returncode == (2 if "invalid choice" in told else 1)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and told in line


def test_no_module_loads_torch():
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert not {'torch', 'transformers'} & set(sys.modules), name\n"
    )
    assert {"mmfr_generation.batch_api", "mmfr_generation.api.batch_jobs", "mmfr_generation.synthetic.writer"} <= set(
        MODULES
    )
    done = run(["-c", code, *MODULES], None)
    assert done.returncode == 0, done.stderr
