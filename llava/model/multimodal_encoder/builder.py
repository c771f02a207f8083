"""The registry of vision towers; a further tower is one class and one line here."""

from collections.abc import Mapping
from typing import Any

from llava.model.components import component_class
from llava.model.multimodal_encoder.base import PixelFormat, TowerSource, VisionTower

VISION_TOWERS = {
    "timm": "llava.model.multimodal_encoder.timm_encoder:TimmVisionTower",
    "residual": "llava.demo.residual_encoder:ResidualVisionTower",
    "dinov2": "llava.model.multimodal_encoder.dino_encoder:DinoVisionTower",
    "clip": "llava.model.multimodal_encoder.clip_encoder:CLIPVisionTower",
}
"""Class of each tower type, imported when it is used; a source is opened by the first that says it can."""


def tower_class(tower_type: str) -> type[VisionTower]:
    """Returns the class of a tower type.

    Raises:
        CheckpointError: The type is unknown.
    """
    found: type[VisionTower] = component_class("vision tower", VISION_TOWERS, tower_type)
    return found


def build_vision_tower(config: Mapping[str, Any], shared: PixelFormat) -> VisionTower:
    """Builds a tower, with random weights, from its config.

    Raises:
        CheckpointError: The type is unknown.
    """
    return tower_class(str(config.get("type")))(config, shared)


def read_vision_tower(source: str) -> TowerSource:
    """Reads the config and the weights of a tower from a path, a hub id or a prefixed name.

    Raises:
        CheckpointError: No tower opens it, or it cannot be read.
    """
    return next(tower for name in VISION_TOWERS if (tower := tower_class(name)).opens(source)).read(source)
