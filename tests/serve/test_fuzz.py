"""Requests that are made from the OpenAPI description, fit ones and unfit ones: none is a fault of the server."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from llava import ForgeryDetector
from tests.serve.running import StubSystem, running

schemathesis = pytest.importorskip("schemathesis")


def fuzz(url: str, requests: int) -> int:
    """Sends so many requests, equally many to each operation; returns how many were sent."""
    from schemathesis.generation import GenerationMode

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    posts = [operation for operation in operations if operation.method == "post"]
    sent = 0
    for operation in posts:
        for mode in modes:

            @settings(
                max_examples=requests // (len(posts) * len(modes)),
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case) -> None:
                nonlocal sent
                sent += 1
                answer = case.call()
                assert answer.status_code < 500, (case.as_curl_command(), answer.text)

            check()
    for operation in operations:
        if operation.method == "get" and operation.path != "/v1/models/{name}":
            assert operation.Case().call().status_code == 200
    return sent


@pytest.fixture(scope="module")
def server():
    with running(ForgeryDetector(StubSystem())) as server:
        yield server


def test_requests_of_every_kind_are_no_fault_of_the_server(server):
    assert fuzz(server.url, 120) >= 60


@pytest.mark.slow
def test_two_thousand_requests_are_no_fault_of_the_server(server):
    assert fuzz(server.url, 2400) >= 2000
