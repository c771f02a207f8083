"""Fields of published configs that change results are kept, and odd files are one sentence."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava import load_pretrained_model
from llava.errors import CheckpointError, UserError
from llava.model.builder import load_tokenizer
from llava.model.saving import published_config
from tests.conftest import GOLDENS
from tests.small_models import small_model

TOWERS = {"vision_tower": GOLDENS / "clip", "dino_weights": GOLDENS / "dino.pth"}


@pytest.fixture
def base(tmp_path) -> Path:
    return shutil.copytree(GOLDENS / "base", tmp_path / "base")


@pytest.fixture
def lora(tmp_path) -> Path:
    return shutil.copytree(GOLDENS / "lora", tmp_path / "lora")


def change(file: Path, **fields: Any) -> None:
    values = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**values, **fields}))


def open_base(folder: Path, **options: Any):
    return load_pretrained_model(folder, device="cpu", **TOWERS, **options)


def logits(model) -> torch.Tensor:
    images = torch.randn(
        1, 3, *[model.image_processor.crop_size["height"]] * 2, generator=torch.Generator().manual_seed(0)
    )
    ids = torch.tensor([[1, -200, *range(40, 80)]])
    with torch.no_grad():
        return model.eval()(input_ids=ids, images=images).logits


@pytest.fixture(scope="module")
def wanted() -> torch.Tensor:
    return logits(open_base(GOLDENS / "base")[1])


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 2.0},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 16},
    ],
)
def test_rope_scaling_is_kept_in_reading_and_in_writing(base, wanted, scaling):
    """transformers#36828: a scaled rotation is not the unscaled one."""
    change(base / "config.json", rope_scaling=scaling)
    _, model, _, _ = open_base(base)
    assert (logits(model) - wanted).abs().max() > 1e-4
    again = published_config(model.config.to_dict(), model)["rope_scaling"]
    assert again["type"] == scaling.get("type", scaling.get("rope_type")) and again["factor"] == scaling["factor"]
    change(base / "config.json", rope_scaling=again)
    assert torch.equal(logits(open_base(base)[1]), logits(model))


def test_an_unscaled_rotation_is_written_as_such():
    model = small_model()
    assert published_config(model.config.to_dict(), model)["rope_scaling"] is None


@pytest.mark.parametrize(
    "fields",
    [
        {"torch_dtype": "torch.float32"},
        {"dtype": "float32"},
        {"torch_dtype": None},
        {"pad_token_id": 10**6},
        {"pad_token_id": -1},
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": "flash_attention_2"},
        {"eos_token_id": [2, 7]},
        {"use_cache": False},
    ],
    ids=str,
)
def test_fields_that_change_nothing_change_nothing(base, wanted, fields):
    change(base / "config.json", **fields)
    assert torch.equal(logits(open_base(base)[1]), wanted)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"torch_dtype": "float99"}, "float99"),
        ({"rope_scaling": {"type": "nonsense", "factor": 2.0}}, "nonsense"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": "linear"}, "config.json is wrong"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"num_attention_heads": 7}, "config.json is wrong|of another shape"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
    ids=str,
)
def test_fields_that_cannot_be_met_are_one_sentence(base, fields, word):
    change(base / "config.json", **fields)
    with pytest.raises(CheckpointError, match=word):
        open_base(base)


@pytest.mark.parametrize("ends", [2, [2, 7], [7]])
def test_every_end_that_a_checkpoint_names_ends_an_answer(base, ends):
    """mlx-vlm#309, with sampling settings that are not taken over."""
    change(base / "generation_config.json", eos_token_id=ends, do_sample=True, temperature=0.2, top_p=0.1)
    from llava.systems.fakereasoning.system import FakeReasoning

    system = FakeReasoning(*open_base(base, system="fakereasoning"))
    assert system.answering._end_ids == {2, *(ends if isinstance(ends, list) else [ends])}
    assert not system.model.generation_config.do_sample


def test_a_tokenizer_that_adds_an_end_does_not_add_it_before_the_answer(base):
    """llama.cpp#13722."""
    plain = load_tokenizer(base)("USER: why? ASSISTANT:").input_ids
    change(base / "tokenizer_config.json", add_eos_token=True)
    assert load_tokenizer(base)("USER: why? ASSISTANT:").input_ids == plain


@pytest.mark.parametrize(
    "name", [1, None, ["model.safetensors"], "../base/model.safetensors", "", "absent.safetensors"]
)
def test_an_index_that_names_odd_files_is_one_sentence(base, name):
    keys = list(load_file(base / "model.safetensors"))
    index = {"weight_map": {**dict.fromkeys(keys, "model.safetensors"), keys[0]: name}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_base(base)


def test_a_dtype_that_is_not_supported_is_named(base):
    tensors = load_file(base / "model.safetensors")
    name = next(name for name in tensors if "q_proj" in name)
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="F8_E4M3"):
        open_base(base)


@pytest.mark.parametrize("file", ["config.json", "adapter_config.json"])
def test_json_that_is_nested_too_deeply_is_one_sentence(lora, file):
    (lora / file).write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        load_pretrained_model(lora, GOLDENS / "base", device="cpu", **TOWERS)


@pytest.mark.parametrize("which", [0, 1, -1])
def test_a_tensor_that_lacks_beside_an_adapter_is_not_the_bases(lora, which):
    """LLaVA#463."""
    file = lora / "non_lora_trainables.bin"
    tensors = torch.load(file, weights_only=True)
    name = sorted(name for name in tensors if "mm_projector" in name)[which]
    torch.save({key: tensor for key, tensor in tensors.items() if key != name}, file)
    with pytest.raises(CheckpointError, match="lacks tensors of parts"):
        load_pretrained_model(lora, GOLDENS / "base", device="cpu", **TOWERS)


@pytest.mark.parametrize("part", ["mm_projector", "crossattention", ""])
def test_a_part_that_lacks_beside_an_adapter_is_not_the_bases(lora, part):
    """LLaVA#463, for a whole part, or all of them."""
    file = lora / "non_lora_trainables.bin"
    tensors = torch.load(file, weights_only=True)
    torch.save({key: tensor for key, tensor in tensors.items() if part not in key}, file)
    with pytest.raises(CheckpointError, match=r"lacks tensors of parts|does not fit the model"):
        load_pretrained_model(lora, GOLDENS / "base", device="cpu", **TOWERS)
