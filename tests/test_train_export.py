"""What a run leaves behind: folders that open with the trained weights, or an error before anything was trained."""

import errno
import json
import os
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llava.model import saving
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint_layout import NON_LORA_FILE
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.train import export
from llava.train import train as train_module
from llava.train.train import main
from llava.train.trainer import ForgeryTrainer
from tests.conftest import GOLDENS
from tests.training_runs import LORA, options, steps, train_here, write_records

TOWERS = {"vision_tower": GOLDENS / "clip", "dino_weights": GOLDENS / "dino.pth"}
GOLDEN_DATA = {"data_path": GOLDENS / "train.json", "image_folder": GOLDENS / "images"}
PUBLISHED = {**TOWERS, **GOLDEN_DATA, "model_name_or_path": GOLDENS / "base", "save_layout": "published"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_records(tmp_path_factory.mktemp("data"), count=12, text_only=2)


@pytest.fixture
def kept(monkeypatch) -> dict:
    """The model in memory that a run exported last."""
    found = {}
    original = train_module.export_model

    def keeping(model, *arguments, **named):
        found["model"] = model
        return original(model, *arguments, **named)

    monkeypatch.setattr(train_module, "export_model", keeping)
    return found


def logits(model) -> torch.Tensor:
    size = model.image_processor.crop_size["height"]
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, -200, 40, 50, 60], [1, 70, -200, 80, 90]])
    with torch.no_grad():
        return model.eval()(input_ids=ids, images=images).logits


def shapes(file: Path) -> dict[str, list[int]]:
    if file.suffix == ".bin":
        return {name: list(tensor.shape) for name, tensor in torch.load(file, weights_only=True).items()}
    with safe_open(file, "pt") as opened:
        return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118 (not a dict)


@pytest.mark.parametrize("save_layout", ["auto", "adapter", "merged"])
def test_the_final_folder_is_the_trained_model(trained, data, kept, tmp_path, save_layout):
    final = train_here(tmp_path / "run", trained, data, **LORA, save_layout=save_layout)
    expected = logits(kept["model"].get_base_model())
    before = logits(load_pretrained_model(trained, device="cpu")[1])
    assert (expected - before).abs().max() > 1e-2
    assert (final / "adapter_config.json").exists() == (save_layout != "merged")
    for merge_lora in (True, False):
        _, model, _, context = load_pretrained_model(final, device="cpu", merge_lora=merge_lora)
        assert torch.allclose(logits(model), expected, atol=1e-5, rtol=1e-5)
        assert model.config.cpm_tokens is not None and context == 2048
    assert sorted(path.name for path in final.parent.iterdir()) == ["data.json", "final", "log.json", "run.json"]


def test_the_published_layout_has_the_authors_files_and_names(kept, tmp_path):
    final = train_here(tmp_path / "run", **LORA, **PUBLISHED)
    assert {path.name for path in final.iterdir()} == {path.name for path in (GOLDENS / "lora").iterdir()}
    for name in ("adapter_model.safetensors", NON_LORA_FILE):
        assert shapes(final / name) == shapes(GOLDENS / "lora" / name)
    ours, theirs = (json.loads((folder / "adapter_config.json").read_text()) for folder in (final, GOLDENS / "lora"))
    for name in ("peft_type", "r", "lora_alpha", "bias", "task_type", "inference_mode"):
        assert ours[name] == theirs[name]
    assert set(ours["target_modules"]) == set(theirs["target_modules"])
    config = json.loads((final / "config.json").read_text())
    assert set(config) <= set(json.loads((GOLDENS / "lora" / "config.json").read_text())) | set(config)
    assert not set(saving._NATIVE_FIELDS) & set(config)
    expected = logits(kept["model"].get_base_model())
    for merge_lora in (True, False):
        _, model, _, _ = load_pretrained_model(final, GOLDENS / "base", **TOWERS, device="cpu", merge_lora=merge_lora)
        assert torch.allclose(logits(model), expected, atol=1e-4, rtol=1e-5)


def test_the_published_layout_of_a_whole_model_is_the_authors(kept, tmp_path):
    final = train_here(tmp_path / "run", **PUBLISHED)
    assert shapes(final / "model.safetensors") == shapes(GOLDENS / "base" / "model.safetensors")
    _, model, _, _ = load_pretrained_model(final, vision_tower=GOLDENS / "clip", device="cpu")
    assert torch.allclose(logits(model), logits(kept["model"]), atol=1e-4, rtol=1e-5)


def test_the_published_layout_cannot_hold_what_a_tower_is(trained, data, tmp_path, capsys):
    assert main(options(tmp_path / "run", trained, data, **LORA, save_layout="published")) == 1
    assert "--vision_tower" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_half_precision_keeps_trained_weights_whole(trained, data, kept, tmp_path):
    final = train_here(tmp_path / "run", trained, data, **LORA, bf16=True)
    for parameter in kept["model"].parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
    stored = [*load_file(final / "adapter_model.safetensors").values()]
    stored += torch.load(final / NON_LORA_FILE, weights_only=True).values()
    assert {tensor.dtype for tensor in stored} == {torch.float32}
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in stored)
    losses = steps(final, "loss")
    exact = steps(train_here(tmp_path / "exact", trained, data, **LORA), "loss")
    assert losses != exact and all(abs(one - other) < 0.1 for one, other in zip(losses, exact, strict=True))


# --- writing that fails


def drop_one(tensors, file, *rest):
    save_file({name: tensors[name] for name in sorted(tensors)[1:]}, file, *rest)


def alter_one(tensors, file, *rest):
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name] + 1}, file, *rest)


@pytest.mark.parametrize("fault", [drop_one, alter_one])
@pytest.mark.parametrize("save_layout", ["adapter", "merged", "published", "published whole"])
def test_a_faulty_write_is_noticed_before_training(trained, data, tmp_path, monkeypatch, capsys, fault, save_layout):
    monkeypatch.setattr(ForgeryTrainer, "train", lambda *_, **__: pytest.fail("it was trained"))
    lora = {} if save_layout == "published whole" else LORA
    monkeypatch.setattr(saving if save_layout == "published whole" else export, "save_file", fault)
    if save_layout == "merged":
        original = LlavaLlamaForCausalLM.save_pretrained

        def faulty(self, folder, *arguments, **named):
            original(self, folder, *arguments, **named)
            file = Path(folder) / "model.safetensors"
            fault(load_file(file), file, {"format": "pt"})

        monkeypatch.setattr(LlavaLlamaForCausalLM, "save_pretrained", faulty)
    layout_name, *_ = save_layout.split()
    given = PUBLISHED if layout_name == "published" else {"model_name_or_path": trained, "save_layout": layout_name}
    assert main(options(tmp_path / "run", data=data, **{**lora, **given})) == 1
    message = capsys.readouterr().err
    assert "does not hold what it should" in message and "Traceback" not in message
    assert list((tmp_path / "run").iterdir()) == []


def test_a_faulty_file_beside_the_adapter_is_noticed(trained, data, tmp_path, monkeypatch, capsys):
    original = torch.save

    def faulty(values, *arguments, **named):
        original({name: value + 1 for name, value in values.items()}, *arguments, **named)

    monkeypatch.setattr(torch, "save", faulty)
    assert main(options(tmp_path / "run", trained, data, **LORA)) == 1
    assert "does not hold what it should" in capsys.readouterr().err


def test_a_full_disk_is_an_error_before_training(trained, data, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ForgeryTrainer, "train", lambda *_, **__: pytest.fail("it was trained"))
    monkeypatch.setattr(export, "save_file", full)
    assert main(options(tmp_path / "run", trained, data, **LORA)) == 1
    message = capsys.readouterr().err
    assert "No space left on device" in message and str(tmp_path / "run") in message and "Traceback" not in message
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(
    ("save_layout", "most_bytes", "named"),
    [
        ("adapter", 10_000, "trial could not be written"),
        ("adapter", 60_000, "trial could not be written"),  # the adapter fits, the file beside it does not
        ("merged", 300_000, "trial could not be written"),
        ("published", 60_000, "trial could not be written"),
        ("adapter", 250_000, "untouched: is the disk full?"),  # the optimizer's state is the largest
    ],
)
def test_a_disk_that_takes_no_more_is_one_line(trained, data, tmp_path, save_layout, most_bytes, named):
    given = PUBLISHED if save_layout == "published" else {"model_name_or_path": trained, "save_layout": save_layout}
    given = {**LORA, **given, "save_strategy": "steps", "save_steps": 2}
    process = os.fork()
    if process == 0:
        with (tmp_path / "stderr").open("w") as sys.stderr:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
            status = main(options(tmp_path / "run", data=data, **given))
        os._exit(status)
    assert os.WEXITSTATUS(os.waitpid(process, 0)[1]) == 1
    message = (tmp_path / "stderr").read_text()
    assert named in message and message.count("could not be written") == 1 and "Traceback" not in message, message
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"data.json", "run.json"}


def test_a_folder_that_cannot_be_made_is_an_error_before_weights_are_read(trained, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_module, "build_model", lambda *_, **__: pytest.fail("weights were read"))
    (tmp_path / "file").write_text("")
    assert main(options(tmp_path / "file" / "run", trained, data, **LORA)) == 1
    message = capsys.readouterr().err
    assert message.count("error: ") == 1 and str(tmp_path / "file") in message


def test_a_checkpoint_that_cannot_be_written_leaves_earlier_ones(trained, data, tmp_path, monkeypatch, capsys):
    original = ForgeryTrainer.save_model

    def failing(self, folder, *arguments, **named):
        original(self, folder, *arguments, **named)
        if str(folder).endswith("-4"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ForgeryTrainer, "save_model", failing)
    saving_often = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "max_steps": 6}
    assert main(options(tmp_path / "run", trained, data, **LORA, **saving_often)) == 1
    message = capsys.readouterr().err
    assert "checkpoint-4 could not be written" in message and "Traceback" not in message
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-2", "data.json", "run.json"]


# --- validation


@pytest.mark.parametrize("verdict", ["score", "generate"])
def test_the_accuracy_of_a_model_that_answers_real_is_the_share_of_real_images(trained, tmp_path, verdict):
    data = write_records(tmp_path, count=16)
    records = json.loads(data.read_text("utf-8"))
    real, fake = records[::2], records[1::2]
    (tmp_path / "real.json").write_text(json.dumps(real), encoding="utf-8")
    (tmp_path / "eval.json").write_text(json.dumps([*real[:6], *fake[:2]]), encoding="utf-8")
    files = {"data_path": tmp_path / "real.json", "eval_data_path": tmp_path / "eval.json"}
    learning = {"learning_rate": 4e-3, "max_steps": 30, "per_device_train_batch_size": 8, "verdict_only_share": 1.0}
    validating = {"eval_strategy": "steps", "eval_steps": 30, "per_device_eval_batch_size": 3}
    given = {**LORA, **learning, **files, **validating, "validation_verdict": verdict, "validation_new_tokens": 200}
    final = train_here(tmp_path / "run", trained, data, **given)
    assert steps(final, "eval_verdict_accuracy") == [0.75]
    best = final.parent / "best"
    assert json.loads(best.with_suffix(".json").read_text())["verdict_accuracy"] == 0.75
    assert torch.equal(*(logits(load_pretrained_model(folder, device="cpu")[1]) for folder in (best, final)))


def test_the_best_model_is_kept(trained, data, tmp_path, monkeypatch):
    kept = []
    export_model = train_module.export_model

    def keeping(model, tensors, folder, **named):
        if folder.name == "best":
            kept.append(logits(model.get_base_model()))
        export_model(model, tensors, folder, **named)

    monkeypatch.setattr(train_module, "export_model", keeping)
    learning = {**LORA, "learning_rate": 0.02, "lr_scheduler_type": "constant", "max_steps": 4, "validation_share": 0.5}
    validating = {"eval_strategy": "steps", "eval_steps": 1, "validation_verdict": "score"}
    final = train_here(tmp_path / "run", trained, data, **learning, **validating)
    found = steps(final, "eval_verdict_accuracy", "eval_loss", "step")
    accuracy, loss, step = max(found, key=lambda metrics: (metrics[0], -metrics[1]))
    assert len(found) == 4
    note = json.loads((tmp_path / "run" / "best.json").read_text())
    assert note == {"step": step, "verdict_accuracy": accuracy, "loss": loss}
    _, best, _, _ = load_pretrained_model(tmp_path / "run" / "best", device="cpu")
    assert torch.allclose(logits(best), kept[-1], atol=1e-5, rtol=1e-5)
