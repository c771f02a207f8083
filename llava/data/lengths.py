"""How long sequences may be: by a model's positions, and by the length that it was trained with."""

from collections.abc import Mapping
from typing import Any

from llava.model.builder import DEFAULT_CONTEXT_LENGTH


def model_positions(config: Mapping[str, Any]) -> float:
    """How many positions a model was made for: those of its config, stretched as its rotary scaling says."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    factor = float(scaling.get("factor") or 1) if kind in ("linear", "dynamic") else 1.0
    return float(config.get("max_position_embeddings") or float("inf")) * max(factor, 1.0)


def default_length(config: Mapping[str, Any]) -> int:
    """Where sequences are cut unless the user says so: at the model's own length, and within its positions."""
    return int(min(config.get("tokenizer_model_max_length") or DEFAULT_CONTEXT_LENGTH, model_positions(config)))
