"""The whole core of a reference folder; another one is named by ``REFERENCE_GOLDENS``."""

import os
from pathlib import Path

import pytest

from tests.conftest import GOLDENS
from tests.reference import Outcome, Reference, compare_all

LEAST_COMPARISONS = 30


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    return compare_all(Reference(Path(os.environ.get("REFERENCE_GOLDENS", GOLDENS))))


def test_every_number_of_the_authors_code_is_met(outcome):
    print(outcome)
    assert not outcome.failed, str(outcome)
    assert not outcome.absent, str(outcome)


def test_there_was_enough_to_compare(outcome):
    assert outcome.compared >= LEAST_COMPARISONS, str(outcome)
