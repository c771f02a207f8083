"""Merging: in float32, what the written dtype loses said, and nothing that is no number."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava import load_pretrained_model
from llava.merge import main as merge
from llava.model.adapter import measure_lost
from llava.model.checkpoint import open_checkpoint
from tests.training_runs import LORA, train_here, write_records


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_records(tmp_path_factory.mktemp("data"), count=8)


@pytest.fixture(scope="module")
def half_base(trained, tmp_path_factory) -> Path:
    """The small model in float16."""
    folder = tmp_path_factory.mktemp("half") / "base"
    assert merge(["--model-path", str(trained), "--save-model-path", str(folder), "--dtype", "float16"]) == 0
    return folder


@pytest.fixture(scope="module")
def adapter(half_base, data, tmp_path_factory) -> Path:
    """A short training's LoRA folder over a float16 base."""
    output = tmp_path_factory.mktemp("adapter") / "run"
    return train_here(output, half_base, data, **LORA, max_steps=6, learning_rate=1e-5)


def logits(model) -> torch.Tensor:
    size = model.image_processor.crop_size["height"]
    images = torch.randn(10, 3, size, size, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, -200, 40, 50, 60]]).expand(10, -1)
    with torch.no_grad():
        return model.eval()(input_ids=ids, images=images).logits


def open_whole(folder: Path, **options):
    return load_pretrained_model(folder, device="cpu", dtype="float32", **options)[1]


def test_a_short_training_over_a_half_precision_base_is_merged_whole(adapter, tmp_path, capsys):
    """peft#1567: six steps, default options, compared on ten images."""
    assert merge(["--model-path", str(adapter), "--save-model-path", str(tmp_path / "merged")]) == 0
    unmerged = open_whole(adapter, merge_lora=False)
    merged = open_whole(tmp_path / "merged")
    tokens = merged.config.cpm_tokens
    found, wanted = (
        (logits(model)[:, -1, [tokens["real"], tokens["fake"]]] / 10).softmax(-1)[:, 1] for model in (merged, unmerged)
    )
    assert (found - wanted).abs().max() < 1e-5
    assert {t.dtype for n, t in load_file(tmp_path / "merged/model.safetensors").items() if "layers" in n} == {
        torch.float32
    }
    assert "loses" not in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_a_written_dtype_loses_is_said(adapter, half_base, tmp_path, capsys, dtype):
    folder = tmp_path / "merged"
    assert merge(["--model-path", str(adapter), "--save-model-path", str(folder), "--dtype", dtype]) == 0
    said = capsys.readouterr().err
    assert f"{dtype} loses" in said and "do not move" in said
    checkpoint = open_checkpoint(adapter)
    whole = checkpoint.with_update().tensors
    names = [name for name, tensor in whole.items() if tensor is not checkpoint.tensors[name]]
    lost = measure_lost(checkpoint.tensors, {name: whole[name] for name in names}, getattr(torch, dtype))
    assert f"{lost.share:.1%}" in said and lost.share > 0.1 and lost.unmoved > 0.1
    written = load_file(folder / "model.safetensors")
    assert all(written[name].dtype == getattr(torch, dtype) for name in names)
    assert all(torch.equal(written[name], whole[name][...].to(written[name].dtype)) for name in names)


@pytest.mark.parametrize("where", ["base", "adapter", "beside", "result"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused_by_name(adapter, half_base, tmp_path, capsys, where, value):
    base, lora = tmp_path / "base", tmp_path / "lora"
    shutil.copytree(half_base, base)
    shutil.copytree(adapter, lora)
    file, dtype = {"base": base / "model.safetensors"}.get(where, lora / "adapter_model.safetensors"), "auto"
    if where == "beside":
        tensors = torch.load(lora / "non_lora_trainables.bin", weights_only=True)
        name = sorted(tensors)[0]
        tensors[name].view(-1)[0] = value
        torch.save(tensors, lora / "non_lora_trainables.bin")
        name = "model.fusion"
    else:
        tensors = load_file(file)
        ends = ("model.layers.0.self_attn.q_proj.weight", "layers.0.self_attn.q_proj.lora_B.weight")
        name = next(name for name in tensors if name.endswith(ends))
        tensors[name].view(-1)[0] = 3e38 if where == "result" else value
        save_file(tensors, file, {"format": "pt"})
        dtype = "float16" if where == "result" else dtype
        name = "q_proj"
    command = ["--model-path", str(lora), "--model-base", str(base), "--save-model-path", str(tmp_path / "merged")]
    assert merge([*command, "--dtype", dtype]) == 1
    said = capsys.readouterr().err
    assert name in said and "infini" in said and "Traceback" not in said
    assert not (tmp_path / "merged").exists()


def test_training_goes_on_from_a_lora_folder(adapter, data, tmp_path):
    """LLaVA#1278: the first step's model is the folder's, and the second result holds both updates."""
    still = train_here(tmp_path / "still", adapter, data, **LORA, learning_rate=0.0)
    wanted = logits(open_whole(adapter))
    assert torch.allclose(logits(open_whole(still)), wanted, atol=1e-5)
    further = train_here(tmp_path / "further", adapter, data, **LORA)
    assert (logits(open_whole(further)) - wanted).abs().max() > 1e-3
    assert merge(["--model-path", str(further), "--save-model-path", str(tmp_path / "merged")]) == 0
    assert torch.allclose(logits(open_whole(tmp_path / "merged")), logits(open_whole(further)), atol=1e-4)


@pytest.mark.parametrize("named", ["../base", "base", "./../base/"])
def test_a_relative_base_counts_from_the_adapters_folder(adapter, half_base, tmp_path, monkeypatch, named):
    folder = tmp_path / "lora"
    shutil.copytree(adapter, folder)
    shutil.copytree(half_base, (folder if named == "base" else tmp_path) / "base")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": named}))
    monkeypatch.chdir("/")
    assert torch.equal(logits(open_whole(folder)), logits(open_whole(adapter)))
