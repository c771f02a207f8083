"""At the published size, on the meta device, names and shapes are the published ones, one for one."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from llava.model.checkpoint_layout import stored_state_dict
from llava.model.configuration import LlavaConfig
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.clip_encoder import image_processor_settings
from llava.systems.fakereasoning import checkpoint as layout
from tests.conftest import GOLDENS

PUBLISHED = json.loads((GOLDENS.parent / "published_keys_13b.json").read_text())


@pytest.fixture(scope="module")
def model() -> LlavaLlamaForCausalLM:
    config = LlavaConfig(
        system="fakereasoning",
        vocab_size=32000,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        vision_tower_config={
            "type": "clip",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
        dino_tower_config={
            "type": "dinov2",
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "native_image_size": 518,
            "patch_size": 14,
        },
        mm_image_processor=image_processor_settings(336),
    )
    with torch.device("meta"):
        return LlavaLlamaForCausalLM(config)


def shapes(tensors) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def test_merged_names_and_shapes(model):
    theirs = layout.KEY_MAP.to_published(stored_state_dict(model))
    assert len(theirs) == PUBLISHED["counts"]["merged"]
    assert shapes(theirs) == PUBLISHED["merged"]


def test_published_names_become_ours_again(model):
    ours = stored_state_dict(model)
    published = {name: torch.empty(shape, device="meta") for name, shape in PUBLISHED["merged"].items()}
    assert shapes(layout.KEY_MAP.to_native(published)) == shapes(ours)


def test_non_lora_names_and_shapes(model):
    beside = layout.non_lora_trainables(stored_state_dict(model))
    assert shapes(beside) == PUBLISHED["non_lora_trainables"]
    assert sum(tensor.numel() for tensor in beside.values()) == PUBLISHED["parameters"]["non_lora_trainables"]


def test_what_the_shapes_tell_is_the_published_model():
    published = {name: torch.empty(shape, device="meta") for name, shape in PUBLISHED["merged"].items()}
    tensors = layout.KEY_MAP.to_native(published)
    assert layout.infer_dino_heads(tensors) == 16
    assert layout.infer_fusion(tensors) == {
        "mm_fusion_type": "forgery_aware",
        "mm_fusion_config": {"num_heads": 16, "ffn_hidden_size": 20480, "bias_hidden_channels": 32},
    }


def test_lora_names_and_shapes(model):
    """Last, since it puts adapters into the model."""
    settings = LoraConfig(r=128, lora_alpha=256, target_modules=r"model\.layers\..*_proj")
    adapted = get_peft_model(model, settings)
    assert shapes(get_peft_model_state_dict(adapted, save_embedding_layers=False)) == PUBLISHED["lora_adapter"]
