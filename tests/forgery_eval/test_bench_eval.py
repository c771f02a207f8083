"""The benchmark of evaluation runs and says what it promises."""

import json

from scripts.bench_eval import bench, parse_arguments


def test_it_prints_one_line_with_the_three_ways(capsys):
    bench(parse_arguments(["--images", "3", "--new-tokens", "4", "--clip-size", "tiny", "--device", "cpu"]))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for way in ("eval", "loop_keeping_clip", "loop_reloading_clip"):
        assert result[way]["images_per_s"] > 0 and 0 < result[way]["shares"]["analyze"] < 1
    assert result["eval_over_loop_reloading_clip"] > 0


def test_evaluation_in_bfloat16_is_compared_with_loops_in_float32(capsys):
    words = ["--images", "2", "--new-tokens", "4", "--clip-size", "tiny", "--device", "cpu", "--dtype", "bfloat16"]
    bench(parse_arguments(words))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["dtype"] == "bfloat16" and result["eval_over_loop_keeping_clip"] > 0
