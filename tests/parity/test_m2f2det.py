"""M2F2-Det against the numbers of its authors' code.

``REFERENCE_GOLDENS`` names another folder of the same form: every size comes from the folder.
"""

import gzip
import json
import os
import pickle
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava import ForgeryDetector
from llava.__main__ import main
from llava.errors import CheckpointError, OptionError
from llava.model.multimodal_encoder.clip_encoder import image_processor_settings
from llava.systems.m2f2det import cnn as cnn_module
from llava.systems.m2f2det.checkpoint import (
    infer_config,
    load_tensors,
    open_detector,
    read_detector_tensors,
    save_detector,
)
from llava.systems.m2f2det.cnn import build_cnn, infer_cnn, run_with_taps
from llava.systems.m2f2det.detector_net import M2F2Detector

FOLDER = Path(os.environ.get("REFERENCE_GOLDENS", Path(__file__).parents[1] / "data" / "goldens_m2f2det"))
STAGE1 = FOLDER / "stage1" / "current_model_180.pth"
CLIP = {"atol": 3e-5, "rtol": 1e-5}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
PROBABILITIES = {"atol": 1e-6, "rtol": 0.0}


@cache
def numbers(name: str = "goldens_stage1") -> dict[str, torch.Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


@cache
def facts(name: str = "goldens_stage1") -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


@cache
def config(folder: str) -> dict:
    """What no shape tells: heads of both CLIP towers and of the bridge, strides of the CNN."""
    tiny = json.loads((FOLDER / "tiny_config.json").read_text())
    clip = json.loads((FOLDER / folder / "config.json").read_text())
    return {
        "text": {"num_attention_heads": clip["text_config"]["num_attention_heads"]},
        "strides": [stage[2] for stage in tiny["efficientnet"]["settings"]],
        "bridge_heads": tiny["br_heads"],
        "vision": {"num_attention_heads": clip["vision_config"]["num_attention_heads"]},
    }


@cache
def bridge_tensors(kind: str) -> dict[str, torch.Tensor]:
    tensors = read_detector_tensors(STAGE1)
    if kind == "eff":
        return tensors
    file = FOLDER / "stage1" / "bridge_densenet121_nonclip.safetensors"
    if not file.is_file():
        pytest.skip(f"the part of the goldens in this repository has no {file.name}")
    dense = load_file(file)
    towers = ("clip_text_encoder.model.", "clip_vision_encoder.")
    return {**{name: value for name, value in tensors.items() if name.startswith(towers)}, **dense}


def make(tensors: dict[str, torch.Tensor], given: dict) -> M2F2Detector:
    detector = M2F2Detector(infer_config(tensors, given, "the goldens"))
    load_tensors(detector, tensors, "the goldens")
    return detector.eval()


def bridge(kind: str = "eff") -> M2F2Detector:
    return make(bridge_tensors(kind), config("clip"))


def cosine(kind: str = "densenet121") -> M2F2Detector:
    file = FOLDER / "weights" / f"M2F2_Det_{kind}.pth"
    if not file.is_file():
        pytest.skip(f"the part of the goldens in this repository has no {file.name}")
    given = {name: value for name, value in config("llava_clip").items() if name != "vision"}
    return make(read_detector_tensors(file), given)


def differences(found: dict[str, torch.Tensor], prefix: str) -> list[str]:
    """Names whose numbers differ from the authors', and those that the folder has and nothing was compared with."""
    wanted = {name.removeprefix(prefix): value for name, value in numbers().items() if name.startswith(prefix)}
    wrong = [name for name in wanted if name not in found]
    for name, value in wanted.items():
        bound = CLIP if name.startswith("clip_") else PROBABILITIES if name == "probs" else CLOSE
        if name in found and not torch.allclose(found[name].float(), value, **bound):
            wrong.append(name)
    assert wanted, f"the folder has nothing of {prefix}"
    return wrong


def intermediates(detector: M2F2Detector, pixels: torch.Tensor, features: torch.Tensor | None) -> dict:
    """Every inner tensor by the name that the goldens give it."""
    with torch.inference_mode():
        out = detector(pixels, features)
        _, taps = run_with_taps(detector.deepfake_encoder, pixels)
        found = {
            "pixel_values": pixels,
            "text_feature": out.text_feature,
            "text_proj": out.text,
            "cnn_map": out.cnn_map,
            "cnn_pooled": out.cnn_pooled,
            "cnn_proj": out.cnn,
            "head_in": out.head_input,
            "logits": out.logits,
            "probs": out.logits.softmax(-1),
            "scores": out.scores,
            "vision_proj": out.vision,
            "vision_proj_cls": out.vision[:, 0],
        }
        if features is None:
            states = detector.clip_vision_encoder(pixels)
            found |= {"clip_last": states[-1], "adapter_vector": out.parts["adapter"]}
            for step, (layer, tap) in enumerate(zip((6, 10, 14), taps, strict=True)):
                cut = detector._clip_tap(states[layer])
                linear = getattr(detector, f"linear_{step + 1}")
                found[f"clip_h{layer}"] = cut
                found[f"clip_reduction{step}"] = detector.clip_reduction(cut)
                found[f"cnn_tap{step}"] = tap
                found[f"cnn_tap{step}_linear"] = linear(tap.flatten(2).transpose(1, 2))
    return found


def bridge_pixels(detector: M2F2Detector, index: int) -> torch.Tensor:
    processor = CLIPImageProcessorPil(**image_processor_settings(detector.config.vision["image_size"]))
    image = Image.open(FOLDER / "images" / f"img{index}.png").convert("RGB")
    return processor(image, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_bridge_detector_and_all_within_it(index):
    detector = bridge()
    pixels = bridge_pixels(detector, index)
    assert torch.equal(pixels, numbers()[f"bridge_eff/img{index}/pixel_values"])
    assert not differences(intermediates(detector, pixels, None), f"bridge_eff/img{index}/")


def test_the_bridge_detector_with_a_densenet():
    detector = bridge("dense")
    assert not differences(intermediates(detector, bridge_pixels(detector, 0), None), "bridge_dense/img0/")


def batch_pixels(detector: M2F2Detector) -> torch.Tensor:
    processor = CLIPImageProcessorPil(**image_processor_settings(detector.config.vision["image_size"]))
    images = (numbers()["bridge_eff/batch/images"] * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return processor([Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]


def test_a_batch_is_its_images():
    detector = bridge()
    found = intermediates(detector, batch_pixels(detector), None)
    for name in ("logits", "probs"):
        torch.testing.assert_close(found[name], numbers()[f"bridge_eff/batch/{name}"], **CLOSE)


@pytest.mark.parametrize("kind", ["densenet121", "efficientnet_b4"])
def test_the_cosine_detector_and_all_within_it(kind):
    found = intermediates(cosine(kind), numbers()["cosine/pixel_values"], numbers()["cosine/clip_last"])
    short = "cosine_dense/" if kind == "densenet121" else "cosine_eff/"
    other = {"logits_trainmode", "trainmode_norm0_running_mean", "trainmode_norm0_running_var"}
    wrong = [name for name in differences(found, short) if name not in other and not name.startswith("text_layer")]
    assert not wrong


def test_batch_statistics_are_the_authors_training():
    detector = cosine().train()
    with torch.no_grad():
        out = detector(numbers()["cosine/pixel_values"], numbers()["cosine/clip_last"])
    torch.testing.assert_close(out.logits, numbers()["cosine_dense/logits_trainmode"], **CLOSE)
    for name in ("running_mean", "running_var"):
        own = getattr(detector.deepfake_encoder.norm0, name)
        torch.testing.assert_close(own, numbers()[f"cosine_dense/trainmode_norm0_{name}"], **CLOSE)


def working_bridge() -> M2F2Detector:
    blocks = load_file(FOLDER / "stage1" / "bridge_blocks_not_in_checkpoint.safetensors")
    tensors = {name: value for name, value in bridge_tensors("eff").items() if ".bridge_adapter_proj.2." not in name}
    return make({**tensors, **blocks}, config("clip"))


def test_the_bridge_at_work():
    detector = working_bridge()
    assert detector.config.bridge_scalar_norm == "none"
    with torch.inference_mode():
        out = detector(bridge_pixels(detector, 0))
        own = numbers()
        for step, block in enumerate(detector.bridge_adapter):
            given, wanted = (own[f"bridge_proposal/img0/block{step}_{end}"] for end in ("in", "out"))
            torch.testing.assert_close(block(given), wanted, **CLOSE)
    # From pixels on, the towers' rounding (3e-5 is allowed them) grows from step to step.
    found = {**out.parts, "adapter_vector": out.parts["adapter"], "token_scalars": out.parts["scalars"]}
    found["logits"] = out.logits
    for name in ("block0_in", "block1_in", "block2_in", "block2_out", "token_scalars", "adapter_vector", "logits"):
        torch.testing.assert_close(found[name], own[f"bridge_proposal/img0/{name}"], atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bridge_eff", "cosine_dense", "cosine_eff"])
def test_loss_and_gradients(kind):
    told = facts()
    if kind == "bridge_eff":
        detector = bridge()
        out = detector(batch_pixels(detector))
    else:
        detector = cosine("densenet121" if kind == "cosine_dense" else "efficientnet_b4")
        out = detector(numbers()["cosine/pixel_values"], numbers()["cosine/clip_last"])
    loss = F.cross_entropy(out.logits, torch.tensor(told["train_labels"]))
    loss.backward()
    assert loss.item() == pytest.approx(told[f"{kind}_train/loss"], abs=1e-5)
    own = {name: value.grad.norm().item() for name, value in detector.named_parameters() if value.grad is not None}
    norms = told[f"{kind}_train/grad_norms"]
    assert len(norms) > 20
    for name, norm in norms.items():
        assert own.get(name, 0.0) == pytest.approx(norm, abs=1e-5, rel=1e-4), name


# --- wrong implementations


def _relu_behind_the_last_norm(monkeypatch):
    monkeypatch.setattr(
        "llava.systems.m2f2det.detector_net.run_with_taps",
        lambda cnn, pixels: (F.relu(run_with_taps(cnn, pixels)[0]), run_with_taps(cnn, pixels)[1]),
    )


def _prompt_without_positions(monkeypatch):
    monkeypatch.setattr(
        "llava.systems.m2f2det.detector_net.PromptEncoder.forward",
        lambda self: self.model["text_model"].final_layer_norm(self.prompt_tokens)[:, -1],
    )


def _class_token_scored(monkeypatch):
    monkeypatch.setattr(
        "llava.systems.m2f2det.detector_net.F.cosine_similarity",
        lambda vision, text, **_: F.normalize(vision, dim=-1) @ F.normalize(text + 1, dim=-1)[0, 0],
    )


@pytest.mark.parametrize("wrong", [_relu_behind_the_last_norm, _prompt_without_positions, _class_token_scored])
def test_a_wrong_cosine_detector_is_seen(monkeypatch, wrong):
    wrong(monkeypatch)
    found = intermediates(cosine(), numbers()["cosine/pixel_values"], numbers()["cosine/clip_last"])
    assert "logits" in differences(found, "cosine_dense/")


def test_wrong_pixels_are_seen():
    detector = bridge()
    settings = image_processor_settings(detector.config.vision["image_size"])
    settings |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    image = Image.open(FOLDER / "images" / "img0.png").convert("RGB")
    pixels = CLIPImageProcessorPil(**settings)(image, return_tensors="pt")["pixel_values"]
    assert {"pixel_values", "logits"} <= set(differences(intermediates(detector, pixels, None), "bridge_eff/img0/"))


def test_kept_last_patch_and_batch_statistics_are_seen():
    kept = make(bridge_tensors("eff"), {**config("clip"), "clip_tap_slice": "drop_cls"})
    pixels = bridge_pixels(kept, 0)
    assert {"clip_h6", "clip_h10"} <= set(differences(intermediates(kept, pixels, None), "bridge_eff/img0/"))
    trained = bridge().train()
    assert "logits" in differences(intermediates(trained, pixels, None), "bridge_eff/img0/")


def test_a_head_that_takes_its_parts_in_another_order_is_seen(monkeypatch):
    detector, cat = cosine(), torch.cat
    monkeypatch.setattr(
        "llava.systems.m2f2det.detector_net.torch.cat",
        lambda parts, dim: cat(parts[::-1] if len(parts) == 3 else parts, dim=dim),
    )
    found = intermediates(detector, numbers()["cosine/pixel_values"], numbers()["cosine/clip_last"])
    assert {"head_in", "logits"} <= set(differences(found, "cosine_dense/"))


# --- real sizes


def uniform(shape: torch.Size, j: int) -> torch.Tensor:
    """u(n, j) of the goldens' README, float64."""
    count = int(np.prod(shape, dtype=np.int64)) if len(shape) else 1
    with np.errstate(over="ignore"):
        z = (np.arange(count, dtype=np.uint64) + np.uint64(j * 2**32)) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return torch.from_numpy((z >> np.uint64(11)).astype(np.float64) / 2**53).view(shape)


def formula(name: str, shape: torch.Size, j: int, convolution_gain: float = 2.0) -> torch.Tensor:
    u = uniform(shape, j)
    if name.endswith("running_mean") or name.endswith("bias"):
        return 0.2 * (2 * u - 1)
    if name.endswith("running_var"):
        return 0.7 + 0.6 * u
    if len(shape) == 1 and not name.endswith("class_embedding"):
        return 0.8 + 0.4 * u
    return (2 * u - 1) * (3 * convolution_gain / np.prod(shape[1:])) ** 0.5


def published(kind: str) -> dict[str, tuple[int, ...]]:
    with gzip.open(FOLDER / "published_keys.json.gz", "rt") as stream:
        found = json.load(stream)
    key = next(name for name in found if name.startswith(kind))
    return {name.removeprefix("module."): tuple(shape) for name, (shape, _) in found[key].items()}


HAS_PUBLISHED = pytest.mark.skipif(
    not (FOLDER / "published_keys.json.gz").is_file(), reason="only one folder has the published names"
)


@HAS_PUBLISHED
@pytest.mark.parametrize(("kind", "count"), [("stage1_current_model", 1324), ("M2F2_Det_densenet121", 938)])
def test_the_published_names_map_both_ways(kind, count):
    names = published(kind)
    with torch.device("meta"):
        tensors = {name: torch.empty(shape) for name, shape in names.items()}
        detector = M2F2Detector(infer_config(tensors, {}, "the published file"))
    own = {name: tuple(value.shape) for name, value in detector.state_dict().items()}
    assert own == names and len(own) == count


@HAS_PUBLISHED
@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("densenet121", "M2F2_Det_dense"), ("efficientnet_b4", "stage1_current")])
def test_a_cnn_of_real_size(name, kind):
    shapes = {
        key.removeprefix("deepfake_encoder."): shape
        for key, shape in published(kind).items()
        if key.startswith("deepfake_encoder.")
    }
    cnn, offset = build_cnn(infer_cnn(shapes)), facts("goldens_cnn_full")["offset"]
    floating = [key for key, value in cnn.state_dict().items() if value.is_floating_point()]
    values = {key: formula(key, cnn.state_dict()[key].shape, offset + j) for j, key in enumerate(floating)}
    cnn.load_state_dict({key: value.float() for key, value in values.items()}, strict=False)
    pixels = (1.5 * (2 * uniform(torch.Size((1, 3, 336, 336)), 10**6 + offset) - 1)).float()
    with torch.inference_mode():
        last, taps = run_with_taps(cnn.eval(), pixels)
    wanted, noise = numbers("goldens_cnn_full"), facts("goldens_cnn_full")[name]["noise_fp64_map"]
    bound = {"atol": 10 * noise, "rtol": 1e-5}
    torch.testing.assert_close(last.mean((2, 3)), wanted[f"{name}/pooled"], **bound)
    torch.testing.assert_close(last[..., :2, :2], wanted[f"{name}/map_corner"], **bound)
    for number, tap in zip(cnn_module.TAPS, taps, strict=True):
        torch.testing.assert_close(tap.mean((2, 3)), wanted[f"{name}/tap{number}_mean"], **bound)


# --- files


def test_code_in_a_file_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "run",))

    torch.save({"model_state_dict": {"a": torch.ones(2)}, "scheduler": Trap()}, tmp_path / "trap.pth")
    assert read_detector_tensors(tmp_path / "trap.pth")["a"].tolist() == [1, 1]
    assert not (tmp_path / "run").exists()
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match=r"cannot be read as tensors|no named tensors"):
        read_detector_tensors(tmp_path / "plain.pth")
    assert not (tmp_path / "run").exists()


def test_a_detector_comes_back_from_its_folder(tmp_path):
    detector = working_bridge()
    save_detector(detector, tmp_path / "model")
    again = open_detector(tmp_path / "model")
    assert again.config == detector.config
    pixels = bridge_pixels(detector, 0)
    with torch.inference_mode():
        assert torch.equal(again(pixels).logits, detector(pixels).logits)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with the published stage-1 file and what its shapes do not tell."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / STAGE1.name).write_bytes(STAGE1.read_bytes())
    text = json.dumps({"model_type": "m2f2det", "detector": config("clip")})
    (tmp_path / "model" / "config.json").write_text(text)
    return tmp_path / "model"


def test_the_detector_opens_a_stage_1_file(folder):
    detector = ForgeryDetector.from_pretrained(folder)
    reports = list(detector.analyze_many([FOLDER / "images" / f"img{n}.png" for n in range(3)], attention=True))
    for index, report in enumerate(reports):
        wanted = numbers()[f"bridge_eff/img{index}/probs"][0, 1].item()
        assert report.fake_probability == pytest.approx(wanted, abs=1e-5)
        assert (report.label == "fake") == (wanted >= 0.5) and report.score_source == "detector" and not report.text
        with Image.open(FOLDER / "images" / f"img{index}.png") as image:
            assert report.attention.shape == (image.height, image.width)
        side = detector.system.size // detector.system.detector.config.vision["patch_size"]
        assert np.shape(report.details["forgery_map"]) == (side, side)
    file = folder / STAGE1.name
    assert ForgeryDetector.from_pretrained(file).system.name == "M2F2-Det"
    with pytest.raises(OptionError, match="answers no question"):
        detector.analyze(FOLDER / "images" / "img0.png", question="Why?")


def test_the_command_writes_scores(folder, tmp_path):
    out = tmp_path / "out.jsonl"
    given = ["--model-path", str(folder), "--img_path", str(FOLDER / "images"), "--json", str(out)]
    assert main(["detect", *given]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    wanted = [numbers()[f"bridge_eff/img{index}/probs"][0, 1].item() for index in range(3)]
    assert [row["fake_probability"] for row in rows] == pytest.approx(wanted, abs=1e-5)


def test_bad_files_are_told_in_one_sentence(tmp_path):
    tensors = dict(bridge_tensors("eff"))
    del tensors["output.bias"], tensors["deepfake_encoder.0.1.running_mean"]
    with pytest.raises(CheckpointError, match=r"lacks deepfake_encoder\.0\.1\.running_mean, output\.bias"):
        make(tensors, config("clip"))
    with pytest.raises(CheckpointError, match=r"is no detector of M2F2-Det, or is incomplete: it lacks"):
        infer_config({"deepfake_encoder.conv0.weight": torch.ones(1)}, {}, "x")
    with pytest.raises(CheckpointError, match="stages 2 and 3"):
        ForgeryDetector.from_pretrained(FOLDER / "weights" / "M2F2_Det_densenet121.pth")
    with pytest.raises(CheckpointError, match="clip_tap_slice 'both' is unknown"):
        make(bridge_tensors("eff"), {**config("clip"), "clip_tap_slice": "both"})
    with pytest.raises(OptionError, match="load_4bit would do nothing"):
        ForgeryDetector.from_pretrained(STAGE1, load_4bit=True)
    assert isinstance(bridge().output, nn.Linear)
