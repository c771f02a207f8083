"""The scripts as their user meets them: help, options, the README's commands in order, and the notebook."""

import importlib
import io
import json
import re
import shlex
import subprocess
import sys
import tarfile

import pytest

from llava.cli import OptionParser
from tests.mmfr_generation.annotation_helpers import REPOSITORY, noise_image, script_environment

SCRIPTS = [
    "prompts",
    "get_jsonl",
    "batch_api",
    "output_control",
    "output_to_reasoning",
    "build_cot",
    "validate",
    "from_folder",
    "download",
]
README = (REPOSITORY / "mmfr_generation" / "README.md").read_text()


def readme_commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("python ")]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_from_any_folder_in_both_ways(name, tmp_path, run_script):
    script = run_script(name, "--help", cwd=tmp_path)
    assert script.returncode == 0, script.stderr
    command = [sys.executable, "-m", f"mmfr_generation.{name}", "--help"]
    module = subprocess.run(command, cwd=tmp_path, env=script_environment(), capture_output=True, text=True)
    assert module.returncode == 0, module.stderr
    assert "show this help message" in script.stdout
    assert "show this help message" in module.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_option_says_what_it_does(name):
    parser = importlib.import_module(f"mmfr_generation.{name}").build_parser()
    commands = [action for action in parser._actions if hasattr(action, "choices") and isinstance(action.choices, dict)]
    for one in [parser, *(command for action in commands for command in action.choices.values())]:
        assert one.description
        assert all(action.help for action in one._actions)


def test_no_torch_and_no_client_until_they_are_needed():
    code = (
        "import sys\n"
        "from mmfr_generation import build_cot, download, from_folder, get_jsonl, output_to_reasoning, validate\n"
        "assert not {'torch', 'openai', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=script_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_long_options_answer_to_both_spellings():
    parser = OptionParser()
    parser.add_argument("--set-name")
    parser.add_argument("rest", nargs="*")
    assert parser.parse_args(["--set_name", "a_b"]).set_name == "a_b"
    assert parser.parse_args(["--set_name=a_b"]).set_name == "a_b"
    assert parser.parse_args(["--set-name", "x", "--", "--a_b"]).rest == ["--a_b"]
    with pytest.raises(SystemExit):
        parser.parse_args(["--set", "x"])


def test_the_readme_from_images_to_a_training_file(server, tmp_path):
    """Runs every command of the README in order, in an empty folder, against local servers."""
    for label, seeds in (("fake", range(4)), ("real", range(4, 9))):
        folder = tmp_path / "data" / "gallery" / label
        folder.mkdir(parents=True)
        for seed in seeds:
            noise_image(seed).save(folder / f"{seed}.{'png' if label == 'fake' else 'jpg'}")
    (tmp_path / "table.csv").write_text("image,label\ngallery/fake/0.png,fake\ngallery/real/4.jpg,0\n")
    make_parts(tmp_path / "parts")
    evaluation = tmp_path / "MMFR-Dataset" / "dataset" / "evaluation_sets" / "gen"
    for folder, seed in (("0_real", 50), ("1_fake", 51)):
        (evaluation / folder).mkdir(parents=True)
        noise_image(seed).save(evaluation / folder / "x.png")
    environment = script_environment(OPENAI_BASE_URL=server.url)
    commands = readme_commands()
    assert len(commands) >= 19
    for command in commands:
        words = shlex.split(command.replace("http://127.0.0.1:8000/v1", server.url))
        if "mmfr_generation.download" in words and "--from-folder" not in words:
            importlib.import_module("mmfr_generation.download").build_parser().parse_args(words[3:])
            continue
        if words[2:4] == ["mmfr_generation.batch_api", "run"]:
            words += ["--poll-seconds", "0.01"]
        done = subprocess.run(
            [sys.executable, *words[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    records = json.loads((tmp_path / "train.json").read_text())
    assert len(records) == 9
    assert {record["image"].split("/")[1] for record in records} == {"real", "fake"}
    assert all("<CAPTION> A picture called" in record["conversations"][1]["value"] for record in records)
    assert len(json.loads((tmp_path / "train_cot.json").read_text())) == 9
    assert len(json.loads((tmp_path / "train_table.json").read_text())) == 2
    assert (tmp_path / "MMFR-Dataset" / "dataset" / "evaluation_sets" / "a.png").read_bytes() == b"a" * 5000


def make_parts(folder):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("dataset/evaluation_sets/a.png")
        member.size = 5000
        archive.addfile(member, io.BytesIO(b"a" * 5000))
    folder.mkdir()
    (folder / "dataset.part70.tar").write_bytes(buffer.getvalue()[:3001])
    (folder / "dataset.part71.tar").write_bytes(buffer.getvalue()[3001:])


def test_the_notebook_runs_and_holds_no_output(server, tmp_path):
    notebook = json.loads((REPOSITORY / "mmfr_generation" / "batch_api_generation.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    source = "\n".join("".join(cell["source"]) for cell in cells).replace("= 30.0", "= 0.01")
    (tmp_path / "requests").mkdir()
    body = {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "The image is fake."}]}]}
    request = {"custom_id": "a.png", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (tmp_path / "requests" / "a.jsonl").write_text(json.dumps(request) + "\n")
    environment = script_environment(OPENAI_BASE_URL=server.url)
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", source], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "requests without an answer: 0" in done.stdout
    assert sum(server.uploads().values()) == 1
    assert json.loads((tmp_path / "answers" / "a.jsonl").read_text())["custom_id"] == "a.png"


def test_control_of_one_answer(tmp_path, run_script):
    (tmp_path / "a.txt").write_text('{"Answer": "fake", "Forgery Attributes": {"Low Image Quality": "It is soft."}}')
    good = run_script("output_control", "a.txt", "--label", "fake", cwd=tmp_path)
    assert json.loads(good.stdout)["Low Image Quality"] == "It is soft."
    bad = run_script("output_control", "a.txt", "--label", "real", cwd=tmp_path)
    assert (bad.returncode, bad.stdout) == (1, "")
    assert "rejected as other_label" in bad.stderr
    lost = run_script("output_control", "lost.txt", "--label", "real", cwd=tmp_path)
    assert lost.stderr == "error: there is no file or folder lost.txt\n"


def test_prompts_are_printed(tmp_path, run_script):
    for label, name in (("real", "High Image Quality"), ("fake", "Low Image Quality")):
        assert name in run_script("prompts", "--label", label, cwd=tmp_path).stdout
    assert "Describe" in run_script("prompts", "--task", "caption", cwd=tmp_path).stdout
