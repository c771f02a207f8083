"""How the tagger and the segmenter are trained (arXiv 2410.02761, section 4.2); the explainer is trained as any LLaVA.

Suffixes: B rows, T ids, L positions of the expanded sequence, V words, n masks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, conv_templates
from llava.data.prompting import TokenizedConversation, fitting_length, label_answers
from llava.errors import DataError, OptionError
from llava.mm_utils import tokenizer_image_token
from llava.model.llava_arch import splice
from llava.model.objective import LM, LossTerm
from llava.systems.fakeshield.answer import DOMAINS, MASK_ANSWERS, OVERVIEW, SEG, mask_request
from llava.systems.fakeshield.checkpoint import (
    load_segmenter,
    new_segmenter,
    read_segmenter,
    segmenter_tensors,
    write_segmenter,
)
from llava.systems.fakeshield.segmenter import Segmenter, SegmenterPixels
from llava.systems.fakeshield.tagger import STAGES, Tagger, crop_image, normalize, open_tagger, save_tagger
from llava.tampered import CHANGED, TamperedImage, read_changed, read_descriptions

BCE, DICE = "bce", "dice"
WEIGHTS = {LM: 1.0, BCE: 2.0, DICE: 0.5}
DICE_SCALE, DICE_SMOOTH = 1000.0, 1e-6
LORA_TARGETS = ("q_proj", "v_proj")
PUBLISHED_PARTS = ("lora", "lm_head", "embed_tokens", "mask_decoder", "text_hidden_fcs")
"""Parts that are trained as published; ``all`` trains everything but CLIP, for a segmenter from scratch."""
TEMPLATE = "llava_v1"


# --- losses of masks


def mask_bce(logits_nHW: Tensor, targets_nHW: Tensor) -> Tensor:
    """Returns the mean binary cross-entropy over each mask's pixels, ``[n]``."""
    losses_nHW = F.binary_cross_entropy_with_logits(logits_nHW.float(), targets_nHW.float(), reduction="none")
    return losses_nHW.flatten(1).mean(dim=1)


def mask_dice(logits_nHW: Tensor, targets_nHW: Tensor) -> Tensor:
    """Returns the Dice loss of each mask, ``[n]``; sums are scaled down as published, so the smoothing counts."""
    chances_nP, targets_nP = logits_nHW.float().sigmoid().flatten(1), targets_nHW.float().flatten(1)
    shared_n = 2 * (chances_nP / DICE_SCALE * targets_nP).sum(dim=1)
    both_n = (chances_nP / DICE_SCALE).sum(dim=1) + (targets_nP / DICE_SCALE).sum(dim=1)
    return 1 - (shared_n + DICE_SMOOTH) / (both_n + DICE_SMOOTH)


# --- samples


def training_conversation(description: str | None, random: Random) -> Conversation:
    """Returns a training conversation of the segmenter, in one of the published wordings."""
    conversation = conv_templates[TEMPLATE].copy()
    request = mask_request(description, random.randrange(6))
    conversation.append_message(conversation.roles[0], f"{OVERVIEW}{request}")
    conversation.append_message(conversation.roles[1], random.choice(MASK_ANSWERS))
    return conversation


def tokenize(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> TokenizedConversation:
    """Returns a conversation's ids and labels: the answer with its end mark is supervised, nothing else."""
    return label_answers(conversation, lambda prompt: tokenizer_image_token(prompt, tokenizer))


def collate(samples: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """Joins samples; ids are padded on the right.

    Returns:
        ``input_ids``, ``labels``, ``attention_mask`` ``[B, T]``, ``clip`` ``[B, 3, S, S]``; ``sam``, B resized images
        ``[h, w, 3]``, and ``masks``, B times ``[n, H, W]`` bool.
    """
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    ids, labels = ([torch.tensor(sample[name]) for sample in samples] for name in ("input_ids", "labels"))
    input_ids = pad_sequence(ids, batch_first=True, padding_value=pad_token_id)
    return {
        "input_ids": input_ids,
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        "attention_mask": torch.arange(input_ids.shape[1]) < lengths[:, None],
        "clip": torch.stack([sample["clip"] for sample in samples]),
        "sam": [sample["sam"] for sample in samples],
        "masks": [sample["masks"] for sample in samples],
    }


class SegmenterInTraining(nn.Module):
    """A segmenter whose forward gives its losses.

    Args:
        segmenter: The segmenter.
        seg_id: Id of ``[SEG]``.
        encodes_frozen: Whether SAM's encoder is frozen, so that it runs without gradients.
    """

    def __init__(self, segmenter: Segmenter, seg_id: int, *, encodes_frozen: bool = True) -> None:
        super().__init__()
        self.segmenter = segmenter
        self.seg_id = seg_id
        self.encodes_frozen = encodes_frozen

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor,
        clip: Tensor,
        sam: Sequence[Tensor],
        masks: Sequence[Tensor],
    ) -> dict[str, LossTerm]:
        """Returns the losses of a batch as ``collate`` gives it: of words, of masks' pixels and of their overlap.

        Raises:
            DataError: A row has not one ``[SEG]`` for each of its masks.
        """
        model = self.segmenter.language_model
        # CLIP is frozen; the projector behind it may be trained.
        tokens_BPD = model.encode_images(clip.to(model.dtype)).tokens
        batch = splice(
            input_ids,
            model.get_input_embeddings(),
            {IMAGE_TOKEN_INDEX: [[own] for own in tokens_BPD]},
            attention_mask=attention_mask,
            labels=labels,
        )
        states_BLD = model.model(
            inputs_embeds=batch.inputs_embeds,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state
        assert batch.labels is not None
        # Position t predicts label t + 1.
        next_BL = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        supervised_BL = next_BL != IGNORE_INDEX
        logits_NV = model.lm_head(states_BLD[supervised_BL]).float()
        words = F.cross_entropy(logits_NV, next_BL[supervised_BL], reduction="sum")
        terms = {LM: LossTerm(words, supervised_BL.sum(), WEIGHTS[LM], {})}
        return {**terms, **self._mask_terms(states_BLD, next_BL == self.seg_id, sam, masks)}

    def _mask_terms(
        self, states_BLD: Tensor, predicts_BL: Tensor, sam: Sequence[Tensor], masks: Sequence[Tensor]
    ) -> dict[str, LossTerm]:
        counts = predicts_BL.sum(dim=1).tolist()
        if counts != [len(own) for own in masks]:
            raise DataError(f"the rows have {counts} times {SEG}, but {[len(own) for own in masks]} masks")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.encodes_frozen):
            embeddings = self.segmenter.embed_images([image.cpu().numpy() for image in sam])
        bce, dice = [], []
        for row, embedding_Cgg in enumerate(embeddings):
            height, width = masks[row].shape[1:]
            resized = (sam[row].shape[0], sam[row].shape[1])
            states_nD = states_BLD[row][predicts_BL[row]]
            logits_nHW = self.segmenter.mask_logits(states_nD, embedding_Cgg, resized, (height, width))
            bce.append(mask_bce(logits_nHW, masks[row]))
            dice.append(mask_dice(logits_nHW, masks[row]))
        found = {BCE: torch.cat(bce), DICE: torch.cat(dice)}
        number = torch.tensor(len(found[BCE]), device=states_BLD.device)
        return {name: LossTerm(values.sum(), number, WEIGHTS[name], {}) for name, values in found.items()}


# --- what is trained


def add_lora(segmenter: Segmenter, *, rank: int = 8, alpha: float = 16, dropout: float = 0.05) -> None:
    """Puts LoRA on queries and values of the language model's blocks, in place."""
    targets = [
        name
        for name, _ in segmenter.language_model.named_modules()
        if name.startswith("model.layers.") and name.endswith(LORA_TARGETS)
    ]
    settings = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias="none")
    inject_adapter_in_model(settings, segmenter.language_model)


def part_of(name: str) -> str:
    """Returns the part of a segmenter's parameter: one of ``PUBLISHED_PARTS``, ``vision_tower``, or ``other``."""
    if ".lora_" in name:
        return "lora"
    for part in ("lm_head", "embed_tokens", "mask_decoder", "text_hidden_fcs", "vision_tower"):
        if f".{part}." in f".{name}":
            return part
    return "other"


def choose_trained(segmenter: Segmenter, trained: Sequence[str]) -> None:
    """Trains these parts, or ``all`` but CLIP, and nothing else."""
    for name, parameter in segmenter.named_parameters():
        part = part_of(name)
        parameter.requires_grad_(part != "vision_tower" if "all" in trained else part in trained)


def merged_tensors(segmenter: Segmenter) -> dict[str, Tensor]:
    """Returns a segmenter's tensors by their published names, CLIP included, each LoRA update added to its weight."""
    published = segmenter_tensors(segmenter, with_tower=True)
    merged = {name.replace(".base_layer.", "."): tensor for name, tensor in published.items() if ".lora_" not in name}
    for name, module in segmenter.language_model.named_modules():
        if isinstance(module, LoraLayer):
            weight = merged[f"{name}.weight"]
            update: Any = module.get_delta_weight("default")
            merged[f"{name}.weight"] = (weight.float() + update.float()).to(weight.dtype)
    return merged


_SETTINGS = {
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "trained": list(PUBLISHED_PARTS),
    "mask_above": CHANGED - 1,
    "described_by": "output",
    "descriptions": None,
    "max_length": None,
    "vision_tower": None,
}
"""Settings of a segmenter's training, with the published values; ``mask_above``: see ``llava.tampered.read_changed``;
``descriptions``: a file of answers of the explainer."""


class SegmenterTraining:
    """The segmenter as ``llava.train`` trains it: from images, their masks and descriptions to its losses.

    Args:
        segmenter: The segmenter.
        tokenizer: Its tokenizer.
        settings: See ``_SETTINGS``.
        max_length: Longest sequence in tokens, image included.
    """

    def __init__(
        self, segmenter: Segmenter, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any], max_length: int
    ) -> None:
        self.settings = {**_SETTINGS, **settings}
        self.segmenter = segmenter
        self.tokenizer = tokenizer
        self.max_length = self.settings["max_length"] or max_length
        trained = self.settings["trained"]
        trained = [trained] if isinstance(trained, str) else trained
        if "lora" in trained:
            names = ("lora_r", "lora_alpha", "lora_dropout")
            rank, alpha, dropout = (self.settings[name] for name in names)
            add_lora(segmenter, rank=rank, alpha=alpha, dropout=dropout)
        choose_trained(segmenter, trained)
        seg_id = int(tokenizer.convert_tokens_to_ids(SEG))
        frozen = not any(parameter.requires_grad for parameter in segmenter.sam.vision_encoder.parameters())
        self.network = SegmenterInTraining(segmenter, seg_id, encodes_frozen=frozen)

    @property
    def described_by(self) -> str:
        """Whose descriptions are taken, see ``llava.tampered.read_tampered``."""
        return str(self.settings["described_by"])

    def described(self, images: Sequence[TamperedImage]) -> list[TamperedImage]:
        """Returns the images with the answers that the setting ``descriptions`` names, a file of ``forgery detect``.

        Raises:
            DataError: It cannot be read, or says nothing of these images.
        """
        file = self.settings["descriptions"]
        if file is None:
            return list(images)
        texts = read_descriptions(Path(file))
        found = [
            replace(image, description=texts.get(str(image.image.resolve()), texts.get(image.name))) for image in images
        ]
        if all(image.description is None for image in found):
            raise DataError(f"{file} describes none of the {len(images)} images")
        return found

    @classmethod
    def open(cls, path: str | None, config: Mapping[str, Any]) -> "SegmenterTraining":
        """Opens a segmenter's folder, or makes a new one.

        Args:
            path: The folder; None for a new segmenter.
            config: Settings; a new segmenter's also say what it is built from, see ``checkpoint.new_segmenter``.

        Raises:
            CheckpointError: It cannot be opened.
            OptionError: A setting is unknown, or describes no segmenter.
        """
        settings = {name: value for name, value in config.items() if name in _SETTINGS}
        rest = {name: value for name, value in config.items() if name not in _SETTINGS}
        if path is None:
            tokenizer, segmenter = new_segmenter(rest)
            return cls(segmenter, tokenizer, settings, segmenter.language_model.config.tokenizer_model_max_length or 0)
        if rest:
            raise OptionError(f"a segmenter that exists has no settings {', '.join(sorted(rest))}")
        files = read_segmenter(Path(path), vision_tower=settings.get("vision_tower"))
        tokenizer, segmenter = load_segmenter(files, device="cpu", dtype="float32")
        return cls(segmenter, tokenizer, settings, files.context_length)

    def sample(self, image: TamperedImage, pixels: Image.Image, random: Random) -> dict[str, Any]:
        """Returns a sample of an image and its mask, in wordings drawn at random.

        Raises:
            DataError: The mask is of another size, or truncation would leave no ``[SEG]``.
        """
        changed_HW = read_changed(image.masks, above=self.settings["mask_above"])
        if changed_HW.shape != (pixels.height, pixels.width):
            size = f"{changed_HW.shape[1]}x{changed_HW.shape[0]}"
            raise DataError(f"{image.image} is {pixels.width}x{pixels.height}, but its mask {image.masks[0]} is {size}")
        prepared: SegmenterPixels = self.segmenter.prepare(pixels)
        own = tokenize(training_conversation(image.description, random), self.tokenizer)
        kept = self.kept_length(own.input_ids)
        if self.network.seg_id not in own.labels[:kept]:
            raise DataError(
                f"{image.image}: its description is so long that {SEG} lies beyond {self.max_length} tokens; shorten "
                "it, or raise max_length"
            )
        return {
            "input_ids": own.input_ids[:kept],
            "labels": own.labels[:kept],
            "clip": prepared.clip,
            "sam": torch.from_numpy(np.array(prepared.sam)),
            "masks": torch.from_numpy(changed_HW)[None],
        }

    def kept_length(self, ids: Sequence[int]) -> int:
        """Returns how many ids stay when a row is cut."""
        image_tokens = {IMAGE_TOKEN_INDEX: self.segmenter.language_model.model.num_image_tokens()}
        return fitting_length(list(ids), image_tokens, self.max_length)

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Joins samples to a batch of ``network``."""
        pad = self.tokenizer.pad_token_id
        return collate(samples, 0 if pad is None else int(pad))

    def save(self, folder: Path) -> None:
        """Writes the merged segmenter into an empty folder that ``open`` and the system open."""
        write_segmenter(self.segmenter, self.tokenizer, folder, tensors=merged_tensors(self.segmenter))

    def stored(self) -> dict[str, Tensor]:
        """Returns what ``save`` writes, by name."""
        return merged_tensors(self.segmenter)


class TaggerTraining:
    """The tagger as ``llava.train.networks`` trains it: cross-entropy over the domains, all parameters.

    Args:
        tagger: The tagger.
    """

    classes: tuple[str, ...] = DOMAINS

    def __init__(self, tagger: Tagger) -> None:
        self.network = tagger

    @classmethod
    def open(cls, path: str | None, config: Mapping[str, Any]) -> "TaggerTraining":
        """Opens ``DTG.pth`` or a folder with it, or makes a new tagger.

        Args:
            path: The file or folder; None for a new tagger.
            config: ``depths``, the blocks of each stage, for a new one.

        Raises:
            CheckpointError: It is no tagger.
            OptionError: A setting is unknown.
        """
        unknown = set(config) - {"depths"}
        if unknown or (path is not None and config):
            raise OptionError(f"a tagger has no setting {', '.join(sorted(unknown or config))}")
        if path is None:
            return cls(Tagger(config.get("depths", STAGES)))
        file = Path(path)
        return cls(open_tagger(file / "DTG.pth" if file.is_dir() else file))

    def prepare(self, image: Image.Image, random: Random | None) -> Tensor:
        """Returns pixels ``[3, 224, 224]``; in training, mirrored at random."""
        crop = crop_image(image)
        if random is not None and random.random() < 0.5:
            crop = crop[:, ::-1]
        return normalize([crop])[0]

    def optimizer(self, learning_rate: float, weight_decay: float) -> None:
        """Leaves the optimizer to the options: nothing is published but the loss."""

    def save(self, folder: Path) -> None:
        """Writes ``DTG.pth``."""
        save_tagger(self.network, folder / "DTG.pth")
