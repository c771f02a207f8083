"""Towers, projectors and fusions at sizes that differ from the published ones."""

import importlib.util

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from llava import load_pretrained_model
from llava.errors import CheckpointError
from llava.model.multimodal_encoder.base import PixelFormat
from llava.model.multimodal_encoder.builder import VISION_TOWERS, build_vision_tower, read_vision_tower
from llava.model.multimodal_encoder.dino_encoder import resample_positions
from llava.model.multimodal_fusion.builder import FUSIONS, build_fusion
from llava.model.multimodal_projector.builder import build_vision_projector
from tests.conftest import GOLDENS
from tests.small_models import CLIP_CONFIG, DINO_CONFIG, MeanTower, small_config, small_model

SHARED = PixelFormat(28, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
PIXELS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
TIMM_CONFIG = {"type": "timm", "name": "vit_tiny_patch16_224", "image_size": 32}


def test_the_dino_attention_is_that_of_the_last_block_and_changes_nothing():
    tower = build_vision_tower(DINO_CONFIG, SHARED)
    with torch.no_grad():
        seen = tower(PIXELS, with_attention=True)
        assert torch.equal(seen.features, tower(PIXELS).features)
        assert tower(PIXELS).attention is None
        plain = tower.vision_tower(PIXELS, output_hidden_states=True).hidden_states[-1]
    assert seen.attention.shape == (2, 3, 5, 5)
    assert torch.allclose(seen.attention.sum(dim=-1), torch.ones(2, 3, 5))
    assert torch.allclose(seen.features, plain[:, 1:], atol=1e-6)


def test_positions_are_resampled_again_when_they_change():
    tower = build_vision_tower(DINO_CONFIG, SHARED)
    tower.requires_grad_(False)
    first = tower(PIXELS).features
    assert torch.equal(tower(PIXELS).features, first)
    tower.vision_tower.embeddings.position_embeddings.data.add_(1.0)
    tower.vision_tower.embeddings.position_embeddings.add_(torch.randn(1, 10, 36))
    assert not torch.equal(tower(PIXELS).features, first)


def test_a_trainable_dino_tower_passes_gradients_to_its_positions():
    tower = build_vision_tower(DINO_CONFIG, SHARED)
    tower(PIXELS).features.sum().backward()
    assert tower.vision_tower.embeddings.position_embeddings.grad.abs().sum() > 0


def test_resampled_positions_of_oblong_grids(bundled):
    native = bundled.base[1].get_model().dino_tower.vision_tower.embeddings.position_embeddings
    for name, rows, columns in (("dino/pos_embed_interp", 5, 5), ("dino/pos_embed_interp_98x70", 7, 5)):
        assert (resample_positions(native, rows, columns) - bundled.tensors[name]).abs().max() < 1e-6
    assert resample_positions(native, 4, 4) is native


def test_the_dino_tower_at_its_native_size(bundled):
    tower = bundled.base[1].get_model().dino_tower
    with torch.no_grad():
        tokens = tower.encode(bundled.tensors["dino/in_56"], with_attention=False).features
    assert (tokens - bundled.tensors["dino/x_prenorm_56"][:, 1:]).abs().max() < 1e-5


def test_a_tower_makes_its_own_pixels_of_the_shared_ones():
    own = build_vision_tower({**DINO_CONFIG, "pixel_mean": [0.5, 0.4, 0.3], "pixel_std": [0.2, 0.3, 0.4]}, SHARED)
    picture = torch.rand(1, 3, 28, 28)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (SHARED.mean, SHARED.std))
    shared = (picture - mean) / std
    wanted = (picture - torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)
    assert torch.allclose(own.own_pixels(shared), wanted, atol=1e-5)
    assert own.own_pixels(shared) is not shared
    assert build_vision_tower(DINO_CONFIG, SHARED).own_pixels(shared) is shared
    larger = build_vision_tower({**DINO_CONFIG, "image_size": 42}, SHARED)
    assert larger.own_pixels(shared).shape[-1] == 42 and larger.grid == (3, 3)


def test_a_dino_tower_is_read_from_transformers_layout(tmp_path):
    config = Dinov2Config(
        hidden_size=36, num_hidden_layers=2, num_attention_heads=3, mlp_ratio=2, image_size=42, patch_size=14
    )
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    source = read_vision_tower(str(tmp_path))
    assert source.config == {**DINO_CONFIG, "use_swiglu_ffn": False, "use_mask_token": True}
    save_file({name: tensor[...].contiguous() for name, tensor in source.tensors.items()}, tmp_path / "tower.st")
    pixels = torch.randn(1, 3, 42, 42)
    small = small_model(dino_tower_config=source.config, mm_fusion_type="dino")
    small.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        hidden = model(pixels, output_hidden_states=True).hidden_states[-1]
        tower = build_vision_tower(source.config, PixelFormat(42, SHARED.mean, SHARED.std))
        tower.vision_tower.load_state_dict(model.state_dict())
        assert torch.allclose(tower(pixels).features, hidden[:, 1:], atol=1e-5)


def test_selected_features_of_clip():
    full = build_vision_tower({**CLIP_CONFIG, "select_layer": -1, "select_feature": "cls_patch"}, SHARED)
    with torch.no_grad():
        states = full.vision_tower(PIXELS, output_hidden_states=True).hidden_states
        assert torch.allclose(full(PIXELS).features, states[-1], atol=1e-6)
        full.num_layers_run = 1
        assert torch.allclose(full(PIXELS).features, states[1], atol=1e-6)
    assert full.num_patches == 5


def test_a_further_tower_is_one_class(monkeypatch):
    monkeypatch.setitem(VISION_TOWERS, "mean", MeanTower)
    model = small_model(dino_tower_config={"type": "mean"})
    assert model.encode_images(PIXELS).tokens.shape == (2, 4, 32)


@needs_timm
def test_a_timm_tower_shows_its_last_attention():
    import timm

    tower = build_vision_tower(TIMM_CONFIG, SHARED).eval()
    assert (tower.grid, tower.hidden_size, tower.num_heads, tower.num_prefix_tokens) == ((2, 2), 192, 3, 1)
    with torch.no_grad():
        seen = tower(PIXELS, with_attention=True)
        reference = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32).eval()
        reference.load_state_dict(tower.vision_tower.state_dict())
        hidden = []
        reference.blocks[-1].register_forward_hook(lambda module, inputs, output: hidden.append(output))
        reference(tower.own_pixels(PIXELS))
    assert torch.allclose(seen.features, hidden[0][:, 1:], atol=1e-5)
    assert seen.attention.shape == (2, 3, 5, 5)
    assert torch.allclose(seen.attention.sum(dim=-1), torch.ones(2, 3, 5), atol=1e-5)


@needs_timm
def test_a_model_with_a_timm_tower_is_saved_and_opened(tmp_path, bundled):
    model = small_model(dino_tower_config=TIMM_CONFIG, vocab_size=800)
    model.tokenizer = bundled.base[0]
    model.save_pretrained(tmp_path)
    again = load_pretrained_model(tmp_path, device="cpu")[1]
    assert torch.equal(again.encode_images(PIXELS).tokens, model.encode_images(PIXELS).tokens)


@needs_timm
def test_a_timm_weight_file_is_read(tmp_path):
    import timm

    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    source = read_vision_tower(f"timm:vit_tiny_patch16_224:{tmp_path / 'weights.safetensors'}")
    assert source.config["image_size"] == 224 and source.config["pixel_mean"] == [0.5, 0.5, 0.5]
    assert torch.equal(source.tensors["vision_tower.cls_token"], model.cls_token)


@needs_timm
@pytest.mark.parametrize(
    ("source", "message"), [("timm:resnet18", "vision transformer is needed"), ("timm:no_such_vit", "no_such_vit")]
)
def test_what_timm_cannot_serve_is_explained(source, message):
    with pytest.raises(CheckpointError, match=message):
        read_vision_tower(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (str(GOLDENS / "base"), "llava_llama model, but a CLIP vision tower"),
        ("/nowhere/dino.pth", "no weight file"),
        ("/nowhere/clip", "no folder"),
    ],
)
def test_a_source_that_is_no_tower_is_explained(source, message):
    with pytest.raises(CheckpointError, match=message):
        read_vision_tower(source)


HEADS = {"clip": 2, "dino": 3}


def fusion_input(patches: int = 4) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    attention = torch.rand(2, 3, patches, patches) * 0.2
    return {"clip": torch.randn(2, patches, 32), "dino": torch.randn(2, patches, 32), "dino_attention": attention}


@pytest.mark.parametrize("name", FUSIONS)
def test_every_fusion_gives_tokens_and_says_whether_it_looked(name):
    torch.manual_seed(0)
    fusion = build_fusion(name, 32, HEADS, {"num_heads": 4}).eval()
    branches = fusion_input()
    output = fusion(branches)
    assert output.tokens.shape == (2, 8 if name == "interleave" else 4, 32)
    if fusion.has_attention:
        looked = fusion(branches, return_attention=True)
        assert torch.allclose(looked.tokens, output.tokens, atol=1e-5)
        assert looked.attention.shape == (2, 4, 4, 4)
        assert torch.allclose(looked.attention.sum(dim=-1), torch.ones(2, 4, 4), atol=1e-5)
    else:
        with pytest.raises(ValueError, match="has no attention"):
            fusion(branches, return_attention=True)


def test_interleaved_and_single_branches():
    branches = fusion_input()
    tokens = build_fusion("interleave", 32, HEADS, None)(branches).tokens
    assert torch.equal(tokens[:, 0::2], branches["clip"]) and torch.equal(tokens[:, 1::2], branches["dino"])
    assert build_fusion("clip", 32, HEADS, None)(branches).tokens is branches["clip"]
    assert build_fusion("dino", 32, HEADS, None)(branches).tokens is branches["dino"]


def test_the_bias_is_what_forgery_aware_adds_to_cross_attention():
    aware = build_fusion("forgery_aware", 32, HEADS, {"num_heads": 4}).eval()
    cross = build_fusion("cross_attention", 32, HEADS, {"num_heads": 4}).eval()
    cross.load_state_dict({name: value for name, value in aware.state_dict().items() if "attention_mlp" not in name})
    branches = fusion_input()
    assert not torch.allclose(aware(branches).tokens, cross(branches).tokens)
    for parameter in aware.attention_mlp.parameters():
        nn.init.zeros_(parameter)
    assert torch.allclose(aware(branches).tokens, cross(branches).tokens, atol=1e-6)


def test_dropout_acts_only_in_training():
    fusion = build_fusion("forgery_aware", 32, HEADS, {"num_heads": 4, "dropout": 0.5})
    branches = fusion_input()
    assert not torch.equal(fusion(branches).tokens, fusion(branches).tokens)
    fusion.eval()
    assert torch.equal(fusion(branches).tokens, fusion(branches).tokens)


@pytest.mark.parametrize("name", FUSIONS)
def test_a_model_builds_only_what_its_fusion_uses(name):
    model = small_model(mm_fusion_type=name).get_model()
    assert hasattr(model, "mm_projector") == (name != "dino")
    assert hasattr(model, "dino_mm_projector") == hasattr(model, "dino_tower") == (name != "clip")
    assert model.encode_images(PIXELS).tokens.shape == (2, 8 if name == "interleave" else 4, 32)


def test_unequal_grids_need_a_fusion_that_takes_them():
    finer = {**DINO_CONFIG, "image_size": 42}
    with pytest.raises(ValueError, match="4 and 9"):
        small_model(dino_tower_config=finer)
    model = small_model(dino_tower_config=finer, mm_fusion_type="cross_attention")
    assert model.encode_images(PIXELS, return_attention=True).attention.shape == (2, 4, 4, 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dino_tower_config": None}, "needs a tower for its branch 'dino'"),
        ({"vision_tower_config": {"type": "vgg"}}, "unknown vision tower type"),
        ({"mm_fusion_config": {"num_heads": 5}}, "no multiple of its 5 heads"),
        ({"mm_image_processor": None}, "no mm_image_processor"),
        ({"mm_projector_type": "mlp0x_gelu"}, "unknown mm_projector_type"),
        ({"mm_projector_type": "identity"}, "cannot turn width 24 into 32"),
        ({"mm_vision_select_feature": "cls"}, "neither patch nor cls_patch"),
    ],
)
def test_a_config_that_cannot_be_built_is_explained(changes, message):
    with pytest.raises(ValueError, match=message):
        small_model(**changes)


def test_projectors_by_name():
    assert isinstance(build_vision_projector("linear", 3, 5), nn.Linear)
    assert isinstance(build_vision_projector("identity", 3, 3), nn.Identity)
    layers = [type(layer) for layer in build_vision_projector("mlp3x_gelu", 3, 5)]
    assert layers == [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]


def test_frozen_towers_keep_no_graph_but_projectors_learn():
    model = small_model()
    tokens = model.encode_images(PIXELS).tokens
    tokens.sum().backward()
    assert all(p.grad is None for n, p in model.named_parameters() if "_tower." in n)
    assert all(p.grad is not None for n, p in model.named_parameters() if "projector" in n or "fusion" in n)
    assert small_config().mm_fusion_type == "forgery_aware"
