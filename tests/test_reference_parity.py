"""The whole core of a reference folder; another one is named by ``REFERENCE_GOLDENS``."""

import os
import warnings
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
    if outcome.absent:
        warnings.warn(f"not in the folder, so not compared: {', '.join(outcome.absent)}", stacklevel=1)
    assert not outcome.failed, str(outcome)


def test_there_was_enough_to_compare(outcome):
    assert outcome.compared >= LEAST_COMPARISONS, str(outcome)


def test_the_bundled_folder_lacks_nothing(bundled):
    assert compare_all(bundled).absent == []


def test_absent_tensors_are_named(bundled):
    poorer = Reference(bundled.folder)
    poorer.tensors = {
        name: value for name, value in bundled.tensors.items() if name not in ("proj/clip", "ce/short_logits")
    }
    outcome = compare_all(poorer)
    assert "proj/clip" in outcome.absent and any("ce/short_logits" in name for name in outcome.absent)
    assert not outcome.failed
