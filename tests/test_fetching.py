"""Images from the web: fetched within limits, and never from inside the user's network."""

import http.server
import io
import ipaddress
import json
import socket
import threading
import time
from functools import partial

import pytest
from PIL import Image

from forgery_eval.inference import run
from llava import fetching, sources
from llava.errors import ImageReadError
from llava.fetching import Limits, fetch_image, is_public
from tests.trained import picture

LOCAL = Limits(size=100_000, seconds=5, redirects=2, allows=lambda address: address.is_loopback)
buffer = io.BytesIO()
picture(1).save(buffer, "PNG")
PNG = buffer.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, body=PNG, status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Type": "image/png", "Content-Length": len(body), **headers}.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.server.seen.append(self.path)
        base = f"http://127.0.0.1:{self.server.server_port}"
        name, _, query = self.path.lstrip("/").partition("?")
        if name in ("one", "two", "three"):
            there = {"one": f"{base}/good.png", "two": "one", "three": "/two"}[name]
            self.answer(b"", 302, Location=there)
        elif name == "away":
            self.answer(b"", 301, Location=query)
        elif name == "nowhere":
            self.answer(b"", 307)
        elif name == "page":
            self.answer(b"<html>", **{"Content-Type": "text/html; charset=utf-8"})
        elif name == "packed":
            self.answer(PNG, **{"Content-Encoding": "gzip"})
        elif name == "large":
            self.answer(PNG, **{"Content-Length": 200_000})
        elif name == "endless":
            self.close_connection = True
            self.answer(b"x" * 300_000, **{"Content-Length": None})
        elif name == "cut":
            self.close_connection = True
            self.answer(PNG[:50], **{"Content-Length": len(PNG)})
        elif name == "slow":
            self.close_connection = True
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            with pytest.raises(OSError):
                for _ in range(200):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
                raise OSError
        elif name.startswith("good"):
            self.answer()
        else:
            self.answer(b"", 404)


@pytest.fixture(scope="module")
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def base(server):
    server.seen.clear()
    return f"http://127.0.0.1:{server.server_port}"


@pytest.mark.parametrize("path", ["good.png", "good.png?a=1&b=//x", "good é.png", "one", "two", "away?/good.png"])
def test_an_allowed_image_is_fetched(base, path):
    assert fetch_image(f"{base}/{path}", LOCAL) == PNG


def test_the_path_and_query_arrive_as_they_are(base, server):
    fetch_image(f"{base}/good//a/../b é?x=http://y//z#part", LOCAL)
    assert server.seen == ["/good//a/../b%20%C3%A9?x=http://y//z"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("three", "redirects more than 2 times"),
        ("away?ftp://127.0.0.1/a.png", "no http or https address"),
        ("away?file:///etc/passwd", "no http or https address"),
        ("away?http://10.0.0.1/a.png", r"10\.0\.0\.1 is 10\.0\.0\.1, which is no public address"),
        ("away?http://169.254.169.254/latest", "no public address"),
        ("nowhere", "redirects to nowhere"),
        ("page", "it is text/html, no image"),
        ("packed", "packed as gzip"),
        ("large", "more than 100,000 bytes"),
        ("endless", "more than 100,000 bytes"),
        ("cut", "broke off after 50 of"),
        ("absent", "the server answers 404"),
    ],
)
def test_what_is_beyond_the_limits_is_named(base, path, message):
    with pytest.raises(ImageReadError, match=message) as caught:
        fetch_image(f"{base}/{path}", LOCAL)
    assert str(caught.value).startswith(f"{base}/{path}: ")


def test_a_server_that_dribbles_does_not_hold_anyone(base):
    start = time.monotonic()
    with pytest.raises(ImageReadError, match=r"did not answer within 0\.3 seconds"):
        fetch_image(f"{base}/slow", Limits(seconds=0.3, allows=LOCAL.allows))
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://user:secret@127.0.0.1/a.png", "user or password"),
        ("http:///a.png", "no http or https address"),
        ("http://127.0.0.1:99999/a.png", "cannot be fetched"),
        ("http://no-such-host.invalid/a.png", "there is no host no-such-host.invalid"),
        ("http://" + "a" * 300 + "/a.png", "there is no host"),
        ("ftp://127.0.0.1/a.png", "no http or https address"),
    ],
)
def test_addresses_that_are_none_are_refused(url, message):
    with pytest.raises(ImageReadError, match=message):
        fetch_image(url, LOCAL)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0x7f.1", "2130706433", "[::1]", "[::ffff:127.0.0.1]"])
def test_this_machine_is_never_asked_by_default(base, server, host):
    with pytest.raises(ImageReadError, match="no public address"):
        fetch_image(f"http://{host}:{server.server_port}/good.png")
    assert not server.seen


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *((text, True) for text in ("93.184.216.34", "2606:2800:220:1::1", "64:ff9b::5db8:d822", "::ffff:8.8.8.8")),
        *((text, False) for text in ("10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1")),
        *((text, False) for text in ("0.0.0.0", "224.0.0.1", "255.255.255.255", "240.0.0.1", "198.18.0.1", "::")),
        *((text, False) for text in ("fe80::1", "fc00::1", "ff02::1", "::ffff:10.0.0.1", "64:ff9b::a00:1")),
        *((text, False) for text in ("2002:7f00:1::", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:db8::1")),
    ],
)
def test_which_addresses_are_public(address, public):
    assert is_public(ipaddress.ip_address(address)) == public


def answers(*rounds):
    """Looks up other addresses each time."""
    left = list(rounds)

    def look_up(host, port, **settings):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in left.pop(0)]

    return look_up


def test_the_connection_goes_to_the_checked_address(monkeypatch):
    asked = []

    def connect(address, timeout):
        asked.append(address)
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(fetching.socket, "getaddrinfo", answers(["93.184.216.34", "8.8.8.8"], ["127.0.0.1"]))
    monkeypatch.setattr(fetching.socket, "create_connection", connect)
    with pytest.raises(ImageReadError, match="Connection refused"):
        fetch_image("http://changing.example/a.png")
    assert asked == [("93.184.216.34", 80), ("8.8.8.8", 80)]


def test_a_name_with_one_private_address_is_refused(monkeypatch):
    monkeypatch.setattr(fetching.socket, "getaddrinfo", answers(["93.184.216.34", "192.168.0.7"]))
    with pytest.raises(ImageReadError, match=r"is 192\.168\.0\.7"):
        fetch_image("https://both.example/a.png")


def test_a_server_without_encryption_is_no_https_server(base, server):
    with pytest.raises(ImageReadError, match="cannot be fetched"):
        fetch_image(f"https://127.0.0.1:{server.server_port}/good.png", LOCAL)


# --- the command


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_detect_fetches_what_it_may(trained, base, server, tmp_path, monkeypatch, capsys):
    url, absent, out = f"{base}/good//x.png?é", f"{base}/absent", tmp_path / "out.jsonl"
    picture(1).save(tmp_path / "own.png")
    (tmp_path / "list.txt").write_text(f"own.png\n{url}\n{absent}\n", encoding="utf-8")
    given = ["--model-path", str(trained), "--device", "cpu", "--score-only", "--img_path", str(tmp_path / "list.txt")]
    assert run(given) == 3  # only the file: nothing is fetched without being allowed
    assert capsys.readouterr().err.count("addresses are not fetched") == 2 and not server.seen
    assert run([*given, "--allow-urls"]) == 3  # but nothing from this machine
    assert capsys.readouterr().err.count("no public address") == 2 and not server.seen
    monkeypatch.setattr(sources, "fetch_image", partial(fetch_image, limits=LOCAL))
    for _ in range(2):
        assert run([*given, "--allow-urls", "--json", str(out)]) == 3
        own, there, missing = lines(out)
        assert (there["image"], there["error"]) == (url, "") and missing["image"] == absent
        assert there["fake_probability"] == pytest.approx(own["fake_probability"], abs=1e-6)
    assert len(server.seen) == 2  # each once, also by the second run
    maps = tmp_path / "maps"
    alone = [*given[:-1], url, "--allow-urls", "--attention-map", str(maps)]
    alone.remove("--score-only")
    assert run(alone) == 0
    (drawn,) = maps.iterdir()
    assert Image.open(drawn).size[1] == 30 and drawn.name.startswith("http%3A%2F%2F127.0.0.1")
    assert len(server.seen) == 3  # what is drawn over is what was analysed
