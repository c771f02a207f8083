"""Weights and scores that are no number are named as such, and cost nothing but their own image."""

import json
import math

import pytest
import torch

from forgery_eval.store import read_run
from llava import ForgeryDetector
from llava.errors import DataError
from llava.model.verdict import VerdictTokens
from tests.trained import picture

VALUES = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("options", [{"max_new_tokens": 5}, {"score_only": True}], ids=["answer", "score"])
def test_a_model_whose_weights_are_no_number_reports_an_error(trained, value, options):
    detector = ForgeryDetector.from_pretrained(trained, device="cpu")
    with torch.no_grad():
        detector.system.model.lm_head.weight.fill_(value)
    for report in [detector.analyze(picture(1), **options), *detector.analyze_many([picture(1)], **options)]:
        assert "no number" in report.error and report.label is None and report.fake_probability is None
        json.dumps(report.to_dict(), allow_nan=False)


def test_only_the_image_whose_score_is_no_number_fails(trained, monkeypatch):
    detector = ForgeryDetector.from_pretrained(trained, device="cpu")
    original = type(detector.system).analyze_batch

    def one_is_nan(self, prepared, options):
        reports = original(self, prepared, options)
        reports[1].fake_probability = math.nan
        return reports

    monkeypatch.setattr(type(detector.system), "analyze_batch", one_is_nan)
    reports = list(detector.analyze_many([picture(n) for n in range(3)], batch_size=3, score_only=True))
    assert [bool(report.error) for report in reports] == [False, True, False]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_a_stored_score_that_is_no_number_is_a_failure(tmp_path, value):
    file = tmp_path / "predictions.jsonl"
    file.write_text(f'{{"id": "a", "fake_probability": {value}}}\n{{"id": "b", "fake_probability": 0.25}}\n')
    _, found = read_run(file)
    assert found["a"].fake_probability is None and "no number" in found["a"].error
    assert found["b"].fake_probability == 0.25 and not found["b"].error


@pytest.mark.parametrize("value", ["true", "false", '"0.5"', "[0.5]", "1.5"])
def test_what_is_no_probability_is_refused(tmp_path, value):
    file = tmp_path / "predictions.jsonl"
    file.write_text(f'{{"id": "a", "fake_probability": {value}}}\n')
    with pytest.raises(DataError, match="line 1: fake_probability must be"):
        read_run(file)


def test_sure_scores_can_still_be_ranked():
    tokens = VerdictTokens((1,), 0, 1)
    found = [float(tokens.fake_probability(torch.tensor([0.0, logit]), 1.0)) for logit in (16.0, 18.0, 20.0, 30.0)]
    assert found == sorted(set(found)) and found[-1] < 1
