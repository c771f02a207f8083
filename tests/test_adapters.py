"""Adapters of every kind that PEFT writes: opened as PEFT opens them, or refused in one sentence."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from llava import load_pretrained_model
from llava.errors import CheckpointError
from llava.model.checkpoint_layout import NON_LORA_FILE, stored_state_dict
from llava.systems.fakereasoning.checkpoint import non_lora_trainables

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(bundled, tmp_path_factory) -> Path:
    """The reference's base with its towers inside, so that it opens by itself."""
    folder = tmp_path_factory.mktemp("base") / "base"
    bundled.load()[1].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def opened(base):
    return load_pretrained_model(base, device="cpu")[1]


def logits(model) -> torch.Tensor:
    size = model.image_processor.crop_size["height"]
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, -200, *range(40, 60)]])
    with torch.no_grad():
        return model.eval()(input_ids=ids, images=images).logits


def language_targets(model, ends: list[str]) -> list[str]:
    return [n for n, _ in model.named_modules() if n.startswith("model.layers.") and n.endswith(tuple(ends))]


def write_adapter(opened, base: Path, folder: Path, **settings: Any) -> torch.Tensor:
    """Writes what PEFT writes of a trained adapter, and returns the trained model's logits."""
    model = copy.deepcopy(opened)
    torch.manual_seed(1)
    values = {"r": 4, "lora_alpha": 8, "target_modules": language_targets(model, TARGETS), "init_lora_weights": False}
    adapted = get_peft_model(model, LoraConfig(**{**values, **settings}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    adapted.save_pretrained(folder)
    change(folder, base_model_name_or_path=str(base))
    saved = load_file(folder / "adapter_model.safetensors")
    beside = {
        name: tensor for name, tensor in non_lora_trainables(stored_state_dict(opened)).items() if name not in saved
    }
    torch.save(beside, folder / NON_LORA_FILE)
    return logits(adapted)


def change(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def both_ways(folder: Path) -> list[torch.Tensor]:
    return [logits(load_pretrained_model(folder, device="cpu", merge_lora=merge)[1]) for merge in (True, False)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 3}},
        {"alpha_pattern": {r"layers\.\d+\.mlp\.down_proj": 32.5, "^model.layers.0.self_attn.q_proj": 1}},
        {"fan_in_fan_out": True},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["mm_projector", "model.norm"]},
        {"bias": "lora_only"},
        {"lora_dropout": 0.5, "init_lora_weights": "gaussian"},
        {"target_modules": ["embed_tokens", "model.layers.0.self_attn.q_proj"]},
        {"target_modules": ["lm_head"]},
    ],
    ids=str,
)
def test_an_adapter_computes_what_peft_computes(opened, base, tmp_path, settings):
    wanted = write_adapter(opened, base, tmp_path / "lora", **settings)
    assert (wanted - logits(opened)).abs().max() > 1e-3 or settings.get("init_lora_weights") == "gaussian"
    own = PeftModel.from_pretrained(copy.deepcopy(opened), tmp_path / "lora")
    assert torch.allclose(logits(own), wanted, atol=1e-5)
    for found in both_ways(tmp_path / "lora"):
        assert torch.allclose(found, wanted, atol=1e-4), (found - wanted).abs().max()


# --- what is refused, and what changes nothing


@pytest.fixture(scope="module")
def plain(opened, base, tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """A plain adapter and its model's logits."""
    folder = tmp_path_factory.mktemp("plain") / "lora"
    return folder, write_adapter(opened, base, folder)


@pytest.fixture
def lora(plain, tmp_path) -> Path:
    return shutil.copytree(plain[0], tmp_path / "lora")


def open_fails(folder: Path, match: str) -> None:
    for merge in (True, False):
        with pytest.raises(CheckpointError, match=match) as failure:
            load_pretrained_model(folder, device="cpu", merge_lora=merge)
        assert "\n" not in str(failure.value) and str(folder) in str(failure.value)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"r": 0}, "r must be a whole number"),
        ({"r": -4}, "r must be"),
        ({"r": "4"}, "r must be"),
        ({"r": 4.5}, "r must be"),
        ({"r": True}, "r must be"),
        ({"r": 8}, "rank 8"),
        ({"lora_alpha": None}, "lora_alpha must be a finite number"),
        ({"lora_alpha": "16"}, "lora_alpha must be"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be"),
        ({"lora_alpha": [16]}, "lora_alpha must be"),
        ({"use_rslora": "yes"}, "use_rslora must be true or false"),
        ({"use_dora": True}, "use_dora is True, which asks for norms"),
        ({"rank_pattern": {"q_proj": 2}}, "rank 2"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must be"),
        ({"rank_pattern": {"(": 4}}, "regular expressions"),
        ({"alpha_pattern": {"q_proj": "big"}}, "alpha_pattern must be"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save names lm_head"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be a list"),
        ({"bias": "all"}, "holds no bias"),
        ({"bias": "some"}, "bias must be one of"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": None}, "must be LORA"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": 1}, "init_lora_weights is 1"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_new_thing": {"depth": 3}}, "use_new_thing"),
        ({"target_modules": ["q_proj", "v_proj", "down_proj", "k_proj"]}, "lacks tensors of modules.*k_proj"),
        ({"layers_to_transform": "x"}, "does not say which modules|lacks tensors"),
        ({"target_modules": 7}, "does not say which modules"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_met_is_one_sentence(lora, fields, word):
    if "layers_to_transform" in fields:
        fields = {**fields, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    change(lora, **fields)
    open_fails(lora, word)


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_dropout": 0.9},
        {"inference_mode": False},
        {"task_type": "NONSENSE"},
        {"fan_in_fan_out": True},
        {"target_modules": None},
        {"target_modules": "all-linear"},
        {"init_lora_weights": "orthogonal"},
        {"use_new_thing": False, "new_config": None},
        {"peft_version": "99.0", "auto_mapping": {"base_model_class": "X"}},
        {"bias": "lora_only"},
        {"alpha_pattern": {"k_proj": 64}, "rank_pattern": {"k_proj": 64}},
        {"modules_to_save": []},
    ],
    ids=str,
)
def test_a_field_that_changes_nothing_changes_nothing(lora, plain, fields):
    change(lora, **fields)
    for found in both_ways(lora):
        assert torch.allclose(found, plain[1], atol=1e-4)


def drop(tensors: dict, end: str) -> None:
    del tensors[next(name for name in sorted(tensors) if name.endswith(end))]


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (dict.clear, "holds no tensors"),
        (lambda tensors: drop(tensors, "q_proj.lora_A.weight"), "without its counterpart"),
        (lambda tensors: drop(tensors, "q_proj.lora_B.weight"), "without its counterpart"),
        (lambda tensors: [drop(tensors, f"v_proj.lora_{part}.weight") for part in "AB"], "lacks tensors of modules"),
        (lambda tensors: tensors.update({"base_model.model.model.odd.weight": torch.ones(2)}), "its base lacks"),
        (lambda tensors: tensors.update({"base_model.model.x.lora_C.weight": torch.ones(2)}), "more than LoRA"),
        (lambda tensors: tensors.update({f"x.lora_{p}.weight": torch.ones(4, 4) for p in "AB"}), "the model lacks: x"),
        (lambda tensors: tensors.update({n: t[:, :-1] for n, t in tensors.items() if "lora_A" in n}), "does not fit"),
        (lambda tensors: tensors.update({n: t[0] for n, t in tensors.items() if "lora_A" in n}), "rank 4"),
        (lambda tensors: tensors.update({n: t * float("nan") for n, t in tensors.items() if "lora_B" in n}), "NaN"),
    ],
)
def test_tensors_that_do_not_fit_are_one_sentence(lora, spoil, word):
    file = lora / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    spoil(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    open_fails(lora, word)


@pytest.mark.parametrize("field", ["r", "lora_alpha", "peft_type"])
def test_a_field_that_is_missing_is_named(lora, field):
    file = lora / "adapter_config.json"
    values = json.loads(file.read_text())
    del values[field]
    file.write_text(json.dumps(values))
    open_fails(lora, "r must be|lora_alpha must be|of type None")


def test_a_part_of_a_module_that_was_trained_whole_is_not_the_bases(opened, base, tmp_path):
    write_adapter(opened, base, tmp_path / "lora", modules_to_save=["mm_projector"])
    file = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    drop(tensors, "mm_projector.0.bias")
    save_file(tensors, file, {"format": "pt"})
    open_fails(tmp_path / "lora", "trained whole.*mm_projector.0.bias")


def test_an_adapter_of_a_tied_embedding_is_refused(lora, base, tmp_path):
    own = shutil.copytree(base, tmp_path / "base")
    values = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**values, "tie_word_embeddings": True}))
    change(lora, base_model_name_or_path=str(own))
    file = lora / "adapter_model.safetensors"
    tensors = load_file(file)
    shape = load_file(base / "model.safetensors")["lm_head.weight"].shape
    parts = {"A": torch.ones(4, shape[1]), "B": torch.ones(shape[0], 4)}
    tensors |= {f"base_model.model.lm_head.lora_{part}.weight": tensor for part, tensor in parts.items()}
    save_file(tensors, file, {"format": "pt"})
    open_fails(lora, "tie_word_embeddings")


def test_a_tensor_that_stands_in_two_files_is_named(lora, opened):
    file = lora / "adapter_model.safetensors"
    name = "base_model.model.model.mm_projector.0.bias"
    save_file({**load_file(file), name: opened.get_parameter("model.mm_projector.0.bias").clone()}, file)
    open_fails(lora, "twice.*mm_projector.0.bias")
