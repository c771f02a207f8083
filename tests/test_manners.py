"""What commands write where: results to standard output, the rest to standard error, and how much of it."""

import io
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from llava import __main__ as front
from llava import cli
from llava.cli import OptionParser, inform, is_quiet, is_verbose, log, note, progress, quiet_libraries, run_cli
from tests.trained import picture

ROOT = Path(__file__).parents[1]
PATHS = [[name] for name, verb in front.VERBS.items() if verb.verbs is None] + [["data", name] for name in front.DATA]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def as_before():
    yield
    cli.set_messages()


@pytest.mark.parametrize("path", [path for path in PATHS if path != ["train"]], ids=" ".join)
def test_every_command_says_how_much_it_says(path, capsys):
    with pytest.raises(SystemExit):
        sys.exit(front.main([*path, "--help"]))
    text = capsys.readouterr().out
    assert "--quiet" in text and "--verbose" in text


def test_quiet_keeps_errors_and_drops_remarks(capsys):
    for words, shown in (([], ["wrong", "told", "note: known"]), (["--quiet"], ["wrong"])):
        OptionParser().parse_args(words)
        log("wrong")
        inform("told")
        note("known")
        assert capsys.readouterr().err.splitlines() == shown


@pytest.mark.parametrize(
    ("words", "quiet", "verbose"),
    [
        (["sub"], False, False),
        (["--quiet", "sub"], True, False),
        (["sub", "--quiet"], True, False),
        (["-v", "sub"], False, True),
        (["sub", "--verbose"], False, True),
    ],
)
def test_it_holds_before_and_after_a_command_below(words, quiet, verbose):
    parser = OptionParser()
    parser.add_subparsers(parser_class=OptionParser).add_parser("sub")
    parser.parse_args(words)
    assert (is_quiet(), is_verbose()) == (quiet, verbose)


def test_quiet_and_verbose_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        OptionParser(prog="x").parse_args(["--quiet", "-v"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "not allowed with" in line and line.endswith("see x --help")


@pytest.mark.parametrize(
    ("stream", "words", "drawn"),
    [(Terminal, [], True), (Terminal, ["--quiet"], False), (io.StringIO, [], False), (Terminal, ["-v"], True)],
)
def test_a_bar_is_for_terminals_and_messages_stand_above_it(monkeypatch, stream, words, drawn):
    monkeypatch.setattr(sys, "stderr", stream())
    OptionParser().parse_args(words)
    bar = progress(range(3), unit=" images", mininterval=0)
    for number in bar:
        if number == 1:
            log("wrong")
    text = sys.stderr.getvalue()
    assert ("images" in text) == drawn
    if drawn:
        before, _, after = text.partition("wrong\n")
        assert before.endswith("\r") and "3/3" in after.rpartition("\r")[2]  # the bar is drawn again below
    else:
        assert text == "wrong\n"


def test_libraries_are_heard_only_if_all_is_wanted(recwarn):
    library = logging.getLogger("bitsandbytes.backends")
    for words, heard in (([], False), (["-v"], True), (["--quiet"], False)):
        OptionParser().parse_args(words)
        with quiet_libraries():
            assert library.isEnabledFor(logging.WARNING) == heard
            warnings.warn("chatter", UserWarning, stacklevel=1)
        assert len(recwarn) == heard
        recwarn.clear()
        library.parent.setLevel(logging.CRITICAL)


def test_warnings_for_programmers_are_no_message_of_a_command(capsys):
    def command() -> None:
        warnings.warn("chatter", UserWarning, stacklevel=1)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert run_cli(command) == 0
    assert not seen and capsys.readouterr().err == ""


def forgery(*lines: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs some command lines in one new process."""
    program = (
        f"import sys\nfrom llava.__main__ import main\nfor words in {lines!r}:\n    assert main(words) == 0, words"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)


@pytest.mark.parametrize("words", [[], ["-v"]], ids=["plain", "verbose"])
def test_no_library_speaks_in_any_command(trained, tmp_path, words):
    picture(1).save(tmp_path / "a.png")
    model = str(trained)
    done = forgery(
        ["merge", "--model-path", model, "--save-model-path", str(tmp_path / "merged"), *words],
        ["detect", str(tmp_path / "a.png"), "--model-path", model, "--device", "cpu", "--score-only", *words],
        ["data", "show", "tests/data/goldens/train_mixed.json", "-n", "1", "--model_name_or_path", model, *words],
    )
    assert "P(fake)" in done.stdout
    if words:
        assert "Loading weights" in done.stderr and "Writing model shards" in done.stderr
    else:
        assert done.stderr == ""


def test_a_quiet_command_of_annotation_says_nothing(tmp_path, capsys):
    for label in ("real", "fake"):
        (tmp_path / "tree" / label).mkdir(parents=True)
        picture(len(label)).save(tmp_path / "tree" / label / "a.png")
    given = ["data", "from-folder", "--input", str(tmp_path / "tree"), "--to", "train", "--output", str(tmp_path / "t")]
    assert front.main(given) == 0
    printed, said = capsys.readouterr()
    assert "form: verdict" in said and "records: 2" in printed
    assert front.main([*given, "--quiet"]) == 0
    assert capsys.readouterr() == (printed, "")
