"""The benchmark of inference, as its user runs it."""

import json

import pytest

from scripts.bench_inference import bench, parse_arguments


def test_the_last_line_is_one_json_object(capsys):
    bench(parse_arguments(["--images", "2", "--new-tokens", "3", "--batch-sizes", "1", "2", "--device", "cpu"]))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result["batch"]) == ["1", "2"] and result["dtype"] == "float32"
    for measured in result["batch"].values():
        assert measured["images_per_s"] > 0 and measured["score_only_images_per_s"] > 0


def test_memory_of_the_published_size_is_added_up(capsys):
    bench(parse_arguments(["--size", "13b", "--memory"]))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    weights = result["weights"]
    assert weights["float32"] == 2 * weights["bfloat16"] == 4 * result["parameters"]
    assert 13e9 < result["parameters"] < 15e9 and weights["4 bits"] < 0.7 * weights["8 bits"] < weights["bfloat16"]
    assert result["cache_of_a_position_in_16_bits"] == 2 * 2 * 40 * 5120


@pytest.mark.parametrize("wrong", [["--dtype", "int8"], ["--dtype", "nosuch"], ["--size", "huge"], ["--batch-sizes"]])
def test_wrong_flags_end_with_the_usage(wrong):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(wrong)
    assert stopped.value.code == 2
