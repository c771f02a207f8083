"""Every tensor that was trained is in what is written, in every way to train and every layout."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava import load_pretrained_model
from llava.model.checkpoint import open_checkpoint, stored_dtype
from llava.model.checkpoint_files import read_tensor_file, read_tensors
from llava.train import train as train_module
from llava.train.train import main
from tests.conftest import GOLDENS
from tests.test_train_export import PUBLISHED, TOWERS
from tests.training_runs import LORA, options, train_here, write_records

STEP = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
WAYS: dict[str, dict[str, Any]] = {
    "all": {},
    "all and towers": {"unfreeze_towers": True},
    "lora": LORA,
    "lora and towers": {**LORA, "unfreeze_towers": True},
    "lora in bfloat16": {**LORA, "bf16": True},
    "projectors": {"tune_mm_mlp_adapter": True},
    "projectors and towers": {"tune_mm_mlp_adapter": True, "unfreeze_towers": True},
    "qlora": {**LORA, "bits": 4},
}
CASES = [
    (way, layout)
    for way, given in WAYS.items()
    for layout in ("adapter", "merged", "published")
    if (layout != "adapter" or "lora_enable" in given)
    and not (layout == "merged" and "bits" in given)
    and not (layout == "published" and {"lora_enable", "unfreeze_towers"} <= set(given))
]
QUICK = {("all and towers", "merged"), ("lora and towers", "adapter"), ("lora", "published"), ("qlora", "adapter")}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_records(tmp_path_factory.mktemp("data"), count=4)


@pytest.fixture
def in_memory(monkeypatch) -> dict[str, torch.Tensor]:
    """What a run holds when it writes its result: its trained tensors, and the weights that adapters are on."""
    found: dict[str, torch.Tensor] = {}
    original = train_module.export_model

    def keeping(model, tensors, folder, **named):
        if folder.name == "final":
            named_here = dict(model.named_parameters())
            found.update({n: p.detach().clone() for n, p in named_here.items() if p.requires_grad})
            bases = {n: p for n, p in named_here.items() if n.endswith("base_layer.weight")}
            found.update({f"untrained {n}": p.detach().clone() for n, p in bases.items()})
        original(model, tensors, folder, **named)

    monkeypatch.setattr(train_module, "export_model", keeping)
    return found


def run(way: str, layout: str, trained: Path, data: Path, output: Path) -> Path:
    given = {**PUBLISHED, "data_path": data, "image_folder": data.parent / "images"}
    if layout != "published":
        given = {"model_name_or_path": trained, "save_layout": layout}
    return train_here(output, data=data, **{**STEP, **WAYS[way], **given})


def merged_weights(trained: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights that adapters are on, with their updates; alpha over r is 2."""
    found = {}
    for name, weight in trained.items():
        if name.startswith("untrained "):
            path = name.removeprefix("untrained ").removesuffix(".base_layer.weight")
            down, up = (trained[f"{path}.lora_{part}.default.weight"].float() for part in "AB")
            found[f"{path.removeprefix('base_model.model.')}.weight"] = weight.float() + (up @ down) * 2.0
    return found


@pytest.mark.parametrize(
    ("way", "layout"), [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)
def test_what_was_trained_is_written(trained, data, in_memory, tmp_path, way, layout):
    if "bits" in WAYS[way] and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    final = run(way, layout, trained, data, tmp_path / "run")
    learnt = {name: tensor for name, tensor in in_memory.items() if not name.startswith("untrained ")}
    checkpoint = load_file(final.parent / "checkpoint-1" / "trainable.safetensors")
    assert set(checkpoint) == set(learnt) and all(torch.equal(checkpoint[name], learnt[name]) for name in learnt)
    kept_apart = (final / "adapter_config.json").is_file()
    # Towers that are named are taken from there; trained ones stand in the folder itself.
    named = layout == "published" and "unfreeze_towers" not in WAYS[way]
    where = TOWERS if named else {}
    where = where | {"model_base": GOLDENS / "base"} if layout == "published" and kept_apart else where
    written = load_pretrained_model(final, device="cpu", dtype="float32", merge_lora=False, **where)[1].state_dict()
    bare = {name.removeprefix("base_model.model."): tensor.float() for name, tensor in learnt.items()}
    adapters = {name for name in bare if "lora_" in name}
    expected = bare if kept_apart else {n: t for n, t in bare.items() if n not in adapters} | merged_weights(in_memory)
    wrong = [name for name, tensor in expected.items() if not torch.equal(written[name], tensor)]
    assert expected and not wrong
    if kept_apart:
        files = [read_tensor_file(final / name) for name in ("adapter_model.safetensors", "non_lora_trainables.bin")]
        count = sum(tensor[...].numel() for file in files for tensor in file.values())
        learnt_count = sum(tensor.numel() for tensor in learnt.values())
        # Towers are written whole, with layers that stay frozen; the published names repeat the first tower.
        assert count > learnt_count if "unfreeze_towers" in WAYS[way] else count == learnt_count


# --- numbers of another kind


@pytest.mark.parametrize("odd", ["first", "last"])
def test_one_tensor_of_another_dtype_makes_no_other_model(trained, tmp_path, odd):
    """A norm that is kept in float32 must not turn a model of 16 bits into one of 32, nor the other way round."""
    for most, one in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
        folder = tmp_path / str(most)
        folder.mkdir()
        tensors = {name: tensor.to(most) for name, tensor in load_file(trained / "model.safetensors").items()}
        layers = sorted(name for name in tensors if name.startswith("model.layers.") and "norm" in name)
        name = layers[0 if odd == "first" else -1]
        order = [name, *(key for key in tensors if key != name)]
        save_file({key: tensors[key].to(one) if key == name else tensors[key] for key in order}, folder / "x")
        (folder / "x").rename(folder / "model.safetensors")
        for file in trained.iterdir():
            if file.name != "model.safetensors":
                (folder / file.name).symlink_to(file)
        assert stored_dtype(open_checkpoint(folder)) == most
        assert load_pretrained_model(folder, device="cpu")[1].dtype == most


def test_a_merged_result_is_written_in_the_adapters_numbers(trained, data, in_memory, tmp_path):
    """peft#1567: over a base of 16 bits, a short training is not lost by the base's rounding."""
    final = train_here(tmp_path / "run", trained, data, **LORA, bf16=True, save_layout="merged")
    written = read_tensors(final)
    assert {tensor.dtype for tensor in written.values() if tensor.dtype.is_floating_point} == {torch.float32}
    assert all(torch.equal(written[name][...], tensor) for name, tensor in merged_weights(in_memory).items())
    assert json.loads((final / "config.json").read_text())["dtype"] == "float32"


def test_what_a_named_dtype_loses_of_a_training_is_said(trained, data, tmp_path, caplog):
    caplog.set_level("INFO")
    train_here(tmp_path / "run", trained, data, **LORA, save_layout="merged", save_dtype="bfloat16")
    (said,) = {text for text in caplog.messages if "bfloat16 loses" in text and "0.0%" not in text}
    assert "--save_dtype float32 loses nothing" in said


# --- what a further training says of the model


def config_of(final: Path) -> dict[str, Any]:
    return json.loads((final / "config.json").read_text())


@pytest.fixture
def noticed(trained, tmp_path) -> Path:
    """A start that gives its score without an answer, and a notice."""
    folder = tmp_path / "start"
    folder.mkdir()
    for file in trained.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    values = {**config_of(trained), "notice": "Rendered only.", "default_score": "prompt", "verdict_only_share": 0.3}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("Trained further from a model that said: Rendered only.", "answer", 0.0)),
        ({"verdict_only_share": 0.5}, ("Trained further from a model that said: Rendered only.", "prompt", 0.5)),
        ({"notice": "Photographs of 2026."}, ("Photographs of 2026.", "answer", 0.0)),
        ({"notice": "", "default_score": "prompt"}, ("", "prompt", 0.0)),
        ({"default_score": "answer", "verdict_only_share": 0.5, "notice": "A & <b>"}, ("A & <b>", "answer", 0.5)),
    ],
)
def test_what_a_model_says_of_its_use_fits_what_it_was_trained_on(noticed, data, tmp_path, given, expected):
    final = train_here(tmp_path / "run", noticed, data, **LORA, max_steps=1, **given)
    values = config_of(final)
    assert (values["notice"], values["default_score"], values["verdict_only_share"]) == expected
    _, model, _, _ = load_pretrained_model(final, device="cpu")
    assert model.config.notice == expected[0] and model.config.default_score == expected[1]


def test_a_notice_of_what_was_said_before_is_not_wrapped_twice(noticed, data, tmp_path):
    first = train_here(tmp_path / "first", noticed, data, **LORA, max_steps=1)
    second = train_here(tmp_path / "second", first, data, **LORA, max_steps=1)
    assert config_of(second)["notice"] == config_of(first)["notice"]


@pytest.mark.parametrize("changes", [{"num_train_epochs": 5}, {"max_steps": 9}, {"learning_rate": 1e-5}])
def test_more_of_a_run_is_refused_with_the_way(trained, data, tmp_path, capsys, changes):
    given = {**LORA, "max_steps": 1, "save_strategy": "steps", "save_steps": 1, "resume": "auto"}
    train_here(tmp_path / "run", trained, data, **given)
    assert main(options(tmp_path / "run", trained, data, **{**given, **changes})) != 0
    said = capsys.readouterr().err
    final = tmp_path / "run" / "final"
    assert f"--model_name_or_path {final}" in said and next(iter(changes)) in said
    further = train_here(tmp_path / "further", final, data, **{**given, **changes, "max_steps": 1})
    assert load_pretrained_model(further, device="cpu")[1] is not None
