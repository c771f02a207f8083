"""The CLIP tower: patch features from one of CLIP's inner layers."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.errors import CheckpointError
from llava.model.checkpoint_files import TensorLike, read_json, read_tensors, resolve_folder
from llava.model.multimodal_encoder.base import PixelFormat, TowerOutput, TowerSource, VisionTower

_OPENAI_CLIP = re.compile(r"clip-vit-(base|large)-patch\d+(-\d+)?")
_OPENAI_HEAD_WIDTH = 64
_OPENAI_MEAN = [0.48145466, 0.4578275, 0.40821073]
OPENAI_STD = [0.26862954, 0.26130258, 0.27577711]
_STORED_PREFIX = "vision_tower.vision_model."
MODEL_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)
"""What a tower's config has of ``CLIPVisionConfig``."""


class CLIPVisionTower(VisionTower):
    """CLIP's vision transformer (arXiv 2103.00020).

    Config: ``MODEL_FIELDS``; ``select_layer``, index into the hidden states
    (published: -2); ``select_feature``, ``patch`` or ``cls_patch``.
    """

    tower_type: ClassVar[str] = "clip"

    def __init__(self, config: Mapping[str, Any], shared: PixelFormat) -> None:
        super().__init__(config, shared)
        model_config = CLIPVisionConfig(**{name: config[name] for name in MODEL_FIELDS if name in config})
        self.vision_tower = CLIPVisionModel(model_config)
        self.image_size = model_config.image_size
        depth = model_config.num_hidden_layers
        select_layer = self.config.get("select_layer", -2)
        self.num_layers_run = select_layer if select_layer >= 0 else depth + 1 + select_layer
        if not 0 <= self.num_layers_run <= depth:
            raise CheckpointError(
                f"mm_vision_select_layer {select_layer} does not exist in a CLIP tower of {depth} layers"
            )
        if self.config.get("select_feature", "patch") not in ("patch", "cls_patch"):
            raise CheckpointError(
                f"mm_vision_select_feature {config['select_feature']!r} is neither patch nor cls_patch"
            )

    @classmethod
    def opens(cls, source: str) -> bool:
        """Whether it is a hub id or a folder; other towers are asked first."""
        return not source.endswith((".pth", ".pt", ".bin"))

    @classmethod
    def read(cls, source: str) -> TowerSource:
        """Reads a folder or hub id that holds a CLIP vision model, alone or beside its text model."""
        folder = resolve_folder(source, "vision tower")
        config = read_json(folder / "config.json")
        config = config.get("vision_config", config)
        if config.get("model_type", "clip_vision_model") != "clip_vision_model":
            raise CheckpointError(f"{folder} holds a {config['model_type']} model, but a CLIP vision tower is needed")
        processor_file = folder / "preprocessor_config.json"
        # Old files give sizes as plain numbers; the processor itself knows what they mean.
        processor = CLIPImageProcessorPil(**read_json(processor_file)).to_dict() if processor_file.is_file() else None
        own = CLIPVisionConfig(**{name: config[name] for name in MODEL_FIELDS if name in config})
        return TowerSource(
            config={"type": cls.tower_type, **{name: getattr(own, name) for name in MODEL_FIELDS}},
            tensors=_tower_tensors(read_tensors(folder)),
            origin=str(folder),
            image_processor=processor or image_processor_settings(own.image_size),
        )

    @classmethod
    def infer(
        cls, source: str | None, tensors: Mapping[str, TensorLike], facts: Mapping[str, Any]
    ) -> TowerSource | None:
        """Returns a tower whose weights are at hand and whose name says that it is one of OpenAI's.

        All of those have heads of width 64 and the quick GELU, which the shapes of ``tensors`` do not tell. The name
        is a hub id or a path on the machine where the model was trained; a folder that is here says more by itself.
        """
        if source is None:
            return None
        position = tensors.get(f"{_STORED_PREFIX}embeddings.position_embedding.weight")
        patch = tensors.get(f"{_STORED_PREFIX}embeddings.patch_embedding.weight")
        inner = tensors.get(f"{_STORED_PREFIX}encoder.layers.0.mlp.fc1.weight")
        if position is None or patch is None or inner is None or not _OPENAI_CLIP.fullmatch(Path(source).name):
            return None
        if Path(source).expanduser().is_dir():
            return None
        layers = {int(n) for name in tensors for n in re.findall(r"encoder\.layers\.(\d+)\.", name)}
        image_size = round((position.shape[0] - 1) ** 0.5) * patch.shape[-1]
        config = {
            "type": cls.tower_type,
            "hidden_size": position.shape[1],
            "intermediate_size": inner.shape[0],
            "num_hidden_layers": max(layers) + 1,
            "num_attention_heads": position.shape[1] // _OPENAI_HEAD_WIDTH,
            "image_size": image_size,
            "patch_size": patch.shape[-1],
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        }
        return TowerSource(config, dict(tensors), "the checkpoint", image_processor_settings(image_size))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.vision_tower.config.image_size // self.vision_tower.config.patch_size
        return side, side

    @property
    def blocks_run(self) -> Sequence[nn.Module]:
        """The layers up to the selected hidden state."""
        return self.vision_tower.encoder.layers[: self.num_layers_run]

    @property
    def parts_behind_output(self) -> Sequence[nn.Module]:
        """The layers behind the selected hidden state, and the norm behind all layers."""
        return [*self.vision_tower.encoder.layers[self.num_layers_run :], self.vision_tower.post_layernorm]

    @property
    def num_patches(self) -> int:
        """Number of features an image, CLS included where it is selected."""
        return super().num_patches + (self.config.get("select_feature") == "cls_patch")

    @torch.no_grad()
    def calibrate(self, shared_pixels: Tensor) -> None:
        """Starts the patch embedding from the principal components of typical patches, each scaled to variance 1.

        Nearly all variance of images lies in a few smooth components. Random weights see those alone, and what tells a
        generator lies in the others. A width that is smaller than the number of components gets every so-manieth.
        """
        embedding = self.vision_tower.embeddings.patch_embedding
        size = embedding.kernel_size[0]
        patches_BFP = F.unfold(self.own_pixels(shared_pixels).float(), size, stride=size)
        values_F, components_FF = torch.linalg.eigh(patches_BFP.transpose(1, 2).flatten(0, 1).T.cov())
        # What rounding to 256 levels alone would give: below it, there is nothing to see.
        floor = (1 / 255 / min(self.shared.std)) ** 2 / 12
        white_FF = components_FF.T / values_F.clamp(min=floor).sqrt()[:, None]
        width = embedding.out_channels
        chosen = torch.linspace(0, len(white_FF) - 1, min(width, len(white_FF))).round().long()
        rows_DF = white_FF[chosen.repeat(-(-width // len(chosen)))[:width]]
        embedding.weight.copy_(rows_DF.unflatten(1, embedding.weight.shape[1:]))

    def encode(self, pixels: Tensor, *, with_attention: bool) -> TowerOutput:
        """Returns the selected hidden state; layers behind it are not run."""
        if with_attention:
            raise CheckpointError("the CLIP tower gives no attention; name a DINO tower as second branch")
        hidden = self.vision_tower.pre_layrnorm(self.vision_tower.embeddings(pixels))
        for block in self.blocks_run:
            hidden = block(hidden, attention_mask=None)
        return TowerOutput(hidden if self.config.get("select_feature") == "cls_patch" else hidden[:, 1:])


def image_processor_settings(image_size: int) -> dict[str, Any]:
    """Returns the settings of OpenAI CLIP's image processor for a size."""
    return {
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _OPENAI_MEAN,
        "image_std": OPENAI_STD,
        "do_convert_rgb": True,
    }


def _tower_tensors(tensors: Mapping[str, TensorLike]) -> dict[str, TensorLike]:
    """Returns the vision model's tensors by their stored names, whether saved alone, beside the text model, or bare."""
    vision = {name: value for name, value in tensors.items() if name.startswith("vision_model.")}
    if not vision:
        vision = {f"vision_model.{name}": value for name, value in tensors.items()}
    return {f"vision_tower.{name}": value for name, value in vision.items() if not name.endswith("position_ids")}
