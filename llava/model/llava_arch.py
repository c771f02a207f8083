"""From images to tokens of the language model: towers, projectors, fusion, and the splice into the prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llava.constants import IGNORE_INDEX
from llava.model.configuration import LlavaConfig
from llava.model.multimodal_encoder.base import PixelFormat, VisionTower
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_fusion.base import FusionInput, FusionOutput
from llava.model.multimodal_fusion.builder import build_fusion, fusion_class
from llava.model.multimodal_projector.builder import build_vision_projector


class TowerOutputs(NamedTuple):
    """What the towers say to B images, before the projectors.

    Attributes:
        clip: Features of the first tower ``[B, P, C]``; None where the fusion does not use them.
        dino: Features of the second tower ``[B, P, C]``; None where there is none.
        dino_attention: Softmax attention of its last block between patches ``[B, G, P, P]``; None where the fusion
            does not use it.
    """

    clip: Tensor | None = None
    dino: Tensor | None = None
    dino_attention: Tensor | None = None


@dataclass(frozen=True)
class SplicedBatch:
    """A batch of prompts after other embeddings took the place of their placeholders.

    Attributes:
        inputs_embeds: ``[B, L, D]``, padded with zeros.
        attention_mask: ``[B, L]``, True where there is something.
        position_ids: ``[B, L]``, counted from each row's first valid place (0 before it).
        labels: ``[B, L]`` with -100 at spliced and padded places, or None.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor | None


class LlavaMetaModel(nn.Module):
    """The vision side of a LLaVA model, mixed into a language model.

    Parts that the fusion does not use are not built, except the first tower, whose pixels all others share.
    """

    config: LlavaConfig

    def initialize_vision_modules(self) -> None:
        """Builds towers, projectors and fusion from the config, with random weights.

        Raises:
            ValueError: The config names unknown types, or towers that do not fit the fusion.
        """
        config = self.config
        self.vision_tower: VisionTower | None = None
        self.dino_tower: VisionTower | None = None
        if config.vision_tower_config is None:
            return
        shared = PixelFormat(**config.pixel_format())
        selection = {"select_layer": config.mm_vision_select_layer, "select_feature": config.mm_vision_select_feature}
        self.vision_tower = build_vision_tower({**config.vision_tower_config, **selection}, shared)
        fusion = fusion_class(config.mm_fusion_type)
        projector, width = config.mm_projector_type, config.hidden_size
        if fusion.uses_clip:
            self.mm_projector = build_vision_projector(projector, self.vision_tower.hidden_size, width)
        if fusion.uses_dino:
            if config.dino_tower_config is None:
                raise ValueError(f"the fusion {config.mm_fusion_type!r} needs a second tower, but none is configured")
            self.dino_tower = build_vision_tower(config.dino_tower_config, shared)
            self.dino_mm_projector = build_vision_projector(projector, self.dino_tower.hidden_size, width)
            both = fusion.uses_clip and fusion.equal_grids
            if both and self.vision_tower.num_patches != self.dino_tower.num_patches:
                raise ValueError(
                    f"the fusion {config.mm_fusion_type!r} needs equally many patches from both towers, but they give "
                    f"{self.vision_tower.num_patches} and {self.dino_tower.num_patches}"
                )
        heads = self.dino_tower.num_heads if self.dino_tower else 0
        self.fusion = build_fusion(config.mm_fusion_type, width, heads, config.mm_fusion_config)

    def get_vision_tower(self) -> VisionTower | None:
        """Returns the first tower."""
        return self.vision_tower

    def towers(self) -> list[VisionTower]:
        """Returns the towers that there are."""
        return [tower for tower in (self.vision_tower, self.dino_tower) if tower is not None]

    def num_image_tokens(self) -> int:
        """Returns how many tokens an image becomes.

        Raises:
            ValueError: The model has no towers.
        """
        if self.vision_tower is None:
            raise ValueError("this model has no vision tower, so it cannot take images")
        dino = self.dino_tower.num_patches if self.dino_tower is not None else 0
        return self.fusion.num_tokens(self.vision_tower.num_patches if self.fusion.uses_clip else 0, dino)

    def freeze_towers(self) -> None:
        """Takes the towers out of training, as published."""
        for tower in self.towers():
            tower.requires_grad_(False)

    def encode_images(self, images: Tensor, *, return_attention: bool = False) -> FusionOutput:
        """Turns shared pixels ``[B, 3, S, S]`` into image tokens ``[B, P, D]``.

        Args:
            images: Pixels as the model's image processor makes them.
            return_attention: Also give the fusion's attention.

        Raises:
            ValueError: The model has no towers, or an attention is asked for that the fusion does not have.
        """
        return self.fuse(self.run_towers(images), return_attention=return_attention)

    def run_towers(self, images: Tensor) -> TowerOutputs:
        """Returns what the towers say to shared pixels ``[B, 3, S, S]``.

        Raises:
            ValueError: The model has no towers.
        """
        if self.vision_tower is None:
            raise ValueError("this model has no vision tower, so it cannot take images")
        clip = self.vision_tower(images).features if self.fusion.uses_clip else None
        if self.dino_tower is None:
            return TowerOutputs(clip)
        seen = self.dino_tower(images, with_attention=self.fusion.uses_dino_attention)
        if seen.attention is None:
            return TowerOutputs(clip, seen.features)
        first = self.dino_tower.num_prefix_tokens
        return TowerOutputs(clip, seen.features, seen.attention[:, :, first:, first:])

    def fuse(self, seen: TowerOutputs, *, return_attention: bool = False) -> FusionOutput:
        """Projects what the towers said and joins it into image tokens, see ``encode_images``."""
        clip = None if seen.clip is None else self.mm_projector(seen.clip)
        dino = None if seen.dino is None else self.dino_mm_projector(seen.dino)
        return self.fusion(FusionInput(clip, dino, seen.dino_attention), return_attention=return_attention)


def features_by_row(input_ids: Tensor, placeholder: int, features: Sequence[Tensor]) -> list[list[Tensor]]:
    """Gives each prompt its share of embeddings, in order.

    Either there are as many as placeholders, or one a row: a row without a placeholder then does not use its own (a
    text-only sample in a batch of images).

    Args:
        input_ids: ``[B, T]``.
        placeholder: Id that stands for one of ``features``.
        features: Embeddings ``[n_i, D]``.

    Raises:
        ValueError: Their numbers do not fit.
    """
    counts: list[int] = (input_ids == placeholder).sum(dim=1).tolist()
    if sum(counts) == len(features):
        ends = torch.tensor(counts).cumsum(0).tolist()
        return [list(features[end - count : end]) for count, end in zip(counts, ends, strict=True)]
    if len(features) == len(counts) and max(counts) <= 1:
        return [[feature] for feature in features]
    raise ValueError(
        f"the prompts have {sum(counts)} placeholders ({counts} in each row) for {len(features)} images; "
        "there must be one image for each placeholder"
    )


def splice(
    input_ids: Tensor,
    embed_tokens: nn.Module,
    features: Mapping[int, list[list[Tensor]]],
    *,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    max_length: int | None = None,
    padding_side: str = "right",
) -> SplicedBatch:
    """Puts embeddings in the place of placeholders.

    Args:
        input_ids: ``[B, T]`` with placeholder ids among them.
        embed_tokens: Embedding of ordinary ids.
        features: For each placeholder id, the embeddings ``[n, D]`` of each row in order. A row without that
            placeholder may have embeddings, which are then not used.
        attention_mask: ``[B, T]``; places that are 0 are dropped. Default: all are valid.
        labels: ``[B, T]``, or None.
        max_length: Rows are cut to this length after the splice.
        padding_side: Where shorter rows are padded, ``right`` or ``left``.

    Returns:
        Rows of equal length L.
    """
    valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    is_placeholder = torch.zeros_like(valid)
    for placeholder in features:
        is_placeholder |= input_ids == placeholder
    embeds_BTD = embed_tokens(input_ids.masked_fill(is_placeholder, 0))
    rows: list[Tensor] = []
    row_labels: list[Tensor] = []
    for row, keep in enumerate(valid):
        ids, embeds = input_ids[row][keep], embeds_BTD[row][keep]
        said = None if labels is None else labels[row][keep]
        waiting = {placeholder: list(given[row]) for placeholder, given in features.items()}
        parts: list[Tensor] = []
        part_labels: list[Tensor] = []
        start = 0
        for place in is_placeholder[row][keep].nonzero().flatten().tolist():
            feature = waiting[int(ids[place])].pop(0).to(device=embeds.device, dtype=embeds.dtype)
            parts += [embeds[start:place], feature]
            if said is not None:
                part_labels += [said[start:place], said.new_full((len(feature),), IGNORE_INDEX)]
            start = place + 1
        # An empty slice of an unused image keeps its modules in the graph, which sharded training waits for.
        unused = [feature[:0].to(embeds) for given in waiting.values() for feature in given]
        rows.append(torch.cat([*parts, embeds[start:], *unused])[:max_length])
        if said is not None:
            row_labels.append(torch.cat([*part_labels, said[start:]])[:max_length])
    lengths = torch.tensor([len(row) for row in rows], device=input_ids.device)
    places = torch.arange(int(lengths.max()), device=input_ids.device).expand(len(rows), -1)
    first = torch.zeros_like(lengths) if padding_side == "right" else lengths.max() - lengths
    mask = (places >= first[:, None]) & (places < (first + lengths)[:, None])
    pad = nn.utils.rnn.pad_sequence
    return SplicedBatch(
        pad(rows, batch_first=True, padding_side=padding_side),
        mask,
        (places - first[:, None]).clamp(min=0),
        pad(row_labels, batch_first=True, padding_value=IGNORE_INDEX, padding_side=padding_side)
        if row_labels
        else None,
    )
