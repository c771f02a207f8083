"""SAM's image encoder and mask decoder through transformers, from and to SAM's own tensor names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

from llava.errors import CheckpointError
from llava.model.checkpoint_files import TensorLike
from llava.model.checkpoint_layout import Rename

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
VISION_EPS, DECODER_EPS = 1e-6, 1e-5
"""Of layer norms; transformers' own default for the decoder is another."""
DECODER_HEADS = 8
"""Published; no shape tells it."""
SHARED_POSITIONS = "prompt_encoder.shared_embedding.positional_embedding"
REPEATED_POSITIONS = "shared_image_embedding.positional_embedding"
"""Transformers keeps the one published matrix under two names."""
DROPPED = ("pixel_mean", "pixel_std")


def sam_rules(published: str, native: str) -> list[Rename]:
    """Returns the rules from SAM's names behind a prefix to those of ``SamModel`` behind another."""
    encoder, layers = "image_encoder.", "vision_encoder.layers.{n}."
    hyper, iou = "mask_decoder.output_hypernetworks_mlps.{n}.", "mask_decoder.iou_prediction_head."
    pairs = [
        (f"{encoder}patch_embed.proj.{{p}}", "vision_encoder.patch_embed.projection.{p}"),
        (f"{encoder}blocks.{{n}}.norm1.{{p}}", f"{layers}layer_norm1.{{p}}"),
        (f"{encoder}blocks.{{n}}.norm2.{{p}}", f"{layers}layer_norm2.{{p}}"),
        (f"{encoder}blocks.{{n}}.{{rest*}}", f"{layers}{{rest*}}"),
        *((f"{encoder}neck.{place}.{{p}}", f"vision_encoder.neck.{name}.{{p}}") for place, name in enumerate(_NECK)),
        (f"{encoder}{{rest*}}", "vision_encoder.{rest*}"),
        ("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", SHARED_POSITIONS),
        ("prompt_encoder.point_embeddings.{rest*}", "prompt_encoder.point_embed.{rest*}"),
        *(
            (f"prompt_encoder.mask_downscaling.{place}.{{p}}", f"prompt_encoder.mask_embed.{n}.{{p}}")
            for place, n in _DOWN
        ),
        *(
            (
                f"mask_decoder.transformer.layers.{{n}}.norm{k}.{{p}}",
                f"mask_decoder.transformer.layers.{{n}}.layer_norm{k}.{{p}}",
            )
            for k in (1, 2, 3, 4)
        ),
        ("mask_decoder.transformer.norm_final_attn.{p}", "mask_decoder.transformer.layer_norm_final_attn.{p}"),
        *((f"mask_decoder.output_upscaling.{place}.{{p}}", f"mask_decoder.{name}.{{p}}") for place, name in _UP),
        *(
            (f"{part}layers.{place}.{{p}}", f"{part}{name}.{{p}}")
            for part in (hyper, iou)
            for place, name in enumerate(_MLP)
        ),
        ("{rest*}", "{rest*}"),
    ]
    return [Rename(f"{published}{theirs}", f"{native}{ours}") for theirs, ours in pairs]


_NECK = ("conv1", "layer_norm1", "conv2", "layer_norm2")
_DOWN = ((0, "conv1"), (1, "layer_norm1"), (3, "conv2"), (4, "layer_norm2"), (6, "conv3"))
_UP = ((0, "upscale_conv1"), (1, "upscale_layer_norm"), (3, "upscale_conv2"))
_MLP = ("proj_in", "layers.0", "proj_out")


@dataclass(frozen=True)
class _Shapes:
    """Shapes of a SAM's tensors; a missing one is told as what it is."""

    tensors: Mapping[str, TensorLike]
    where: str

    def __getitem__(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            raise CheckpointError(f"{self.where} holds no SAM, or only a part of one: it lacks {name}")
        return tuple(self.tensors[name].shape)

    def count(self, prefix: str, end: str) -> int:
        """How many tensors have such a name."""
        return sum(name.startswith(prefix) and name.endswith(end) for name in self.tensors)


def infer_config(tensors: Mapping[str, TensorLike], given: Mapping[str, Any], where: str) -> SamConfig:
    """Returns what a SAM is built from, by the shapes of its tensors.

    Args:
        tensors: By the names of ``SamModel``.
        given: What no shape tells or what is to differ: ``vision``, ``prompt`` and ``decoder``, each with fields of
            transformers' config of that part.
        where: The file, for messages.

    Raises:
        CheckpointError: A tensor is missing; the message names it.
    """
    shapes = _Shapes(tensors, where)
    vision = _vision_fields(shapes)
    prompt = {
        "hidden_size": vision["output_channels"],
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "mask_input_channels": shapes["prompt_encoder.mask_embed.conv2.weight"][0],
    }
    fields = {"vision": vision, "prompt": prompt, "decoder": _decoder_fields(shapes)}
    return build_config({part: {**own, **given.get(part, {})} for part, own in fields.items()})


def _vision_fields(shapes: _Shapes) -> dict[str, Any]:
    layers = "vision_encoder.layers."
    width, _, patch, _ = shapes["vision_encoder.patch_embed.projection.weight"]
    grid = shapes["vision_encoder.pos_embed"][1]
    depth = shapes.count(layers, ".attn.qkv.weight")
    # Relative positions of n patches are 2 n - 1; a layer that spans the grid sees all of it.
    spans = [(shapes[f"{layers}{n}.attn.rel_pos_h"][0] + 1) // 2 for n in range(depth)]
    windows = {span for span in spans if span != grid}
    return {
        "hidden_size": width,
        "output_channels": shapes["vision_encoder.neck.conv1.weight"][0],
        "num_hidden_layers": depth,
        "num_attention_heads": width // shapes[f"{layers}0.attn.rel_pos_h"][1],
        "image_size": grid * patch,
        "patch_size": patch,
        "window_size": windows.pop() if len(windows) == 1 else 0,
        "global_attn_indexes": [n for n, span in enumerate(spans) if span == grid],
        "num_pos_feats": shapes[SHARED_POSITIONS][1],
        "mlp_dim": shapes[f"{layers}0.mlp.lin1.weight"][0],
        "layer_norm_eps": VISION_EPS,
    }


def _decoder_fields(shapes: _Shapes) -> dict[str, Any]:
    decoder, layers = "mask_decoder.", "mask_decoder.transformer.layers."
    inner, channels = shapes["mask_decoder.transformer.final_attn_token_to_image.q_proj.weight"]
    return {
        "hidden_size": channels,
        "mlp_dim": shapes[f"{layers}0.mlp.lin1.weight"][0],
        "num_hidden_layers": shapes.count(layers, ".mlp.lin1.weight"),
        "num_attention_heads": DECODER_HEADS,
        "attention_downsample_rate": channels // inner,
        "num_multimask_outputs": shapes[f"{decoder}mask_tokens.weight"][0] - 1,
        "iou_head_depth": 2 + shapes.count(f"{decoder}iou_prediction_head.layers.", ".weight"),
        "iou_head_hidden_dim": shapes[f"{decoder}iou_prediction_head.proj_in.weight"][0],
        "layer_norm_eps": DECODER_EPS,
    }


def build_config(parts: Mapping[str, Mapping[str, Any]]) -> SamConfig:
    """Returns a config from the fields of its parts ``vision``, ``prompt`` and ``decoder``."""
    return SamConfig(
        vision_config=SamVisionConfig(**parts["vision"]).to_dict(),
        prompt_encoder_config=SamPromptEncoderConfig(**parts["prompt"]).to_dict(),
        mask_decoder_config=SamMaskDecoderConfig(**{"layer_norm_eps": DECODER_EPS, **parts["decoder"]}).to_dict(),
    )


def resized_shape(height: int, width: int, side: int) -> tuple[int, int]:
    """Returns height and width of an image whose longer side becomes ``side``; at least 1 each."""
    scale = side / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_image(image: Image.Image, side: int) -> np.ndarray:
    """Returns an RGB image, its longer side resized to ``side``, ``[h, w, 3]`` uint8."""
    height, width = resized_shape(image.height, image.width, side)
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def normalize(image: np.ndarray, side: int) -> Tensor:
    """Returns pixels ``[3, side, side]``: normalised, and only then padded with zeros on the right and below."""
    pixels_HWC = (torch.from_numpy(np.array(image)).float() - torch.tensor(MEAN)) / torch.tensor(STD)
    pixels_CHW = pixels_HWC.permute(2, 0, 1)
    return F.pad(pixels_CHW, (0, side - pixels_CHW.shape[2], 0, side - pixels_CHW.shape[1]))


def decode_masks(sam: SamModel, image_embedding_Cgg: Tensor, prompts_nC: Tensor) -> Tensor:
    """Returns mask logits at low resolution, ``[n, 1, 4g, 4g]``, of one image and an embedding for each mask.

    Args:
        sam: Holds the decoder.
        image_embedding_Cgg: What its encoder gives.
        prompts_nC: Each becomes the only sparse prompt of its mask; the dense prompt is SAM's for "no mask".
    """
    embedding_1Cgg = image_embedding_Cgg[None]
    dense_1Cgg = sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand_as(embedding_1Cgg)
    masks_1n1HW = sam.mask_decoder(
        image_embeddings=embedding_1Cgg,
        image_positional_embeddings=sam.get_image_wide_positional_embeddings().to(embedding_1Cgg),
        sparse_prompt_embeddings=prompts_nC[None, :, None],
        dense_prompt_embeddings=dense_1Cgg,
        multimask_output=False,
    )[0]
    masks: Tensor = masks_1n1HW[0]
    return masks


def mask_over_image(low_n1HW: Tensor, side: int, resized: tuple[int, int], original: tuple[int, int]) -> Tensor:
    """Returns mask logits over the image, ``[n, H, W]``, from those at low resolution.

    Args:
        low_n1HW: What ``decode_masks`` gives.
        side: Of the square that the encoder sees.
        resized: Height and width of the image within that square.
        original: Height and width of the image.
    """
    square = F.interpolate(low_n1HW.float(), (side, side), mode="bilinear", align_corners=False)
    within = square[..., : resized[0], : resized[1]]
    return F.interpolate(within, original, mode="bilinear", align_corners=False)[:, 0]
