"""A run that was killed resumes as if nothing had happened, or tells why it cannot."""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from llava.errors import OptionError
from llava.train import checkpointing
from llava.train.checkpointing import COMPLETE_FILE, complete_checkpoints
from llava.train.train import main
from llava.train.trainer import ForgeryTrainer
from tests.training_runs import (
    LORA,
    ROOT,
    adapter_weights,
    largest_gap,
    options,
    start_on_two,
    train_here,
    train_on_two,
    write_records,
)

RUN = {
    **LORA,
    "lora_dropout": 0.1,
    "max_steps": 10,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "group_by_modality_length": True,
    "gradient_accumulation_steps": 2,
    "cpm_search": "predictions",
    "resume": "auto",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_records(tmp_path_factory.mktemp("data"), count=14, text_only=5)


@pytest.fixture(scope="module")
def whole(trained, data, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    return train_here(tmp_path_factory.mktemp("whole") / "run", trained, data, **RUN)


def start_copy(arguments: list[str], before: Callable[[], None] = lambda: None) -> int:
    """Starts a training in a copy of this process; returns its id."""
    process = os.fork()
    if process == 0:
        try:
            before()
            os._exit(main(arguments))
        finally:
            os._exit(70)
    return process


def was_killed(process: int) -> bool:
    status = os.waitpid(process, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying_at(owner: object, name: str, call: int) -> Callable[[], None]:
    """Makes a process die where it calls a function for so many times."""

    def install() -> None:
        original, calls = getattr(owner, name), iter(range(1, 1000))

        def counted(*arguments, **named):
            if next(calls) == call:
                die()
            return original(*arguments, **named)

        setattr(owner, name, counted)

    return install


@pytest.mark.parametrize(
    ("owner", "name", "call", "complete_then"),
    [
        (ForgeryTrainer, "training_step", 12, [4, 6]),  # within an optimizer step
        (ForgeryTrainer, "training_step", 17, [6, 8]),  # in a later epoch
        (ForgeryTrainer, "save_model", 3, [2, 4]),  # before the weights
        (torch, "save", 6, [2]),  # between optimizer, schedule and random states
        (checkpointing, "write_json", 2, [2]),  # just before the checkpoint counts as whole
        (checkpointing, "remove_old_checkpoints", 3, [2, 4, 6]),  # just after
        (ForgeryTrainer, "export_to", 2, [8, 10]),  # all is trained, the final folder is missing
    ],
)
def test_a_killed_run_ends_like_one_that_was_not(trained, data, whole, tmp_path, owner, name, call, complete_then):
    output = tmp_path / "run"
    arguments = options(output, trained, data, **RUN)
    assert was_killed(start_copy(arguments, dying_at(owner, name, call)))
    assert not (output / "final").exists()
    assert [int(path.name.split("-")[1]) for path in complete_checkpoints(output)] == complete_then
    assert not was_killed(start_copy(arguments))
    assert largest_gap(adapter_weights(output / "final"), adapter_weights(whole)) <= 1e-5
    assert [path.name for path in complete_checkpoints(output)] == ["checkpoint-8", "checkpoint-10"]
    assert not [path.name for path in output.iterdir() if path.name.startswith((".", "trial"))]


def dying_at_random(choice: random.Random) -> Callable[[], None]:
    """Makes a process die anywhere in its first six training steps and their savings, however fast the machine is."""
    step, events = choice.randint(1, 3), choice.randint(1, 300_000)  # a step has 50,000 to 200,000 events

    def count_down(*_: object) -> None:
        nonlocal events
        events -= 1
        if events == 0:
            die()

    def install() -> None:
        original, steps = ForgeryTrainer.training_step, iter(range(1, 1000))

        def watched(*arguments, **named):
            if next(steps) == step:
                sys.setprofile(count_down)
            return original(*arguments, **named)

        ForgeryTrainer.training_step = watched

    return install


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_like_one_that_was_not(trained, data, whole, tmp_path):
    choice = random.Random()
    arguments = options(tmp_path / "run", trained, data, **RUN)
    kills = 0
    while kills < 12 and was_killed(start_copy(arguments, dying_at_random(choice))):
        kills += 1
    assert kills >= 3
    train_here(tmp_path / "run", trained, data, **RUN)
    assert largest_gap(adapter_weights(tmp_path / "run" / "final"), adapter_weights(whole)) <= 1e-5


def test_a_copy_that_dies_while_it_draws_progress_keeps_no_lock_of_this_process():
    assert was_killed(start_copy([], lambda: (tqdm.get_lock().acquire(), die())))
    assert tqdm.get_lock().acquire(blocking=False)
    tqdm.get_lock().release()


@pytest.mark.parametrize("lost", [COMPLETE_FILE, "optimizer.pt", "trainable.safetensors", "trainer_state.json"])
def test_a_checkpoint_that_is_not_whole_is_never_chosen(trained, data, whole, tmp_path, capsys, lost):
    output = tmp_path / "run"
    shutil.copytree(whole.parent, output)
    shutil.rmtree(output / "final")
    # As after a machine's breakdown, which cuts what was not yet on its disk.
    os.truncate(output / "checkpoint-10" / lost, 20)
    assert main(options(output, trained, data, **{**RUN, "resume": output / "checkpoint-10"})) == 1
    assert "no complete checkpoint" in capsys.readouterr().err
    train_here(output, trained, data, **RUN)
    assert largest_gap(adapter_weights(output / "final"), adapter_weights(whole)) <= 1e-5


def test_a_named_checkpoint_is_resumed_from(trained, data, whole, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(whole.parent, output)
    train_here(output, trained, data, **{**RUN, "resume": output / "checkpoint-8"})
    assert largest_gap(adapter_weights(output / "final"), adapter_weights(whole)) <= 1e-5


def test_a_finished_run_is_finished_again_without_a_step(trained, data, whole, tmp_path, monkeypatch):
    output = tmp_path / "run"
    shutil.copytree(whole.parent, output)
    monkeypatch.setattr(ForgeryTrainer, "training_step", lambda *_: pytest.fail("a step was trained"))
    train_here(output, trained, data, **RUN)
    assert largest_gap(adapter_weights(output / "final"), adapter_weights(whole)) == 0


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"lora_r": 8}, "lora_r was 4, is 8"),
        ({"lora_dropout": 0.2}, "lora_dropout"),
        ({"learning_rate": 2e-3}, "learning_rate"),
        ({"weight_decay": 0.1}, "weight_decay"),
        ({"warmup_ratio": 0.5}, "warmup_steps"),
        ({"lr_scheduler_type": "constant"}, "lr_scheduler_type"),
        ({"mm_projector_lr": 1e-5}, "mm_projector_lr"),
        ({"optim": "sgd"}, "optim"),
        ({"bf16": True}, "bf16"),
        ({"max_steps": 12}, "max_steps"),
        ({"seed": 7}, "seed"),
        ({"cpm_search": "labels"}, "cpm_search"),
        ({"gradient_accumulation_steps": 1}, "global_batch was 4, is 2"),
        ({"loss_average": "micro_batch"}, "loss_average"),
        ({"group_by_modality_length": False}, "group_by_modality_length"),
        ({"group_by_length": True}, "group_by_length"),
        ({"verdict_only_share": 0.5}, "verdict_only_share"),
        ({"image_aspect_ratio": "square"}, "image_aspect_ratio"),
        ({"init": "fusion"}, "init"),
    ],
)
def test_a_run_with_another_option_is_not_continued(trained, data, whole, capsys, changed, named):
    assert main(options(whole.parent, trained, data, **{**RUN, **changed})) == 1
    message = capsys.readouterr().err
    assert named in message and message.count("error: ") == 1 and "Traceback" not in message


def test_a_damaged_description_of_the_run_is_named(trained, data, whole, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(whole.parent, output)
    os.truncate(output / "run.json", 20)
    assert main(options(output, trained, data, **RUN)) == 1
    assert f"error: {output / 'run.json'} is not JSON" in capsys.readouterr().err


def test_options_of_a_run_are_compared_under_their_old_names_too(tmp_path):
    (tmp_path / "run.json").write_text('{"alike_lengths": true}')
    checkpointing.check_same_run(tmp_path / "run.json", {"group_by_length": True})
    with pytest.raises(OptionError, match="group_by_length was True, is False"):
        checkpointing.check_same_run(tmp_path / "run.json", {"group_by_length": False})


def test_a_run_on_other_data_is_not_continued(trained, whole, tmp_path, capsys):
    other = write_records(tmp_path, count=14, text_only=5, seed=1)
    assert main(options(whole.parent, trained, other, **RUN)) == 1
    assert "data was" in capsys.readouterr().err


def test_a_used_folder_is_not_overwritten(trained, data, whole, capsys):
    before = adapter_weights(whole)
    assert main(options(whole.parent, trained, data, **{**RUN, "resume": None})) == 1
    assert "--resume auto" in capsys.readouterr().err
    assert largest_gap(adapter_weights(whole), before) == 0


def test_a_checkpoint_of_other_parameters_is_refused(trained, data, whole, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(whole.parent, output)
    run = json.loads((output / "run.json").read_text("utf-8"))
    (output / "run.json").write_text(json.dumps({**run, "lora_r": 8}), encoding="utf-8")
    assert main(options(output, trained, data, **{**RUN, "lora_r": 8})) == 1
    message = capsys.readouterr().err
    assert "other trained parameters" in message and "Traceback" not in message


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_killed_run_of_two_sharding_processes_resumes(trained, data, tmp_path, stage):
    pytest.importorskip("deepspeed")
    run = {**RUN, "gradient_accumulation_steps": 1, "max_steps": 6, "deepspeed": ROOT / "scripts" / f"zero{stage}.json"}
    whole = train_on_two(tmp_path / "whole", trained, data, **run)
    output = tmp_path / "run"
    process = start_on_two(output, trained, data, **run)
    deadline = time.monotonic() + 240
    while not (output / "checkpoint-2" / COMPLETE_FILE).is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (output / "final").exists()
    resumed = train_on_two(output, trained, data, **run)
    assert largest_gap(adapter_weights(resumed), adapter_weights(whole)) <= 1e-5
