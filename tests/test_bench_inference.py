"""The benchmark of inference, as its user runs it."""

import json
from types import SimpleNamespace

import pytest
import torch

from llava.errors import OptionError, UserError
from llava.gpu_ceilings import Ceilings
from scripts import bench_inference
from scripts.bench_inference import (
    SIZES,
    bench,
    build_system,
    check_memory,
    language_work,
    measure_batches,
    parse_arguments,
    summary,
)


def test_the_last_line_is_one_json_object(capsys):
    bench(parse_arguments(["--images", "2", "--new-tokens", "3", "--batch-sizes", "1", "2", "--device", "cpu"]))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result["batch"]) == ["1", "2"] and result["dtype"] == "float32"
    for measured in result["batch"].values():
        assert measured["images_per_s"] > 0 and measured["score_only_images_per_s"] > 0
        assert measured["read_bytes_per_s"] > 0 and measured["prefill_flops_per_s"] > 0
        assert "bandwidth_share" not in measured, "no ceiling is known for a CPU"
    assert result["decode"] == "eager" and result["one_at_a_time_images_per_s"] > 0
    assert result["bandwidth_share"] is result["compute_share"] is None


@pytest.mark.parametrize("mode", ["static", "eager"])
def test_it_measures_what_fits_and_its_share_of_ceilings(mode, capsys, monkeypatch):
    monkeypatch.setattr("llava.gpu_ceilings.gpu_ceilings", lambda device: Ceilings(1e12, 1e15))
    bench(parse_arguments(["--images", "1", "--new-tokens", "4", "--batch-sizes", "auto", "1", "--decode", mode]))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["decode"] == mode and list(result["batch"]) == ["1", "16"]
    best = result["batch"][str(result["best_batch"])]
    assert (
        result["bandwidth_share"] == best["bandwidth_share"] == pytest.approx(best["read_bytes_per_s"] / 1e12, rel=1e-3)
    )
    assert result["compute_share"] == pytest.approx(best["prefill_flops_per_s"] / 1e15, rel=1e-3)
    ratio = best["images_per_s"] / result["one_at_a_time_images_per_s"]
    assert result["best_over_one_at_a_time"] == pytest.approx(ratio, rel=1e-2)


def test_work_of_a_small_model_counted_by_hand():
    model = build_system(SIZES["tiny"], "meta", torch.bfloat16).model
    width, layers, inner, words, prompt, new, rows = 64, 2, 128, 32000, 10, 4, 3
    matrices = layers * (4 * width**2 + 3 * width * inner)
    weights = matrices + layers * 2 * width + width + words * width
    cache = 2 * layers * width  # keys and values of a position
    work = language_work(model, rows, prompt, new)
    assert work["step_bytes"] == 2 * (weights + rows * cache * (prompt + 2))
    scores_and_sums = layers * sum(2 * 2 * width * seen for seen in range(prompt)) + layers * prompt * 2 * width
    assert work["prefill_flops"] == rows * (2 * matrices * prompt + scores_and_sums)


def test_a_batch_that_does_not_fit_ends_the_measuring(monkeypatch, capsys):
    def measure(system, images, size, new_tokens):
        if size > limit:
            raise torch.OutOfMemoryError
        return {"images_per_s": 2.0 * size, "bandwidth_share": 0.1 * size}

    monkeypatch.setattr(bench_inference, "measure_batch", measure)
    limit = 4
    measured = measure_batches(None, [], [1, 4, 8, 16], 2)
    assert list(measured) == [1, 4] and "batches of 8 do not fit" in capsys.readouterr().err
    found = summary(measured, 0.5)
    assert (found["best_batch"], found["best_over_batch_1"], found["best_over_one_at_a_time"]) == (4, 4, 16)
    assert found["bandwidth_share"] == pytest.approx(0.4) and found["compute_share"] is None
    limit = 0
    with pytest.raises(UserError, match="a batch of 1 does not fit"):
        measure_batches(None, [], [1, 4], 2)


def test_the_published_size_needs_a_gpu_and_its_memory(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(OptionError, match="size 13b is for a GPU, and there is none here"):
        bench(parse_arguments(["--size", "13b"]))
    gpu = SimpleNamespace(type="cuda", __str__=lambda self: "cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * 10**9, 80 * 10**9))
    with pytest.raises(OptionError, match=r"size 13b takes at least 28\.0 GB, and the .* has free 20\.0 GB"):
        check_memory(gpu, 28.0e9, "size 13b")
    check_memory(gpu, 19e9, "size 13b")
    with pytest.raises(OptionError, match="the cpu has "):
        check_memory(torch.device("cpu"), 1e18, "all")


def test_memory_of_the_published_size_is_added_up(capsys):
    bench(parse_arguments(["--size", "13b", "--memory"]))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    weights = result["weights"]
    assert weights["float32"] == 2 * weights["bfloat16"] == 4 * result["parameters"]
    assert 13e9 < result["parameters"] < 15e9 and weights["4 bits"] < 0.7 * weights["8 bits"] < weights["bfloat16"]
    position = 2 * 2 * 40 * 5120
    assert result["cache_of_a_position_in_16_bits"] == position
    matrices = 40 * (4 * 5120**2 + 3 * 5120 * 13824)
    assert result["step_bytes_in_bfloat16"] == 2 * (matrices + 32000 * 5120 + 81 * 5120) + 656 * position
    assert result["prefill_flops"] == 656 * (2 * matrices + 4 * 40 * 5120 * 328)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--dtype", "int8"],
        ["--decode", "fast"],
        ["--batch-sizes", "many"],
        ["--dtype", "nosuch"],
        ["--size", "huge"],
        ["--batch-sizes"],
    ],
)
def test_wrong_flags_end_with_the_usage(wrong):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(wrong)
    assert stopped.value.code == 2
