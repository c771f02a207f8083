"""Servers that several tests share."""

from collections.abc import Iterator

import pytest

from llava import ForgeryDetector
from tests.serve.running import Running, StubSystem, running


@pytest.fixture(scope="session")
def detector() -> ForgeryDetector:
    """The embedded model, which gives every verdict."""
    return ForgeryDetector.from_pretrained(device="cpu", abstain=False)


@pytest.fixture(scope="session")
def embedded(detector: ForgeryDetector) -> Iterator[Running]:
    """The embedded model at work."""
    with running(detector) as server:
        yield server


@pytest.fixture
def stub() -> StubSystem:
    return StubSystem()


@pytest.fixture
def stubbed(stub: StubSystem) -> Iterator[Running]:
    """A system without answers at work."""
    with running(ForgeryDetector(stub), queue=16, upload_mb=1.0, megapixels=1.0) as server:
        yield server
