"""The steps of a long run: each is done once, under its own name, and one that fails is done again."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = """
set -euo pipefail
out=$1
. scripts/steps.sh
first() { for name in a b; do echo "saw $name"; done; start=never; }
second() { [ -f "$out/fine" ]; }
step first first
step second second
echo end
"""


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", SCRIPT, "run", str(folder)], cwd=ROOT, capture_output=True, text=True)


def test_steps_are_done_once_and_marked_under_their_own_names(tmp_path):
    failed = run(tmp_path)
    assert failed.returncode != 0 and failed.stdout.splitlines() == ["== first", "saw a", "saw b", "== second"]
    assert {file.name for file in tmp_path.iterdir()} == {".first.done"}
    assert (tmp_path / ".first.done").read_text().strip().isdigit()
    (tmp_path / "fine").touch()
    assert run(tmp_path).stdout.splitlines() == ["== second", "end"]
    assert run(tmp_path).stdout.splitlines() == ["end"]
