"""The demonstration: its page, its command, and the shell script around it."""

import base64
import io
import json
import os
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from forgery_eval.demo import command as demo
from forgery_eval.demo.page import Shown, Truth, constant_stages, demo_page
from forgery_eval.pages.overlay import draw_mask
from llava import ForgeryReport, assets
from llava.cli import SOME_FAILED
from tests.trained import NOTICE, picture

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "demo.sh"
SAMPLES = json.loads((assets.SAMPLES / "samples.json").read_text(encoding="utf-8"))["samples"]


class Page(HTMLParser):
    """Reads a page: every tag must be closed in order; keeps what it shows, loads and says."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.words)

    def images(self) -> list[np.ndarray]:
        found = []
        for source in self.sources:
            kind, data = source.split(",", 1)
            assert kind == "data:image/jpeg;base64"
            found.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), dtype=float))
        return found


@pytest.fixture
def analysed(default_model, tmp_path, capsys):
    """What the command wrote and printed, with one image of the user and one file that is none."""
    (tmp_path / "own & <b>").mkdir()
    picture(3, (90, 30)).save(tmp_path / "own & <b>" / "my <i>photo.png")
    (tmp_path / "own & <b>" / "no image.png").write_text("hello")
    out = tmp_path / "deep" / "page.html"
    assert demo.run(["--out", str(out), str(tmp_path / "own & <b>")]) == SOME_FAILED
    return Page(out.read_text(encoding="utf-8")), capsys.readouterr(), out


def test_the_page_shows_every_image_and_needs_nothing_else(analysed):
    page, _, out = analysed
    masks = sum(entry["mask"] is not None for entry in SAMPLES)
    images = page.images()
    assert len(images) == 2 * (len(SAMPLES) + 1) + masks
    assert page.tags.count("article") == len(SAMPLES) + 2
    assert page.tags.count("img") == len(images) and not {"script", "link", "iframe"} & set(page.tags)
    assert {max(shown.shape) for shown in images} == {336}
    own = images[0]
    assert own.shape[:2] == (112, 336)
    text = out.read_text(encoding="utf-8")
    assert "http" not in text.replace("http-equiv", "") and "url(" not in text and "@import" not in text
    assert str(ROOT) not in text and str(out.parent) not in text and str(Path.home()) + "/" not in text
    for entry in SAMPLES:
        assert entry["caption"] in page.text
        with Image.open(assets.SAMPLES / entry["image"]) as image:
            size = [round(336 * side / max(image.size)) for side in image.size]
            large = np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS), dtype=float)
        assert min(np.abs(shown - large).mean() for shown in images if shown.shape == large.shape) < 6


def test_the_page_and_the_terminal_agree(analysed):
    page, printed, out = analysed
    assert page.text.count(NOTICE) == 1 and printed.err.count(NOTICE) == 1
    assert printed.out.splitlines()[-1] == f"written: {out}"
    assert printed.out.count("  verdict     ") == len(SAMPLES) + 1 and printed.out.count("P(fake)") == len(SAMPLES) + 1
    assert (
        printed.out.count("  truth       ") == len(SAMPLES) and printed.out.count("  reasoning   ") == len(SAMPLES) + 1
    )
    assert "no image.png" in printed.err and "could not be analysed" in page.text
    assert "my <i>photo.png" in page.text and "Your images" in page.text
    for words in ("not seen in training, nor any of its mechanism", "by inpainting at strength", "(seen in training)"):
        assert words in page.text and words in printed.out


def test_without_images_of_ones_own_there_are_only_the_samples(default_model, tmp_path, capsys):
    assert demo.run(["--out", str(tmp_path / "page.html")]) == 0
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.tags.count("article") == len(SAMPLES) and "Your images" not in page.text
    assert demo.run(["--out", str(tmp_path / "page.html"), str(tmp_path / "absent.png")]) == 1
    assert "no file or folder" in capsys.readouterr().err


TRUTH = Truth("fake", "halo", "It glows.", "seen", 0.5, "A tree & a cat.", {"Irregular Image Edges": "Rims."}, None)


@pytest.mark.parametrize(
    ("report", "words", "absent"),
    [
        (
            ForgeryReport("fake", 0.9, "verdict"),
            ["fake", "✓", "P(fake) 0.900", "own answer"],
            ["disagree", "at the verdict"],
        ),
        (ForgeryReport("real", 0.9, "prompt", 0.2), ["✗", "0.200 at the verdict", "disagree", "without an answer"], []),
        (ForgeryReport(None, 0.4, "forced", text="<b>what?"), ["neither", "✗", "<b>what?"], ["disagree"]),
        (ForgeryReport("fake", None, None), ["✓"], ["P(fake)"]),
    ],
    ids=["right", "wrong", "no verdict", "no score"],
)
def test_a_card_says_what_the_report_says(tmp_path, report, words, absent):
    picture(1).save(tmp_path / "a.png")
    page = Page(demo_page([Shown(tmp_path / "a.png", report, TRUTH)], ""))
    printed = page.text.split("training did not see")[1]
    assert all(word in printed for word in [*words, "A tree & a cat.", "It glows."])
    assert not any(word in printed for word in absent)
    assert len(page.images()) == 1 and "notice" not in page.tags


def test_a_predicted_mask_is_shown_and_stages_that_never_change_are_not(tmp_path):
    picture(1).save(tmp_path / "a.png")
    mask = np.ones((30, 40))
    reports = [
        ForgeryReport(label, 0.5, "detector", stages={"PLAN": "I <look>.", "WHY": f"It is {label}."}, mask=mask)
        for label in ("real", "fake")
    ]
    page = Page(demo_page([Shown(tmp_path / "a.png", report, None) for report in reports], "<script>no</script>"))
    assert len(page.images()) == 4 and "predicted mask: what the model calls forged" in page.text
    assert "script" not in page.tags and "<script>no</script>" in page.text
    assert "It is real." in page.text and "I <look>." not in page.text
    assert constant_stages(reports) == {"PLAN"} and constant_stages(reports[:1]) == constant_stages([]) == set()


def test_the_mask_is_lit_and_the_rest_darkened():
    mask = np.zeros((20, 30), dtype=bool)
    mask[5:10, 20:25] = True
    drawn = np.asarray(draw_mask(Image.new("RGB", (30, 20), (100, 100, 100)), mask)).astype(int)
    assert (drawn[mask].mean(axis=0)[:2] > 130).all() and (drawn[~mask] < 60).all()


def test_the_script_explains_itself():
    for folder in ("/", str(ROOT)):
        done = subprocess.run(["bash", str(SCRIPT), "--help"], capture_output=True, text=True, cwd=folder, check=True)
        assert "bash scripts/demo.sh [--out PAGE.html] [IMAGE …]" in done.stdout and "PYTHON=" in done.stdout
        assert "#" not in done.stdout and done.stderr == ""


FAKE_PYTHON = """#!/usr/bin/env bash
echo "$PWD: $*" >> "$LOG"
case "$*" in
    *sys.version_info*) [ ! -e "$STATE/old" ] ;;
    *"-m venv"*) mkdir -p .venv/bin && for name in python ruff mypy; do cp "$0" ".venv/bin/$name"; done ;;
    *"pip install"*) [ ! -e "$STATE/offline" ] ;;
esac
"""


class Clone:
    """A copy of the scripts in a folder with spaces, and an interpreter that only notes what it is asked."""

    def __init__(self, folder: Path) -> None:
        self.root, self.state = folder / "a clone", folder / "state"
        (self.root / "scripts").mkdir(parents=True)
        self.state.mkdir()
        for name in (
            "pyproject.toml",
            "constraints.txt",
            "scripts/demo.sh",
            "scripts/test.sh",
            "scripts/environment.sh",
        ):
            shutil.copy(ROOT / name, self.root / name)
        self.python = folder / "python"
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)

    def run(self, *arguments: str, script: str = "demo.sh") -> tuple[int, list[str], str]:
        """Runs a script from elsewhere; returns its status, what the interpreter was asked, and the errors."""
        log = self.state / "log"
        log.unlink(missing_ok=True)
        environment = {**os.environ, "PYTHON": str(self.python), "LOG": str(log), "STATE": str(self.state)}
        done = subprocess.run(
            ["bash", str(self.root / "scripts" / script), *arguments],
            capture_output=True,
            text=True,
            cwd=self.state,
            env=environment,
        )
        return done.returncode, log.read_text().splitlines() if log.exists() else [], done.stderr


@pytest.fixture
def clone(tmp_path) -> Clone:
    return Clone(tmp_path)


def test_the_script_installs_once_and_then_only_analyses(clone):
    status, asked, _ = clone.run("my photo.jpg", "--out", "x.html")
    assert status == 0
    installs = [line for line in asked if "pip install" in line]
    assert len(installs) == 1 and "--constraint constraints.txt torch --editable ." in installs[0]
    assert installs[0].startswith(f"{clone.root}: ")
    started = f"{clone.state}: -m forgery_eval.demo my photo.jpg --out x.html"
    assert asked[-1] == started
    assert clone.run("my photo.jpg", "--out", "x.html") == (0, [started], "")


def test_an_interrupted_installation_resumes(clone):
    (clone.state / "offline").touch()
    status, asked, _ = clone.run()
    assert status == 1 and not any("forgery_eval.demo" in line for line in asked)
    (clone.state / "offline").unlink()
    status, asked, _ = clone.run()
    assert status == 0 and any("pip install" in line for line in asked) and not any("-m venv" in line for line in asked)


def test_another_recipe_or_folder_installs_again(clone):
    clone.run()
    with (clone.root / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert any("pip install" in line for line in clone.run()[1])
    assert len(clone.run()[1]) == 1
    clone.root = clone.root.rename(clone.root.with_name("moved"))
    assert any("pip install" in line for line in clone.run()[1])


def test_the_tests_need_more_and_serve_the_demonstration_too(clone):
    clone.run()
    status, asked, _ = clone.run("-x", script="test.sh")
    assert status == 0 and any("pip install" in line and "torchvision" in line for line in asked)
    assert any("install_torchvision_shim.py" in line for line in asked)
    assert asked[-1] == f"{clone.root}: -m pytest -n 2 --dist loadfile -m not slow -x"
    assert not any("pip install" in line for line in clone.run("--all", script="test.sh")[1])
    (clone.root / ".venv" / "installed-demo").unlink()
    assert len(clone.run()[1]) == 1


def test_an_old_interpreter_is_refused(clone):
    (clone.state / "old").touch()
    status, _, errors = clone.run()
    assert status == 1 and "is not Python 3.10 or newer; name one with PYTHON=" in errors
    assert not (clone.root / ".venv").exists()
