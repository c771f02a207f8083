"""The segmenter: a LLaVA that answers with ``[SEG]``, and SAM's decoder that turns its state there into a mask.

Suffixes: B images, L positions, D width of the language model, C width of the mask decoder, n masks of an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AddedToken, PreTrainedTokenizerBase, SamConfig, SamModel

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.errors import CheckpointError, OptionError
from llava.images import to_rgb
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.configuration import LlavaConfig
from llava.model.decoding import Sampler, decode
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.llava_arch import splice
from llava.systems.fakeshield import sam as sam_parts
from llava.systems.fakeshield.answer import ADDED_TOKENS, OVERVIEW, SEG, mask_request

MAX_NEW_TOKENS = 64
"""Longest answer of the segmenter; the published ones have at most a dozen tokens."""
_SAM_BATCH = {"cpu": 1, "cuda": 4}
"""Images that SAM's encoder sees at a time: each of its global blocks holds half a gigabyte an image."""
_TEMPLATE = "llava_v1"


@dataclass(frozen=True)
class SegmenterPixels:
    """An image as the segmenter takes it.

    Attributes:
        clip: CLIP's pixels ``[3, S, S]``, of the image's central square.
        sam: The whole image, its longer side as SAM wants it, ``[h, w, 3]`` uint8.
        shape: The image's own height and width.
    """

    clip: Tensor
    sam: np.ndarray
    shape: tuple[int, int]


@dataclass(frozen=True)
class Segmentation:
    """What the segmenter says of one image.

    Attributes:
        text: Its answer, ``[SEG]`` included.
        ids: Its new ids.
        logits: Of "changed" at each pixel, the largest over all masks, ``[H, W]`` float32; None without a mask.
        count: Number of masks.
    """

    text: str
    ids: list[int]
    logits: np.ndarray | None
    count: int


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Returns a tokenizer that cuts texts as the published model was trained: apart at each added token.

    Blanks beside an added token vanish, and every piece begins like a text of its own.

    Raises:
        CheckpointError: The tokenizer does not know the tokens by the ids that follow its own words.
    """
    tokens: Any = [AddedToken(name, lstrip=True, rstrip=True, normalized=False, special=False) for name in ADDED_TOKENS]
    tokenizer.add_tokens(tokens)
    ids = tokenizer.convert_tokens_to_ids(list(ADDED_TOKENS))
    if any(index is None or index == tokenizer.unk_token_id for index in ids):
        raise CheckpointError(f"the segmenter's tokenizer does not take the tokens {' '.join(ADDED_TOKENS)}")
    return tokenizer


def build_prompt(request: str, answer: str | None = None) -> str:
    """Returns the segmenter's prompt for what follows ``OVERVIEW``, with an answer if one is given."""
    conversation = conv_templates[_TEMPLATE].copy()
    conversation.append_message(conversation.roles[0], f"{OVERVIEW}{request}")
    conversation.append_message(conversation.roles[1], answer)
    return conversation.get_prompt()


class Segmenter(nn.Module):
    """Masks from texts.

    Args:
        config: Of the language model, one branch ``clip``.
        sam_config: Of SAM.
        language_model: The language model, where it was opened elsewhere; None builds a new one.
    """

    def __init__(
        self, config: LlavaConfig, sam_config: SamConfig, language_model: LlavaLlamaForCausalLM | None = None
    ) -> None:
        super().__init__()
        self.language_model = LlavaLlamaForCausalLM(config) if language_model is None else language_model
        self.sam = SamModel(sam_config)
        width, prompt_width = config.hidden_size, sam_config.mask_decoder_config.hidden_size
        layers = (nn.Linear(width, width), nn.ReLU(), nn.Linear(width, prompt_width), nn.Dropout(0.0))
        self.text_hidden_fcs = nn.ModuleList([nn.Sequential(*layers)])  # named as published

    @property
    def side(self) -> int:
        """Side of the square that SAM's encoder sees, in pixels."""
        return int(self.sam.config.vision_config.image_size)

    @property
    def device(self) -> torch.device:
        """Where the language model computes."""
        return self.language_model.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the mask decoder."""
        return self.sam.dtype

    def prepare(self, image: Image.Image) -> SegmenterPixels:
        """Turns an image into the pixels of both encoders."""
        return prepare_pixels(image, self.language_model.image_processor, self.language_model.config, self.side)

    def embed_images(self, images: Sequence[np.ndarray]) -> Tensor:
        """Returns SAM's embeddings ``[B, C, g, g]`` of resized images."""
        device = self.sam.device
        size = _SAM_BATCH.get(device.type, 1)
        embeddings = []
        for start in range(0, len(images), size):
            pixels = torch.stack([sam_parts.normalize(image, self.side) for image in images[start : start + size]])
            embeddings.append(self.sam.vision_encoder(pixels.to(device, self.dtype))[0])
        return torch.cat(embeddings)

    def mask_prompts(self, states_nD: Tensor) -> Tensor:
        """Returns the mask decoder's prompts ``[n, C]`` of the states that predict ``[SEG]``."""
        prompts: Tensor = self.text_hidden_fcs[0](states_nD.to(self.dtype))
        return prompts

    def mask_logits(
        self, states_nD: Tensor, embedding_Cgg: Tensor, resized: tuple[int, int], original: tuple[int, int]
    ) -> Tensor:
        """Returns logits over an image, ``[n, H, W]`` float32, a mask for each state."""
        low_n1HW = sam_parts.decode_masks(self.sam, embedding_Cgg, self.mask_prompts(states_nD))
        return sam_parts.mask_over_image(low_n1HW, self.side, resized, original)


def prepare_pixels(image: Image.Image, processor: Any, config: LlavaConfig, side: int) -> SegmenterPixels:
    """Turns an image into the pixels of both encoders.

    Raises:
        DataError: It is too oblong for CLIP, which sees the central square alone.
    """
    image = to_rgb(image)
    clip = process_images([image], processor, config)[0]
    return SegmenterPixels(clip, sam_parts.resize_image(image, side), (image.height, image.width))


class SegmenterAnswering:
    """Asks a segmenter about images, in batches whose prompts differ.

    Args:
        segmenter: The segmenter.
        tokenizer: Its tokenizer, see ``prepare_tokenizer``.
        context_length: Longest sequence in tokens.
    """

    def __init__(self, segmenter: Segmenter, tokenizer: PreTrainedTokenizerBase, context_length: int) -> None:
        self.segmenter = segmenter
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.seg_id = int(tokenizer.convert_tokens_to_ids(SEG))

    @torch.no_grad()
    def segment(self, images: Sequence[SegmenterPixels], requests: Sequence[str]) -> list[Segmentation]:
        """Returns the masks of B images, each asked by its own request (``answer.mask_request``).

        Raises:
            OptionError: A request is longer than the model's context.
        """
        texts, ids, states = self._answer(images, requests)
        wanted = [row for row, own in enumerate(states) if len(own)]
        embeddings = self.segmenter.embed_images([images[row].sam for row in wanted]) if wanted else ()
        logits: dict[int, np.ndarray] = {}
        for row, embedding_Cgg in zip(wanted, embeddings, strict=True):
            image = images[row]
            resized = (image.sam.shape[0], image.sam.shape[1])
            masks_nHW = self.segmenter.mask_logits(states[row], embedding_Cgg, resized, image.shape)
            logits[row] = masks_nHW.amax(dim=0).cpu().numpy()
        return [Segmentation(text, ids[row], logits.get(row), len(states[row])) for row, text in enumerate(texts)]

    def _answer(
        self, images: Sequence[SegmenterPixels], requests: Sequence[str]
    ) -> tuple[list[str], list[list[int]], list[Tensor]]:
        """Decodes greedily; returns texts, new ids, and the states ``[n, D]`` that predict each ``[SEG]``."""
        model = self.segmenter.language_model
        prompts = [tokenizer_image_token(build_prompt(request), self.tokenizer) for request in requests]
        budget = min(MAX_NEW_TOKENS, *map(self._free_context, prompts))
        if budget < 1:
            raise OptionError(
                f"what the segmenter is asked takes more than its context of {self.context_length} tokens"
            )
        pixels = torch.stack([image.clip for image in images]).to(model.device, model.dtype)
        tokens_BPD = model.encode_images(pixels).tokens
        lengths = torch.tensor([len(ids) for ids in prompts])
        padded = pad_sequence([torch.tensor(ids) for ids in prompts], batch_first=True, padding_side="left")
        mask = torch.arange(padded.shape[1]) >= padded.shape[1] - lengths[:, None]
        batch = splice(
            padded.to(model.device),
            model.get_input_embeddings(),
            {IMAGE_TOKEN_INDEX: [[own] for own in tokens_BPD]},
            attention_mask=mask.to(model.device),
            padding_side="left",
        )
        decoded, _ = decode(
            model,
            batch.inputs_embeds,
            sampler=Sampler(0.0, None, [""] * len(prompts)),
            max_new_tokens=budget,
            kept_words=(),
            is_complete=lambda ids: ids[-1] == self.tokenizer.eos_token_id,
            attention_mask=batch.attention_mask,
            states_of=self.seg_id,
        )
        texts = [_spaced(self.tokenizer.decode(one.ids, skip_special_tokens=True)) for one in decoded]
        return texts, [one.ids for one in decoded], [one.states for one in decoded]

    def request(self, description: str | None, variant: int) -> tuple[str, bool]:
        """Returns what the segmenter is asked, its description cut at the end where the context has no room for all.

        Args:
            description: See ``answer.mask_request``.
            variant: As there.

        Returns:
            The request, and whether the description was cut.
        """
        kept, is_cut = description, False
        while True:
            request = mask_request(kept, variant)
            ids = tokenizer_image_token(build_prompt(request), self.tokenizer)
            over = MAX_NEW_TOKENS - self._free_context(ids)
            if over <= 0 or not kept:
                return request, is_cut
            own = self.tokenizer(kept, add_special_tokens=False).input_ids
            kept, is_cut = self.tokenizer.decode(own[: max(0, len(own) - over)]), True

    def _free_context(self, ids: Sequence[int]) -> int:
        """Tokens that the context has left after a prompt; below 1 if it is full."""
        return self.context_length - (len(ids) - 1 + self.segmenter.language_model.model.num_image_tokens())


def _spaced(text: str) -> str:
    """An answer with blanks about ``[SEG]`` as one writes them."""
    return " ".join(text.replace(SEG, f" {SEG} ").split()).replace(f"{SEG} .", f"{SEG}.").replace(f"{SEG} ,", f"{SEG},")


def share_vision_tower(segmenter: Segmenter, other: LlavaLlamaForCausalLM) -> None:
    """Lets the segmenter use another model's CLIP tower instead of its own equal one, so that memory holds it once."""
    segmenter.language_model.model.vision_tower = other.model.vision_tower
