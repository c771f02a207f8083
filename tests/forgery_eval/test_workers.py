"""Several workers: the same answers as one, whatever is killed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from forgery_eval import inference
from forgery_eval.eval import parse_arguments, run
from forgery_eval.workers import Done, _in_order, split
from llava.cli import SOME_FAILED
from llava.errors import OptionError
from tests.forgery_eval.test_inference import lines
from tests.trained import picture

SCRIPTS = Path(__file__).parents[2] / "forgery_eval"


@pytest.fixture(scope="module")
def cluster():
    """Ray for all tests of this file, which starts once."""
    ray = pytest.importorskip("ray")
    ray.init("local", num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for index in range(19):
        folder = root / ("real", "fake")[index % 2]
        folder.mkdir(exist_ok=True)
        picture(index).save(folder / f"{index:03}.png")
    (root / "fake" / "broken.png").write_text("no image")
    return root


def evaluation(model: Path, data: Path, results: Path, *more: object) -> list[str]:
    given = ["--model-path", model, "--dataset_path", data, "--result_folder", results, "--device", "cpu"]
    return [*map(str, given), "--score-only", "--batch-size", "3", *map(str, more)]


def predictions(results: Path) -> bytes:
    (file,) = (results / "predictions").glob("*.jsonl")
    assert not list((results / "predictions").glob("*.shards"))
    return file.name.encode() + file.read_bytes()


def test_one_two_and_three_workers_give_the_same_bytes(cluster, trained, data, tmp_path):
    found = set()
    for count in (1, 2, 3):
        results = tmp_path / str(count)
        assert run(evaluation(trained, data, results, "--workers", count)) == SOME_FAILED
        found.add(predictions(results))
        assert run([*evaluation(trained, data, results, "--workers", 1)]) == SOME_FAILED  # nothing is left to do
        found.add(predictions(results))
    assert len(found) == 1
    (one,) = found
    assert one.count(b'"id"') == 20


def test_the_key_does_not_depend_on_the_batch_size(cluster, trained, data, tmp_path):
    assert run(evaluation(trained, data, tmp_path / "a", "--workers", 2)) == SOME_FAILED
    before = predictions(tmp_path / "a")
    assert run([*evaluation(trained, data, tmp_path / "a"), "--batch-size", "7"]) == SOME_FAILED
    assert predictions(tmp_path / "a") == before


def test_the_answers_of_detection_are_the_same_too(cluster, trained, data, tmp_path):
    given = ["--img_path", str(data), "--model-path", str(trained), "--device", "cpu", "--score-only"]
    for count in (1, 3):
        file = tmp_path / f"{count}.jsonl"
        more = ["--batch-size", "2", "--json", str(file), "--workers", str(count)]
        assert inference.run([*given, *more]) == SOME_FAILED
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "3.jsonl").read_bytes()
    assert len(lines(tmp_path / "1.jsonl")) == 20


@pytest.mark.slow
def test_killed_drivers_and_workers_lose_and_repeat_nothing(cluster, trained, data, tmp_path):
    """Kills a driver or one of its workers at random points, then resumes to the end."""
    assert run(evaluation(trained, data, tmp_path / "whole", "--workers", 2)) == SOME_FAILED
    choice = random.Random(0)
    command = [sys.executable, str(SCRIPTS / "eval.py"), *evaluation(trained, data, tmp_path / "cut", "--workers", 2)]
    for kill in range(4):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(choice.uniform(8, 25))
        victim = process.pid if kill % 2 else worker_of(process.pid)
        if victim is not None:
            os.kill(victim, signal.SIGKILL)
        if victim == process.pid:
            process.wait()
        else:
            assert process.wait(300) == SOME_FAILED
    assert run(evaluation(trained, data, tmp_path / "cut", "--workers", 3)) == SOME_FAILED
    assert predictions(tmp_path / "cut") == predictions(tmp_path / "whole")


def worker_of(driver: int) -> int | None:
    """A process below a driver whose title is that of our worker."""
    children: dict[int, list[int]] = {}
    titles = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            titles[int(folder.name)] = (folder / "cmdline").read_text()
        except OSError:
            continue
        children.setdefault(parent, []).append(int(folder.name))
    below = [driver]
    for process in below:
        below += children.get(process, [])
    return next((process for process in below if "ray::_Worker" in titles.get(process, "")), None)


def test_a_lost_worker_is_replaced(cluster, trained, data, tmp_path, monkeypatch, capfd):
    """The worker that meets a certain image for the first time ends at once."""
    mark = tmp_path / "mark"
    monkeypatch.setattr("forgery_eval.runner.image_source", lambda *a, **k: lambda sample: die_once(sample, mark))
    assert run(evaluation(trained, data, tmp_path / "cut", "--workers", 2)) == SOME_FAILED
    assert "was lost; its" in capfd.readouterr().err and mark.exists()
    monkeypatch.undo()
    assert run(evaluation(trained, data, tmp_path / "whole", "--workers", 2)) == SOME_FAILED
    assert predictions(tmp_path / "cut") == predictions(tmp_path / "whole")


def die_once(sample, mark: Path):
    if sample.image.name == "007.png" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return sample.image


def test_what_a_worker_cannot_open_is_one_line(cluster, trained, data, tmp_path, capsys):
    broken = tmp_path / "model"
    broken.mkdir()
    for file in trained.iterdir():
        if file.suffix == ".json":
            (broken / file.name).write_bytes(file.read_bytes())
    assert run(evaluation(broken, data, tmp_path / "r", "--workers", 2)) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_launchers_are_refused_with_the_line_to_use(monkeypatch, data, tmp_path):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    given = ["--dataset_path", str(data), "--result_folder", str(tmp_path)]
    with pytest.raises(OptionError, match=r"forgery eval --dataset_path .* --workers 4$"):
        parse_arguments(given)
    with pytest.raises(OptionError, match=r"forgery detect --img_path x.png --workers 4$"):
        inference.parse_arguments(["--img_path", "x.png"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ray-address", "auto"], "needs --workers"),
        (["--workers", "2", "--device", "cuda:1"], "leave the number out"),
    ],
)
def test_options_that_would_do_nothing_are_refused(more, message, data, tmp_path):
    with pytest.raises(OptionError, match=message):
        parse_arguments(["--dataset_path", str(data), "--result_folder", str(tmp_path), *more])


def test_without_ray_it_is_explained(monkeypatch, trained, data, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run(evaluation(trained, data, tmp_path / "r", "--workers", 2)) == 1
    assert "'.[cluster]'" in capsys.readouterr().err


def test_results_are_put_in_order():
    done = [Done(number, 0, [], None) for number in (2, 0, 1, 4, 3)]
    assert [one.number for one in _in_order(done)] == [0, 1, 2, 3, 4]
    assert list(split("abcde", 2)) == [["a", "b"], ["c", "d"], ["e"]]
