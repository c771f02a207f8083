"""Counted operations by part against those of whole steps of small models, and against counts by hand."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.train.flops import BatchSize, Passes, TrainingFlops
from tests.small_models import small_config, small_model

ROWS, LENGTH, PATCHES = 2, 12, 4
TOKENS = LENGTH - 1 + PATCHES
FUSIONS = ("forgery_aware", "cross_attention", "interleave", "clip", "dino")


def with_lora(model: LlavaLlamaForCausalLM):
    """LoRA on the language model's layers; projectors and fusion trained whole."""
    places = r"model\.layers\..*\.(q|k|v|o|gate|up|down)_proj"
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=places))
    for name, parameter in adapted.named_parameters():
        if any(part in name for part in ("mm_projector", "fusion")):
            parameter.requires_grad_(True)
    return adapted


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(12, 60, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    ids[:, 2] = IMAGE_TOKEN_INDEX
    return {"input_ids": ids, "labels": labels, "images": torch.randn(ROWS, 3, 28, 28)}


def seen_by_torch(model, *, backward: bool) -> int:
    """FLOPs with attention as plain products, since torch does not count its fused kernels on a CPU."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        loss = model(**batch()).loss
        if backward:
            loss.backward()
    return counter.get_total_flops()


def size(tokens: int = TOKENS) -> BatchSize:
    return BatchSize.of([tokens] * ROWS, images=ROWS, scored=ROWS * tokens)


def whole_square(flops: TrainingFlops, measured: BatchSize) -> dict[str, Passes]:
    """Counted passes with the whole square of causal attention, as plain products compute it."""
    parts = flops.by_part(measured)
    return {**parts, "attention": parts["attention"] * 2}


def rotary(tokens: int) -> tuple[int, int]:
    """FLOPs outside the count: newer versions of transformers make the rotary angles by no matrix product."""
    return 0, ROWS * tokens * small_config().head_dim


def total(parts: dict[str, Passes]) -> int:
    return sum(part.total for part in parts.values())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_forward_is_counted_exactly(fusion):
    model = small_model(mm_fusion_type=fusion)
    tokens = LENGTH - 1 + PATCHES * (2 if fusion == "interleave" else 1)
    parts = whole_square(TrainingFlops(model), size(tokens))
    unseen = seen_by_torch(model, backward=False) - sum(part.forward for part in parts.values())
    assert unseen in rotary(tokens)


def test_the_forward_is_that_of_a_count_by_hand():
    """CLIP alone: 4 patches of 14 x 14 pixels, one of two blocks over 5 tokens; then projector and decoder."""
    flops = TrainingFlops(small_model(mm_fusion_type="clip"))
    one_image = flops.by_part(BatchSize(images=1))
    patches = 4 * (3 * 14 * 14) * 24
    block = 5 * (4 * 24 * 24 + 2 * 24 * 48) + 2 * 5 * 5 * 24
    assert one_image["towers"] == Passes(2 * (patches + block))
    assert one_image["projectors"].forward == 2 * 4 * (24 * 32 + 32 * 32)
    assert one_image["fusion"] == Passes()
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48  # q and o; k and v of half as many heads; the three of the MLP
    assert flops.by_part(BatchSize(tokens=1))["layers"].forward == 2 * 2 * layer
    # A pair: one product of 32 numbers for its score, one for its value; causal attention needs half of the pairs.
    assert flops.by_part(BatchSize(squares=2))["attention"].forward == 2 * 2 * (32 + 32)
    assert flops.language_weights == 2 * layer + 32 * 64


def test_repeated_towers_are_counted_without_their_embedding():
    model = small_model(mm_fusion_type="clip").train()
    model.model.vision_tower.requires_grad_(True)
    model.gradient_checkpointing_enable()
    towers = TrainingFlops(model).by_part(BatchSize(images=1))["towers"]
    assert towers.repeated == towers.forward - 2 * 4 * (3 * 14 * 14) * 24


@pytest.mark.parametrize("kind", ["projectors", "lora", "whole"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_whole_step_is_counted(kind, checkpointed):
    model = small_model(mm_fusion_type="interleave").train()
    if kind == "projectors":
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("mm_projector" in name)
    trained = with_lora(model) if kind == "lora" else model
    if checkpointed:
        model.gradient_checkpointing_enable()
    parts = whole_square(TrainingFlops(trained), size(LENGTH - 1 + 2 * PATCHES))
    seen, counted = seen_by_torch(trained, backward=True), total(parts)
    if not checkpointed:
        assert seen - counted in rotary(LENGTH - 1 + 2 * PATCHES)
    else:
        # Repetition ends at the last value that the backward needs, so that a layer's last product may be left out.
        last = 2 * model.config.intermediate_size * model.config.hidden_size * ROWS * (LENGTH - 1 + 2 * PATCHES)
        most = model.config.num_hidden_layers * last
        assert -rotary(LENGTH - 1 + 2 * PATCHES)[1] <= counted - seen <= most


def test_the_step_of_the_published_fusion():
    model = small_model().train()
    trained = with_lora(model)
    parts = whole_square(TrainingFlops(trained), size())
    assert seen_by_torch(trained, backward=True) - total(parts) in rotary(TOKENS)


def test_trained_towers_have_a_backward():
    model = small_model(mm_fusion_type="interleave").train()
    frozen = TrainingFlops(model)
    for tower in (model.model.vision_tower, model.model.dino_tower):
        tower.requires_grad_(True)
    trained = TrainingFlops(model)
    measured = size(LENGTH - 1 + 2 * PATCHES)
    assert frozen.by_part(measured)["towers"].backward == 0
    unseen = seen_by_torch(model, backward=True) - total(whole_square(trained, measured))
    assert unseen in rotary(LENGTH - 1 + 2 * PATCHES)


def test_only_what_has_a_backward_is_repeated():
    model = small_model().train()
    model.gradient_checkpointing_enable()
    parts = TrainingFlops(with_lora(model)).by_part(size())
    assert {name for name, part in parts.items() if part.repeated} == {"layers", "attention"}
    assert parts["layers"].repeated == parts["layers"].forward


def test_frozen_weights_cost_four_and_six_with_repetition():
    """At the published size, a frozen decoder costs 4 FLOPs a weight and token, 6 with checkpointing."""
    heads = {"num_attention_heads": 40, "num_key_value_heads": 40}
    sizes = {"vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
    fusion = {"mm_fusion_config": {"num_heads": 16}}
    with torch.device("meta"):
        model = LlavaLlamaForCausalLM(small_config(**sizes, **heads, **fusion)).train()
        weights = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
        model.requires_grad_(False)
        model.model.mm_projector.requires_grad_(True)
    one_token = BatchSize(tokens=1)
    flops = TrainingFlops(model)
    assert flops.needed(one_token) == flops.computed(one_token) == 4 * weights
    model.gradient_checkpointing_enable()
    flops = TrainingFlops(model)
    assert flops.needed(one_token) == 4 * weights and flops.computed(one_token) == 6 * weights
    assert flops.conventional(one_token) == 6 * (weights + 32000 * 5120)


def test_sizes_add_up():
    first, second = BatchSize.of([3, 5], images=2, scored=4), BatchSize.of([2], images=1, scored=1)
    assert first + second == BatchSize(images=3, tokens=10, squares=9 + 25 + 4, scored=5)


def test_looking_through_logits_has_no_backward():
    flops = TrainingFlops(small_model())
    config = small_config()
    assert flops.needed(BatchSize(searched=3)) == 3 * 2 * config.hidden_size * config.vocab_size
    assert flops.by_part(BatchSize(searched=3))["search"].backward == 0


def test_padding_is_computed_but_not_needed():
    flops = TrainingFlops(small_model())
    needed, computed = BatchSize.of([5, 9], 2, 4), BatchSize.of([9, 9], 2, 4)
    assert flops.needed(needed) < flops.needed(computed)


def test_adapters_are_not_of_the_language_model():
    model = small_model()
    assert TrainingFlops(model).language_weights == TrainingFlops(with_lora(model)).language_weights
