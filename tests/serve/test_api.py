"""The API over real HTTP: results, limits, batches, and what goes wrong."""

import io
import json
import logging
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import requests
from PIL import Image

from llava import ForgeryDetector
from llava.abstention import AbstentionRule
from llava.calibration import Calibration
from llava.report import ForgeryReport
from tests.serve.running import data_url, opened, png, running, sample, wait_until

SAMPLE = "05_fake_inpainting.jpg"


def events(response: requests.Response) -> list[tuple[str, dict]]:
    """Name and data of each event of a stream."""
    found = []
    for block in response.content.decode().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            found.append((lines.get("event", ""), json.loads(lines["data"])))
    return found


# --- results


def test_an_image_gets_the_detectors_report(embedded, detector):
    name, content = sample(SAMPLE)
    answer = embedded.analyze((name, content), attention="true", preview="true")
    assert answer.status_code == 200
    body = answer.json()
    assert (body["model"], body["system"], body["notice"]) == ("model", detector.system.name, detector.notice)
    (found,) = body["results"]
    own = detector.analyze(content, attention=True)
    assert found["name"] == name and found["report"]["text"] == own.text
    assert found["report"]["fake_probability"] == pytest.approx(own.fake_probability, abs=1e-4)
    with Image.open(io.BytesIO(content)) as image:
        assert opened(found["attention"]).size == opened(found["preview"]).size == image.size
    seen = np.asarray(opened(found["attention"]), float)
    wanted = (own.attention - own.attention.min()) / (own.attention.max() - own.attention.min())
    assert np.abs(seen / 255 - wanted).max() < 0.01
    assert found["provenance"]["traces"] == [] and "mask" not in found


def test_json_with_a_data_url_says_the_same(embedded):
    name, content = sample(SAMPLE)
    form = embedded.analyze((name, content)).json()["results"][0]
    body = {"image": data_url(content, "image/jpeg"), "options": {"max_new_tokens": 512}}
    answer = requests.post(f"{embedded.url}/v1/analyze", json=body, timeout=60).json()["results"][0]
    assert answer["report"]["text"] == form["report"]["text"]
    assert "attention" not in form


def test_several_images_have_each_their_result_or_error(stubbed):
    answer = stubbed.analyze(("a.png", png(20)), ("b.png", b"no image"), ("c.png", png(30)))
    first, bad, third = answer.json()["results"]
    assert answer.status_code == 200
    assert [first["report"]["fake_probability"], third["report"]["fake_probability"]] == [0.02, 0.03]
    assert bad["name"] == "b.png" and "no image in a known format" in bad["error"]["message"]


def test_options_reach_the_system(embedded, detector):
    name, content = sample(SAMPLE)
    report = embedded.analyze((name, content), options='{"score_only": true}').json()["results"][0]["report"]
    own = detector.analyze(content, score_only=True)
    assert report["text"] == "" and report["fake_probability"] == pytest.approx(own.fake_probability, abs=1e-4)


def test_masks_and_calibrated_scores_are_given_where_there_are_some(stub):
    def with_mask(prepared, options):
        mask = np.zeros((30, 40), bool)
        mask[:15] = True
        return [ForgeryReport("fake", 0.9, "detector", mask=mask) for _ in prepared]

    stub.analyze_batch = with_mask
    calibration = Calibration(2.0, 0.0, "detector")
    with running(ForgeryDetector(stub, calibration=calibration)) as server:
        found = server.analyze(("a.png", png()), mask="true").json()["results"][0]
        assert found["calibrated_probability"] == pytest.approx(0.75)
        values = np.asarray(opened(found["mask"]))
        assert values.shape == (30, 40) and values[0, 0] == 255 and values[29, 0] == 0 and found["marked"] == 0.5
        assert "mask" not in server.analyze(("a.png", png())).json()["results"][0]
    with running(ForgeryDetector(stub, calibration=Calibration(2.0, 0.0, "prompt"))) as server:
        assert server.analyze(("a.png", png())).json()["results"][0]["calibrated_probability"] is None


def test_stability_compares_the_image_with_what_becomes_of_it(stubbed, stub):
    answer = requests.post(f"{stubbed.url}/v1/stability", files={"image": ("a.png", png(100))}, timeout=60).json()
    assert [(row["step"], row["fake_probability"], row["holds"]) for row in answer["steps"]] == [
        ("jpeg", 0.1, True),
        ("resize", 0.07, True),
        ("crop", 0.09, True),
    ]
    stub.analyze_batch = lambda prepared, options: [
        ForgeryReport("fake" if width == 100 else "real", 0.5, "detector") for width in prepared
    ]
    answer = requests.post(f"{stubbed.url}/v1/stability", files={"image": ("a.png", png(100))}, timeout=60).json()
    assert [row["holds"] for row in answer["steps"]] == [True, False, False]
    for count, fields, status in ((1, {"attention": "true"}, 422), (2, {}, 413)):
        files = [("image", ("a.png", png()))] * count
        answer = requests.post(f"{stubbed.url}/v1/stability", files=files, data=fields, timeout=60)
        assert answer.status_code == status


# --- streams


def test_an_answer_streams_in_pieces(embedded, detector):
    name, content = sample(SAMPLE)
    found = events(embedded.analyze((name, content), stream="true"))
    assert found[-1][0] == "done" and found[-2][0] == "result"
    pieces = [data["text"] for kind, data in found if kind == "text"]
    result = found[-2][1]
    assert len(pieces) > 20 and "".join(pieces).strip() == result["report"]["text"]
    assert result["model"] == "model" and result["report"]["text"] == detector.analyze(content).text


def test_a_stream_of_several_images_has_a_result_each(stubbed):
    answer = stubbed.analyze(("a.png", png(20)), ("b.png", b"x"), stream="true")
    found = {data["index"]: data for kind, data in events(answer) if kind == "result"}
    assert found[0]["report"]["fake_probability"] == 0.02 and "error" in found[1]


def test_a_bad_image_is_refused_before_a_stream_begins(stubbed):
    assert stubbed.analyze(("a.png", b"x"), stream="true").status_code == 422


def test_a_verdict_that_is_not_given_does_not_leak_through_the_stream(detector):
    silent = ForgeryDetector(detector.system, AbstentionRule(low=None, high=None, error_level=0.1, confidence=0.9))
    with running(silent) as server:
        answer = server.analyze(sample(SAMPLE), stream="true")
    found = events(answer)
    assert [kind for kind, _ in found] == ["result", "done"]
    report = found[0][1]["report"]
    assert report["abstained"] and report["label"] is None and "inconclusive" in report["abstained_because"]


# --- what is refused


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it is large and holds nothing."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def tiff_bomb() -> bytes:
    """A TIFF of few pixels with many samples, which only one more library decodes."""
    import tifffile

    stream = io.BytesIO()
    values = np.zeros((900, 900, 40), np.uint16)
    tifffile.imwrite(stream, values, compression="zlib", photometric="minisblack", planarconfig="contig")
    return stream.getvalue()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
REFUSED = {
    "truncated": (sample(SAMPLE)[1][:3000], 422, "unreadable_image"),
    "empty": (b"", 422, "unreadable_image"),
    "text": (b"<svg><script>alert(1)</script></svg>", 422, "unreadable_image"),
    "postscript": (EPS, 422, "unreadable_image"),
    "bomb": (bomb(60000, 60000), 422, "too_many_pixels"),
    "large": (bomb(2000, 1000), 422, "too_many_pixels"),
    "tiff bomb": (tiff_bomb(), 422, "too_many_pixels"),
    "too many bytes": (bytes(2_000_000), 413, "too_large"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_fit_image_is_refused_with_the_reason(stubbed, stub, name):
    content, status, code = REFUSED[name]
    answer = stubbed.analyze(("a.png", content))
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"] and answer.json()["error"]["code"] == code
    assert stub.batches == [] and stubbed.analyze(("a.png", png())).status_code == 200


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({"image": "https://example.org/a.png"}, "addresses are never fetched"),
        ({"image": "file:///etc/passwd"}, "addresses are never fetched"),
        ({"image": "data:image/png;base64"}, "no comma"),
        ({"image": "data:image/png;base64,%%%"}, "no base64"),
        ({}, "there is no image"),
        ({"image": data_url(png()), "imge": 1}, "imge"),
        ({"image": data_url(png()), "options": {"score_onl": True}}, "score_onl"),
        ({"image": data_url(png()), "options": {"max_new_tokens": "9"}}, "max_new_tokens"),
        ({"image": data_url(png()), "options": {"max_new_tokens": 10**9}}, "at most 1024"),
        ({"image": data_url(png()), "options": {"samples": 4}}, "samples above 1 need a temperature"),
        ({"image": data_url(png()), "options": {"question": "why" * 9000}}, "at most 8000 characters"),
        ({"image": data_url(png()), "options": {"attention": True}}, "attention"),
    ],
)
def test_a_body_that_cannot_be_is_explained(stubbed, body, part):
    answer = requests.post(f"{stubbed.url}/v1/analyze", json=body, timeout=60)
    assert answer.status_code == 422 and part in answer.json()["error"]["message"], answer.text


@pytest.mark.parametrize(
    ("headers", "content", "status"),
    [
        ({"content-type": "text/plain"}, b"x", 415),
        ({"content-type": "application/json"}, b"{", 422),
        ({"content-type": "application/json"}, b"[" * 100_000, 422),
        ({"content-type": "application/json"}, b'{"image": "\\ud800"}', 422),
        ({"content-type": "multipart/form-data"}, b"x", 422),
        ({"content-type": "multipart/form-data; boundary=x"}, b"--x\r\nnonsense", 422),
        ({"content-type": "multipart/form-data; boundary=x; charset=klingon"}, b"--x--\r\n", 422),
    ],
)
def test_a_malformed_request_is_no_fault_of_the_server(stubbed, headers, content, status):
    answer = requests.post(f"{stubbed.url}/v1/analyze", data=content, headers=headers, timeout=60)
    assert answer.status_code == status and answer.json()["error"]["message"]


def test_more_images_than_a_request_may_have_are_refused(stubbed):
    for count in (17, 40):
        answer = stubbed.analyze(*[("a.png", png())] * count)
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "too_many_images"


def test_an_option_that_only_the_model_can_refuse_is_explained(embedded):
    answer = embedded.analyze(sample(SAMPLE), options='{"question": "<image> why?"}')
    assert answer.status_code == 422 and "must not hold <image>" in answer.json()["error"]["message"]


# --- batches and places


def test_requests_share_batches_and_each_gets_its_own_result(stubbed, stub):
    stub.gate.clear()
    with ThreadPoolExecutor(10) as clients:
        first = clients.submit(stubbed.analyze, ("a.png", png(500)))
        assert stub.begun.acquire(timeout=30)
        others = [clients.submit(stubbed.analyze, (f"{w}.png", png(w))) for w in range(20, 28)]
        odd = clients.submit(stubbed.analyze, ("odd.png", png(99)), options='{"seed": 5}')
        wait_until(lambda: len(stubbed.service.batcher._waiting) == 9)
        stub.gate.set()
        found = [future.result().json()["results"][0]["report"]["fake_probability"] for future in [first, *others, odd]]
    assert found == [0.5, *(w / 1000 for w in range(20, 28)), 0.099]
    assert sorted(map(len, stub.batches)) == [1, 1, 4, 4] and [99] in stub.batches


def test_a_full_server_says_so_and_when_to_come_again(stub):
    stub.gate.clear()
    with running(ForgeryDetector(stub), queue=2, images=2) as server, ThreadPoolExecutor(4) as clients:
        taken = [clients.submit(server.analyze, ("a.png", png(w))) for w in (20, 30)]
        wait_until(lambda: server.service.batcher._taken == 2)
        refused = server.analyze(("b.png", png()))
        assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        stub.gate.set()
        assert [future.result().status_code for future in taken] == [200, 200]
        assert server.analyze(("b.png", png()), ("c.png", png())).status_code == 200
        wait_until(lambda: server.service.batcher._taken == 0)


def half_a_request(server, content: bytes) -> socket.socket:
    """Sends an image and does not wait for the answer."""
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"image": data_url(content)}).encode()
    head = (
        f"POST /v1/analyze HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    client = socket.create_connection((host, int(port)))
    client.sendall(head.encode() + body)
    return client


def test_all_uploads_together_are_bounded(stub):
    with running(ForgeryDetector(stub), upload_mb=0.1) as server:
        host, port = server.url.removeprefix("http://").split(":")
        head = "POST /v1/analyze HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99000\r\n\r\n"
        clients = []
        for _ in range(16):
            clients.append(socket.create_connection((host, int(port)), timeout=60))
            clients[-1].sendall(head.encode() + bytes(98_000))
        wait_until(lambda: server.service.held_bytes == 16 * 98_000)
        assert server.analyze(("a.png", png() + bytes(60_000))).status_code == 429
        for client in clients:
            client.close()
        wait_until(lambda: server.service.held_bytes == 0)
        assert server.analyze(("a.png", png())).status_code == 200


def test_a_client_that_goes_frees_its_place_and_is_not_worked_for(stub):
    stub.gate.clear()
    with running(ForgeryDetector(stub), queue=3, images=3) as server, ThreadPoolExecutor(4) as clients:
        first = clients.submit(server.analyze, ("a.png", png(20)))
        assert stub.begun.acquire(timeout=30)
        leaving = [half_a_request(server, png(w)) for w in (50, 60)]
        wait_until(lambda: len(server.service.batcher._waiting) == 2)
        for client in leaving:
            client.close()
        wait_until(lambda: server.service.batcher._taken == 1)
        second = clients.submit(server.analyze, ("b.png", png(30)))
        wait_until(lambda: len(server.service.batcher._waiting) == 1)
        stub.gate.set()
        assert first.result().status_code == second.result().status_code == 200
    assert stub.batches == [[20], [30]]


def test_an_answer_that_nobody_waits_for_is_not_decoded_to_its_end(embedded, detector, monkeypatch):
    steps = []
    forward = type(detector.system.model).forward
    monkeypatch.setattr(
        type(detector.system.model), "forward", lambda self, *a, **o: (steps.append(1), forward(self, *a, **o))[1]
    )
    url = f"{embedded.url}/v1/analyze"
    files = {"image": sample(SAMPLE)}
    with requests.post(url, files=files, data={"stream": "true"}, stream=True, timeout=60) as answer:
        next(answer.iter_content(64))
    wait_until(lambda: embedded.service.batcher._taken == 0)
    before = len(steps)
    wait_until(lambda: embedded.service.batcher.is_working and not embedded.service.batcher._waiting)
    time.sleep(0.3)
    assert len(steps) - before <= 3
    whole = len(detector.system.tokenizer(detector.analyze(sample(SAMPLE)[1]).text).input_ids)
    assert before < whole


def test_a_request_that_takes_too_long_is_given_up(stub):
    stub.gate.clear()
    with running(ForgeryDetector(stub), timeout=0.3) as server:
        answer = server.analyze(("a.png", png()))
        assert answer.status_code == 504 and "0.3 s" in answer.json()["error"]["message"]
        wait_until(lambda: server.service.batcher._taken == 0)
        stub.gate.set()
        assert server.analyze(("a.png", png())).status_code == 200


def test_an_upload_that_does_not_arrive_is_given_up(stub):
    with running(ForgeryDetector(stub), upload_timeout=0.3) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as client:
            client.sendall(b"POST /v1/analyze HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
            client.sendall(b"Content-Length: 100\r\n\r\n{")
            assert b" 408 " in client.recv(200)
        wait_until(lambda: server.service.batcher._taken == 0)


def test_a_bug_in_the_analysis_hits_only_its_own_image(stubbed, stub, caplog):
    stub.gate.clear()
    with caplog.at_level(logging.ERROR), ThreadPoolExecutor(5) as clients:
        first = clients.submit(stubbed.analyze, ("a.png", png(500)))
        assert stub.begun.acquire(timeout=30)
        others = [clients.submit(stubbed.analyze, ("a.png", png(w))) for w in (12, 13, 14)]
        wait_until(lambda: len(stubbed.service.batcher._waiting) == 3)
        stub.gate.set()
        assert [future.result().status_code for future in [first, *others]] == [200, 200, 500, 200]
    assert "a mistake in the code" in caplog.text and "KeyError" in caplog.text
    assert stubbed.analyze(("a.png", png())).status_code == 200
    assert "mistake" not in others[1].result().text


# --- keys, health, counters, texts


def test_keys_are_asked_for(stub):
    with running(ForgeryDetector(stub), keys=("one", "two")) as server:
        assert server.analyze(("a.png", png())).status_code == 401
        for key, status in (("two", 200), ("three", 401), ("", 401)):
            headers = {"Authorization": f"Bearer {key}"}
            answer = requests.get(f"{server.url}/v1/models", headers=headers, timeout=60)
            assert answer.status_code == status
        assert requests.get(f"{server.url}/healthz", timeout=60).status_code == 200


def test_health_and_counters(stubbed, stub):
    assert requests.get(f"{stubbed.url}/healthz", timeout=60).json() == {"status": "ok"}
    assert requests.get(f"{stubbed.url}/readyz", timeout=60).json()["status"] == "ready"
    stubbed.analyze(("a.png", png()))
    stubbed.analyze(("a.png", b"x"))
    text = requests.get(f"{stubbed.url}/metrics", timeout=60).text
    assert 'forgery_requests_total{path="/v1/analyze",status="200"} 1.0' in text
    assert 'forgery_requests_total{path="/v1/analyze",status="422"} 1.0' in text
    assert 'forgery_images_total{verdict="fake"} 1.0' in text and "forgery_batch_images_count 1.0" in text
    assert "forgery_images_in_work 0.0" in text
    stubbed.service.stopping = True
    assert requests.get(f"{stubbed.url}/readyz", timeout=60).status_code == 503
    assert stubbed.analyze(("a.png", png())).status_code == 503


def test_a_dead_model_is_not_ready(stubbed):
    stubbed.service.batcher.close()
    assert requests.get(f"{stubbed.url}/readyz", timeout=60).status_code == 503
    assert stubbed.analyze(("a.png", png())).status_code == 503


def test_the_documentation_names_what_there_is(stubbed):
    described = requests.get(f"{stubbed.url}/openapi.json", timeout=60).json()
    assert {"/v1/analyze", "/v1/stability", "/v1/chat/completions", "/v1/models", "/healthz"} <= set(described["paths"])
    content = described["paths"]["/v1/analyze"]["post"]["requestBody"]["content"]
    assert set(content) == {"multipart/form-data", "application/json"}
    page = requests.get(f"{stubbed.url}/docs", timeout=60)
    assert page.status_code == 200 and "/v1/analyze" in page.text and "//cdn" not in page.text


def test_no_answer_is_a_page_and_the_page_runs_no_foreign_script(stubbed):
    evil = "<script>alert(1)</script>.png"
    answer = stubbed.analyze((evil, png()))
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.json()["results"][0]["name"] == evil
    policy = requests.get(stubbed.url, timeout=60).headers["content-security-policy"]
    assert "script-src 'self'" in policy and "unsafe" not in policy and "default-src 'none'" in policy


def test_files_are_answered_at_once(stubbed):
    """Their answers listen for the client's leaving, while what is left of the request is read."""
    for path in ("/static/page.js", "/samples/01_real_garden.png"):
        answer = requests.get(f"{stubbed.url}{path}", timeout=60)
        assert answer.status_code == 200 and answer.elapsed.total_seconds() < 10


def test_sample_names_lead_nowhere_else(stubbed):
    for name in ("samples.json", "..%2f..%2fpyproject.toml", "%2e%2e/pyproject.toml"):
        assert requests.get(f"{stubbed.url}/samples/{name}", timeout=60).status_code == 404
    for name in ("../html.py", "..%2fhtml.py"):
        assert requests.get(f"{stubbed.url}/static/{name}", timeout=60).status_code == 404


def test_the_models_thread_ends_with_its_server(stub):
    def threads() -> int:
        return sum(thread.name == "model" for thread in threading.enumerate())

    before = threads()
    with running(ForgeryDetector(stub)):
        assert threads() == before + 1
    assert threads() == before
