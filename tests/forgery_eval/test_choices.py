"""Choices between images, scored by P(fake)."""

from pathlib import Path

import numpy as np
import pytest

from forgery_eval.benchmarks import Sample
from forgery_eval.metrics.choices import choice_metrics
from forgery_eval.metrics.scoring import Scored
from forgery_eval.store import Prediction
from llava.labels import FAKE, REAL


def rows(scores: dict[str, float], chosen_from: dict[str, tuple[tuple[str, ...], ...]]) -> list[Scored]:
    """Images whose names begin with their class."""
    found = []
    for name, score in scores.items():
        label = FAKE if name.startswith("fake") else REAL
        sample = Sample(name, Path(name), label, "set", chosen_from=chosen_from.get(name, ()))
        found.append(Scored(sample, Prediction(name, label), score, "", None, score))
    return found


def accuracy(scores: dict[str, float], **chosen_from: tuple[tuple[str, ...], ...]) -> tuple[int, float | None]:
    found = choice_metrics(rows(scores, chosen_from), draws=20, seed=0)["metrics"]
    return found["choices"], found["accuracy"]


@pytest.mark.parametrize(
    ("scores", "right"),
    [
        ({"fake": 0.4, "real": 0.3}, 1.0),  # both below one half: a choice asks which, not whether
        ({"fake": 0.6, "real": 0.7}, 0.0),
        ({"fake": 0.5, "real": 0.5}, 0.0),
        ({"fake": 0.9, "real": np.nan}, 0.0),
    ],
)
def test_the_fake_one_has_the_higher_score(scores, right):
    assert accuracy(scores, fake=(("real",),)) == (1, right)


def test_a_real_one_among_fakes_has_the_lowest_score():
    scores = {"real": 0.5, "fake1": 0.6, "fake2": 0.7, "fake3": 0.4}
    assert accuracy(scores, real=(("fake1", "fake2"), ("fake1", "fake3"))) == (2, 0.5)


def test_a_choice_that_is_not_all_there_does_not_count():
    assert accuracy({"fake": 0.9, "real": 0.1}, fake=(("real",), ("elsewhere",))) == (1, 1.0)
    found = choice_metrics(rows({"fake": 0.9}, {"fake": (("elsewhere",),)}), draws=20, seed=0)
    assert found["metrics"] == {"choices": 0, "accuracy": None} and found["undefined"]["accuracy"]


def test_without_any_score_there_is_no_accuracy():
    found = choice_metrics(rows({"fake": np.nan, "real": np.nan}, {"fake": (("real",),)}), draws=20, seed=0)
    assert found["metrics"] == {"choices": 1, "accuracy": None}
    assert found["undefined"] == {"accuracy": "no image has a score"}
