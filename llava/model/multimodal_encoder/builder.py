"""The registry of vision towers; a further tower is one class and one line here."""

from collections.abc import Mapping
from typing import Any

from llava.model.multimodal_encoder.base import PixelFormat, TowerSource, VisionTower
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_encoder.dino_encoder import DinoVisionTower
from llava.model.multimodal_encoder.residual_encoder import ResidualVisionTower
from llava.model.multimodal_encoder.timm_encoder import TimmVisionTower

VISION_TOWERS: dict[str, type[VisionTower]] = {
    tower.tower_type: tower for tower in (TimmVisionTower, ResidualVisionTower, DinoVisionTower, CLIPVisionTower)
}
"""Towers by type; a source is opened by the first that says it can."""


def build_vision_tower(config: Mapping[str, Any], shared: PixelFormat) -> VisionTower:
    """Builds a tower, with random weights, from its config.

    Raises:
        ValueError: The type is unknown.
    """
    tower_type = config.get("type")
    if tower_type not in VISION_TOWERS:
        raise ValueError(f"unknown vision tower type {tower_type!r}; known: {', '.join(VISION_TOWERS)}")
    return VISION_TOWERS[tower_type](config, shared)


def read_vision_tower(source: str) -> TowerSource:
    """Reads the config and the weights of a tower from a path, a hub id or a prefixed name.

    Raises:
        CheckpointError: No tower opens it, or it cannot be read.
    """
    return next(tower for tower in VISION_TOWERS.values() if tower.opens(source)).read(source)
