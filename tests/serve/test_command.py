"""The verb ``forgery serve``: its options, and what it says when it cannot begin."""

import socket

import pytest

from llava import ForgeryDetector
from llava import __main__ as front
from llava.errors import OptionError
from llava.serve import command
from llava.serve.command import build_parser, open_service, read_keys
from tests.serve.running import StubSystem


@pytest.fixture
def opened(monkeypatch):
    """A stub in the place of every model, and with what it was opened."""
    asked: list[dict] = []
    monkeypatch.setattr(command, "open_detector", lambda _, **rule: asked.append(rule) or ForgeryDetector(StubSystem()))
    return asked


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--port", "70000"], "--port must be from 0 to 65535"),
        (["--api-keys", "{folder}/absent"], "absent"),
        (["--api-keys", "{folder}/empty"], "holds no key"),
        (["--batch-wait-ms", "-1"], "--batch-wait-ms must be from 0"),
        (["--max-images", "20", "--queue", "10"], "must not be above --queue"),
        (["--host", "not a host"], "cannot be listened on"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(arguments, part, opened, tmp_path, capsys):
    (tmp_path / "empty").write_text("# no key\n\n")
    assert front.main(["serve", *(word.format(folder=tmp_path) for word in arguments)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and part in line


def test_a_port_that_is_taken_is_named(opened, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert front.main(["serve", "--port", str(port)]) == 1
    error = capsys.readouterr().err
    assert f"127.0.0.1:{port} cannot be listened on" in error and "choose another --port" in error


def test_a_missing_package_is_named_with_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "uvicorn" else object())
    assert front.main(["serve"]) == 1
    assert "the server needs uvicorn: pip install" in capsys.readouterr().err


def test_options_reach_the_service(opened, tmp_path):
    given = ["--queue", "9", "--max-images", "3", "--megapixels", "2", "--name", "own", "--no-abstain"]
    service = open_service(build_parser().parse_args(given))
    assert (service.name, service.limits.queue, service.limits.images, service.limits.pixels) == (
        "own",
        9,
        3,
        2_000_000,
    )
    assert opened == [{"calibration": None, "abstain": False}]
    assert open_service(build_parser().parse_args(["--model-path", str(tmp_path / "mine")])).name == "mine"


def test_only_this_machine_is_served_unless_told_otherwise():
    assert build_parser().parse_args([]).host == "127.0.0.1"


def test_keys_are_read_one_a_line(tmp_path):
    (tmp_path / "keys").write_text("# ours\none\n\n two \n")
    assert read_keys(tmp_path / "keys") == ["one", "two"] and read_keys(None) == []
    (tmp_path / "none").write_text("\n")
    with pytest.raises(OptionError):
        read_keys(tmp_path / "none")
