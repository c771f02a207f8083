"""LLaVA on a Llama language model: forward with both losses, generation, saving."""

import os
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.checkpoint_layout import stored_state_dict
from llava.model.configuration import LlavaConfig
from llava.model.llava_arch import LlavaMetaModel, SplicedBatch, TowerOutputs, features_by_row, splice
from llava.model.multimodal_encoder.base import VisionTower
from llava.model.multimodal_fusion.base import FusionOutput
from llava.model.probability_mapper import MapperOutput, ProbabilityMapper, VerdictTokens


@dataclass
class LlavaOutput(CausalLMOutputWithPast):
    """Output of a forward.

    Attributes:
        lm_loss: Mean cross-entropy over supervised tokens, ``[]``; None without labels.
        mapper_loss: Loss of the probability mapper, ``[]``; None without forgery labels.
        mapper_rows: Number of rows where the verdict was found, ``[]``; None without forgery labels.
        mapper_correct: Number of those rows where the likelier class is the right one, ``[]``.
        labels: Labels of the expanded sequence ``[B, L]``; None without labels.
    """

    lm_loss: Tensor | None = None
    mapper_loss: Tensor | None = None
    mapper_rows: Tensor | None = None
    mapper_correct: Tensor | None = None
    labels: Tensor | None = None


class LlavaLlamaModel(LlavaMetaModel, LlamaModel):
    """Llama with towers, projectors and fusion."""

    config_class = LlavaConfig
    config: LlavaConfig

    def __init__(self, config: LlavaConfig) -> None:
        LlamaModel.__init__(self, config)
        self.initialize_vision_modules()


class LlavaLlamaForCausalLM(LlamaForCausalLM):
    """Llama that takes images in its prompt and gives logits, losses and P(fake)."""

    config_class = LlavaConfig
    config: LlavaConfig
    _no_split_modules: ClassVar[list[str]] = [
        "LlamaDecoderLayer",
        "CLIPVisionTower",
        "DinoVisionTower",
        "TimmVisionTower",
        "ForgeryAwareFusion",
        "CrossAttentionFusion",
        "Sequential",
    ]

    def __init__(self, config: LlavaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LlavaLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.post_init()
        self.model.freeze_towers()

    def get_model(self) -> LlavaLlamaModel:
        """Returns the model without its head."""
        return self.model

    def get_vision_tower(self) -> VisionTower | None:
        """Returns the first tower."""
        return self.model.get_vision_tower()

    @property
    def image_processor(self) -> CLIPImageProcessorPil | None:
        """The processor that makes the shared pixels; the PIL one, so that numbers are equal on every machine."""
        settings = self.config.mm_image_processor
        return None if settings is None else CLIPImageProcessorPil(**settings)

    @property
    def probability_mapper(self) -> ProbabilityMapper:
        """The mapper that the config describes.

        Raises:
            ValueError: The config does not say how the verdict is spelled.
        """
        if self.config.cpm_tokens is None:
            raise ValueError(
                "the model does not know how its tokenizer spells the verdict; call model.set_tokenizer(tokenizer, …)"
            )
        tokens = VerdictTokens.from_dict(self.config.cpm_tokens)
        return ProbabilityMapper(tokens, self.config.cpm_temperature, self.config.cpm_search)

    def set_tokenizer(self, tokenizer: PreTrainedTokenizerBase, verdict: VerdictTokens) -> None:
        """Tells the model its tokenizer, which is saved with it, and how that spells the verdict."""
        self.tokenizer = tokenizer
        self.config.cpm_tokens = verdict.to_dict()

    def encode_images(self, images: Tensor, *, return_attention: bool = False) -> FusionOutput:
        """Turns shared pixels ``[B, 3, S, S]`` into image tokens, see ``LlavaMetaModel.encode_images``."""
        return self.model.encode_images(images, return_attention=return_attention)

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: Tensor,
        images: Tensor | None,
        *,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        padding_side: str | None = None,
        tower_outputs: TowerOutputs | None = None,
    ) -> SplicedBatch:
        """Puts the images' tokens into the prompts.

        Args:
            input_ids: ``[B, T]`` with ``IMAGE_TOKEN_INDEX`` where an image stands.
            images: Shared pixels ``[N, 3, S, S]``: one for each placeholder in order, or one for each row.
            attention_mask: ``[B, T]``; default: all valid.
            labels: ``[B, T]``, or None.
            padding_side: Default: the config's.
            tower_outputs: What the towers said to the images, in the place of ``images``.

        Raises:
            ValueError: Images have another shape, or their number does not fit the placeholders.
        """
        if tower_outputs is None:
            if images is None or images.ndim != 4:
                shape = None if images is None else list(images.shape)
                raise ValueError(f"images must have shape [N, 3, S, S], not {shape}")
            tower_outputs = self.model.run_towers(images.to(self.device))
        tokens = self.model.fuse(tower_outputs).tokens
        shares = features_by_row(input_ids, IMAGE_TOKEN_INDEX, list(tokens))
        return splice(
            input_ids,
            self.get_input_embeddings(),
            {IMAGE_TOKEN_INDEX: shares},
            attention_mask=attention_mask,
            labels=labels,
            max_length=self.config.tokenizer_model_max_length,
            padding_side=padding_side or self.config.tokenizer_padding_side,
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        images: Tensor | None = None,
        forgery_labels: Tensor | None = None,
        tower_outputs: TowerOutputs | None = None,
        loss_only: bool = False,
        **kwargs: Any,
    ) -> LlavaOutput:
        """Runs the model on prompts with images, and computes the losses if there is something to compare with.

        Args:
            input_ids: ``[B, T]``, with ``IMAGE_TOKEN_INDEX`` where an image stands.
            attention_mask: ``[B, T]``.
            position_ids: ``[B, T]``; computed where images are spliced in.
            past_key_values: Cache of earlier positions.
            inputs_embeds: ``[B, T, D]`` in the place of ``input_ids``.
            labels: ``[B, T]``, -100 where nothing is to be predicted.
            use_cache: Whether to return a cache.
            logits_to_keep: Compute logits only for the last so many positions, or for these; 0 means all.
            images: Shared pixels ``[N, 3, S, S]``.
            forgery_labels: ``[B]``, real = 0, fake = 1, -100 for none.
            tower_outputs: What the towers said to the images, in the place of ``images``.
            loss_only: Compute the vocabulary's logits only where the losses need them, and return none.
            **kwargs: Passed on to Llama; ``num_items_in_batch`` is the number of supervised tokens to average over.

        Returns:
            ``loss`` = ``lm_loss`` + ``cpm_weight`` × ``mapper_loss``, and the logits of the expanded sequence.

        Raises:
            ValueError: Placeholders and images do not fit, or losses are asked for on a part of the logits.
        """
        if input_ids is not None and (images is not None or tower_outputs is not None):
            batch = self.prepare_inputs_labels_for_multimodal(
                input_ids, images, attention_mask=attention_mask, labels=labels, tower_outputs=tower_outputs
            )
            input_ids, inputs_embeds, labels = None, batch.inputs_embeds, batch.labels
            attention_mask, position_ids = batch.attention_mask, batch.position_ids
        elif input_ids is not None and past_key_values is None and bool((input_ids == IMAGE_TOKEN_INDEX).any()):
            raise ValueError("the prompt has a place for an image, but no images were given")
        wants_loss = labels is not None or forgery_labels is not None
        if wants_loss and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("losses need the logits of all positions, so logits_to_keep must stay 0")
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            **kwargs,
            "return_dict": True,
        }
        if loss_only:
            if labels is None:
                raise ValueError("loss_only needs labels")
            return self._losses_alone(
                self.model(**inputs).last_hidden_state, labels, forgery_labels, num_items_in_batch
            )
        output = super().forward(logits_to_keep=logits_to_keep, **inputs)
        lm_loss, mapped = None, None
        if labels is not None:
            lm_loss = self.loss_function(
                logits=output.logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        if forgery_labels is not None:
            mapped = self.probability_mapper.loss(output.logits, forgery_labels, labels)
        return self._with_losses(
            lm_loss,
            mapped,
            labels,
            logits=output.logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def _losses_alone(
        self, hidden_BTD: Tensor, labels_BT: Tensor, forgery_labels_B: Tensor | None, num_items_in_batch: Any
    ) -> LlavaOutput:
        """Both losses from logits at supervised positions and at the verdict alone."""
        predicting_BT = torch.nn.functional.pad(labels_BT[:, 1:] != IGNORE_INDEX, (0, 1))
        targets_N = labels_BT[:, 1:][predicting_BT[:, :-1]]
        logits_NV = self.lm_head(hidden_BTD[predicting_BT]).float()
        count = max(1, len(targets_N)) if num_items_in_batch is None else num_items_in_batch
        lm_loss = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum") / count
        mapped = None
        if forgery_labels_B is not None:
            mapper = self.probability_mapper
            if mapper.search == "labels":
                positions_B = mapper.positions_in_labels(labels_BT, forgery_labels_B)
            else:
                positions_B = mapper.positions(self._likeliest(hidden_BTD), labels_BT.shape[1], forgery_labels_B)
            rows_B = torch.arange(len(positions_B), device=hidden_BTD.device)
            at_verdict_BV = self.lm_head(hidden_BTD[rows_B, positions_B.clamp(min=0)])
            mapped = mapper.loss_at(at_verdict_BV, positions_B, forgery_labels_B)
        return self._with_losses(lm_loss, mapped, labels_BT)

    @torch.no_grad()
    def _likeliest(self, hidden_BTD: Tensor) -> Tensor:
        """The id that each position predicts, ``[B, T]``; the logits of one row at a time are held."""
        return torch.stack([self.lm_head(row_TD).argmax(dim=-1) for row_TD in hidden_BTD])

    def _with_losses(
        self, lm_loss: Tensor | None, mapped: MapperOutput | None, labels: Tensor | None, **rest: Any
    ) -> LlavaOutput:
        losses = [lm_loss] if lm_loss is not None else []
        losses += [self.config.cpm_weight * mapped.loss] if mapped is not None else []
        return LlavaOutput(
            loss=cast(Any, sum(losses) if losses else None),
            lm_loss=lm_loss,
            mapper_loss=None if mapped is None else mapped.loss,
            mapper_rows=None if mapped is None else mapped.rows,
            mapper_correct=None if mapped is None else mapped.correct,
            labels=labels,
            **rest,
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        images: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continues prompts that may hold images.

        Args:
            input_ids: ``[B, T]`` with ``IMAGE_TOKEN_INDEX`` where an image stands.
            images: Shared pixels ``[N, 3, S, S]``.
            attention_mask: ``[B, T]``; default: all valid.
            **kwargs: As for transformers' ``generate``.

        Returns:
            New ids only, ``[B, new]``, or what ``return_dict_in_generate`` gives.
        """
        if images is None or input_ids is None:
            if input_ids is None:
                return super().generate(attention_mask=attention_mask, **kwargs)
            embeds = self.get_input_embeddings()(input_ids)
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            return super().generate(inputs_embeds=embeds, attention_mask=mask, **kwargs)
        batch = self.prepare_inputs_labels_for_multimodal(
            input_ids, images, attention_mask=attention_mask, padding_side="left"
        )
        return super().generate(inputs_embeds=batch.inputs_embeds, attention_mask=batch.attention_mask.long(), **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Saves everything that ``load_pretrained_model`` needs: weights, towers, config, tokenizer, pixels.

        Args:
            save_directory: Folder to write.
            state_dict: Tensors by their names in memory, where the model's own are not to be taken.
            **kwargs: As for transformers' ``save_pretrained``.
        """
        stored = stored_state_dict(self, state_dict)
        super().save_pretrained(save_directory, state_dict=stored, **{"save_original_format": False, **kwargs})
        if not kwargs.get("is_main_process", True):
            return
        if self.image_processor is not None:
            self.image_processor.save_pretrained(save_directory)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(save_directory)


AutoConfig.register(LlavaConfig.model_type, LlavaConfig)
AutoModelForCausalLM.register(LlavaConfig, LlavaLlamaForCausalLM)
