"""What README and docs tell their reader to run can be run, and what they name is there."""

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llava import __main__ as front
from llava.assets import SAMPLES
from llava.systems import registry
from tests.commands import parse_command

ROOT = Path(__file__).parents[1]
PAGES = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in sorted(ROOT.glob("docs/*.md"))}
for page_name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
    PAGES[page_name] = (ROOT / page_name).read_text(encoding="utf-8")
BLOCKS = [
    (page, kind, block) for page, text in PAGES.items() for kind, block in re.findall(r"```(\w*)\n(.*?)```", text, re.S)
]
LINES = [line.split("#")[0].strip() for _, kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
INLINE = [
    " ".join(code.split())
    for text in PAGES.values()
    for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.S))
]
COMMANDS = list(dict.fromkeys(line for line in LINES if line))
COMMANDS += [code for code in INLINE if re.match(r"python (-m (llava|forgery_eval|scripts)\S+|scripts/\S+) --", code)]
OURS = [shlex.split(command) for command in COMMANDS if re.match(r"(python|forgery) ", command)]
NETWORK = ["train", "--network", "m2f2det:detector"]
PAGES_OF_FLAGS = {
    "README.md": [["eval"]],
    "docs/inference.md": [["detect"]],
    "docs/evaluation.md": [["eval"], ["compare"]],
    "docs/several-gpus.md": [["eval"], ["detect"]],
    "docs/slurm.md": [["eval"]],
    "docs/kubernetes.md": [],
    "docs/serving.md": [["serve"], ["detect"], ["export"], ["eval"]],
    "docs/training.md": [["train"], ["train", "--recipe", "fakereasoning"], NETWORK, ["detect"]],
    "docs/checkpoints.md": [["merge"], ["detect"]],
    "docs/data.md": [["data", name] for name in front.DATA],
    "docs/synthetic.md": [["data", "synthetic"], ["data", "forge"]],
    "docs/fakevlm.md": [
        ["detect", "--system", "fakevlm"],
        ["eval", "--system", "fakevlm"],
        ["train"],
        ["train", "--recipe", "fakevlm"],
        ["merge"],
    ],
    "docs/m2f2det.md": [["detect", "--system", "m2f2det"], ["train"], NETWORK, ["merge"], ["eval"]],
    "docs/adding-a-system.md": [["eval"]],
    "docs/fakeshield.md": [["detect", "--system", "fakeshield"], ["eval"]],
    "docs/architecture.md": [],
    "docs/contrast.md": [["train"]],
    "docs/ablations.md": [["train"]],
    "CONTRIBUTING.md": [["eval"]],
    "CHANGELOG.md": [
        NETWORK,
        ["train"],
        ["train", "--recipe", "fakereasoning"],
        ["merge"],
        ["export"],
        ["eval"],
        ["compare"],
        ["detect"],
    ],
}
"""The verbs whose flags each page names in its text."""
ELSEWHERE = {
    "--outliers": "llava.demo.towers",
    "--strangers": "llava.demo.towers",
    "--start": "llava.demo.towers",
    "--summary-epochs": "llava.demo.towers",
    "--on": "scripts.ablation.__main__",
    "--probe": "scripts.ablation.__main__",
    "--evaluated": "scripts.ablation.__main__",
}
"""Flags of commands that are no verbs."""
OLD_NAMES = {"--alike-lengths"}
"""Flags that only the changelog names; ``test_old_commands`` reads them."""


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_commands_are_understood(words, tmp_path, monkeypatch):
    # Relative paths of the pages are those of the repository's root.
    monkeypatch.chdir(ROOT)
    try:
        parse_command(words)
    except SystemExit as end:
        assert end.code == 0, words


def shell_commands() -> list[list[str]]:
    """Words of each command that runs a script of ours by bash, with the variables before it."""
    inline = [code for code in INLINE if re.match(r"(?:[A-Z_]+=\S+ )*bash scripts/", code)]
    return [words for command in dict.fromkeys([*COMMANDS, *inline]) if "bash" in (words := shlex.split(command))]


@pytest.mark.parametrize("words", shell_commands(), ids=" ".join)
def test_shell_scripts_document_what_is_written_of_them(words):
    index = words.index("bash")
    command, environment = ["bash", ROOT / words[index + 1], "--help"], {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    named = [
        word.partition("=")[0] for word in [*words[:index], *words[index + 2 :]] if "=" in word or word[:2] == "--"
    ]
    for name in named:
        assert name.startswith("PIP_") or re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", done.stdout), name


def test_the_two_commands_are_in_the_readme():
    assert "bash scripts/demo.sh" in PAGES["README.md"] and "bash scripts/test.sh" in PAGES["README.md"]


def test_other_commands_are_those_known_here():
    known = ["python3.11 -m venv .venv", "source .venv/bin/activate"]
    known += [".venv/bin/python -m pip install pre-commit"]
    known += [".venv/bin/pre-commit install --hook-type pre-commit --hook-type pre-push"]
    for command in (c for c in COMMANDS if not re.match(r"(python|forgery) ", c) and "bash" not in c):
        words = shlex.split(command)
        if words[:2] == ["hf", "download"]:
            ask = [sys.executable, "-m", "huggingface_hub.cli.hf", "download", "--help"]
            help_ = subprocess.run(
                ask, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"}
            ).stdout
            assert all(word in help_ for word in words if word.startswith("--"))
        elif words[1:4] == ["-m", "pip", "install"] and "-c" in words:
            assert (ROOT / words[words.index("-c") + 1]).is_file()
        else:
            assert command in known, command


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_links_to_are_there(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = ROOT / Path(page).parent / path
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.M)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], target


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_the_readme_leads_to_every_page(page):
    assert f"]({page})" in PAGES["README.md"]


def names_of(text: str) -> set[str]:
    return {flag.replace("_", "-") for flag in re.findall(r"--[A-Za-z][\w-]+", text)}


@pytest.mark.parametrize("page", PAGES)
def test_flags_named_in_the_text_exist(page, capsys):
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.S)
    # One code is one flag and perhaps its value; a longer command is parsed by other tests.
    codes = [" ".join(code.split()) for code in re.findall(r"`(--[^`]+)`", text)]
    wanted = {flag for code in codes for flag in names_of(code)} - {"--help"}
    known = set()
    for path in PAGES_OF_FLAGS[page] if wanted else []:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COLUMNS", "200")
            try:
                front.main([*path, "--help"])
            except SystemExit as end:
                assert end.code == 0
        known |= names_of(capsys.readouterr().out)
    elsewhere = OLD_NAMES if page == "CHANGELOG.md" else set()
    for flag, module in ELSEWHERE.items():
        if flag in wanted:
            actions = importlib.import_module(module).build_parser()._option_string_actions
            assert flag in {option.replace("_", "-") for option in actions}
            elsewhere = elsewhere | {flag}
    assert wanted - known - elsewhere == set()


def test_every_python_block_is_valid_and_imports_what_there_is():
    python = [block for _, kind, block in BLOCKS if kind == "python"]
    assert python
    for node in (node for block in python for node in ast.walk(ast.parse(block))):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Images by the names that the pages use, in the current folder."""
    (tmp_path / "photos").mkdir()
    for name in ("photo.jpg", "other.jpg", "photos/a.jpg"):
        shutil.copy(SAMPLES / "04_fake_transposed_convolution.jpg", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def python_of(page: str) -> list[str]:
    return [block for name, kind, block in BLOCKS if name == page and kind == "python"]


@pytest.mark.parametrize("page", ["README.md", "docs/inference.md"])
def test_python_runs_on_the_embedded_model(page, folder, capsys):
    (block,) = python_of(page)
    exec(compile(block, page, "exec"), {})
    printed = capsys.readouterr().out
    assert re.match(r"(real|fake) [01]\.\d", printed) and "'fake_probability'" in printed


def test_the_python_of_the_readme_is_six_lines():
    (block,) = python_of("README.md")
    assert len([line for line in block.splitlines() if line]) == 6


def test_the_example_of_a_system_works(folder, capsys, monkeypatch):
    system, use = python_of("docs/adding-a-system.md")
    names: dict[str, object] = {}
    exec(compile(system, "brightness.py", "exec"), names)
    monkeypatch.setitem(registry.specs(), "brightness", names["SPEC"])
    (config,) = re.findall(r"`(\{.*?\})`", PAGES["docs/adding-a-system.md"])
    (folder / "brightness_model").mkdir()
    (folder / "brightness_model" / "config.json").write_text(config)
    exec(compile(use, "use.py", "exec"), {})
    label, score, *shape = capsys.readouterr().out.split(maxsplit=2)
    assert label == ("fake" if float(score) >= 0.5 else "real") and shape == ["(112, 112)\n"]
    assert front.main(["detect", "photo.jpg", "--model-path", "brightness_model", "--json", "out.jsonl"]) == 0
    assert '"system": "brightness"' in (folder / "out.jsonl").read_text()


def test_the_tree_names_what_there_is():
    (tree,) = [block for page, kind, block in BLOCKS if page == "docs/architecture.md" and "  base.py" in block]
    path: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.match(r"\s*((?:[\w./]+ ?)+)", line)[1].split():
            if depth == 0 and not name.endswith("/"):
                continue
            if name.endswith("/") or "." in name:
                assert (ROOT.joinpath(*path[:depth]) / name).exists(), line
            if name.endswith("/"):
                path[depth:] = [name]


def test_the_table_of_verbs_is_that_of_the_front_door():
    rows = re.findall(r"^\| `([\w-]+)` \| `python -m (\S+)`", PAGES["docs/data.md"], flags=re.M)
    assert [name for name, _ in rows] == list(front.DATA)
    for name, module in rows:
        assert front.DATA[name].command.removesuffix(":main").removesuffix(".__main__") == module


def test_the_hooks_are_what_the_tests_run():
    script = (ROOT / "scripts" / "test.sh").read_text(encoding="utf-8")
    hooks = re.findall(r"entry: (.*)", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert len(hooks) == 4
    for hook in hooks:
        assert hook.split(' -m "not slow"')[0] in script
