"""The registry of vision towers; a further tower is one class and one line here."""

from collections.abc import Mapping
from typing import Any

from llava.errors import CheckpointError
from llava.model.multimodal_encoder.base import PixelFormat, TowerSource, VisionTower
from llava.systems.base import resolve

VISION_TOWERS: "dict[str, str | type[VisionTower]]" = {
    "timm": "llava.model.multimodal_encoder.timm_encoder:TimmVisionTower",
    "residual": "llava.demo.residual_encoder:ResidualVisionTower",
    "dinov2": "llava.model.multimodal_encoder.dino_encoder:DinoVisionTower",
    "clip": "llava.model.multimodal_encoder.clip_encoder:CLIPVisionTower",
}
"""Towers by type, imported on use; the first that says it can opens a source."""


def build_vision_tower(config: Mapping[str, Any], shared: PixelFormat) -> VisionTower:
    """Builds a tower, with random weights, from its config.

    Raises:
        CheckpointError: The type is unknown.
    """
    tower_type = config.get("type")
    if tower_type not in VISION_TOWERS:
        raise CheckpointError(f"unknown vision tower type {tower_type!r}; known: {', '.join(VISION_TOWERS)}")
    return resolve(VISION_TOWERS[tower_type])(config, shared)


def read_vision_tower(source: str) -> TowerSource:
    """Reads the config and the weights of a tower from a path, a hub id or a prefixed name.

    Raises:
        CheckpointError: No tower opens it, or it cannot be read.
    """
    return next(tower for tower in map(resolve, VISION_TOWERS.values()) if tower.opens(source)).read(source)
