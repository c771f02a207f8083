"""Each plausible mistake makes at least one comparison with the authors' numbers fail."""

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.model.multimodal_encoder import dino_encoder
from llava.model.multimodal_encoder.base import TowerOutput
from tests.reference import Comparer, Reference, compare_vision

Mutation = Callable[[Any, pytest.MonkeyPatch], None]


def drop_bias(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.fusion.attention_bias = lambda attention: None


def swap_query_and_key_value(model: Any, patch: pytest.MonkeyPatch) -> None:
    right = model.fusion.forward

    def swapped(inputs: dict[str, Tensor], **options: Any) -> Any:
        return right({**inputs, "clip": inputs["dino"], "dino": inputs["clip"]}, **options)

    model.fusion.forward = swapped


def renormalise_attention(model: Any, patch: pytest.MonkeyPatch) -> None:
    right = model.fusion.attention_bias
    model.fusion.attention_bias = lambda attention: right(attention / attention.sum(dim=-1, keepdim=True))


def interpolate_to_size(model: Any, patch: pytest.MonkeyPatch) -> None:
    def to_size(positions: Tensor, rows: int, columns: int) -> Tensor:
        native = round((positions.shape[1] - 1) ** 0.5)
        grid = positions[:, 1:].unflatten(1, (native, native)).permute(0, 3, 1, 2)
        resampled = F.interpolate(grid, size=(rows, columns), mode="bicubic").flatten(2).transpose(1, 2)
        return torch.cat((positions[:, :1], resampled), dim=1)

    patch.setattr(dino_encoder, "resample_positions", to_size)


def features_after_the_norm(model: Any, patch: pytest.MonkeyPatch) -> None:
    right = model.dino_tower.encode

    def normed(pixels: Tensor, *, with_attention: bool) -> TowerOutput:
        seen = right(pixels, with_attention=with_attention)
        return TowerOutput(model.dino_tower.vision_tower.layernorm(seen.features), seen.attention)

    model.dino_tower.encode = normed


def larger_epsilon(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.fusion.attention_norm.eps = model.fusion.ffn_norm.eps = 1e-5


def epsilon_outside_the_root(model: Any, patch: pytest.MonkeyPatch) -> None:
    def forward(self: nn.LayerNorm, x: Tensor) -> Tensor:
        deviation = x.std(dim=-1, keepdim=True, unbiased=False)
        return self.weight * (x - x.mean(dim=-1, keepdim=True)) / (deviation + self.eps) + self.bias

    for norm in (model.fusion.attention_norm, model.fusion.ffn_norm):
        norm.forward = MethodType(forward, norm)


def sample_variance(model: Any, patch: pytest.MonkeyPatch) -> None:
    def forward(self: nn.LayerNorm, x: Tensor) -> Tensor:
        root = (x.var(dim=-1, keepdim=True, unbiased=True) + self.eps).sqrt()
        return self.weight * (x - x.mean(dim=-1, keepdim=True)) / root + self.bias

    for norm in (model.fusion.attention_norm, model.fusion.ffn_norm):
        norm.forward = MethodType(forward, norm)


def tanh_gelu_in(*parts: str) -> Mutation:
    def mutate(model: Any, patch: pytest.MonkeyPatch) -> None:
        for part in parts:
            for module in model.get_submodule(part).modules():
                if isinstance(module, nn.GELU):
                    module.approximate = "tanh"

    return mutate


def last_clip_layer(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.vision_tower.num_layers_run += 1


def imagenet_pixels_for_dino(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.dino_tower.config |= {"pixel_mean": [0.485, 0.456, 0.406], "pixel_std": [0.229, 0.224, 0.225]}


def unscaled_scores(model: Any, patch: pytest.MonkeyPatch) -> None:
    scale = (model.fusion.q_proj.out_features // model.fusion.num_heads) ** 0.5
    model.fusion.q_proj.weight.data *= scale
    model.fusion.q_proj.bias.data *= scale


MUTATIONS: dict[str, tuple[Mutation, str]] = {
    "drop the bias": (drop_bias, "fusion/out"),
    "swap query and key/value": (swap_query_and_key_value, "fusion/out"),
    "renormalise the attention": (renormalise_attention, "fusion/attn_bias"),
    "interpolate to size=": (interpolate_to_size, "dino/features"),
    "features after the norm": (features_after_the_norm, "dino/features"),
    "epsilon 1e-5": (larger_epsilon, "norm_small/out_0"),
    "epsilon outside the root": (epsilon_outside_the_root, "norm_small/out_1"),
    "sample variance": (sample_variance, "fusion/out"),
    "tanh-GELU in the CLIP projector": (tanh_gelu_in("mm_projector"), "proj/clip"),
    "tanh-GELU in the DINO projector": (tanh_gelu_in("dino_mm_projector"), "proj/dino"),
    "tanh-GELU in the bias": (tanh_gelu_in("fusion.attention_mlp"), "fusion/attn_bias"),
    "the last CLIP layer": (last_clip_layer, "clip/features"),
    "ImageNet pixels for DINO": (imagenet_pixels_for_dino, "dino/features"),
    "unscaled scores": (unscaled_scores, "fusion/out"),
}


@pytest.fixture
def compared(bundled: Reference, monkeypatch: pytest.MonkeyPatch) -> Callable[[Mutation | None], set[str]]:
    """Compares the vision side of a mutated copy of the model; returns what failed."""

    def compare(mutation: Mutation | None) -> set[str]:
        tokenizer, model, processor, length = bundled.base
        changed = Reference(bundled.folder)
        changed.base = (tokenizer, copy.deepcopy(model), processor, length)
        if mutation is not None:
            mutation(changed.base[1].get_model(), monkeypatch)
        comparer = Comparer(changed)
        compare_vision(changed, comparer)
        assert not comparer.outcome.absent
        return set(comparer.outcome.failed)

    return compare


def test_the_right_implementation_passes(compared):
    assert compared(None) == set()


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_implementation_is_caught(compared, name):
    mutation, caught_by = MUTATIONS[name]
    assert caught_by in compared(mutation)
