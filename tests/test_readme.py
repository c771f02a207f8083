"""What the README tells its reader to run can be run."""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = re.sub(r"<!--.*?-->", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, flags=re.DOTALL)
LINES = [line.split("#")[0].strip() for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
COMMANDS = [line for line in LINES if line]
PYTHON = [block for kind, block in BLOCKS if kind == "python"]


def script_commands() -> list[list[str]]:
    return [shlex.split(command) for command in COMMANDS if command.startswith("python ")]


def parser_of(words: list[str]) -> tuple[Callable[[list[str]], object], list[str]]:
    """What reads a command's arguments, and the arguments."""
    if words[1] == "-m":
        module = importlib.import_module(words[2])
        if hasattr(module, "__path__"):
            module = importlib.import_module(f"{words[2]}.__main__")
        return module.build_parser().parse_args, words[3:]
    script = ROOT / words[1]
    assert script.is_file()
    module = importlib.import_module(".".join(script.relative_to(ROOT).with_suffix("").parts))
    return module.parse_arguments, words[2:]


@pytest.mark.parametrize("words", script_commands(), ids=" ".join)
def test_commands_of_scripts_are_understood(words):
    parse, arguments = parser_of(words)
    parse(arguments)


def shell_commands() -> list[list[str]]:
    """Words of each command that runs a script of ours by bash, with the variables before it."""
    inline = re.findall(r"`((?:[A-Z_]+=\S+ )*bash scripts/[^`]*)`", TEXT)
    return [words for command in [*COMMANDS, *inline] if "bash" in (words := shlex.split(command))]


@pytest.mark.parametrize("words", shell_commands(), ids=" ".join)
def test_shell_scripts_document_what_is_said_of_them(words):
    place = words.index("bash")
    done = subprocess.run(["bash", ROOT / words[place + 1], "--help"], capture_output=True, text=True, check=True)
    named = [
        word.partition("=")[0] for word in [*words[:place], *words[place + 2 :]] if "=" in word or word[:2] == "--"
    ]
    for name in named:
        assert name.startswith("PIP_") or re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", done.stdout), name


def test_scripts_of_two_commands_are_there():
    assert {"scripts/demo.sh", "scripts/test.sh"} <= {words[words.index("bash") + 1] for words in shell_commands()}


def test_other_commands_are_those_known_here():
    others = [c for c in COMMANDS if not c.startswith("python ") and "bash" not in c]
    for command in others:
        words = shlex.split(command)
        if words[:2] == ["hf", "download"]:
            ask = [sys.executable, "-m", "huggingface_hub.cli.hf", "download", "--help"]
            said = subprocess.run(ask, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"})
            assert all(word in said.stdout for word in words if word.startswith("--"))
        elif words[1:4] == ["-m", "pip", "install"]:
            assert (ROOT / words[words.index("-c") + 1]).is_file()
        else:
            assert words == ["python3.11", "-m", "venv", ".venv"], command


def test_files_that_the_text_links_to_are_there():
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", TEXT) if "://" not in target]
    assert targets and all((ROOT / target).exists() for target in targets)


@pytest.mark.parametrize("block", PYTHON)
def test_python_imports_what_there_is(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


def test_flags_named_in_the_text_exist():
    from forgery_eval.inference import parse_arguments

    section = TEXT.split("## Judge pictures with the published weights")[1].split("\n## ")[0]
    values = {"--samples": "8", "--temperature": "1", "--seed": "1", "--json": "o", "--attention-map": "m"}
    values |= {
        "--img_path": "p",
        "--model-path": "m",
        "--score": "prompt",
        "--vision-tower": "v",
        "--dino-weights": "d",
    }
    for flag in sorted(set(re.findall(r"`(--[\w-]+)", section)) - {"--help"}):
        required = [] if flag == "--img_path" else ["--img_path", "p"]
        parse_arguments([*required, flag, *([values[flag]] if flag in values else [])])


def test_flags_of_evaluation_named_in_the_text_exist():
    from forgery_eval.eval import parse_arguments

    section = TEXT.split("## Evaluate")[1].split("\n## ")[0]
    values = {"--calibration": "c.json", "--clip_path": "c", "--score": "prompt"}
    required = ["--dataset_path", "d", "--result_folder", "r"]
    for flag in sorted(set(re.findall(r"`(--[\w-]+)", section)) - {"--dataset_path"}):
        parse_arguments([*required, flag, *([values[flag]] if flag in values else [])])


def test_the_tree_names_what_there_is():
    tree = next(block for kind, block in BLOCKS if kind == "" and "llava/" in block)
    folder: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.match(r"\s*((?:[\w./]+ ?)+)", line)[1].split():
            if depth == 0 and not name.endswith("/"):
                continue
            if name.endswith("/") or "." in name:
                assert (ROOT.joinpath(*folder[:depth]) / name).exists(), line
            if name.endswith("/"):
                folder[depth:] = [name]
