"""The front door: every verb is found and helps, imports what it uses, and tells bugs from mistakes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import llava
from llava import __main__ as front
from llava.assets import SAMPLES
from tests.trained import picture

ROOT = Path(__file__).parents[1]
PATHS = [[name] for name, verb in front.VERBS.items() if verb.verbs is None] + [["data", name] for name in front.DATA]
BUGS = (RuntimeError, ValueError, KeyError, OSError)


def forgery(*arguments: object, code: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the front door in a process of its own, after some code."""
    given = [str(argument) for argument in arguments]
    program = f"import sys\n{code}\nfrom llava.__main__ import main\nsys.exit(main({given!r}))"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)


# --- finding a verb


@pytest.mark.parametrize("arguments", [["--help"], ["-h"]])
def test_help_lists_every_verb_in_a_line(capsys, arguments):
    assert front.main(arguments) == 0
    text = capsys.readouterr().out
    for name, verb in front.VERBS.items():
        assert re.search(rf"^  {name} +{re.escape(verb.help)}$", text, flags=re.MULTILINE)


def test_data_lists_its_verbs(capsys):
    assert front.main(["data", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: forgery data VERB") and all(f"  {name} " in text for name in front.DATA)


@pytest.mark.parametrize("arguments", [[], ["data"]])
def test_without_a_verb_the_help_is_shown_and_the_status_says_so(capsys, arguments):
    assert front.main(arguments) == 2
    assert "VERB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["detct"], "unknown verb 'detct'; did you mean detect?; see forgery --help"),
        (["data", "validat"], "unknown verb 'validat'; did you mean validate?; see forgery data --help"),
        (["xyzzy"], "unknown verb 'xyzzy'; see forgery --help"),
    ],
)
def test_an_unknown_verb_is_answered_with_the_nearest(capsys, arguments, message):
    assert front.main(arguments) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_the_version_is_that_of_the_package(capsys):
    assert front.main(["--version"]) == 0
    assert capsys.readouterr().out == f"forgery {llava.__version__}\n"
    assert re.match(r"\d+\.\d+", llava.__version__)


def test_python_m_llava_is_the_same():
    done = subprocess.run([sys.executable, "-m", "llava", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.startswith("usage: forgery VERB")


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_every_verb_has_help(path, capsys):
    try:
        status = front.main([*path, "--help"])
    except SystemExit as end:
        status = end.code
    assert status == 0
    assert "usage" in capsys.readouterr().out.lower()


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["detect", "--help"], ["eval", "--help"], ["merge", "--help"], ["serve", "--help"]],
    ids=" ".join,
)
def test_help_loads_no_torch(arguments):
    code = "import atexit\natexit.register(lambda: print('torch' in sys.modules))"
    done = forgery(*arguments, code=code)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False", done.stderr


def test_an_image_is_analysed_without_what_only_others_need():
    code = (
        "import atexit\n"
        "heavy = {'peft', 'bitsandbytes', 'deepspeed', 'datasets', 'ray', 'nltk', 'pandas', 'matplotlib', 'sklearn', "
        "'fastapi', 'starlette', 'uvicorn', 'timm', 'skimage', 'cv2', 'transformers.trainer', "
        "'transformers.pipelines', 'torch.utils.tensorboard'}\n"
        "atexit.register(lambda: print(sorted(heavy & set(sys.modules))))"
    )
    done = forgery("detect", min(SAMPLES.glob("*.png")), "--score-only", "--device", "cpu", code=code)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_a_verb_loads_only_its_own_package():
    code = (
        "import atexit\n"
        "atexit.register(lambda: print([p for p in ('forgery_eval', 'mmfr_generation', 'torch') if p in sys.modules]))"
    )
    assert forgery("data", "validate", "--help", code=code).stdout.splitlines()[-1] == "['mmfr_generation']"
    assert forgery("doctor", "--help", code=code).stdout.splitlines()[-1] == "[]"


# --- the image of detect


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["photo.jpg"], ["--img_path", "photo.jpg"]),
        (["photos", "--json", "out.jsonl"], ["--img_path", "photos", "--json", "out.jsonl"]),
        (["--json", "out.jsonl", "--img_path", "a"], ["--json", "out.jsonl", "--img_path", "a"]),
        (["--img-path=a"], ["--img-path=a"]),
        (["-", "--sort", "score"], ["--img_path", "-", "--sort", "score"]),
        (["--help"], ["--help"]),
    ],
)
def test_an_image_by_position_is_the_option(given, wanted):
    assert front.name_image(given) == wanted


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a.jpg", "--img_path", "b.jpg"], "name the image once"),
        (["--score-only", "a.jpg"], "before the options: forgery detect IMAGE"),
        ([], "before the options: forgery detect IMAGE"),
    ],
)
def test_an_image_that_is_not_clear_is_explained(capsys, given, message):
    assert front.main(["detect", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_detect_takes_an_image_by_position(default_model, capsys):
    assert front.main(["detect", str(SAMPLES / "02_real_people.jpg"), "--device", "cpu", "--score-only"]) == 0
    assert "P(fake)" in capsys.readouterr().out


# --- bugs and mistakes


@pytest.fixture
def world(tmp_path) -> Path:
    """Images of both classes."""
    for label in ("real", "fake"):
        (tmp_path / "images" / label).mkdir(parents=True)
        picture(len(label)).save(tmp_path / "images" / label / "a.png")
    return tmp_path


COMMANDS = {
    "detect": (["detect", "{images}/real/a.png"], "llava.detector.ForgeryDetector.from_pretrained"),
    "eval": (
        ["eval", "--dataset_path", "{images}", "--result_folder", "{world}/results"],
        "llava.detector.ForgeryDetector.from_pretrained",
    ),
    "compare": (["compare", "{world}/a", "{world}/b"], "forgery_eval.matching.read_metrics"),
    "serve": (["serve"], "llava.detector.ForgeryDetector.from_pretrained"),
    "train": (["train", "--recipe", "fakereasoning", "--dry-run"], "llava.train.launcher.read_recipe"),
    "merge": (["merge", "--model-path", "m", "--save-model-path", "{world}/merged"], "llava.merge.merge"),
    "export": (["export", "--model-path", "m", "--save-model-path", "{world}/exported"], "llava.export.export"),
    "doctor": (["doctor"], "llava.doctor.examine"),
    **{
        f"data {name}": (["data", name], verb.command.replace(":main", ".build_parser"))
        for name, verb in front.DATA.items()
    },
}


def test_every_verb_has_a_command_here():
    assert set(COMMANDS) == set(map(" ".join, PATHS))


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_bug_in_a_verb_keeps_its_traceback(name, bug, world, default_model, monkeypatch):
    command, target = COMMANDS[name]

    def broken(*arguments: object, **options: object) -> None:
        raise bug("injected")

    monkeypatch.setattr(target, broken)
    filled = [word.format(images=world / "images", world=world) for word in command]
    with pytest.raises(bug, match="injected"):
        front.main(filled)


def test_the_traceback_of_a_bug_is_printed(world):
    code = (
        "from llava.detector import ForgeryDetector\n"
        "def broken(*arguments, **options): raise ValueError('injected')\n"
        "ForgeryDetector.from_pretrained = broken"
    )
    done = forgery("detect", world / "images" / "real", code=code)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and done.stderr.rstrip().endswith("ValueError: injected")


MISTAKES = {
    "detect": ["detect", "{world}/absent.jpg"],
    "eval": ["eval", "--dataset_path", "{world}/absent", "--result_folder", "{world}/results"],
    "compare": ["compare", "{world}/absent", "{world}/absent"],
    "serve": ["serve", "--api-keys", "{world}/absent"],
    "train": ["train", "--recipe", "no_such_recipe"],
    "merge": ["merge", "--model-path", "{world}/absent", "--save-model-path", "{world}/merged"],
    "export": ["export", "--model-path", "{world}/absent", "--save-model-path", "{world}/exported"],
    "data show": ["data", "show", "{world}/absent.json", "--tokenizer", "{world}"],
    "data validate": ["data", "validate", "{world}/absent.json"],
    "data convert": ["data", "convert", "{world}/absent.json", "--to", "fakevlm", "--out", "{world}/o.json"],
    "data download": ["data", "download", "--parts", "0", "--output-folder", "{world}/MMFR"],
    "data requests": ["data", "requests", "--image-folder", "{world}/absent", "--label", "fake", "--dry-run"],
    "data batch": ["data", "batch", "run", "--input-folder", "{world}/absent", "--output-folder", "{world}/out"],
    "data reasoning": ["data", "reasoning", "--input", "{world}/absent", "--label", "fake", "--output", "{world}/o"],
    "data cot": ["data", "cot", "--reasoning", "{world}/absent", "--form", "verdict", "--output", "{world}/o"],
    "data from-folder": ["data", "from-folder", "--input", "{world}/absent", "--to", "train", "--output", "{world}/o"],
    "data synthetic": ["data", "synthetic", "--out", "{world}/s", "--train", "-1", "--eval", "1"],
    "data forge": ["data", "forge", "--images", "{world}/absent", "--out", "{world}/f"],
    "data tokenizer": ["data", "tokenizer", "{world}/absent.json", "--output_dir", "{world}/own"],
    "doctor": ["doctor", "--jsn"],
}


def test_every_verb_has_a_mistake_here():
    assert set(MISTAKES) == set(COMMANDS)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_explained_in_one_line(name, world, default_model, capsys):
    filled = [word.format(world=world) for word in MISTAKES[name]]
    try:
        status = front.main(filled)
    except SystemExit as end:
        status = end.code
    assert status in (1, 2)
    errors = [line for line in capsys.readouterr().err.splitlines() if line]
    assert errors and "error: " in errors[-1]
    assert len([line for line in errors if "error" in line]) == 1 and not any("Traceback" in line for line in errors)
