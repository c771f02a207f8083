"""FakeVLM against the numbers of its authors' code; ``REFERENCE_GOLDENS`` names another folder of the same form."""

import os
import warnings
from pathlib import Path

import pytest

from tests.parity.fakevlm_reference import FakeVLMReference, compare_all
from tests.reference import Outcome

BUNDLED = Path(__file__).parents[1] / "data" / "goldens_fakevlm"
FOLDER = Path(os.environ.get("REFERENCE_GOLDENS", BUNDLED))
LEAST_COMPARISONS = 30


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    return compare_all(FakeVLMReference(FOLDER))


def test_every_number_of_the_authors_code_is_met(outcome):
    print(outcome)
    if outcome.absent:
        warnings.warn(f"not in the folder, so not compared: {', '.join(outcome.absent)}", stacklevel=1)
    assert not outcome.failed, str(outcome)


def test_there_was_enough_to_compare(outcome):
    assert outcome.compared >= LEAST_COMPARISONS, str(outcome)
