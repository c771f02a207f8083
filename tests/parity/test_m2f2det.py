"""M2F2-Det against the numbers of its authors' code.

``REFERENCE_GOLDENS`` names another folder of the same form: every size comes from the folder.
"""

import copy
import gzip
import json
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from llava.errors import CheckpointError, OptionError
from llava.model.checkpoint_layout import stored_state_dict
from llava.systems.m2f2det import cnn as cnn_module
from llava.systems.m2f2det.checkpoint import infer_config, load_tensors, read_detector_tensors
from llava.systems.m2f2det.cnn import build_cnn, infer_cnn, run_with_taps
from llava.systems.m2f2det.detector_net import M2F2Detector
from llava.systems.m2f2det.layout import KEY_MAP
from llava.systems.m2f2det.token import DeepfakeToken
from tests.parity import m2f2det_reference as parity
from tests.parity.m2f2det_reference import Comparer, Reference, compare_all, intermediates
from tests.reference import Outcome

BUNDLED = Path(__file__).parents[1] / "data" / "goldens_m2f2det"
FOLDER = Path(os.environ.get("REFERENCE_GOLDENS", BUNDLED))
LEAST_COMPARISONS = 60


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Reference:
    return Reference(FOLDER, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def outcome(reference) -> Outcome:
    return compare_all(reference)


def test_every_number_of_the_authors_code_is_met(outcome):
    print(outcome)
    if outcome.absent:
        warnings.warn(f"not in the folder, so not compared: {', '.join(outcome.absent)}", stacklevel=1)
    assert not outcome.failed, str(outcome)


def test_there_was_enough_to_compare(outcome):
    assert outcome.compared >= LEAST_COMPARISONS, str(outcome)


# --- wrong implementations


def _relu_behind_the_last_norm(monkeypatch):
    monkeypatch.setattr(
        "llava.systems.m2f2det.detector_net.run_with_taps",
        lambda cnn, pixels: (F.relu(run_with_taps(cnn, pixels)[0]), run_with_taps(cnn, pixels)[1]),
    )


def _prompt_without_positions(monkeypatch):
    monkeypatch.setattr(
        "llava.systems.m2f2det.detector_net.PromptEncoder.forward",
        lambda self, _: self.model["text_model"].final_layer_norm(self.prompt_tokens)[:, -1],
    )


def _other_scores(monkeypatch):
    monkeypatch.setattr(
        "llava.systems.m2f2det.detector_net.F.cosine_similarity",
        lambda vision, text, **_: F.normalize(vision, dim=-1) @ F.normalize(text + 1, dim=-1)[0, 0],
    )


@pytest.mark.parametrize("wrong", [_relu_behind_the_last_norm, _prompt_without_positions, _other_scores])
def test_a_wrong_cosine_detector_is_seen(monkeypatch, reference, wrong):
    wrong(monkeypatch)
    comparer = Comparer()
    parity.compare_cosine(reference, comparer)
    assert "cosine_dense/logits" in comparer.outcome.failed


def test_a_head_that_takes_its_parts_in_another_order_is_seen(monkeypatch, reference):
    cat = torch.cat
    monkeypatch.setattr(
        "llava.systems.m2f2det.detector_net.torch.cat",
        lambda parts, dim=0: cat(parts[::-1] if dim == 1 and len(parts) == 3 else parts, dim=dim),
    )
    comparer = Comparer()
    parity.compare_cosine(reference, comparer)
    assert {"cosine_dense/head_in", "cosine_dense/logits"} <= set(comparer.outcome.failed)


def test_wrong_pixels_are_seen(reference):
    detector = reference.cosine()
    pixels, features = reference.cosine_inputs()
    comparer = Comparer()
    other = parity.imagenet_pixels(pixels)
    parity.compare_named(comparer, intermediates(detector, other, features), reference.stage1, "cosine_dense/")
    assert {"cosine_dense/cnn_map", "cosine_dense/logits"} <= set(comparer.outcome.failed)


def test_batch_statistics_are_seen(reference):
    detector = reference.cosine().train()
    comparer = Comparer()
    found = intermediates(detector, *reference.cosine_inputs())
    parity.compare_named(comparer, found, reference.stage1, "cosine_dense/")
    assert "cosine_dense/logits" in comparer.outcome.failed


def test_a_kept_last_patch_is_seen(reference):
    tensors = reference.stage1_tensors
    if tensors is None:
        pytest.skip("the part of the goldens in this repository has no stage-1 file")
    kept = parity.make(tensors, {**reference.given("clip"), "clip_tap_slice": "drop_cls"})
    comparer = Comparer()
    found = intermediates(kept, reference.pixels(kept.image_size, 0), None)
    parity.compare_named(comparer, found, reference.stage1, "bridge_eff/img0/")
    assert "bridge_eff/img0/clip_h6" in comparer.outcome.failed


def _swapped_probabilities(monkeypatch):
    right = DeepfakeToken.detect

    def swapped(self, context):
        output = right(self, context)
        return type(output)(**{**vars(output), "logits": output.logits.flip(-1)})

    monkeypatch.setattr(DeepfakeToken, "detect", swapped)


def _last_patch_dropped_instead_of_the_class_token(monkeypatch):
    from llava.systems.m2f2det.token import FusionOutput, PatchesOnly

    monkeypatch.setattr(PatchesOnly, "forward", lambda self, inputs, **_: FusionOutput(inputs["clip"][:, :-1]))


def _padded_pixels_for_the_detector(monkeypatch):
    right = DeepfakeToken.detect
    monkeypatch.setattr(
        DeepfakeToken, "detect", lambda self, context: right(self, type(context)(context.images, context.tower_outputs))
    )


@pytest.mark.parametrize(
    ("wrong", "seen"),
    [
        (_swapped_probabilities, "det/logits_last16"),
        (_last_patch_dropped_instead_of_the_class_token, "mm_projector"),
        (_padded_pixels_for_the_detector, "pad/det_probs"),
    ],
)
def test_a_wrong_language_model_is_seen(monkeypatch, reference, wrong, seen):
    wrong(monkeypatch)
    comparer = Comparer()
    parity.compare_language(reference, comparer)
    assert seen in comparer.outcome.failed


def test_other_prompts_and_batches_are_seen(monkeypatch, reference):
    right = parity.arrange
    monkeypatch.setattr(parity, "arrange", lambda value: right(value).replace("\n\n\n", "\n"))
    comparer = Comparer()
    parity.compare_batches(reference, comparer)
    assert "conversation 0" in comparer.outcome.failed and "train/input_ids 0" in comparer.outcome.failed


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


def detector_formula(name: str, shape: torch.Size, j: int) -> torch.Tensor:
    """The same for a whole detector, whose embeddings and other matrices have ranges of their own."""
    if name == "clip_vision_alpha":
        return torch.tensor(0.5)
    if name == "clip_text_alpha":
        return torch.tensor(4.0)
    if "embedding" in name or name.endswith("prompt_tokens"):
        return 0.5 * (2 * uniform(shape, j) - 1)
    return formula(name, shape, j, convolution_gain=2.0 if len(shape) == 4 else 1.0)


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
def test_the_published_names_of_a_detector_map_both_ways(kind, count):
    names = published(kind)
    with torch.device("meta"):
        tensors = {name: torch.empty(shape) for name, shape in names.items()}
        detector = M2F2Detector(infer_config(tensors, {}, "the published file"))
    own = {name: tuple(value.shape) for name, value in detector.state_dict().items()}
    assert own == names and len(own) == count


@HAS_PUBLISHED
def test_the_published_names_of_the_merged_model_map_both_ways():
    from llava.model.configuration import LlavaConfig
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower, image_processor_settings
    from llava.systems.m2f2det.layout import FORMAT

    names = published("llava-v1.5-7b-M2F2-Det")
    with torch.device("meta"):
        stored = {name: torch.empty(shape) for name, shape in names.items()}
        native = KEY_MAP.to_native(stored)
        prefix = "model.vision_tower."
        tower = {name.removeprefix(prefix): value for name, value in native.items() if name.startswith(prefix)}
        found = CLIPVisionTower.infer("openai/clip-vit-large-patch14-336", tower, {})
        config = json.loads((FOLDER / parity.BASE / "config.json").read_text())
        sizes = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
        sizes |= {
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "mm_image_processor": image_processor_settings(336),
        }
        values = FORMAT.infer_config({**config, **sizes, "mm_vision_tower": None}, native)
        values |= {"vision_tower_config": found.config, "system": "m2f2det"}
        model = LlavaLlamaForCausalLM(LlavaConfig.from_dict(values))
        back = KEY_MAP.to_published(stored_state_dict(model))
    assert {name: tuple(value.shape) for name, value in back.items()} == names and len(back) == 1628


@HAS_PUBLISHED
@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("densenet121", "M2F2_Det_dense"), ("efficientnet_b4", "stage1_current")])
def test_a_cnn_of_real_size(reference, name, kind):
    shapes = {
        key.removeprefix("deepfake_encoder."): shape
        for key, shape in published(kind).items()
        if key.startswith("deepfake_encoder.")
    }
    facts, wanted = reference.facts("goldens_cnn_full"), reference.tensors("goldens_cnn_full")
    cnn, offset = build_cnn(infer_cnn(shapes)), facts["offset"]
    floating = [key for key, value in cnn.state_dict().items() if value.is_floating_point()]
    values = {key: formula(key, cnn.state_dict()[key].shape, offset + j) for j, key in enumerate(floating)}
    cnn.load_state_dict({key: value.float() for key, value in values.items()}, strict=False)
    pixels = (1.5 * (2 * uniform(torch.Size((1, 3, 336, 336)), 10**6 + offset) - 1)).float()
    with torch.inference_mode():
        last, taps = run_with_taps(cnn.eval(), pixels)
    bound = {"atol": 10 * facts[name]["noise_fp64_map"], "rtol": 1e-5}
    torch.testing.assert_close(last.mean((2, 3)), wanted[f"{name}/pooled"], **bound)
    torch.testing.assert_close(last[..., :2, :2], wanted[f"{name}/map_corner"], **bound)
    for number, tap in zip(cnn_module.TAPS, taps, strict=True):
        torch.testing.assert_close(tap.mean((2, 3)), wanted[f"{name}/tap{number}_mean"], **bound)


def real_size(kind: str, offset: int) -> M2F2Detector:
    """A detector of real size with the weights of the formula."""
    with torch.device("meta"):
        tensors = {name: torch.empty(shape) for name, shape in published(kind).items()}
    detector = M2F2Detector(infer_config(tensors, {}, "the published file"))
    state = detector.state_dict()
    floating = sorted(name for name, value in state.items() if value.is_floating_point())
    for j, name in enumerate(floating):
        state[name].copy_(detector_formula(name, state[name].shape, offset + j).float())
    return detector.eval()


NOISES = 4.0
"""How often the rounding of float32, measured here against float64, the reference may be away from float64."""


def real_size_outputs(detector: M2F2Detector, pixels: torch.Tensor, features: torch.Tensor | None):
    """What a detector of real size gives, by the goldens' names, and CLIP's features."""
    with torch.inference_mode():
        out = detector(pixels, features)
        found = {"logits": out.logits, "probs": out.logits.softmax(-1)}
        found |= {"head_in": out.head_input, "text_feature": out.text_feature}
        if features is None:
            states = detector.clip_vision_encoder(pixels)
            found |= {"clip_last_cls": states[-1][:, 0], "clip_last_token576": states[-1][:, 576]}
            found |= {f"clip_h{layer}_token1": states[layer][:, 1] for layer in detector.config.clip_taps}
            features = states[-1]
    return found, features


def behind_the_cnn(detector: M2F2Detector, pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The CNN's part of the head's input, its last W values, in a precision; the detector stays as it is."""
    parts = [copy.deepcopy(part).to(dtype) for part in (detector.deepfake_encoder, detector.deepfake_proj)]
    with torch.inference_mode():
        return parts[1](run_with_taps(parts[0], pixels.to(dtype))[0].mean((2, 3)))


def compare_full(
    detector: M2F2Detector, found: dict[str, torch.Tensor], cnn: torch.Tensor, wanted: dict[str, torch.Tensor]
) -> None:
    """Asserts that all of a detector's numbers are the reference's.

    The depth of the CNN amplifies rounding, so what stands behind it is compared with float64, within ``NOISES`` times
    the rounding of float32, which is measured here; all else within fixed bounds, the last layer too.

    Args:
        detector: The detector.
        found: Its numbers in float32.
        cnn: ``behind_the_cnn`` in float64.
        wanted: The reference's.
    """
    width = detector.config.width
    weight, bias = (value.detach().double() for value in (detector.output.weight, detector.output.bias))
    logits = F.linear(torch.cat([found["head_in"][:, :-width].double(), cnn], dim=1), weight, bias)
    exact = {"head_in": cnn, "logits": logits, "probs": logits.softmax(-1)}
    for name, value in wanted.items():
        own, key = found[name].reshape(-1), value.reshape(-1)
        if name in exact:
            true = exact[name].reshape(-1)
            noise = (own[-true.numel() :] - true).abs().max()
            away = (key[-true.numel() :] - true).abs().max()
            assert away <= NOISES * noise + 2e-5, f"{name}: behind the CNN {away:.2g} away, rounding is {noise:.2g}"
            own, key = own[: -true.numel()], key[: -true.numel()]
        bound = {"atol": 5e-5 if name.startswith("clip_") else 2e-5, "rtol": 1e-5}
        torch.testing.assert_close(own, key, **bound, msg=lambda text, name=name: f"{name}: {text}")
    last = F.linear(wanted["head_in"].reshape(1, -1).double(), weight, bias)
    for name, value in {"logits": last, "probs": last.softmax(-1)}.items():
        torch.testing.assert_close(value.float().reshape(-1), wanted[name].reshape(-1), atol=2e-5, rtol=1e-5)


def part(wanted: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    found = {name.removeprefix(prefix): value for name, value in wanted.items() if name.startswith(prefix)}
    assert {"logits", "probs", "head_in"} <= set(found)
    return found


def other_eps(detector: M2F2Detector) -> M2F2Detector:
    """A detector whose CNN has the epsilon of other libraries in its norms."""
    other = copy.deepcopy(detector)
    for module in other.deepfake_encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 1e-3
    return other


def other_pool(detector: M2F2Detector) -> M2F2Detector:
    """A detector whose CNN's mean forgets the outermost row and column."""
    other = copy.deepcopy(detector)
    other.deepfake_encoder.append(torch.nn.ZeroPad2d((0, -1, 0, -1)))
    return other


def with_cnn(detector: M2F2Detector, found: dict[str, torch.Tensor], pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """A detector's numbers if its CNN's part were this one's of these pixels."""
    cnn = behind_the_cnn(detector, pixels, torch.float32)
    head = torch.cat([found["head_in"][:, : -cnn.shape[1]], cnn], dim=1)
    with torch.inference_mode():
        logits = detector.output(head)
    return {**found, "head_in": head, "logits": logits, "probs": logits.softmax(-1)}


@HAS_PUBLISHED
@pytest.mark.slow
def test_both_detectors_of_real_size(reference):
    wanted, offset = reference.tensors("goldens_detector_full"), reference.facts("goldens_detector_full")["offset"]
    bridge, pixels = real_size("stage1_current", offset), reference.pixels(336, 0)
    torch.testing.assert_close(pixels[0, :, 168, :8], wanted["pixel_row"], atol=0, rtol=0)
    found, features = real_size_outputs(bridge, pixels, None)
    key = part(wanted, "A/")
    compare_full(bridge, found, behind_the_cnn(bridge, pixels, torch.float64), key)
    for other, seen in (
        (bridge, parity.imagenet_pixels(pixels)),
        (other_eps(bridge), pixels),
        (other_pool(bridge), pixels),
    ):
        with pytest.raises(AssertionError, match="head_in: behind the CNN"):
            compare_full(other, with_cnn(other, found, seen), behind_the_cnn(other, seen, torch.float64), key)
    del bridge, other
    cosine = real_size("M2F2_Det_dense", offset + 3000)
    found, _ = real_size_outputs(cosine, pixels, features)
    double, key = behind_the_cnn(cosine, pixels, torch.float64), part(wanted, "B/")
    compare_full(cosine, found, double, key)
    # The class token for the first patch, so that the last one is dropped.
    moved = features[:, [0, *range(features.shape[1] - 1)]]
    with pytest.raises(AssertionError, match="head_in: Tensor"):
        compare_full(cosine, real_size_outputs(cosine, pixels, moved)[0], double, key)


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


def test_what_a_detector_lacks_is_named(reference):
    tensors = reference.cosine().state_dict()
    del tensors["output.bias"], tensors["deepfake_encoder.norm0.running_mean"]
    config = reference.cosine().config
    with pytest.raises(CheckpointError, match=r"lacks deepfake_encoder\.norm0\.running_mean, output\.bias"):
        load_tensors(M2F2Detector(config), tensors, "x")
    with pytest.raises(CheckpointError, match=r"is no detector of M2F2-Det, or is incomplete: it lacks"):
        infer_config({"deepfake_encoder.conv0.weight": torch.ones(1)}, {}, "x")
    with pytest.raises(CheckpointError, match="clip_tap_slice 'both' is unknown"):
        parity.make(reference.cosine().state_dict(), {"clip_tap_slice": "both"})


def test_options_of_a_language_model_are_refused_for_a_detector(reference, tmp_path):
    from llava import ForgeryDetector
    from llava.systems.m2f2det.checkpoint import save_detector

    detector = reference.cosine()
    save_detector(detector, tmp_path / "detector")
    with pytest.raises(OptionError, match="load_4bit would do nothing"):
        ForgeryDetector.from_pretrained(tmp_path / "detector", load_4bit=True)
    with pytest.raises(CheckpointError, match="takes the features of a vision tower and has none of its own"):
        ForgeryDetector.from_pretrained(tmp_path / "detector")
