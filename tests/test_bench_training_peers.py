"""The benchmark of a LoRA step against the plain loop, as its user runs it."""

import json

import pytest

from scripts.bench.training_peers import bench, parse_arguments


@pytest.mark.slow
def test_both_ways_train_the_same_model(capsys):
    bench(parse_arguments(["--length", "110", "--batch-size", "2", "--steps", "1"]))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name, within in (("loss", 1e-3), ("projector_gradient_norm", 1e-2)):
        values = [value for way in result[name].values() for value in way.values()]
        assert len(values) == 4 and values == pytest.approx([values[0]] * 4, rel=within)
    step, peak = result["step_s"], result["peak_bytes"]
    for dtype in ("float32", "bfloat16"):
        assert result["faster_than"][dtype] == pytest.approx(step["plain"][dtype] / step["ours"]["bfloat16"], rel=1e-2)
        assert result["share_of_memory"][dtype] == pytest.approx(
            peak["ours"]["bfloat16"] / peak["plain"][dtype], rel=1e-2
        )


@pytest.mark.parametrize("wrong", [["--batch-size", "0"], ["--steps", "0"], ["--length", "95"]])
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match="at least"):
        bench(parse_arguments(wrong))
