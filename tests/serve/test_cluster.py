"""Several processes behind one port, as users start them."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import requests

from llava import __main__ as front
from llava.serve import cluster
from llava.serve.command import build_parser
from llava.serve.limits import Limits
from tests.serve.running import sample


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return int(own.getsockname()[1])


@pytest.mark.slow
def test_two_processes_answer_on_one_port_and_end_together():
    pytest.importorskip("ray")
    port = free_port()
    command = [sys.executable, "-m", "llava", "serve", "--replicas", "2", "--port", str(port), "--device", "cpu"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    elsewhere = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}  # no cluster answers there, and none is asked
    process = subprocess.Popen(command, env=elsewhere, **quiet)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 300
        while not is_ready(url):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(1)
        for _ in range(4):
            answer = requests.post(f"{url}/v1/analyze", files={"image": sample("05_fake_inpainting.jpg")}, timeout=120)
            assert answer.status_code == 200 and answer.json()["results"][0]["report"]["text"]
        process.send_signal(signal.SIGTERM)
        process.wait(120)
        with pytest.raises(requests.ConnectionError):
            requests.get(f"{url}/readyz", timeout=10)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def is_ready(url: str) -> bool:
    try:
        answer = requests.get(f"{url}/readyz", timeout=10)
    except requests.RequestException:
        return False
    return answer.status_code == 200 and answer.json()["status"] == "ready"


def test_without_ray_it_is_explained(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert front.main(["serve", "--replicas", "2"]) == 1
    assert "'.[cluster]'" in capsys.readouterr().err


def test_more_processes_than_gpus_are_refused(monkeypatch, capsys):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "init", lambda address, **settings: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 1.0})
    arguments = build_parser().parse_args(["--replicas", "2"])
    with pytest.raises(ValueError, match="only 1 GPUs"):
        cluster.run_replicas(arguments, Limits(), [])
