"""The wheel: everything is in it, and it works in an environment that has no repository."""

import json
import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from llava.assets import SAMPLES

ROOT = Path(__file__).parents[1]
PACKAGES = ("llava", "forgery_eval", "mmfr_generation")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this repository, built without network from a copy, so that nothing is left in the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", str(source), *options], check=True)
    (file,) = folder.glob("*.whl")
    shutil.rmtree(source)
    return file


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """The programs of a fresh environment with the wheel, and the dependencies of the one that runs the tests."""
    folder = tmp_path_factory.mktemp("environment") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    (own,) = folder.glob("lib/python*/site-packages") if os.name != "nt" else [folder / "Lib" / "site-packages"]
    # A path in a .pth file is searched, but the .pth files there are not read: that of the editable install stays out.
    lines = site.getsitepackages()
    for file in (file for folder in site.getsitepackages() for file in sorted(Path(folder).glob("*.pth"))):
        lines += [] if file.name.startswith("__editable__") else file.read_text(encoding="utf-8").splitlines()
    (own / "dependencies.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
    install = ["--python", str(programs / "python"), "install", "--no-deps", "--no-index", "--quiet", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    return programs


def run(environment: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))}
    program = str(environment / command[0])
    return subprocess.run(
        [program, *command[1:]], cwd=folder, env=variables, capture_output=True, text=True, check=False
    )


def test_every_module_and_every_data_file_is_in_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    wanted = {file for name in PACKAGES for file in (ROOT / name).rglob("*.py")}
    for folder in ("llava/assets", "llava/train/recipes", "forgery_eval/pages/templates"):
        files = {file for file in (ROOT / folder).rglob("*") if file.is_file() and file.suffix != ".pyc"}
        assert files, folder
        wanted |= files
    missing = {file.relative_to(ROOT).as_posix() for file in wanted} - held
    assert missing == set()
    assert {"llava/py.typed", "llava/train/recipes/fakereasoning.yaml"} <= held
    assert not any(name.split("/")[0] in ("tests", "scripts", "docs") for name in held)


def test_it_is_the_one_that_is_imported(environment, tmp_path):
    code = "import llava, forgery_eval, mmfr_generation as m; print(llava.__file__, forgery_eval.__file__, m.__file__)"
    done = run(environment, tmp_path, "python", "-c", code)
    assert done.returncode == 0, done.stderr
    assert all(str(environment.parent) in place for place in done.stdout.split())


def test_an_image_is_analysed_from_another_folder(environment, tmp_path):
    shutil.copy(SAMPLES / "04_fake_transposed_convolution.jpg", tmp_path / "photo.jpg")
    done = run(environment, tmp_path, "forgery", "detect", "photo.jpg", "--json", "out.jsonl")
    assert done.returncode == 0, done.stderr
    (record,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert record["label"] in ("real", "fake") and record["text"] and 0 <= record["fake_probability"] <= 1
    shown = run(environment, tmp_path, "forgery", "detect", "photo.jpg", "--score-only")
    assert "P(fake)" in shown.stdout


def test_a_training_is_planned_from_another_folder(environment, tmp_path):
    done = run(environment, tmp_path, "forgery", "train", "--recipe", "fakereasoning", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "llava.train" in done.stdout and "batch" in done.stdout


def test_an_evaluation_and_its_page_are_written_from_another_folder(environment, tmp_path):
    for name, label in (("02_real_people.jpg", "real"), ("09_fake_block_walsh.jpg", "fake")):
        (tmp_path / "data" / label).mkdir(parents=True)
        shutil.copy(SAMPLES / name, tmp_path / "data" / label)
    options = ["--dataset_path", "data", "--result_folder", "results", "--score-only"]
    done = run(environment, tmp_path, "forgery", "eval", *options)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results" / "report.html").is_file()


def test_its_doctor_finds_no_problem(environment, tmp_path):
    done = run(environment, tmp_path, "forgery", "doctor", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0, found["problems"]
    assert str(environment.parent) in found["package"]["imported"]
    assert found["weights"]["embedded model"].startswith(found["package"]["imported"])
    version = run(environment, tmp_path, "forgery", "--version").stdout
    assert version == f"forgery {found['versions']['fakereasoning']}\n"
