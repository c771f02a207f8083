"""Reads and writes detectors: the published stage-1 file, the flat detector file, and folders of this project."""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from llava.errors import CheckpointError
from llava.files import atomic_write, write_json
from llava.model.checkpoint_files import TensorLike, list_keys, read_json, read_tensor_file
from llava.model.checkpoint_layout import stored_state_dict
from llava.model.multimodal_encoder.base import PixelFormat, VisionTower
from llava.model.multimodal_encoder.builder import build_vision_tower, read_vision_tower
from llava.systems.m2f2det.cnn import EFFICIENTNET_STRIDES, infer_cnn
from llava.systems.m2f2det.detector_net import DetectorConfig, M2F2Detector

MODEL_TYPE = "m2f2det"
TOWER_FOLDER = "vision_tower"
"""Folder beside a cosine detector with the tower whose features it takes."""
_HEAD_WIDTH = 64  # of every CLIP model of OpenAI
_PROMPT = "clip_text_encoder."
_TEXT = f"{_PROMPT}model.text_model."
_VISION = "clip_vision_encoder.model.vision_model."
_CNN = "deepfake_encoder."
_BUILDERS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")


class _Inert:
    """Stands for whatever a pickled file holds beside tensors: takes anything, does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> "_Inert":
        return self

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    def extend(self, _: Any) -> None:
        pass

    def __hash__(self) -> int:
        return 0


class _TensorUnpickler(pickle.Unpickler):
    """Builds tensors and ordered dictionaries; every other class or function becomes an ``_Inert``."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns what builds tensors, or the inert stand-in."""
        allowed = (module == "torch._utils" and name in _BUILDERS) or (module, name) == ("collections", "OrderedDict")
        return super().find_class(module, name) if allowed else _Inert


def _load(file: Any, **options: Any) -> Any:
    return _TensorUnpickler(file, **options).load()


_TENSORS_ONLY = SimpleNamespace(Unpickler=_TensorUnpickler, load=_load, __name__="tensors_only")


class _Shapes(dict[str, tuple[int, ...]]):
    """Shapes by name; a missing one is told as what it is."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
        super().__init__(shapes)
        self.where = where

    def __missing__(self, name: str) -> tuple[int, ...]:
        raise CheckpointError(f"{self.where} is no detector of M2F2-Det, or is incomplete: it lacks {name}")


def read_detector_tensors(file: Path) -> dict[str, Tensor]:
    """Reads a detector's tensors by their published names, from either layout or from safetensors.

    A stage-1 file also holds an optimizer and a pickled scheduler; no code of it is run.

    Raises:
        CheckpointError: The file cannot be read, or holds no named tensors.
    """
    if file.suffix == ".safetensors":
        content: Any = {name: value[...] for name, value in read_tensor_file(file).items()}
    else:
        try:
            content = torch.load(file, map_location="cpu", weights_only=False, pickle_module=_TENSORS_ONLY)
        except Exception as error:
            raise CheckpointError(f"{file} cannot be read as tensors: {type(error).__name__}: {error}") from error
    if isinstance(content, dict) and "model_state_dict" in content:
        content = content["model_state_dict"]
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no named tensors")
    tensors = {str(name).removeprefix("module."): value for name, value in content.items()}
    wrong = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if wrong or not tensors:
        raise CheckpointError(f"{file} holds something else than named tensors: {list_keys(wrong) or 'nothing'}")
    return {name: value for name, value in tensors.items() if not name.endswith("position_ids")}


def weight_file(path: Path) -> Path:
    """Returns the file of a detector's weights: the path itself, or the only weight file of a folder.

    Raises:
        CheckpointError: A folder has no weight file, or several.
    """
    if path.is_file():
        return path
    found = sorted(file for file in path.glob("*") if file.suffix in (".safetensors", ".pth"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise CheckpointError(f"{path} must hold one file of weights (.safetensors or .pth), but has: {names}")
    return found[0]


def infer_config(tensors: Mapping[str, TensorLike], given: Mapping[str, Any], where: str) -> DetectorConfig:
    """Returns what a detector is built from, by the shapes of its tensors.

    Args:
        tensors: By their published names.
        given: Fields of ``DetectorConfig`` that shapes do not tell or that are to differ, such as
            ``{"vision": {"num_attention_heads": 16}}``; ``strides`` are those of the EfficientNet's stages.
        where: The file, for messages.

    Raises:
        CheckpointError: A tensor is missing or of another shape, or a given field is unknown.
    """
    shapes = _Shapes({name: tuple(value.shape) for name, value in tensors.items()}, where)
    if empty := [name for name, shape in shapes.items() if 0 in shape]:
        raise CheckpointError(f"{where} is no detector of M2F2-Det: it has empty tensors, {list_keys(empty)}")
    try:
        fields = _inferred_fields(shapes, given.get("strides", EFFICIENTNET_STRIDES))
    except CheckpointError:
        raise
    except (IndexError, ValueError, ZeroDivisionError) as error:  # a tensor of another rank or size
        raise CheckpointError(f"{where} is no detector of M2F2-Det: its tensors have other shapes ({error})") from error
    for name, value in given.items():
        if name != "strides":
            fields[name] = {**fields[name], **value} if isinstance(fields.get(name), dict) else value
    try:
        return DetectorConfig(**fields)
    except TypeError as error:
        raise CheckpointError(f"{where}: its config is none of a detector: {error}") from None


def _inferred_fields(shapes: _Shapes, strides: Sequence[int]) -> dict[str, Any]:
    """Returns the fields of ``DetectorConfig`` that shapes tell."""
    head = shapes["output.weight"]
    cnn = _Shapes({n.removeprefix(_CNN): shape for n, shape in shapes.items() if n.startswith(_CNN)}, shapes.where)
    fields: dict[str, Any] = {
        "fusion": "bridge" if f"{_VISION}embeddings.class_embedding" in shapes else "cosine",
        "cnn": infer_cnn(cnn, strides),
        "text": {
            **_clip_fields(shapes, _TEXT, shapes["clip_text_encoder.prompt_tokens"][2]),
            "vocab_size": shapes[f"{_TEXT}embeddings.token_embedding.weight"][0],
            "max_position_embeddings": shapes[f"{_TEXT}embeddings.position_embedding.weight"][0],
        },
        "prompt_length": shapes["clip_text_encoder.prompt_tokens"][1],
        "width": shapes["text_proj.0.weight"][0],
        "vision": {"hidden_size": shapes["vision_proj.0.weight"][1]},
    }
    fields |= _prompt_fields(shapes)
    if fields["fusion"] == "bridge":
        fields |= _bridge_fields(shapes)
    else:
        fields["vision"]["num_patches"] = head[1] - 2 * fields["width"]
    return fields


def _prompt_fields(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    if f"{_PROMPT}layer_tokens" not in shapes:
        return {}
    made, width = shapes[f"{_PROMPT}image_prompt.2.weight"]
    return {
        "prompt": "paper",
        "prompt_image_tokens": made // width,
        "prompt_words": shapes[f"{_PROMPT}word_tokens"][1],
        "prompt_layer_tokens": shapes[f"{_PROMPT}layer_tokens"][1],
    }


def _bridge_fields(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    width, _, patch, _ = shapes[f"{_VISION}embeddings.patch_embedding.weight"]
    side = round((shapes[f"{_VISION}embeddings.position_embedding.weight"][0] - 1) ** 0.5)
    head = "bridge_adapter_proj."
    scalar_norm = f"{head}bridge_adapter_proj.2.weight" in shapes
    fields: dict[str, Any] = {} if scalar_norm else {"bridge_inner": shapes["bridge_adapter.0.ffn.0.weight"][0]}
    if "map_head.conv.weight" in shapes:
        fields |= {
            "prompt_in_loss": "map",
            "clip_tap_slice": "drop_cls",
            "bridge_out": shapes["map_head.conv.weight"][0],
        }
    else:
        reduction = shapes[f"{head}bridge_adapter_reduction.0.weight"]
        fields |= {"bridge_tokens": reduction[1], "bridge_out": reduction[0]}
    return {
        **fields,
        "vision": {**_clip_fields(shapes, _VISION, width), "image_size": side * patch, "patch_size": patch},
        "bridge_dim": shapes["clip_reduction.weight"][0],
        "tap_widths": [shapes[f"linear_{number}.weight"][1] for number in (1, 2, 3)],
        "bridge_scalar_norm": "layer_norm" if scalar_norm else "none",
    }


def _clip_fields(shapes: Mapping[str, Sequence[int]], prefix: str, width: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": shapes[f"{prefix}encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": sum(
            name.startswith(f"{prefix}encoder.layers.") and name.endswith("mlp.fc1.weight") for name in shapes
        ),
        "num_attention_heads": max(1, width // _HEAD_WIDTH),
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }


def open_detector(path: Path, given: Mapping[str, Any] | None = None) -> M2F2Detector:
    """Opens a detector in evaluation mode and float32: a file, or a folder with a config and one file of weights.

    Args:
        path: Where it lies.
        given: Fields of the config that go before those of the folder, see ``infer_config``.

    Raises:
        CheckpointError: It is none, a tensor is missing or unknown, or a shape does not fit.
    """
    own = read_json(path / "config.json").get("detector", {}) if (path / "config.json").is_file() else {}
    file = weight_file(path)
    tensors = read_detector_tensors(file)
    detector = M2F2Detector(infer_config(tensors, {**own, **(given or {})}, str(file)))
    load_tensors(detector, tensors, str(file))
    return detector.eval()


def load_tensors(detector: M2F2Detector, tensors: Mapping[str, Tensor], where: str) -> None:
    """Puts tensors into a detector; every one must have its place, and every place its tensor.

    Raises:
        CheckpointError: Names or shapes differ; the message lists them.
    """
    own = detector.state_dict()
    missing, unknown = set(own) - set(tensors), set(tensors) - set(own)
    if missing or unknown:
        told = [f"{what} {list_keys(names)}" for what, names in (("lacks", missing), ("has also", unknown)) if names]
        raise CheckpointError(f"{where} does not fit its detector: it {'; it '.join(told)}")
    other = {name for name in own if own[name].shape != tensors[name].shape}
    if other:
        raise CheckpointError(f"{where} has tensors of other shapes: {list_keys(other)}")
    detector.load_state_dict({name: tensors[name].to(own[name].dtype) for name in own})


def save_detector(detector: M2F2Detector, folder: Path, training: Mapping[str, Any] | None = None) -> None:
    """Writes a folder that ``open_detector`` opens: config and safetensors, each file whole or not at all.

    Args:
        detector: The detector.
        folder: Where to.
        training: How it was trained, for the config.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous() for name, value in detector.state_dict().items()}
    atomic_write(folder / "model.safetensors", save(tensors))
    config = {"model_type": MODEL_TYPE, "system": MODEL_TYPE, "detector": detector.config.to_dict()}
    config |= {"training": dict(training)} if training else {}
    write_json(folder / "config.json", config)


def open_tower(detector: M2F2Detector, source: str | None, beside: Path | None) -> VisionTower:
    """Opens the frozen tower whose features a cosine detector takes, CLS first.

    Args:
        detector: The detector.
        source: Folder or hub id; None for the one in the detector's own folder.
        beside: The detector's folder or file, if any.

    Raises:
        CheckpointError: There is none, or its features do not fit.
    """
    own = None if beside is None else (beside if beside.is_dir() else beside.parent) / TOWER_FOLDER
    place = source or (str(own) if own is not None and own.is_dir() else None)
    if place is None:
        raise CheckpointError(
            f"{beside or 'the settings'}: a cosine detector takes the features of a vision tower and has none of its "
            "own; name one with vision_tower"
        )
    found = read_vision_tower(place)
    shared = PixelFormat(found.config.get("image_size", detector.image_size), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    tower = build_vision_tower({**found.config, "select_layer": -2, "select_feature": "cls_patch"}, shared)
    wanted, given = detector.config.vision, (tower.hidden_size, tower.num_patches - 1)
    if given != (wanted["hidden_size"], wanted["num_patches"]):
        raise CheckpointError(
            f"{place} gives {given[1]} patches of width {given[0]}, but the detector takes {wanted['num_patches']} of "
            f"width {wanted['hidden_size']}"
        )
    names = dict(zip(tower.state_dict(), stored_state_dict(tower), strict=True))
    tower.load_state_dict({name: found.tensors[stored][...] for name, stored in names.items()})
    return tower.requires_grad_(False).eval()
