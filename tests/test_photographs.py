"""The script that gathers photographs out of packages, with an apt-get and a dpkg of its own."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "photographs.sh"
LIST = [line.split(" ") for line in (ROOT / "scripts" / "photographs.txt").read_text().splitlines()]


def test_the_list_names_each_photograph_once():
    assert all(len(entry) == 2 for entry in LIST) and len({tuple(entry) for entry in LIST}) == len(LIST) > 90
    assert all(path.startswith("usr/") and ".." not in path for _, path in LIST)
    names = {f"{package}_{path.removeprefix('usr/share/').replace('/', '_')}" for package, path in LIST}
    assert len(names) == len(LIST)


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder of programs: each package has all its photographs but the first, and one package cannot be had."""
    programs = tmp_path / "bin"
    programs.mkdir()
    apt = f'#!/bin/bash\nname=${{@: -1}}\n[ "$name" != "{LIST[-1][0]}" ] || exit 100\ntouch "${{name}}_1_all.deb"\n'
    dpkg = f"""#!/bin/bash
name=${{2%%_*}}
sed -n "s/^$name //p" "{ROOT}/scripts/photographs.txt" | tail -n +2 | while read -r path; do
    mkdir -p "$3/$(dirname "$path")"; echo "$name $path" > "$3/$path"
done
mkdir -p "$3/usr/share/doc/$name"; echo free > "$3/usr/share/doc/$name/copyright"
"""
    for name, content in (("apt-get", apt), ("dpkg", dpkg)):
        (programs / name).write_text(content)
        (programs / name).chmod(0o755)
    return programs


def test_photographs_are_copied_and_what_is_missing_is_named(shop, tmp_path):
    environment = {**os.environ, "PATH": f"{shop}:{os.environ['PATH']}"}
    command = ["bash", str(SCRIPT), str(tmp_path / "photographs")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    packages = sorted({package for package, _ in LIST})
    gone = LIST[-1][0]
    first = {package: next(path for name, path in LIST if name == package) for package in packages}
    expected = {
        f"{package}_{path.removeprefix('usr/share/').replace('/', '_')}": f"{package} {path}\n"
        for package, path in LIST
        if package != gone and path != first[package]
    }
    found = {file.name: file.read_text() for file in (tmp_path / "photographs").iterdir() if file.is_file()}
    assert found == expected
    assert {file.name for file in (tmp_path / "photographs" / "copyright").iterdir()} == {*packages} - {gone}
    assert f"{len(expected)} photographs in" in done.stdout and f"{len(LIST) - len(expected)} left out" in done.stdout
    assert f"{first[packages[0]]} is not in this version" in done.stderr and "cannot be had" in done.stderr


def test_without_a_package_it_fails_and_says_why(shop, tmp_path):
    (shop / "apt-get").write_text("#!/bin/bash\nexit 100\n")
    environment = {**os.environ, "PATH": f"{shop}:{os.environ['PATH']}"}
    command = ["bash", str(SCRIPT), str(tmp_path / "photographs")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "photographs in" not in done.stdout
    assert "error: nothing could be had" in done.stderr


def test_it_says_what_it_takes():
    for words, status in ((["--help"], 0), ([], 2)):
        done = subprocess.run(["bash", str(SCRIPT), *words], capture_output=True, text=True, check=False)
        assert done.returncode == status and "FOLDER takes the photographs" in done.stdout
        assert "set -euo" not in done.stdout
