"""Several workers: the same answers as one, whatever is killed.

Most tests use the system of ``test_third_party_system``, which needs no torch, so that workers start in a second.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from forgery_eval import cluster as cluster_module
from forgery_eval import inference, runner, workers
from forgery_eval.conditions import Plan
from forgery_eval.eval import parse_arguments, predict, run
from forgery_eval.perturbations import choose_perturbations
from forgery_eval.workers import Done, _in_order, _Work, split
from llava.cli import SOME_FAILED
from llava.errors import OptionError, WorkerError
from llava.systems import registry
from scripts.bench.kills import below, left
from scripts.bench.workers import bench
from scripts.bench.workers import parse_arguments as bench_arguments
from tests.forgery_eval.test_inference import lines
from tests.test_third_party_system import MODULE, ROOT, checkpoint, package, paint
from tests.trained import picture

__all__ = ["package"]

IMAGES = 20
DEATHS = '''
import os
import signal
import time
from pathlib import Path


def image_of(sample, mark, always=False):
    """Ends its process at a certain image, once or always."""
    if sample.image.name == "07.png" and (always or not mark.exists()):
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return sample.image


def slowly(sample):
    time.sleep(0.05)
    return sample.image
'''


@pytest.fixture(scope="module")
def site(package):
    """The toy's package, importable here and in processes that are started here."""
    (package / "toy_deaths.py").write_text(DEATHS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(package))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(package), str(ROOT)]))
        registry.specs.cache_clear()
        yield package
    registry.specs.cache_clear()
    sys.modules.pop("toy_forensics", None)
    sys.modules.pop("toy_deaths", None)


@pytest.fixture(scope="module")
def cluster(site):
    """Ray for all tests of this file, which starts once."""
    ray = pytest.importorskip("ray")
    ray.init("local", num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    assert "class Toy" in MODULE
    return checkpoint(tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for index in range(IMAGES - 1):
        paint(root / ("real", "fake")[index % 2] / f"{index:02}.png", index, index)
    (root / "fake" / "broken.png").write_text("no image")
    return root


def evaluation(model: Path, data: Path, results: Path, *more: object, size: int = 3) -> list[str]:
    given = ["--model-path", model, "--dataset_path", data, "--result_folder", results, "--device", "cpu"]
    return [*map(str, given), "--batch-size", str(size), *map(str, more)]


def analyse(model: Path, data: Path, results: Path, *more: object, size: int = 3) -> dict[str, bytes]:
    """Evaluates without the metrics; returns what is on disk."""
    arguments = parse_arguments(evaluation(model, data, results, *more, size=size))
    predict(arguments, Plan(choose_perturbations(arguments.perturb)))
    return predictions(results)


def predictions(results: Path) -> dict[str, bytes]:
    """All that was predicted, masks too, by file; nothing that is for a time only may be left."""
    files = [file for file in (results / "predictions").rglob("*") if file.is_file() and file.suffix != ".lock"]
    assert not list((results / "predictions").rglob("*.shards"))
    return {str(file.relative_to(results)): file.read_bytes() for file in files}


def assert_same(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    """Compares all but the times, which workers do not give."""
    assert found.keys() == expected.keys()
    for name, content in found.items():
        one, other = content, expected[name]
        if name.endswith(".jsonl"):
            one, other = ([{**json.loads(line), "seconds": 0} for line in x.splitlines()] for x in (one, other))
        assert one == other, name


# --- the same answers


def test_one_two_and_three_workers_give_the_same_bytes(cluster, toy, data, tmp_path):
    found = {n: analyse(toy, data, tmp_path / str(n), "--workers", n, "--perturb", "jpeg:75") for n in (1, 2, 3)}
    assert found[1] == found[2] == found[3]
    assert len(found[1]) == 2 + 2 * (IMAGES - 1)  # two runs, and their masks
    assert_same(found[1], analyse(toy, data, tmp_path / "alone", "--perturb", "jpeg:75"))
    # The key depends neither on batches nor on workers: nothing is left to do.
    assert analyse(toy, data, tmp_path / "2", "--perturb", "jpeg:75", size=7) == found[1]


def test_covered_images_are_the_same_with_workers(cluster, toy, data, tmp_path):
    more = ("--faithfulness", "4")
    found = {n: analyse(toy, data, tmp_path / str(n), "--workers", n, *more) for n in (1, 2)}
    assert found[1] == found[2] and any("/faithfulness/" in name for name in found[1])
    assert_same(found[1], analyse(toy, data, tmp_path / "alone", *more))


def test_the_answers_of_detection_are_the_same_too(cluster, toy, data, tmp_path):
    given = ["--img_path", str(data), "--model-path", str(toy), "--device", "cpu", "--batch-size", "2"]
    for name in ("2", "alone"):
        more = [] if name == "alone" else ["--workers", name]
        file = tmp_path / name / "answers.jsonl"
        assert inference.run([*given, "--json", str(file), *more]) == SOME_FAILED
    cut = tmp_path / "2" / "answers.jsonl"
    answers = cut.read_bytes()
    assert answers == (tmp_path / "alone" / "answers.jsonl").read_bytes()
    assert len(lines(cut)) == IMAGES
    # Cut within a batch's lines and resumed.
    cut.write_bytes(b"".join(answers.splitlines(keepends=True)[:8]) + b'{"image": "/x')
    more = ["--workers", "1", "--csv", str(tmp_path / "t.csv")]
    assert inference.run([*given, "--json", str(cut), *more]) == SOME_FAILED
    assert cut.read_bytes() == answers
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 1 + IMAGES


# --- what is killed


def test_a_lost_worker_is_replaced(cluster, toy, data, tmp_path, monkeypatch, capfd):
    import toy_deaths

    deadly = functools.partial(toy_deaths.image_of, mark=tmp_path / "mark")
    monkeypatch.setattr(runner, "image_source", lambda *a, **k: deadly)
    found = analyse(toy, data, tmp_path / "cut", "--workers", 2)
    assert "was lost; its" in capfd.readouterr().err and (tmp_path / "mark").exists()
    monkeypatch.undo()
    assert_same(found, analyse(toy, data, tmp_path / "whole"))


def test_an_image_that_ends_every_worker_is_named(cluster, toy, data, tmp_path, monkeypatch):
    import toy_deaths

    deadly = functools.partial(toy_deaths.image_of, mark=tmp_path / "mark", always=True)
    monkeypatch.setattr(runner, "image_source", lambda *a, **k: deadly)
    monkeypatch.setattr(workers, "_MOST_LOST", 2)
    message = r"2 workers were lost one after another at the same batch \(data\d*/fake/07\.png, "
    with pytest.raises(WorkerError, match=message):
        analyse(toy, data, tmp_path / "r", "--workers", 1, size=1)
    # What others finished is kept, and a run without workers takes it up.
    monkeypatch.undo()
    (shard,) = (tmp_path / "r" / "predictions").glob("*.shards/*.jsonl")
    assert shard.read_bytes().count(b'"batch"') >= 1
    assert_same(analyse(toy, data, tmp_path / "r", size=1), analyse(toy, data, tmp_path / "whole", size=1))


def test_a_killed_driver_leaves_no_process_and_loses_nothing(cluster, toy, data, tmp_path):
    code = (
        "import toy_deaths, forgery_eval.runner as runner; from forgery_eval.eval import run\n"
        "runner.image_source = lambda *a, **k: toy_deaths.slowly\n"
    )
    given = evaluation(toy, data, tmp_path / "cut", "--workers", 2, size=1)
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen([sys.executable, "-c", f"{code}run({given!r})"], stdout=log, stderr=log)
    shards = tmp_path / "cut" / "predictions"
    until = time.monotonic() + 120
    while not [1 for file in shards.glob("*.shards/*.jsonl") if file.read_bytes().count(b"\n") > 2]:
        assert driver.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()
        time.sleep(0.02)
    processes = below(driver.pid)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert any("raylet" in title for title in processes.values()) and left(processes) == {}
    assert list(shards.glob("*.shards/*.jsonl"))
    found = analyse(toy, data, tmp_path / "cut", "--workers", 2, size=7)
    assert_same(found, analyse(toy, data, tmp_path / "whole", size=1))
    assert found == analyse(toy, data, tmp_path / "cut")


# --- what is refused


def test_what_a_worker_cannot_open_is_one_line(cluster, data, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "toy"}')
    assert run(evaluation(tmp_path / "model", data, tmp_path / "r", "--workers", 2)) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ") and "a toy needs its gain" in said


def test_more_workers_than_there_is_room_for_are_refused(cluster, toy, data, tmp_path, capsys):
    assert run(evaluation(toy, data, tmp_path / "r", "--workers", 4)) == 1
    assert "--workers 4: there are only 3 CPUs" in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"])
def test_launchers_are_refused_with_the_line_to_use(variable, monkeypatch, data, tmp_path):
    monkeypatch.setenv(variable, "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    given = ["--dataset_path", str(data), "--result_folder", str(tmp_path)]
    with pytest.raises(OptionError, match=r"forgery eval --dataset_path .* --workers 4$"):
        parse_arguments(given)
    with pytest.raises(OptionError, match=r"forgery detect --img_path x.png --workers 2$"):
        inference.parse_arguments(["--img_path", "x.png", "--workers", "2"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(OptionError, match=r"--workers 4 --ray-address auto$"):
        parse_arguments(given)


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


def test_workers_need_a_model_and_no_page(data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--dataset_path", str(data), "--result_folder", str(tmp_path), "--workers", "2", "--rescore"])
    assert "--workers analyses with a model" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        inference.parse_arguments(["--img_path", str(data), "--workers", "2", "--html", "x.html"])
    assert "leave out --workers" in capsys.readouterr().err


def test_without_ray_it_is_explained(monkeypatch, site, toy, data, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run(evaluation(toy, data, tmp_path / "r", "--workers", 2)) == 1
    assert "pip install 'fakereasoning[cluster]'" in capsys.readouterr().err


class Growing:
    """A cluster that a GPU joins whenever somebody asks."""

    def __init__(self, gpus: int = 0) -> None:
        self.gpus = gpus

    def cluster_resources(self) -> dict[str, float]:
        self.gpus += 1
        return {"CPU": 64.0, "GPU": float(self.gpus)}


def test_machines_that_join_late_are_waited_for_where_they_can(monkeypatch, capsys):
    monkeypatch.setattr(cluster_module.time, "sleep", lambda seconds: None)
    gpu = {"num_gpus": 1, "num_cpus": 0}
    assert cluster_module.resources(Growing(), 4, "cuda", may_join=True) == gpu
    assert "waiting for 4 GPUs; the cluster has 1" in capsys.readouterr().err
    with pytest.raises(OptionError, match="only 1 GPUs; ask for as many, or add --device cpu"):
        cluster_module.resources(Growing(), 4, "cuda", may_join=False)
    assert cluster_module.resources(Growing(), 4, "cpu", may_join=False) == {"num_cpus": 1}
    assert cluster_module.resources(Growing(8), 4, "auto", may_join=False) == gpu


# --- order


def test_results_are_put_in_order():
    done = [Done(number, 0, [], None) for number in (2, 0, 1, 4, 3)]
    assert [one.number for one in _in_order(done)] == [0, 1, 2, 3, 4]
    assert list(split("abcde", 2)) == [["a", "b"], ["c", "d"], ["e"]]


def test_nobody_runs_far_ahead_of_the_oldest_batch():
    work = _Work(enumerate([[name] for name in "abcdef"]), most_ahead=3)
    assert [work.take(None).number, work.take(0).number, work.take(0).number] == [0, 1, 2]
    assert work.take(0) is None and work.is_left  # 1 and 2 are finished, and 0 is not
    assert work.take(1).number == 3
    lost = workers._Task(0, ["a"])
    work.again.append(lost)
    assert work.take(1) is lost
    assert [work.take(4).number, work.take(4).number, work.take(4)] == [4, 5, None] and not work.is_left


# --- with a real model


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    for index in range(24):
        folder = root / ("real", "fake")[index % 2]
        folder.mkdir(exist_ok=True)
        picture(index).save(folder / f"{index:03}.png")
    return root


@pytest.mark.slow
def test_calibration_and_perturbations_are_the_same_with_any_workers(cluster, trained, photographs, tmp_path):
    found = []
    more = ["--score-only", "--calibrate", "--calibration-share", "0.5", "--stability", "1", "--perturb", "jpeg:75"]
    for count in (1, 2, 3):
        results = tmp_path / str(count)
        assert run(evaluation(trained, photographs, results, *more, "--workers", count)) == 0
        found.append((predictions(results), (results / "metrics.json").read_bytes()))
    assert found[0] == found[1] == found[2]
    assert any(name.endswith(".features.safetensors") for name in found[0][0])
    rule = tmp_path / "1" / "calibration.json"
    answers = []
    for count in ("1", "2"):
        file = tmp_path / f"{count}.jsonl"
        given = ["--img_path", str(photographs), "--model-path", str(trained), "--calibration", str(rule)]
        given += ["--device", "cpu", "--score-only", "--batch-size", "5", "--json", str(file), "--workers", count]
        assert inference.run(given) == 0
        answers.append(file.read_bytes())
    assert answers[0] == answers[1] and answers[0].count(b'"agreeing"') == 24


@pytest.mark.slow
def test_the_benchmark_prints_one_line(cluster, capsys):
    bench(bench_arguments(["--size", "tiny", "--images", "6", "--batch", "2"]))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["equal"] and result["speedup"] > 0 and result["1"]["start_s"] > 0
    assert result["2"]["images_per_s"] > result["2"]["images_per_s_with_start"] > 0
