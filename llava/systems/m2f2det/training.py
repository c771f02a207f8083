"""How the detector is trained alone (stage 1): its parts, its augmentation, its optimizer, and where it begins."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.errors import CheckpointError
from llava.labels import LABELS
from llava.model.checkpoint_files import (
    WORD_PATTERNS,
    TensorLike,
    list_keys,
    read_json,
    read_tensor_file,
    read_tensors,
    resolve_folder,
)
from llava.model.multimodal_encoder.base import VisionTower
from llava.model.multimodal_encoder.builder import read_vision_tower
from llava.model.multimodal_encoder.clip_encoder import image_processor_settings
from llava.systems.m2f2det.augmentation import augment, flip
from llava.systems.m2f2det.checkpoint import TOWER_FOLDER, open_detector, open_tower, save_detector
from llava.systems.m2f2det.cnn import CNNS, build_cnn, run_with_taps
from llava.systems.m2f2det.detector_net import DetectorConfig, M2F2Detector

PUBLISHED_CLIP = "openai/clip-vit-large-patch14-336"
AUGMENTATIONS = ("published", "flip", "none")
_WIDTHS = {"bridge": 1792, "cosine": 1024}
_WORDS = "forged face"
_PAPER_PROMPT = {"prompt_image_tokens": 4, "prompt_words": 2, "prompt_layer_tokens": 4}
"""Sizes of a new ``paper`` prompt, beside its universal tokens; ours."""
_SETTINGS = ("detector", "clip", "cnn_weights", "vision_tower", "augmentation", "words")


class DetectorNetwork(nn.Module):
    """A detector as a plain network; a cosine detector has a frozen tower beside it.

    Args:
        detector: The detector.
        tower: Gives a cosine detector CLIP's features; None for a bridge.
    """

    def __init__(self, detector: M2F2Detector, tower: VisionTower | None) -> None:
        super().__init__()
        self.detector = detector
        self.tower = tower
        cnn: Any = detector.deepfake_encoder
        cnn.to(memory_format=torch.channels_last)  # in which convolutions are fastest
        for part in detector.frozen_parts() + ([] if tower is None else [tower]):
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> "DetectorNetwork":
        """Sets the mode of what is trained; frozen towers stay as they are used."""
        super().train(mode)
        for part in self.detector.frozen_parts():
            if isinstance(part, nn.Module):
                part.eval()
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        """Returns the logits of real and fake ``[B, 2]`` for normalised pixels ``[B, 3, S, S]``."""
        features = None if self.tower is None else self.tower(pixels).features
        logits: Tensor = self.detector(pixels, features).logits
        return logits


class DetectorTraining:
    """A detector and its published training.

    Settings of a new one, all optional: ``detector``, fields of ``DetectorConfig`` (``cnn`` may be a name); ``clip``,
    folder or hub id of the CLIP model whose towers it takes, or None for random ones; ``cnn_weights``, a file of
    torchvision's; ``vision_tower``, another tower's weights, which a cosine
    detector needs; ``augmentation``, ``published``, ``flip`` or ``none``; ``words`` of a ``paper`` prompt, "forged
    face", read by the CLIP model's tokenizer (random towers get random vectors for them).
    """

    classes: tuple[str, ...] = LABELS

    def __init__(self, detector: M2F2Detector, tower: VisionTower | None, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)
        self.augmentation: str = self.settings.get("augmentation", "published")
        if self.augmentation not in AUGMENTATIONS:
            raise CheckpointError(f"augmentation {self.augmentation!r} is unknown; known: {', '.join(AUGMENTATIONS)}")
        self.network = DetectorNetwork(detector, tower)
        self.processor = CLIPImageProcessorPil(**image_processor_settings(detector.image_size))

    @classmethod
    def open(cls, path: str | None, config: Mapping[str, Any]) -> "DetectorTraining":
        """Opens a detector's file or folder, or makes a new one from settings.

        Raises:
            CheckpointError: It cannot be opened, or the settings describe no detector.
        """
        unknown = set(config) - set(_SETTINGS)
        if unknown:
            raise CheckpointError(f"unknown settings {', '.join(sorted(unknown))}; known: {', '.join(_SETTINGS)}")
        if path is None:
            settings = {"clip": PUBLISHED_CLIP, **config}
            detector = new_detector(settings)
            return cls(detector, _tower(detector, settings, None), settings)
        file = Path(path).expanduser()
        own = file / "config.json"
        stored = read_json(own).get("training", {}) if own.is_file() else {}
        settings = {**stored, **config}
        detector = open_detector(file, config.get("detector"))
        return cls(detector, _tower(detector, settings, file), settings)

    def prepare(self, image: Image.Image, random: Random | None) -> Tensor:
        """Returns normalised pixels ``[3, S, S]``; in training blurred, compressed or mirrored by chance."""
        if random is not None and self.augmentation == "published":
            image = augment(image, random)
        elif random is not None and self.augmentation == "flip":
            image = flip(image, random)
        pixels: Tensor = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels

    def optimizer(self, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        """Returns Adam as published: the text's scale learns three times as fast as all else."""
        scale = self.network.detector.clip_text_alpha
        rest = [value for value in self.network.parameters() if value.requires_grad and value is not scale]
        groups: list[dict[str, Any]] = [{"params": rest}, {"params": [scale], "lr": 3 * learning_rate}]
        return torch.optim.Adam(groups, lr=learning_rate, weight_decay=weight_decay)

    def save(self, folder: Path) -> None:
        """Writes the detector as ``open_detector`` opens it, and a cosine detector's tower beside it."""
        save_detector(self.network.detector, folder, training={"augmentation": self.augmentation})
        if self.network.tower is not None:
            self.network.tower.save_pretrained(folder / TOWER_FOLDER)


# --- new detectors


def new_detector(settings: Mapping[str, Any]) -> M2F2Detector:
    """Makes a detector with random weights, and puts those of CLIP and of a CNN in that the settings name.

    Raises:
        CheckpointError: The settings describe no detector, or a file does not fit.
    """
    given = dict(settings.get("detector", {}))
    clip = settings.get("clip")
    towers = {} if clip is None else _clip_configs(resolve_folder(clip, "clip"))
    words = _words(settings, given)
    detector = M2F2Detector(complete_config(given, towers | ({"prompt_words": len(words)} if words else {})))
    if clip is not None:
        _load_clip(detector, resolve_folder(clip, "clip"))
    if words:
        encoder: Any = detector.clip_text_encoder
        encoder.word_tokens.copy_(encoder.model["text_model"].embeddings.token_embedding.weight[words].detach())
    if settings.get("cnn_weights"):
        file = Path(settings["cnn_weights"]).expanduser()
        weights = {n.removeprefix("features."): t for n, t in read_tensor_file(file).items() if "classifier" not in n}
        _load(detector.deepfake_encoder, weights, str(file))
    return detector


def _words(settings: Mapping[str, Any], given: Mapping[str, Any]) -> list[int]:
    """Returns the ids of the words in a prompt; none for a prompt without words, or for random towers.

    Raises:
        CheckpointError: Words are given that nothing would read, or that the tokenizer makes nothing of.
    """
    clip, text = settings.get("clip"), settings.get("words")
    if given.get("prompt", "universal") != "paper" or clip is None:
        if text is not None:
            raise CheckpointError("words need the prompt 'paper' and a clip model, whose tokenizer reads them")
        return []
    if "prompt_words" in given:
        raise CheckpointError("prompt_words follows from the words; leave it out")
    folder = resolve_folder(clip, "clip", WORD_PATTERNS)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the tokenizer in {folder}, which reads the prompt's words, fails: {error}") from error
    ids: list[int] = tokenizer(text or _WORDS, add_special_tokens=False).input_ids
    if not ids:
        raise CheckpointError(f"words {text!r} are no words to the tokenizer of {clip}")
    return ids


def complete_config(given: Mapping[str, Any], towers: Mapping[str, Any]) -> DetectorConfig:
    """Returns a whole config: what is given, CLIP's, and what follows from the CNN's taps.

    Raises:
        CheckpointError: A field is unknown, or one that nothing tells is missing.
    """
    known = {item.name for item in fields(DetectorConfig)}
    wrong = set(given) - known
    if wrong:
        raise CheckpointError(f"a detector has no field {', '.join(sorted(wrong))}; it has {', '.join(sorted(known))}")
    fusion = given.get("fusion", "bridge")
    values: dict[str, Any] = {
        "fusion": fusion,
        "cnn": "efficientnet_b4" if fusion == "bridge" else "densenet121",
        "prompt_length": 7,
        "width": _WIDTHS.get(fusion, 0),
        **(_PAPER_PROMPT if given.get("prompt") == "paper" else {}),
        **towers,
        **given,
    }
    missing = [name for name in ("vision", "text") if name not in values]
    if missing:
        raise CheckpointError(f"the detector's settings lack {' and '.join(missing)}; name them, or a clip model")
    if isinstance(values["cnn"], str):
        if values["cnn"] not in CNNS:
            raise CheckpointError(f"unknown cnn {values['cnn']!r}; known: {', '.join(CNNS)}, or its settings")
        values["cnn"] = CNNS[values["cnn"]]
    vision = {"hidden_act": "quick_gelu", **values["vision"]}
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    if fusion == "bridge":
        values = {"bridge_dim": vision["hidden_size"] // 16, "bridge_out": 128, **values}
        values |= _tap_fields(values["cnn"], vision["image_size"], patches)
        values["vision"] = vision
    else:
        values["vision"] = {"hidden_size": vision["hidden_size"], "num_patches": patches}
    values["text"] = {"hidden_act": "quick_gelu", **values["text"]}
    try:
        return DetectorConfig(**values)
    except TypeError as error:
        raise CheckpointError(f"the settings describe no detector: {error}") from None


def _tap_fields(cnn: Mapping[str, Any], size: int, patches: int) -> dict[str, Any]:
    """Widths of the CNN's taps, and how many tokens the bridge ends with: one a place of each tap and one a patch."""
    with torch.device("meta"):
        _, taps = run_with_taps(build_cnn(cnn), torch.empty(1, 3, size, size))
    places = sum(tap.shape[2] * tap.shape[3] for tap in taps)
    return {"tap_widths": [tap.shape[1] for tap in taps], "bridge_tokens": places + len(taps) * patches}


def _clip_configs(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sized = {
        "vision": (*names, "image_size", "patch_size"),
        "text": (*names, "vocab_size", "max_position_embeddings"),
    }
    from transformers import CLIPConfig

    own = CLIPConfig(**{name: config.get(name) for name in ("vision_config", "text_config")})
    parts = {"vision": own.vision_config, "text": own.text_config}
    return {
        part: {name: getattr(parts[part], name) for name in wanted} | {"layer_norm_eps": 1e-5}
        for part, wanted in sized.items()
    }


def _load_clip(detector: M2F2Detector, folder: Path) -> None:
    tensors = {name: tensor for name, tensor in read_tensors(folder).items() if not name.endswith("position_ids")}
    parts: list[tuple[nn.Module, str]] = [(detector.clip_text_encoder.model["text_model"], "text_model.")]
    if detector.config.fusion == "bridge":
        parts.append((detector.clip_vision_encoder.model["vision_model"], "vision_model."))
    for module, prefix in parts:
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        _load(module, own, str(folder))


def _load(module: nn.Module, tensors: Mapping[str, TensorLike], where: str) -> None:
    """Puts tensors into a module.

    Raises:
        CheckpointError: Names or shapes differ.
    """
    own = module.state_dict()
    wrong = set(own) ^ set(tensors)
    wrong |= {name for name in set(own) - wrong if tuple(own[name].shape) != tuple(tensors[name].shape)}
    if wrong:
        raise CheckpointError(f"{where} does not fit the detector: {list_keys(wrong)}")
    module.load_state_dict({name: tensor[...].to(own[name].dtype) for name, tensor in tensors.items()})


def _tower(detector: M2F2Detector, settings: Mapping[str, Any], folder: Path | None) -> VisionTower | None:
    """The tower of a cosine detector; a new bridge gets the named tower's weights in its own."""
    source = settings.get("vision_tower")
    if detector.config.fusion == "cosine":
        return open_tower(detector, source or (settings.get("clip") if folder is None else None), folder)
    if source is not None and folder is None:
        file = Path(source).expanduser()
        tensors = read_tensor_file(file) if file.is_file() else dict(read_vision_tower(source).tensors)
        bare = {n.removeprefix("vision_tower.").removeprefix("vision_model."): t for n, t in tensors.items()}
        kept = {name: tensor for name, tensor in bare.items() if not name.endswith("position_ids")}
        _load(detector.clip_vision_encoder.model["vision_model"], kept, source)
    return None
