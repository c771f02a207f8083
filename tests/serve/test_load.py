"""The real command under load: malformed uploads among good ones, memory, batches, and a stop that loses nothing."""

import json

import pytest

from scripts.bench.serve import main


def measured(capfd, *arguments: str) -> dict:
    assert main([*arguments, "--serve", "--device", "cpu"]) == 0
    return json.loads(capfd.readouterr().out.splitlines()[-1])


def check(found: dict) -> None:
    """What holds whatever the machine: nothing breaks, nothing is mixed up, nothing is lost."""
    together = found["together"]
    assert together["mismatched"] == found["alone"]["mismatched"] == 0
    assert set(together["good"]) <= {"200", "429"} and set(together["malformed"]) <= {"413", "422", "429"}
    assert together["good"]["200"] >= 0.9 * sum(together["good"].values())
    assert found["stop"]["lost"] == 0 and found["stop"]["status"] == 0 and found["stop"]["answered"] > 0


def test_some_clients_some_of_them_malformed_and_a_stop_under_load(capfd):
    options = ("--options", '{"score_only": true}', "--images", "4", "--side", "96", "--malformed", "0.1")
    found = measured(capfd, "--clients", "12", "--seconds", "5", "--alone", "1", *options)
    check(found)
    assert found["images_a_batch"] > 1.5


@pytest.mark.slow
def test_64_clients_for_a_minute(capfd):
    found = measured(capfd, "--clients", "64", "--seconds", "60", "--alone", "15", "--malformed", "0.1")
    print(json.dumps(found))
    check(found)
    memory = found["memory"]
    assert 0.9 * memory["settled_mb"] <= memory["min_mb"] and memory["max_mb"] <= 1.1 * memory["settled_mb"]
