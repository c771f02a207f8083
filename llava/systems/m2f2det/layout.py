"""The published files of stages 2 and 3, and where a language model gets its detector from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.errors import CheckpointError
from llava.model.branches import FIRST
from llava.model.checkpoint_files import TensorLike, read_json
from llava.model.checkpoint_layout import KeyMap, Rename
from llava.systems.base import CheckpointFormat
from llava.systems.m2f2det.answer import PUBLISHED
from llava.systems.m2f2det.checkpoint import infer_config, read_detector_tensors, weight_file
from llava.systems.m2f2det.detector_net import DetectorConfig
from llava.systems.m2f2det.token import NAME

_SOURCE = f"model.token_sources.{NAME}."
_TOWER, _PROJECTOR = f"{_SOURCE}tower.", f"{_SOURCE}mm_projector."
_PATH = "deepfake_model_path"
"""Field of the published config that names the detector's file."""
_CNN_NAMES = {"densenet": "densenet121", "efficientnet": "efficientnet_b4"}

_VISION = "clip_vision_encoder.model.vision_model"

KEY_MAP = KeyMap(
    (
        # A bridge's tower is stored as transformers stores it, with its own prefix once more.
        Rename(f"deepfake_encoder.{_VISION}.{{rest*}}", f"{_TOWER}{_VISION}.vision_model.{{rest*}}"),
        Rename("deepfake_encoder.{rest*}", f"{_TOWER}{{rest*}}"),
        Rename("deepfake_projector.{rest*}", f"{_PROJECTOR}{{rest*}}"),
    )
)


class _Format:
    """The published layout as a ``CheckpointFormat``."""

    key_map = KEY_MAP
    asks_as_trained = True
    tower_types: Mapping[str, str] = {FIRST: "clip"}
    tower_variables: Mapping[str, str] = {}

    def with_sources(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorLike], given: str | None
    ) -> tuple[dict[str, Any], dict[str, TensorLike]]:
        """Returns config and tensors with their detector: the given one, else the checkpoint's, else the named one.

        Raises:
            CheckpointError: There is none, or the file holds none.
        """
        has_own = any(name.startswith(_TOWER) for name in tensors)
        if given is None and has_own:
            return dict(config), dict(tensors)
        place = given or config.get(_PATH)
        if not place:
            raise CheckpointError(
                "the model has no detector, whose token stands in its prompt; name one with detector=<file or folder> "
                "(--detector)"
            )
        found, detector = read_detector(Path(place).expanduser(), config)
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(_TOWER)}
        own = {**config, "token_source_configs": _source_config(config, detector)}
        return own, {**kept, **KEY_MAP.to_native({f"deepfake_encoder.{name}": t for name, t in found.items()})}

    def infer_config(self, config: Mapping[str, Any], tensors: Mapping[str, TensorLike]) -> dict[str, Any]:
        """Returns our config for a published one, or for a plain LLaVA that is to be trained; ours as it is.

        Raises:
            CheckpointError: The tower's features are not those that the detector takes.
        """
        is_published = any(name.startswith("deepfake_") for name in config)
        feature = config.get("mm_vision_select_feature", "patch")
        if is_published and feature != "cls_patch":
            raise CheckpointError(
                f"config.json: mm_vision_select_feature is {feature!r}, but the detector takes the class token and the "
                "patches; it must be 'cls_patch'"
            )
        values = {"conv_mode": PUBLISHED if is_published else "v1", "image_aspect_ratio": "pad", **config}
        values |= {"mm_fusion_type": "m2f2det:patches", "mm_vision_select_feature": "cls_patch"}
        if not values.get("token_source_configs"):
            own = {name.removeprefix(_TOWER): tensor for name, tensor in tensors.items() if name.startswith(_TOWER)}
            detector = infer_config(own, _given(config), "the checkpoint")
            values["token_source_configs"] = _source_config(config, detector)
        return {**values, **_published_fields(values)}

    def infer_tower(self, branch: str, tensors: Mapping[str, TensorLike]) -> dict[str, Any]:
        """Returns nothing: the tower tells all itself."""
        return {}


def read_detector(place: Path, config: Mapping[str, Any]) -> tuple[dict[str, TensorLike], DetectorConfig]:
    """Reads a detector for a language model: a file of either kind, or a folder of this project.

    Args:
        place: Where it lies.
        config: The language model's, whose CLIP's text config tells what no shape does.

    Raises:
        CheckpointError: There is none.
    """
    if not place.exists():
        raise CheckpointError(f"there is no detector {place}; name one with detector=<file or folder> (--detector)")
    file = weight_file(place)
    tensors: dict[str, TensorLike] = dict(read_detector_tensors(file))
    own = read_json(place / "config.json").get("detector", {}) if (place / "config.json").is_file() else {}
    return tensors, infer_config(tensors, {**_given(config), **own}, str(file))


def _given(config: Mapping[str, Any]) -> dict[str, Any]:
    """Heads of the text tower, which the authors build from the model that the vision tower is named by."""
    named = config.get("mm_vision_tower")
    file = None if not named else Path(named).expanduser() / "config.json"
    text = read_json(file).get("text_config", {}) if file is not None and file.is_file() else {}
    heads = text.get("num_attention_heads") if isinstance(text, Mapping) else None
    return {} if heads is None else {"text": {"num_attention_heads": heads}}


def _source_config(config: Mapping[str, Any], detector: DetectorConfig) -> dict[str, Any]:
    before = (config.get("token_source_configs") or {}).get(NAME, {})
    return {NAME: {"freeze_batch_norm": True, **before, "type": "m2f2det:deepfake", "detector": detector.to_dict()}}


def _published_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the authors' code asks a config for."""
    detector = values["token_source_configs"][NAME]["detector"]
    return {
        "deepfake_model_name": values.get("deepfake_model_name") or _CNN_NAMES[detector["cnn"]["type"]],
        "unfreeze_mm_vision_tower": True,
    }


FORMAT: CheckpointFormat = _Format()
