"""Metrics of texts: the authors' numbers, other libraries' arithmetic, and edge cases."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgery_eval.metrics.calibration import Calibration, fit, is_for_fitting
from forgery_eval.metrics.ratios import ratio_part
from forgery_eval.metrics.reasoning import attribute_sums, mean_with_interval, text_metrics
from forgery_eval.metrics.similarity import TextSimilarity
from llava.systems.base import EvaluatedAnswer, EvaluationProtocol
from llava.systems.fakereasoning import protocol

DATA = Path(__file__).parents[1] / "data"
AUTHORS = json.loads((DATA / "metrics.json").read_text())
CSS = AUTHORS["css"]


@pytest.fixture(scope="module")
def clip() -> TextSimilarity:
    return TextSimilarity(str(DATA / "clip_full"), device="cpu")


@pytest.mark.parametrize("pair", AUTHORS["text_pairs"], ids=lambda pair: pair["hyp"][:20])
def test_text_metrics_are_those_of_the_authors(pair):
    metrics = text_metrics(pair["hyp"], pair["ref"])
    assert metrics["bleu_1"] == pytest.approx(pair["bleu1"], abs=1e-12)
    assert metrics["rouge_l"] == pytest.approx(pair["rougeL"], abs=1e-12)


WORDS = st.lists(st.sampled_from(["a", "bb", "c1", "d"]), max_size=12)


def bleu_by_hand(words, wanted, order) -> float:
    if not words:
        return 0.0
    product = 1.0
    for n in range(1, order + 1):
        found = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        there = Counter(tuple(wanted[i : i + n]) for i in range(len(wanted) - n + 1))
        product *= (found & there).total() / max(1, found.total())
    brevity = 1.0 if len(words) > len(wanted) else math.exp(1 - len(wanted) / len(words))
    return brevity * product ** (1 / order)


def longest_common(a, b) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@given(WORDS, WORDS)
@settings(max_examples=150, deadline=None)
def test_text_metrics_equal_a_computation_by_hand(words, wanted):
    metrics = text_metrics(" ".join(words), " ".join(wanted))
    for order in (1, 2, 3, 4):
        assert metrics[f"bleu_{order}"] == pytest.approx(bleu_by_hand(words, wanted, order), abs=1e-9)
    common = longest_common(words, wanted)
    assert metrics["rouge_l"] == pytest.approx(2 * common / (len(words) + len(wanted)) if common else 0.0)
    assert metrics["words"] == len(words)


@pytest.mark.parametrize("pair", CSS, ids=lambda pair: pair["hyp"][:20])
def test_similarity_is_that_of_the_authors_alone_and_in_a_batch(clip, pair):
    assert clip.token_ids(pair["hyp"]) == pair["ids_hyp"]
    assert clip.token_ids(pair["ref"]) == pair["ids_ref"]
    assert clip.cut([pair["hyp"]], [pair["ref"]])[0] == pytest.approx(pair["similarity"], abs=1e-5)
    together = clip.cut([other["hyp"] for other in CSS], [other["ref"] for other in CSS])
    assert together[CSS.index(pair)] == pytest.approx(pair["similarity"], abs=1e-5)


def test_chunks_read_what_the_cut_leaves_out(clip):
    short, long = CSS[5], CSS[7]
    assert clip.chunked([short["hyp"]], [short["ref"]]) == pytest.approx(clip.cut([short["hyp"]], [short["ref"]]))
    assert clip.cut([long["hyp"]], [long["ref"]])[0] > 0.99999
    assert clip.chunked([long["hyp"]], [long["ref"]])[0] < 0.99999
    assert clip.chunked([long["hyp"]], [long["hyp"]])[0] == pytest.approx(1)


def attributes(pairs, only=None, draws=200) -> dict:
    strata = [("set", 1)] * len(pairs)
    reasons = dict.fromkeys(("attribute_precision", "attribute_recall", "attribute_f1"), "none")
    return ratio_part("x", strata, attribute_sums(pairs, only), reasons, draws=draws)


def test_attributes_are_counted_over_all_images():
    pairs = [(["a", "b"], ["a", "c"]), ([], ["d"])]
    found = attributes(pairs)
    assert found["metrics"] == {"attribute_precision": 1 / 2, "attribute_recall": 1 / 3, "attribute_f1": 2 / 5}
    assert attributes(pairs, "b")["metrics"] == {"attribute_precision": 0, "attribute_recall": None, "attribute_f1": 0}
    assert attributes(pairs, "d")["undefined"] == {"attribute_precision": "none"}
    assert set(attributes([])["metrics"].values()) == {None}


def test_the_interval_of_a_ratio_is_of_images_not_of_names():
    """Ten images that name all four attributes rightly and ten that name one wrongly: 40 of 50 are right."""
    pairs = [(list("abcd"), list("abcd"))] * 10 + [(["x"], ["a"])] * 10
    found = attributes(pairs, draws=4000)
    low, high = found["intervals"]["attribute_precision"]
    assert found["metrics"]["attribute_precision"] == 40 / 50
    # k of 20 draws are of the first kind, binomial with 1/2: 95 % from 6 to 14, which gives 24 / 38 and 56 / 62.
    assert (low, high) == pytest.approx((24 / 38, 56 / 62), abs=0.02)
    apart = ratio_part("x", [("s", k // 10) for k in range(20)], attribute_sums(pairs), {})
    assert apart["intervals"]["attribute_precision"] == [0.8, 0.8]  # each class is drawn by itself


def test_a_mean_has_an_interval_of_the_right_width():
    values = np.random.default_rng(0).normal(size=400)
    found = mean_with_interval(values, 1000, 0)
    assert found["interval"][1] - found["interval"][0] == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert mean_with_interval([0.3], 10, 0) == {"mean": 0.3, "interval": [0.3, 0.3]}


@pytest.mark.parametrize(
    "case", [*AUTHORS["parse"], AUTHORS["validate_all_failed"]], ids=lambda case: case["text"][:30]
)
def test_answers_are_parsed_as_the_authors_parse(case):
    parsed = protocol.parse(case["text"])
    assert ([] if parsed is None else [parsed[0]]) == case["y_pred"]
    assert (None if parsed is None else parsed[1]) == case["reasoning"]


def test_metrics_of_the_papers_protocol_are_those_of_the_authors():
    assert isinstance(protocol, EvaluationProtocol)
    given = AUTHORS["validate"]
    answers = [
        EvaluatedAnswer(label, text, reference=reference)
        for label, text, reference in zip(given["labels"], given["outputs"], given["gts"], strict=True)
    ]

    def stubbed(texts, references):
        return [given["result"]["css"]] * len(texts)

    assert protocol.metrics(answers, text_metrics, stubbed) == given["result"]
    assert protocol.metrics([EvaluatedAnswer(1, "")], text_metrics, None)["acc"] is None
    assert protocol.metric_line("flux", given["result"]) == (
        "flux r_acc: 0.3333, f_acc: 0.5000, acc: 0.4000, bleu1: 0.0000, rougel: 0.0000, css: 0.5000\n"
    )


def test_calibration_finds_the_temperature_and_bias_that_spoilt_the_scores(tmp_path):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 20_000)
    labels = (rng.uniform(size=20_000) < 1 / (1 + np.exp(-logits))).astype(int)
    spoilt = 1 / (1 + np.exp(-(logits - 0.6) * 3))
    found = fit(spoilt, labels)
    assert found.temperature == pytest.approx(3, rel=0.05) and found.bias == pytest.approx(0.6, abs=0.05)
    found.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == found
    assert np.isnan(found(np.array([math.nan]))[0]) and 0 < found(np.array([1.0]))[0] <= 1


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [([0.1, 0.2], [0, 0], "both classes"), ([], [], "both classes"), ([0.9, 0.1], [0, 1], "does not mean fake")],
)
def test_what_cannot_be_calibrated_is_said(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        fit(scores, labels)


def test_classes_that_do_not_overlap_give_a_finite_temperature():
    assert 0 < fit([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1]).temperature < 10


def test_a_fifth_of_the_ids_is_for_fitting():
    assert sum(is_for_fitting(f"flux/0_real/{number}.png") for number in range(5000)) == pytest.approx(1000, rel=0.1)


def test_a_larger_share_for_fitting_holds_the_smaller():
    ids = [f"flux/0_real/{number}.png" for number in range(5000)]
    splits = {share: {name for name in ids if is_for_fitting(name, share)} for share in (0.05, 0.2, 0.33, 0.8, 1.0)}
    for share, split in splits.items():
        assert len(split) == pytest.approx(share * 5000, rel=0.1)
    assert splits[0.05] < splits[0.2] < splits[0.33] < splits[0.8] < splits[1.0] and len(splits[1.0]) == 5000
    assert splits[0.2] == {name for name in ids if is_for_fitting(name)} and not is_for_fitting(ids[0], 0.0)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"temperature": 0, "bias": 0}',
        '{"temperature": 1}',
        '{"temperature": 1, "bias": 0, "score": "luck"}',
        '{"temperature": 1, "bias": 0, "score": ["answer"]}',
    ],
)
def test_a_wrong_calibration_file_is_explained(tmp_path, content):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(ValueError, match=r"c\.json"):
        Calibration.load(tmp_path / "c.json")
