"""Small random models built from config alone, and a tokenizer for them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerFast

from llava.model.configuration import LlavaConfig
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.base import PixelFormat, TowerOutput, TowerSource, VisionTower
from llava.model.multimodal_encoder.clip_encoder import image_processor_settings

CLIP_CONFIG = {
    "type": "clip",
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
DINO_CONFIG = {
    "type": "dinov2",
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "mlp_ratio": 2,
    "native_image_size": 42,
    "patch_size": 14,
}


def small_config(**changes: Any) -> LlavaConfig:
    """A config with unlike sizes everywhere: 4 patches, grouped-query attention, 3 DINO heads, 4 fusion heads."""
    values: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vision_tower_config": CLIP_CONFIG,
        "dino_tower_config": DINO_CONFIG,
        "mm_image_processor": image_processor_settings(28),
        "mm_fusion_config": {"num_heads": 4, "ffn_hidden_size": 40, "bias_hidden_channels": 5},
        "pad_token_id": 0,
        "system": "fakereasoning",
        "cpm_tokens": {"pattern": [7, 8, 9], "real": 10, "fake": 11},
    }
    return LlavaConfig(**{**values, **changes})


def small_model(seed: int = 0, **changes: Any) -> LlavaLlamaForCausalLM:
    """A random model of that config, no parameter at 0 or 1."""
    torch.manual_seed(seed)
    model = LlavaLlamaForCausalLM(small_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (parameter == 1) * 1.0)
    return model


def published_llama_pieces() -> PreTrainedTokenizerFast:
    """A tokenizer of 32,000 pieces in which the verdict's pieces have Llama's ids."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    vocab = {f"<fill_{index}>": index for index in range(32000)}

    def place(piece: str, index: int) -> None:
        vocab.pop(next(name for name, value in vocab.items() if value == index))
        vocab[piece] = index

    words = {
        "▁<": 529,
        "<": 29966,
        "CON": 6007,
        "CL": 6154,
        "US": 3308,
        "ION": 2725,
        ">": 29958,
        "▁This": 910,
        "▁image": 1967,
        "▁is": 338,
        "▁real": 1855,
        "▁fake": 25713,
        "▁": 29871,
        "\n": 13,
        ".": 29889,
        "x": 29916,
    }
    for piece, index in words.items():
        place(piece, index)
    merges: list[tuple[str, str]] = []
    free = iter(range(20000, 25000))
    for piece in sorted(words, key=len):
        for end in range(1, len(piece) + 1):
            for part in (piece[:end], piece[end - 1 : end]):
                if part not in vocab:
                    place(part, next(free))
            if end > 1 and (piece[: end - 1], piece[end - 1]) not in merges:
                merges.append((piece[: end - 1], piece[end - 1]))
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token=None, fuse_unk=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Replace("▁", " ")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class MeanTower(VisionTower):
    """Mean colours of four quarters, the smallest tower that there can be."""

    tower_type = "mean"
    hidden_size, num_heads, grid = 3, 1, (2, 2)

    def __init__(self, config: dict[str, Any], shared: PixelFormat) -> None:
        super().__init__(config, shared)
        self.scale = nn.Parameter(torch.ones(1))

    @classmethod
    def opens(cls, source: str) -> bool:
        return source == "mean"

    @classmethod
    def read(cls, source: str) -> TowerSource:
        return TowerSource({"type": "mean"}, {"scale": torch.ones(1)}, "nowhere")

    def encode(self, pixels: torch.Tensor, *, with_attention: bool) -> TowerOutput:
        features = F.avg_pool2d(pixels, 14).flatten(2).transpose(1, 2) * self.scale
        return TowerOutput(features, torch.full((len(pixels), 1, 5, 5), 0.2) if with_attention else None)
