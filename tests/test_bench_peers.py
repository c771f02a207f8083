"""The benchmark against other ways to run a checkpoint, as its user runs it."""

import json

import pytest

from scripts.bench.peers import bench, parse_arguments

TINY = ["--images", "2", "--new-tokens", "4", "--batch-sizes", "1", "2", "--clip-size", "tiny", "--device", "cpu"]


def test_all_ways_run_the_same_checkpoint(capsys):
    bench(parse_arguments(TINY))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["equal_answers"] == 1
    rates = result["images_per_s"]
    assert rates["authors"] > 0
    assert set(rates["transformers"]) == set(rates["ours"]) == {"1", "2"}
    best = max(rates["ours"].values())
    assert result["ours_over_authors"] == pytest.approx(best / rates["authors"], rel=1e-2)
    assert result["ours_over_transformers"] == pytest.approx(best / max(rates["transformers"].values()), rel=1e-2)


@pytest.mark.parametrize("wrong", [["--images", "1"], ["--new-tokens", "3"], ["--batch-sizes", "0"]])
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match="at least"):
        bench(parse_arguments([*TINY, *wrong]))
