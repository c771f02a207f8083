"""What is NaN or infinite is never written as a good checkpoint, and what is damaged is named."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava import ForgeryDetector, load_pretrained_model
from llava.errors import CheckpointError
from llava.merge import main as merge
from llava.train.checkpointing import COMPLETE_FILE, complete_checkpoints
from llava.train.train import main
from llava.train.trainer import ForgeryTrainer
from tests.training_runs import LORA, environment, options, train_here, write_records

RUN = {**LORA, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "resume": "auto"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_records(tmp_path_factory.mktemp("data"), count=8)


@pytest.fixture(scope="module")
def done(trained, data, tmp_path_factory) -> Path:
    """A whole run with its last checkpoint; the one before is kept too."""
    output = tmp_path_factory.mktemp("run") / "run"
    train_here(output, trained, data, **{**RUN, "save_total_limit": 2})
    return output


def spoil_gradients(monkeypatch, at: int, value: float) -> None:
    """Makes one gradient no number at a step, while the loss stays finite."""
    original = ForgeryTrainer.training_step

    def spoilt(self, model, inputs, *rest, **named):
        loss = original(self, model, inputs, *rest, **named)
        if self.state.global_step == at - 1:
            next(p for p in model.parameters() if p.requires_grad and p.grad is not None).grad.view(-1)[0] = value
        return loss

    monkeypatch.setattr(ForgeryTrainer, "training_step", spoilt)


@pytest.mark.parametrize(("at", "value"), [(4, float("nan")), (3, float("nan")), (4, float("inf"))])
def test_a_finite_loss_with_a_gradient_that_is_none(trained, data, tmp_path, monkeypatch, capsys, at, value):
    """open-instruct#149: the good checkpoint stays, and the disk is not blamed."""
    spoil_gradients(monkeypatch, at, value)
    output = tmp_path / "run"
    assert main(options(output, trained, data, **RUN, logging_strategy="no")) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said and "disk" not in said and ("NaN or infinite" in said or "loss is nan" in said)
    assert [path.name for path in complete_checkpoints(output)] == ["checkpoint-2"]
    assert all(tensor.isfinite().all() for tensor in load_file(output / "checkpoint-2/trainable.safetensors").values())
    assert not (output / "final").exists()


def test_the_last_step_is_checked_without_checkpoints_too(trained, data, tmp_path, monkeypatch, capsys):
    spoil_gradients(monkeypatch, 3, float("nan"))
    assert main(options(tmp_path / "run", trained, data, **LORA)) == 1
    assert "after step 3 trained weights are NaN or infinite" in capsys.readouterr().err
    assert not (tmp_path / "run/final").exists()


@pytest.mark.parametrize("kept", [1, 0])
def test_a_damaged_checkpoint_is_named_and_what_is_taken_instead(done, trained, data, tmp_path, caplog, kept):
    output = shutil.copytree(done, tmp_path / "run")
    shutil.rmtree(output / "final")
    newest = output / "checkpoint-4"
    (newest / "trainable.safetensors").write_bytes(b"cut")
    if not kept:
        shutil.rmtree(output / "checkpoint-2")
    train_here(output, trained, data, **RUN)
    taken = "going on from checkpoint-2" if kept else "training starts anew"
    assert any("checkpoint-4" in text and taken in text for text in caplog.messages)


def test_a_checkpoint_that_holds_nan_is_refused_by_name(done, trained, data, tmp_path, capsys):
    output = shutil.copytree(done, tmp_path / "run")
    shutil.rmtree(output / "final")
    shutil.rmtree(output / "checkpoint-4")
    file = output / "checkpoint-2/trainable.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, file)
    mark = json.loads((file.parent / COMPLETE_FILE).read_text())
    (file.parent / COMPLETE_FILE).write_text(json.dumps({**mark, "bytes": {}}))
    assert main(options(output, trained, data, **RUN)) == 1
    said = capsys.readouterr().err
    assert "checkpoint-2 holds weights that are NaN or infinite" in said and "remove this folder" in said


@pytest.mark.parametrize(("folder", "way"), [("", "final"), ("checkpoint-4", "--resume auto")])
def test_folders_of_a_run_say_where_the_model_is(done, folder, way):
    for open_it in (load_pretrained_model, ForgeryDetector.from_pretrained):
        with pytest.raises(CheckpointError, match=way):
            open_it(done / folder)


@pytest.mark.parametrize(("folder", "way"), [("", "final"), ("checkpoint-4", "--resume auto")])
def test_folders_of_a_run_are_merged_and_exported_or_say_what_to_do(done, tmp_path, capsys, folder, way):
    for layout in ("native", "published"):
        command = ["--model-path", str(done / folder), "--save-model-path", str(tmp_path / layout), "--layout", layout]
        assert merge(command) == 1
        assert way in capsys.readouterr().err and not (tmp_path / layout).exists()
    assert merge(["--model-path", str(done / "final"), "--save-model-path", str(tmp_path / "native")]) == 0


SPOIL_ONE_PROCESS = """
import sys
from llava.train.train import main
from llava.train.trainer import ForgeryTrainer

original = ForgeryTrainer.training_step

def spoilt(self, model, inputs, *rest, **named):
    loss = original(self, model, inputs, *rest, **named)
    if self.args.process_index == int(sys.argv[1]) and self.state.global_step == 3:
        next(p for p in model.parameters() if p.requires_grad).data.view(-1)[0] = float("nan")
    return loss

ForgeryTrainer.training_step = spoilt
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_weights_of_one_process_of_two_that_are_no_number(trained, data, tmp_path, process):
    """Both stop, neither waits for the other, and the good checkpoint stays."""
    script, output = tmp_path / "spoilt.py", tmp_path / "run"
    script.write_text(SPOIL_ONE_PROCESS)
    launcher = [sys.executable, "-m", "llava.train.launch", "--standalone", "--nproc_per_node", "2", str(script)]
    command = [*launcher, str(process), *options(output, trained, data, **RUN, logging_strategy="no")]
    found = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert found.returncode != 0 and "NaN or infinite" in found.stderr and "Traceback" not in found.stderr
    assert [path.name for path in complete_checkpoints(output)] == ["checkpoint-2"]
    assert not (output / "final").exists()


def test_the_final_folder_opens(done):
    _, model, _, _ = load_pretrained_model(done / "final", device="cpu")
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
