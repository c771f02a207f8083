"""8 and 4 bits for the language model's layers, and for nothing else."""

import importlib.util

import pytest
import torch

from llava import load_pretrained_model
from tests.conftest import GOLDENS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def linear_types(model) -> dict[str, str]:
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if type(module).__name__.startswith("Linear")
    }


@pytest.mark.parametrize(("option", "kind"), [("load_8bit", "Linear8bitLt"), ("load_4bit", "Linear4bit")])
def test_only_the_language_models_layers_are_quantised(bundled, option, kind):
    _, model, _, _ = bundled.load(**{option: True})
    types = linear_types(model)
    quantised = {name for name, found in types.items() if found == kind}
    assert quantised == {name for name in types if name.startswith("model.layers.")}
    assert len(quantised) == 7 * model.config.num_hidden_layers
    assert all(types[name] == "Linear" for name in types if name not in quantised)
    assert types["lm_head"] == "Linear" and types["model.fusion.q_proj"] == "Linear"
    assert any("vision_tower" in name for name in types) and any("dino_tower" in name for name in types)
    with torch.no_grad():
        exact = bundled.base[1](input_ids=bundled.prompt_ids, images=bundled.pixels[:1]).logits
        rough = model(input_ids=bundled.prompt_ids, images=bundled.pixels[:1]).logits
        same = model.encode_images(bundled.pixels).tokens
    assert torch.allclose(same, bundled.tensors["fusion/out"], atol=1e-5, rtol=1e-5)
    assert torch.nn.functional.cosine_similarity(exact.flatten(), rough.flatten(), dim=0) > 0.9
    assert not torch.equal(exact, rough)
    assert model.generate(bundled.prompt_ids, images=bundled.pixels[:1], max_new_tokens=3).shape == (1, 3)


def test_an_adapter_stays_apart_on_a_quantised_model(bundled):
    _, model, _, _ = bundled.load("lora", load_8bit=True)
    assert any("lora_A" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        rough = model(input_ids=bundled.prompt_ids, images=bundled.pixels[:1]).logits
        exact = bundled.load("lora")[1](input_ids=bundled.prompt_ids, images=bundled.pixels[:1]).logits
    assert torch.nn.functional.cosine_similarity(exact.flatten(), rough.flatten(), dim=0) > 0.9


def test_both_at_once_are_refused():
    with pytest.raises(ValueError, match="exclude each other"):
        load_pretrained_model(GOLDENS / "base", load_8bit=True, load_4bit=True)


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(ValueError, match=r"fakereasoning\[quant\]"):
        load_pretrained_model(
            GOLDENS / "base", vision_tower=GOLDENS / "clip", dino_weights=GOLDENS / "dino.pth", load_4bit=True
        )
