"""The benchmark of training runs and prints what it promises."""

import json

import numpy as np
import pytest
import torch

from llava.errors import OptionError, UserError
from scripts import bench_training
from scripts.bench_training import (
    ANSWER_TOKENS,
    answer_lengths,
    batch_order,
    bench,
    needed_bytes,
    padding_share,
    parse_arguments,
    trained_model,
)

TINY = [
    "--size",
    "tiny",
    "--device",
    "cpu",
    "--batch-size",
    "2",
    "--accumulation",
    "2",
    "--steps",
    "1",
    "--lora-r",
    "4",
]


def result_of(capsys, *arguments: str) -> dict:
    bench(parse_arguments([*TINY, *arguments]))
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_it_trains_and_prints_one_line(capsys):
    result = result_of(capsys)
    assert result["samples_per_s"] > 0 and result["tokens_per_s"] > 0 and result["peak_bytes"] > 0
    assert result["samples_per_s"] * result["step_s"] == pytest.approx(4, rel=1e-2)
    assert result["tokens_per_s"] / result["samples_per_s"] == pytest.approx(result["tokens_per_sample"], rel=1e-2)
    assert 0 <= result["padding_share"] < 0.5
    assert result["last_loss"] != result["first_loss"] > 0
    assert result["mfu"] is result["hfu"] is None, "no ceiling is known for a CPU"
    rates = result["tflops_per_s"]
    assert 0 < rates["mfu_needed"] < rates["hfu"] and rates["mfu"] > 0
    assert sum(result["hfu_by_part"].values()) == pytest.approx(1, rel=1e-2)
    assert result["trained_parameters"] < result["parameters"]


def test_repetition_and_search_are_work_that_can_be_left_out(capsys):
    whole = result_of(capsys)
    less = result_of(capsys, "--no_gradient_checkpointing", "--cpm-search", "labels")

    def work(result: dict) -> float:
        return result["tflops_per_s"]["hfu"] / result["samples_per_s"]

    assert work(less) < work(whole)
    assert less["hfu_by_part"]["search"] == 0 < whole["hfu_by_part"]["search"]
    assert less["first_loss"] == pytest.approx(whole["first_loss"], rel=0.1)


def test_lengths_are_those_that_are_documented():
    lengths = answer_lengths(10_000, 400, np.random.default_rng(0))
    fewest, mean, deviation, _ = ANSWER_TOKENS
    assert np.mean(lengths) == pytest.approx(mean, rel=0.01) and np.std(lengths) == pytest.approx(deviation, rel=0.05)
    assert fewest <= min(lengths) and max(lengths) <= 400


def test_batches_of_like_length_have_less_than_five_percent_of_padding():
    arguments = parse_arguments(["--batch-size", "8"])
    answers = answer_lengths(8_000, 1_000, np.random.default_rng(0))
    shares = {}
    for alike in (False, True):
        batches = batch_order(answers, arguments, alike=alike)
        assert sorted(index for batch in batches for index in batch) == list(range(8_000))
        shares[alike] = padding_share(answers, batches, 80 + 576)
    assert shares[True] < 0.05 and shares[True] < shares[False]


def test_padding_is_counted_by_the_longest():
    assert padding_share([1, 3, 5], [[0, 1], [2]], 1) == pytest.approx(1 - (2 + 4 + 6) / (4 + 4 + 6))


@pytest.mark.parametrize("wrong", [["--steps", "0"], ["--lora-r", "0"], ["--max-length", "100"]])
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match="at least"):
        bench(parse_arguments([*TINY, *wrong]))


def test_the_published_size_is_refused_where_it_does_not_fit(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(OptionError, match="size 13b is for a GPU"):
        bench(parse_arguments(["--size", "13b"]))
    monkeypatch.setattr("os.sysconf", lambda name: 1000)
    with pytest.raises(OptionError, match=r"training size tiny takes at least 0\.0 GB, and the cpu has 0\.0 GB"):
        bench(parse_arguments(TINY))


def test_weights_gradients_and_moments_are_added_up():
    arguments = parse_arguments([*TINY, "--dtype", "bfloat16"])
    model = trained_model(arguments, "meta", torch.bfloat16)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    assert trained > 0 and needed_bytes(arguments, torch.bfloat16) == 2 * frozen + 16 * trained


def test_a_micro_batch_that_does_not_fit_is_named(monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench_training, "measure", full)
    with pytest.raises(UserError, match=r"micro-batches of 2 do not fit into memory; give a smaller --batch-size"):
        bench(parse_arguments(TINY))
