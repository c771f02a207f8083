"""Frozen backbones of a linear probe: a vision tower, or the towers of a whole model of some system here."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.errors import CheckpointError
from llava.model.checkpoint_files import list_keys
from llava.model.checkpoint_layout import memory_names
from llava.model.multimodal_encoder.base import PixelFormat, VisionTower
from llava.model.multimodal_encoder.builder import build_vision_tower, read_vision_tower
from llava.model.multimodal_encoder.clip_encoder import image_processor_settings
from llava.systems import registry
from llava.systems.base import FeatureSource, SystemSpec, resolve

_SIDE = 224
"""Pixels of a side for a tower that takes any size and comes without an image processor."""


class Backbone(Protocol):
    """What a probe stands on."""

    def prepare(self, image: Image.Image) -> Any:
        """Turns an RGB image into what ``features`` takes."""
        ...

    def features(self, prepared: Sequence[Any]) -> np.ndarray:
        """Returns features ``[B, D]``, float32."""
        ...


def open_backbone(source: str, device: str = "cpu") -> Backbone:
    """Opens a backbone.

    Args:
        source: A folder or hub id of a CLIP model; ``timm:<name>`` or a plain name of timm; a tower of ours, of
            DINOv2 or of residuals; or a checkpoint of a system that gives features.
        device: Where it runs.

    Raises:
        CheckpointError: It cannot be opened, or gives no features.
    """
    spec = _system_of(source)
    if spec is None:
        return _TowerBackbone(_named(source), device)
    system = resolve(spec.system).load(source, device=device)
    if not isinstance(system, FeatureSource):
        raise CheckpointError(f"{source} is a model of {spec.title}, which gives no features for a probe")
    return _SystemBackbone(system)


def _system_of(source: str) -> SystemSpec | None:
    """The system of a model here; None for a tower, or what is no folder."""
    try:
        files = registry.read_files(source) if not source.startswith("timm:") else None
        return None if files is None else registry.identify(files)
    except CheckpointError:
        return None


def _named(source: str) -> str:
    """A plain name that timm knows is one of timm's."""
    if "/" in source or ":" in source:
        return source
    try:
        import timm
    except ImportError:
        return source
    return f"timm:{source}" if timm.is_model(source) else source


class _SystemBackbone:
    """The towers of a model, as the model itself feeds them."""

    def __init__(self, system: Any) -> None:
        self.prepare = system.prepare
        self.features = system.image_features


class _TowerBackbone:
    """What one tower says of an image: mean and deviation over its patches, where it has nothing of its own."""

    def __init__(self, source: str, device: str) -> None:
        found = read_vision_tower(source)
        side = found.config.get("image_size") or _SIDE
        settings = found.image_processor or image_processor_settings(side)
        self._processor = CLIPImageProcessorPil(**settings)
        shared = PixelFormat(side, tuple(settings["image_mean"]), tuple(settings["image_std"]))
        self._tower: VisionTower = build_vision_tower(found.config, shared)
        names = memory_names(self._tower)
        missing = sorted(set(names) - set(found.tensors))
        if missing:
            raise CheckpointError(f"{source} lacks tensors of its tower: {list_keys(missing)}")
        own = self._tower.state_dict()
        self._tower.load_state_dict(
            {name: found.tensors[stored][...].to(own[name].dtype) for stored, name in names.items()}
        )
        self._tower.requires_grad_(False).eval().to(device)
        self._device = device

    def prepare(self, image: Image.Image) -> Tensor:
        """Returns the shared pixels ``[3, S, S]``."""
        pixels: Tensor = self._processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels

    @torch.no_grad()
    def features(self, prepared: Sequence[Tensor]) -> np.ndarray:
        """Returns what the tower says of the images ``[B, F]``, see ``TowerOutput``."""
        features: np.ndarray = self._tower(torch.stack(list(prepared)).to(self._device)).description.cpu().numpy()
        return features
