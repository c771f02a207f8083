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


@pytest.mark.parametrize("wrong", [["--dtype", "int8"], ["--dtype", "nosuch"], ["--size", "huge"], ["--batch-sizes"]])
def test_wrong_flags_end_with_the_usage(wrong):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(wrong)
    assert stopped.value.code == 2
