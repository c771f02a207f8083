"""From images to tokens of the language model: towers, projectors, fusion, and the splice into the prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import CheckpointError, DataError
from llava.mm_utils import IMAGE_PLACEHOLDER
from llava.model.branches import FIRST, attention_name, projector_name, tower_name
from llava.model.configuration import LlavaConfig
from llava.model.multimodal_encoder.base import PixelFormat, VisionTower
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_fusion.base import FusionOutput
from llava.model.multimodal_fusion.builder import build_fusion, fusion_class
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.token_sources import TokenSource, VisionContext, build_token_sources

TowerOutputs = dict[str, Tensor]
"""What the towers give for B images, before the projectors: features ``[B, P, C]`` by the branch's name; of the branch
that leads the fusion ``<branch>_attention`` ``[B, G, P, P]``, its last block's softmax attention between patches."""


@dataclass(frozen=True)
class EncodedImages:
    """What B images are to the language model.

    Attributes:
        embeddings: What takes each placeholder's place, ``[B, n, D]`` by its id.
        attention: The fusion's, see ``FusionOutput``; None unless asked for.
        readings: What token sources say beside their tokens, each ``[B, …]``.
        description: See ``FusionOutput``.
    """

    embeddings: dict[int, Tensor]
    attention: Tensor | None
    readings: dict[str, Tensor]
    description: Tensor | None = None


@dataclass(frozen=True)
class SplicedBatch:
    """A batch of prompts after other embeddings were put at their placeholders.

    Attributes:
        inputs_embeds: ``[B, L, D]``, padded with zeros.
        attention_mask: ``[B, L]``, True where there is something.
        position_ids: ``[B, L]``, counted from each row's first valid place (0 before it).
        labels: ``[B, L]`` with -100 at spliced and padded places, or None.
        image_tokens: What the images are to the language model, ``[N, P, D]``, if that is asked for.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor | None
    image_tokens: Tensor | None = None


class LlavaMetaModel(nn.Module):
    """The vision side of a LLaVA model, mixed into a language model.

    An image goes through named branches, each a tower and its projector, which a fusion joins into image tokens; token
    sources add what else a prompt may hold. Parts that the fusion does not use are not built, except the first tower,
    whose pixels all others share.
    """

    config: LlavaConfig

    def initialize_vision_modules(self) -> None:
        """Builds towers, projectors, fusion and token sources from the config, with random weights.

        Raises:
            CheckpointError: The config names unknown types, or towers that do not fit the fusion.
        """
        config = self.config
        self.branches: tuple[str, ...] = ()
        self.vision_tower: VisionTower | None = None
        self.token_sources = build_token_sources(None, config.hidden_size)
        configs = config.tower_configs()
        if FIRST not in configs:
            return
        shared = PixelFormat(**config.pixel_format())
        fusion = fusion_class(config.mm_fusion_type)
        self.branches = tuple(dict.fromkeys((FIRST, *fusion.branches)))
        selection = {"select_layer": config.mm_vision_select_layer, "select_feature": config.mm_vision_select_feature}
        for branch in self.branches:
            if branch not in configs:
                raise CheckpointError(
                    f"the fusion {config.mm_fusion_type!r} needs a tower for its branch {branch!r}; none is configured"
                )
            own = selection if branch == FIRST else {}
            tower = build_vision_tower({**configs[branch], **own}, shared)
            setattr(self, tower_name(branch), tower)
            if branch in fusion.branches:
                projector = build_vision_projector(config.mm_projector_type, tower.hidden_size, config.hidden_size)
                setattr(self, projector_name(branch), projector)
        if fusion.equal_grids and len({self.tower(branch).num_patches for branch in fusion.branches}) > 1:
            counts = " and ".join(str(self.tower(branch).num_patches) for branch in fusion.branches)
            raise CheckpointError(
                f"the fusion {config.mm_fusion_type!r} needs equally many patches from its branches; they give {counts}"
            )
        heads = {branch: self.tower(branch).num_heads for branch in fusion.branches}
        self.fusion = build_fusion(config.mm_fusion_type, config.hidden_size, heads, config.mm_fusion_config)
        self.token_sources = build_token_sources(config.token_source_configs, config.hidden_size)

    def tower(self, branch: str) -> VisionTower:
        """Returns the tower of a branch."""
        found: VisionTower = getattr(self, tower_name(branch))
        return found

    def get_vision_tower(self) -> VisionTower | None:
        """Returns the first tower."""
        return self.vision_tower

    def towers(self) -> list[VisionTower]:
        """Returns the towers that there are."""
        return [self.tower(branch) for branch in self.branches]

    def num_image_tokens(self) -> int:
        """Returns how many tokens an image becomes.

        Raises:
            CheckpointError: The model has no towers.
        """
        self._check_towers()
        return self.fusion.num_tokens({branch: self.tower(branch).num_patches for branch in self.fusion.branches})

    def placeholder_tokens(self) -> dict[int, int]:
        """Returns how many tokens each placeholder id becomes."""
        own = {source.index: source.num_tokens for source in self._sources()}
        return {IMAGE_TOKEN_INDEX: self.num_image_tokens(), **own}

    def placeholders(self) -> dict[str, int]:
        """Returns what stands for images and sources in a prompt's text, each with its id."""
        return {**IMAGE_PLACEHOLDER, **{source.placeholder: source.index for source in self._sources()}}

    def image_inputs(self, image: Image.Image | None, processor: Any) -> dict[str, Tensor]:
        """Returns the further inputs that token sources make of an image, see ``TokenSource.image_inputs``."""
        found: dict[str, Tensor] = {}
        for source in self._sources():
            found |= source.image_inputs(image, processor, is_padded=self.config.image_aspect_ratio == "pad")
        return found

    def needs_images(self) -> bool:
        """Whether some source looks at the pixels."""
        return any(source.needs_images for source in self._sources())

    def _sources(self) -> list[TokenSource]:
        return [source for source in self.token_sources.values() if isinstance(source, TokenSource)]

    def _check_towers(self) -> None:
        if not self.branches:
            raise CheckpointError("this model has no vision tower, so it cannot take images")

    def freeze_towers(self) -> None:
        """Takes the towers out of training, as published."""
        for tower in self.towers():
            tower.requires_grad_(False)
        for source in self._sources():
            source.freeze()

    def freeze_behind_outputs(self) -> None:
        """Takes those parts of the towers out of training that no gradient reaches."""
        for part in (part for tower in self.towers() for part in tower.parts_behind_output):
            part.requires_grad_(False)

    def encode_images(self, images: Tensor, *, return_attention: bool = False) -> FusionOutput:
        """Turns shared pixels ``[B, 3, S, S]`` into image tokens ``[B, P, D]``.

        Args:
            images: Pixels as the model's image processor makes them.
            return_attention: Also give the fusion's attention.

        Raises:
            CheckpointError: The model has no towers.
            OptionError: An attention is asked for that the fusion does not have.
        """
        outputs, description = self.look(images)
        return replace(self.fuse(outputs, return_attention=return_attention), description=description)

    def run_towers(self, images: Tensor) -> TowerOutputs:
        """Returns what the towers give for shared pixels ``[B, 3, S, S]``.

        Raises:
            CheckpointError: The model has no towers.
        """
        return self.look(images)[0]

    def look(self, images: Tensor) -> tuple[TowerOutputs, Tensor]:
        """Returns what ``run_towers`` does, and what tells known images from others ``[B, F]``, in one pass.

        Raises:
            CheckpointError: The model has no towers.
        """
        self._check_towers()
        outputs: TowerOutputs = {}
        descriptions = []
        for branch in self.fusion.branches:
            tower = self.tower(branch)
            # Only asked for where it is used: towers compute it apart from their fast attention.
            wanted = {"with_attention": True} if branch == self.fusion.attention_branch else {}
            output = tower(images, **wanted)
            outputs[branch] = output.features
            descriptions.append(output.description)
            if output.attention is not None:
                patches = slice(tower.num_prefix_tokens, None)
                outputs[attention_name(branch)] = output.attention[:, :, patches, patches]
        return outputs, torch.cat(descriptions, dim=1)

    def fuse(self, outputs: Mapping[str, Tensor], *, return_attention: bool = False) -> FusionOutput:
        """Projects what the towers gave and joins it into image tokens, see ``encode_images``."""
        inputs = dict(outputs)
        for branch in self.fusion.branches:
            inputs[branch] = getattr(self, projector_name(branch))(outputs[branch])
        return self.fusion(inputs, return_attention=return_attention)

    def encode(self, context: VisionContext, *, return_attention: bool = False) -> EncodedImages:
        """Returns what takes each placeholder's place, and what there is to say of it."""
        fused = self.fuse(context.tower_outputs, return_attention=return_attention)
        embeddings, readings = {IMAGE_TOKEN_INDEX: fused.tokens}, dict[str, Tensor]()
        for source in self._sources():
            embeddings[source.index], own = source.read(context)
            readings |= own
        return EncodedImages(embeddings, fused.attention, readings)

    def placeholder_embeddings(self, context: VisionContext) -> dict[int, Tensor]:
        """Returns what takes each placeholder's place, ``[B, n, D]`` by its id: image tokens, and token sources'."""
        own = {source.index: source(context) for source in self._sources()}
        return {IMAGE_TOKEN_INDEX: self.fuse(context.tower_outputs).tokens, **own}


def features_by_row(input_ids: Tensor, placeholder: int, features: Sequence[Tensor]) -> list[list[Tensor]]:
    """Gives each prompt its share of embeddings, in order.

    Either there are as many as placeholders, or one a row: a row without a placeholder then does not use its own (a
    text-only sample in a batch of images).

    Args:
        input_ids: ``[B, T]``.
        placeholder: Id that stands for one of ``features``.
        features: Embeddings ``[n_i, D]``.

    Raises:
        DataError: Their numbers do not fit.
    """
    counts: list[int] = (input_ids == placeholder).sum(dim=1).tolist()
    if sum(counts) == len(features):
        ends = torch.tensor(counts).cumsum(0).tolist()
        return [list(features[end - count : end]) for count, end in zip(counts, ends, strict=True)]
    if len(features) == len(counts) and max(counts) <= 1:
        return [[feature] for feature in features]
    raise DataError(
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
    """Puts embeddings where their placeholders stand.

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
    all_labels = torch.full_like(input_ids, IGNORE_INDEX) if labels is None else labels
    filled = [
        _fill_row(
            input_ids[row][keep],
            embeds_BTD[row][keep],
            all_labels[row][keep],
            is_placeholder[row][keep],
            {placeholder: given[row] for placeholder, given in features.items()},
        )
        for row, keep in enumerate(valid)
    ]
    rows = [embeds[:max_length] for embeds, _ in filled]
    lengths = torch.tensor([len(row) for row in rows], device=input_ids.device)
    positions = torch.arange(int(lengths.max()), device=input_ids.device).expand(len(rows), -1)
    first = torch.zeros_like(lengths) if padding_side == "right" else lengths.max() - lengths
    mask = (positions >= first[:, None]) & (positions < (first + lengths)[:, None])
    pad = nn.utils.rnn.pad_sequence
    padded_labels = None
    if labels is not None:
        row_labels = [own[:max_length] for _, own in filled]
        padded_labels = pad(row_labels, batch_first=True, padding_value=IGNORE_INDEX, padding_side=padding_side)
    return SplicedBatch(
        pad(rows, batch_first=True, padding_side=padding_side),
        mask,
        (positions - first[:, None]).clamp(min=0),
        padded_labels,
    )


def _fill_row(
    ids_T: Tensor, embeds_TD: Tensor, labels_T: Tensor, is_placeholder_T: Tensor, given: Mapping[int, list[Tensor]]
) -> tuple[Tensor, Tensor]:
    """Returns one row's embeddings and labels with its placeholders filled, in the order of what is given."""
    waiting = {placeholder: list(features) for placeholder, features in given.items()}
    parts: list[Tensor] = []
    labels: list[Tensor] = []
    start = 0
    for position in is_placeholder_T.nonzero().flatten().tolist():
        feature = waiting[int(ids_T[position])].pop(0).to(device=embeds_TD.device, dtype=embeds_TD.dtype)
        parts += [embeds_TD[start:position], feature]
        labels += [labels_T[start:position], labels_T.new_full((len(feature),), IGNORE_INDEX)]
        start = position + 1
    # An empty slice of an unused image keeps its modules in the graph, which sharded training waits for.
    unused = [feature[:0].to(embeds_TD) for features in waiting.values() for feature in features]
    return torch.cat([*parts, embeds_TD[start:], *unused]), torch.cat([*labels, labels_T[start:]])
