"""The published FakeReasoning checkpoints: their tensor names, and what their shapes tell of the model.

Published configs name neither the fusion nor any head count; both are read from the tensors.
"""

from collections.abc import Mapping
from typing import Any

import torch

from llava.model.checkpoint_files import TensorLike
from llava.model.checkpoint_layout import LORA_PREFIX, Duplicate, KeyMap, Rename
from llava.model.multimodal_encoder.dino_encoder import original_rules
from llava.systems.base import CheckpointFormat

NON_LORA_PARTS = ("model.fusion.", "model.mm_projector.", "model.dino_mm_projector.")
"""What is trained whole beside the LoRA weights, by our names."""

_PUBLISHED, _NATIVE = "model.crossattention.", "model.fusion."

KEY_MAP = KeyMap(
    (
        Rename(f"{_PUBLISHED}attention_mlp.mlp.{{n}}.{{p}}", f"{_NATIVE}attention_mlp.{{n}}.{{p}}"),
        Rename(f"{_PUBLISHED}mhatt.0.linear_q.{{p}}", f"{_NATIVE}q_proj.{{p}}"),
        Rename(f"{_PUBLISHED}mhatt.0.linear_k.{{p}}", f"{_NATIVE}k_proj.{{p}}"),
        Rename(f"{_PUBLISHED}mhatt.0.linear_v.{{p}}", f"{_NATIVE}v_proj.{{p}}"),
        Rename(f"{_PUBLISHED}mhatt.0.linear_merge.{{p}}", f"{_NATIVE}out_proj.{{p}}"),
        Rename(f"{_PUBLISHED}ffn.0.mlp.fc.linear.{{p}}", f"{_NATIVE}ffn.0.{{p}}"),
        Rename(f"{_PUBLISHED}ffn.0.mlp.linear.{{p}}", f"{_NATIVE}ffn.3.{{p}}"),
        Rename(f"{_PUBLISHED}norm.0.a_2", f"{_NATIVE}attention_norm.weight"),
        Rename(f"{_PUBLISHED}norm.0.b_2", f"{_NATIVE}attention_norm.bias"),
        Rename(f"{_PUBLISHED}norm.1.a_2", f"{_NATIVE}ffn_norm.weight"),
        Rename(f"{_PUBLISHED}norm.1.b_2", f"{_NATIVE}ffn_norm.bias"),
        *original_rules("model.dino_tower.vision_tower.", "model.dino_tower.vision_tower."),
        Duplicate("model.dino_tower.clip_vision_tower.{rest*}", of="model.vision_tower.vision_tower.{rest*}"),
    )
)


def non_lora_trainables(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the published non-LoRA file's contents from a model's tensors by our stored names."""
    parts = {name: tensor for name, tensor in state_dict.items() if name.startswith(NON_LORA_PARTS)}
    return {f"{LORA_PREFIX}{name}": tensor for name, tensor in KEY_MAP.to_published(parts).items()}


def infer_fusion(tensors: Mapping[str, TensorLike]) -> dict[str, Any]:
    """Returns ``mm_fusion_type`` and ``mm_fusion_config`` as the tensors (by our names) tell."""
    bias_in, bias_out = f"{_NATIVE}attention_mlp.0.weight", f"{_NATIVE}attention_mlp.2.weight"
    inner = f"{_NATIVE}ffn.0.weight"
    if bias_in in tensors and bias_out in tensors and inner in tensors:
        settings = {
            "num_heads": tensors[bias_out].shape[0],
            "ffn_hidden_size": tensors[inner].shape[0],
            "bias_hidden_channels": tensors[bias_in].shape[0],
        }
        return {"mm_fusion_type": "forgery_aware", "mm_fusion_config": settings}
    if inner in tensors:
        return {"mm_fusion_type": "cross_attention", "mm_fusion_config": {"ffn_hidden_size": tensors[inner].shape[0]}}
    has_clip = any(name.startswith("model.mm_projector.") for name in tensors)
    has_dino = any(name.startswith("model.dino_mm_projector.") for name in tensors)
    if has_dino:
        return {"mm_fusion_type": "interleave" if has_clip else "dino"}
    return {"mm_fusion_type": "clip"}


def infer_dino_heads(tensors: Mapping[str, TensorLike]) -> int | None:
    """Returns the DINO tower's number of heads, which is the number of channels that the fusion's bias takes."""
    bias_in = tensors.get(f"{_NATIVE}attention_mlp.0.weight")
    return None if bias_in is None else bias_in.shape[1]


class _Format:
    """The published layout as a ``CheckpointFormat``."""

    key_map = KEY_MAP
    tower_types: Mapping[str, str] = {"clip": "clip", "dino": "dinov2"}
    tower_variables: Mapping[str, str] = {"dino": "DINO_WEIGHT"}

    def infer_config(self, config: Mapping[str, Any], tensors: Mapping[str, TensorLike]) -> dict[str, Any]:
        """Returns the config with the fusion that the tensors tell."""
        return {**config, **({} if "mm_fusion_type" in config else infer_fusion(tensors))}

    def infer_tower(self, branch: str, tensors: Mapping[str, TensorLike]) -> dict[str, Any]:
        """Returns the DINO tower's number of heads."""
        heads = infer_dino_heads(tensors) if branch == "dino" else None
        return {} if heads is None else {"num_attention_heads": heads}


FORMAT: CheckpointFormat = _Format()
