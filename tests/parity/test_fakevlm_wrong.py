"""Each plausible mistake makes at least one comparison of FakeVLM with the authors' numbers fail."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from llava import mm_utils
from llava.conversation import conv_templates
from llava.model.verdict import VerdictTokens
from tests.parity import fakevlm_reference as parts
from tests.parity.fakevlm_reference import FakeVLMReference, compare_all
from tests.parity.test_fakevlm import BUNDLED

Mutation = Callable[[Any, pytest.MonkeyPatch], None]


def tanh_in_the_projector(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.get_model().mm_projector[1] = nn.GELU(approximate="tanh")


def exact_gelu_in_the_tower(model: Any, patch: pytest.MonkeyPatch) -> None:
    for layer in model.get_model().vision_tower.vision_tower.encoder.layers:
        layer.mlp.activation_fn = nn.GELU()


def the_last_layer_of_the_tower(model: Any, patch: pytest.MonkeyPatch) -> None:
    tower = model.get_model().vision_tower
    tower.num_layers_run = tower.vision_tower.config.num_hidden_layers


def another_epsilon_in_the_tower(model: Any, patch: pytest.MonkeyPatch) -> None:
    for module in model.get_model().vision_tower.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6


def another_epsilon_in_the_language_model(model: Any, patch: pytest.MonkeyPatch) -> None:
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.variance_epsilon = 1e-6


def padded_instead_of_cropped(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model.config, "image_aspect_ratio", "pad")


def no_beginning_mark(model: Any, patch: pytest.MonkeyPatch) -> None:
    right = mm_utils.join_chunks
    patch.setattr(mm_utils, "join_chunks", lambda chunks, bos, between: right(chunks, bos, between)[1:])


def end_mark_without_its_space(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(conv_templates, "chat", replace(conv_templates["chat"], sep2="</s>"))


def end_mark_behind_every_turn(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(conv_templates, "chat", replace(conv_templates["chat"], between=None))


def verdicts_swapped(model: Any, patch: pytest.MonkeyPatch) -> None:
    own = model.verdict_tokens
    patch.setattr(model.config, "cpm_tokens", VerdictTokens(own.pattern, own.fake, own.real).to_dict())


MUTATIONS: list[tuple[Mutation, Any, str]] = [
    (tanh_in_the_projector, parts.compare_vision, "proj/out"),
    (exact_gelu_in_the_tower, parts.compare_vision, "vision/features"),
    (the_last_layer_of_the_tower, parts.compare_vision, "vision/features"),
    (another_epsilon_in_the_tower, parts.compare_vision, "vision/hidden_m2"),
    (another_epsilon_in_the_language_model, parts.compare_training, "train.lm_loss"),
    (padded_instead_of_cropped, parts.compare_pixels, "pixel_values"),
    (no_beginning_mark, parts.compare_training, "train/input_ids"),
    (end_mark_without_its_space, parts.compare_training, "train/labels"),
    (end_mark_behind_every_turn, parts.compare_training, "mixed/0/input_ids"),
    (verdicts_swapped, parts.compare_probabilities, "pfake of raw, image 0"),
]


@pytest.mark.parametrize(("mutate", "part", "name"), MUTATIONS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_wrong_implementation_is_caught(monkeypatch, mutate, part, name):
    reference = FakeVLMReference(BUNDLED)
    mutate(reference.base[1], monkeypatch)
    if part is parts.compare_training:
        monkeypatch.setattr(parts, "_compare_gradients", lambda *_: None)
    outcome = compare_all(reference, [part])
    assert name in outcome.failed, str(outcome)
