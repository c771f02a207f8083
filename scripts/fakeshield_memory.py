"""What FakeShield takes of a GPU's memory at its published size, from shapes alone: a table, then one JSON line.

Weights, keys and values of one image with the longest answers, and the largest activation, that of SAM's attention.
Quantised are the linear layers of both language models: 8 bits with a scale a row, or 4 bits (NF4) with scales that are
quantised too, 0.127 bits a weight.
"""

import json
import sys
from typing import Any

import torch
from torch import nn
from transformers import SamModel

from llava.model.configuration import LlavaConfig
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.clip_encoder import image_processor_settings
from llava.systems.fakeshield.sam import build_config
from llava.systems.fakeshield.tagger import Tagger

GIB = 2**30
HALF = 2
"""Bytes of a number in bfloat16."""
_CLIP = {
    **{"type": "clip", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24},
    **{"num_attention_heads": 16, "image_size": 336, "patch_size": 14},
}
_SAM: dict[str, dict[str, Any]] = {
    "vision": {
        **{"hidden_size": 1280, "output_channels": 256, "num_hidden_layers": 32, "num_attention_heads": 16},
        **{"image_size": 1024, "patch_size": 16, "window_size": 14, "global_attn_indexes": [7, 15, 23, 31]},
        **{"num_pos_feats": 128, "mlp_dim": 5120, "layer_norm_eps": 1e-6},
    },
    "prompt": {"hidden_size": 256, "image_size": 1024, "patch_size": 16, "mask_input_channels": 16},
    "decoder": {"hidden_size": 256, "mlp_dim": 2048, "num_hidden_layers": 2, "num_attention_heads": 8},
}
_SIZES = {"explainer": (5120, 40, 13824, 32000), "segmenter": (4096, 32, 11008, 32007)}
_POSITIONS = {"explainer": 575 + 140 + 1024, "segmenter": 1536}


def language_model(part: str) -> LlavaLlamaForCausalLM:
    """Returns the published language model of a part, without memory."""
    hidden, layers, inner, words = _SIZES[part]
    config = LlavaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 128,
        intermediate_size=inner,
        vocab_size=words,
        vision_tower_config=_CLIP,
        mm_image_processor=image_processor_settings(336),
        mm_fusion_type="clip",
    )
    with torch.device("meta"):
        return LlavaLlamaForCausalLM(config)


def weight_bytes(model: nn.Module, bits: int) -> float:
    """Returns the bytes of a model's weights, the linear layers of its blocks in so many bits."""
    total = 0.0
    for name, parameter in model.named_parameters():
        is_quantised = bits < 16 and name.startswith("model.layers.") and parameter.ndim == 2
        if is_quantised and bits == 8:
            total += parameter.numel() + 4 * parameter.shape[0]
        elif is_quantised:
            total += parameter.numel() * (4 + 0.127) / 8
        else:
            total += parameter.numel() * HALF
    return total


def count(module: nn.Module) -> int:
    """Returns how many numbers a module has."""
    return sum(parameter.numel() for parameter in module.parameters())


def main() -> int:
    """Prints the table and the JSON line."""
    models = {part: language_model(part) for part in _SIZES}
    with torch.device("meta"):
        sam, tagger = SamModel(build_config(_SAM)), Tagger()
    tower = models["segmenter"].model.vision_tower
    assert tower is not None
    clip, sam_bytes, tag_bytes = count(tower) * HALF, count(sam) * HALF, count(tagger) * 4
    cache = {part: 2 * _SIZES[part][0] * _SIZES[part][1] * HALF * _POSITIONS[part] for part in _SIZES}
    attention = 16 * 4096**2 * HALF  # of one image in SAM's global blocks, whose positions need the whole matrix
    rows = {}
    for bits in (16, 8, 4):
        explainer = weight_bytes(models["explainer"], bits)
        segmenter = weight_bytes(models["segmenter"], bits) + sam_bytes
        together = explainer + segmenter - clip + tag_bytes + max(cache["explainer"], cache["segmenter"] + attention)
        alone = {"explainer": explainer + cache["explainer"], "segmenter": segmenter + cache["segmenter"] + attention}
        rows[bits] = {name: round(value / GIB, 1) for name, value in {"together": together, **alone}.items()}
    print(f"{'bits':<6}{'together':>10}{'explainer':>11}{'segmenter':>11}")
    for bits, row in rows.items():
        print(f"{bits:<6}{row['together']:>10}{row['explainer']:>11}{row['segmenter']:>11}")
    print(json.dumps({"gib": rows, "one_at_a_time": {b: max(r["explainer"], r["segmenter"]) for b, r in rows.items()}}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
