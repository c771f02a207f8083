"""LLaVA on a Llama language model: forward with losses, generation, saving."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
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

from llava.cli import without_bars
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import CheckpointError, DataError
from llava.model.checkpoint_layout import stored_state_dict
from llava.model.configuration import LlavaConfig
from llava.model.language_contrast import WORDS, contrast_terms, language_contrast
from llava.model.llava_arch import LlavaMetaModel, SplicedBatch, TowerOutputs, features_by_row, splice
from llava.model.multimodal_encoder.base import VisionTower
from llava.model.multimodal_fusion.base import FusionOutput
from llava.model.objective import LM, LossTerm, ObjectiveStep
from llava.model.static_steps import StepRunner
from llava.model.token_sources import VisionContext
from llava.model.verdict import VerdictTokens
from llava.model.vocabulary_loss import vocabulary_loss
from llava.systems import registry
from llava.systems.base import TrainingObjective


@dataclass
class LlavaOutput(CausalLMOutputWithPast):
    """Output of a forward.

    Attributes:
        lm_loss: Mean cross-entropy over supervised tokens, ``[]``; None without labels.
        terms: Every loss with what it is averaged over, by its name; None without labels.
        labels: Labels of the expanded sequence ``[B, L]``; None without labels.
    """

    lm_loss: Tensor | None = None
    terms: dict[str, LossTerm] | None = None
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
        self.step_runner, self.prompt_lookup = StepRunner(), 0
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
    def objective(self) -> TrainingObjective | None:
        """What the model's system is trained for beside its words; None for a system without a loss of its own.

        Raises:
            CheckpointError: The config lacks what the objective needs.
        """
        kind = registry.component(self.config.system, "objective") if self.config.system else None
        return None if kind is None else kind(self.config)

    @property
    def verdict_tokens(self) -> VerdictTokens:
        """How the tokenizer spells the verdict.

        Raises:
            CheckpointError: The config does not say it.
        """
        if self.config.cpm_tokens is None:
            raise CheckpointError(
                "the model does not know how its tokenizer spells the verdict; call model.set_tokenizer(tokenizer, …)"
            )
        return VerdictTokens.from_dict(self.config.cpm_tokens)

    def set_tokenizer(self, tokenizer: PreTrainedTokenizerBase, verdict: VerdictTokens | None = None) -> None:
        """Tells the model its tokenizer, which is saved with it, and how that spells the verdict.

        Args:
            tokenizer: The tokenizer.
            verdict: The verdict's spelling; default: as the system's answers give it, none for a plain LLaVA.

        Raises:
            CheckpointError: The tokenizer spells real and fake alike.
        """
        self.tokenizer = tokenizer
        if verdict is None and self.config.system:
            answers = registry.answer_format(self.config.system)
            if answers is not None:
                verdict = VerdictTokens.from_tokenizer(tokenizer, answers.verdict_prefix, answers.verdict_words)
        self.config.cpm_tokens = None if verdict is None else verdict.to_dict()

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
        extras: Mapping[str, Tensor] | None = None,
    ) -> SplicedBatch:
        """Puts the images' tokens, and those of token sources, into the prompts.

        Args:
            input_ids: ``[B, T]`` with ``IMAGE_TOKEN_INDEX`` where an image stands, and sources' ids.
            images: Shared pixels ``[N, 3, S, S]``: one for each placeholder in order, or one for each row.
            attention_mask: ``[B, T]``; default: all valid.
            labels: ``[B, T]``, or None.
            padding_side: Default: the config's.
            tower_outputs: What the towers give for the images, instead of ``images``.
            extras: A system's further inputs.

        Raises:
            DataError: Images have another shape, or their number does not fit the placeholders.
        """
        if tower_outputs is None:
            if images is None or images.ndim != 4:
                shape = None if images is None else list(images.shape)
                raise DataError(f"images must have shape [N, 3, S, S], not {shape}")
            tower_outputs = self.model.run_towers(images.to(self.device))
        embeddings = self.model.placeholder_embeddings(VisionContext(images, tower_outputs, extras or {}))
        spliced = splice(
            input_ids,
            self.get_input_embeddings(),
            {index: features_by_row(input_ids, index, list(tokens)) for index, tokens in embeddings.items()},
            attention_mask=attention_mask,
            labels=labels,
            max_length=self.config.tokenizer_model_max_length,
            padding_side=padding_side or self.config.tokenizer_padding_side,
        )
        return replace(spliced, image_tokens=embeddings[IMAGE_TOKEN_INDEX])

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
        extras: Mapping[str, Tensor] | None = None,
        loss_only: bool = False,
        **kwargs: Any,
    ) -> LlavaOutput:
        """Runs the model on prompts with images, and computes the losses if there is something to compare with.

        Args:
            input_ids: ``[B, T]``, with ``IMAGE_TOKEN_INDEX`` where an image stands.
            attention_mask: ``[B, T]``.
            position_ids: ``[B, T]``; computed where images are spliced in.
            past_key_values: Cache of earlier positions.
            inputs_embeds: ``[B, T, D]`` instead of ``input_ids``.
            labels: ``[B, T]``, -100 where nothing is to be predicted.
            use_cache: Whether to return a cache.
            logits_to_keep: Compute logits only for the last so many positions, or for these; 0 means all.
            images: Shared pixels ``[N, 3, S, S]``.
            forgery_labels: ``[B]``, real = 0, fake = 1, -100 for none.
            tower_outputs: What the towers give for the images, instead of ``images``.
            extras: A system's further inputs, for its token sources and its objective.
            loss_only: Compute the vocabulary's logits only where the losses need them, and return none.
            **kwargs: Passed on to Llama; ``num_items_in_batch`` is the number of supervised tokens to average over.

        Returns:
            ``loss``, the weighted sum of the terms' means, and the logits of the expanded sequence.

        Raises:
            DataError: Placeholders and images do not fit.
            ValueError: Losses are asked for on a part of the logits.
        """
        own = dict(extras or {}) | ({} if forgery_labels is None else {"forgery_labels": forgery_labels})
        further: dict[str, LossTerm] = {}
        if input_ids is not None and (images is not None or tower_outputs is not None):
            batch = self.prepare_inputs_labels_for_multimodal(
                input_ids,
                images,
                attention_mask=attention_mask,
                labels=labels,
                tower_outputs=tower_outputs,
                extras=extras,
            )
            input_ids, inputs_embeds, labels = None, batch.inputs_embeds, batch.labels
            attention_mask, position_ids = batch.attention_mask, batch.position_ids
            further = self._contrast(batch, own)
        elif input_ids is not None and past_key_values is None and bool((input_ids < 0).any()):
            raise DataError("the prompt has a place for an image, but no images were given")
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
        }
        count = kwargs.pop("num_items_in_batch", None)
        inputs |= {**kwargs, "return_dict": True}
        if labels is None and forgery_labels is None:
            output = super().forward(logits_to_keep=logits_to_keep, **inputs)
            return LlavaOutput(**output)
        if not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("losses need the logits of all positions, so logits_to_keep must stay 0")
        if loss_only:
            return self._sparse_losses(self.model(**inputs).last_hidden_state, labels, own, count, further)
        return self._dense_losses(super().forward(**inputs), labels, own, count, further)

    def _contrast(self, batch: SplicedBatch, own: Mapping[str, Tensor]) -> dict[str, LossTerm]:
        """The losses of contrast, in training, where the config asks for them and the batch brings its texts."""
        if not (self.training and self.config.contrast and WORDS in own):
            return {}
        assert batch.image_tokens is not None
        settings = language_contrast(self.config.contrast)
        return contrast_terms(settings, batch.image_tokens, self.get_input_embeddings(), own)

    def _dense_losses(
        self,
        output: CausalLMOutputWithPast,
        labels_BT: Tensor | None,
        own: Mapping[str, Tensor],
        count: Any,
        further: Mapping[str, LossTerm],
    ) -> LlavaOutput:
        """Losses from the logits of all positions, which are returned as well."""
        logits_BTV = output.logits
        assert logits_BTV is not None
        terms = dict(further)
        if labels_BT is not None:
            lm_loss = self.loss_function(
                logits=logits_BTV, labels=labels_BT, vocab_size=self.config.vocab_size, num_items_in_batch=count
            )
            tokens = (labels_BT[:, 1:] != IGNORE_INDEX).sum() if count is None else torch.as_tensor(count)
            terms[LM] = LossTerm(lm_loss * tokens, tokens, 1.0, {})
        step = ObjectiveStep(
            labels_BT,
            logits_BTV.shape[1],
            own,
            logits_at=lambda rows_N, positions_N: logits_BTV[rows_N, positions_N],
            likeliest=lambda: logits_BTV.argmax(dim=-1),
        )
        return self._with_losses(terms, step, **output)

    def _sparse_losses(
        self,
        hidden_BTD: Tensor,
        labels_BT: Tensor | None,
        own: Mapping[str, Tensor],
        count: Any,
        further: Mapping[str, LossTerm],
    ) -> LlavaOutput:
        """The same losses from logits at supervised positions, and where the objective asks for them, alone."""
        if labels_BT is None:
            raise ValueError("loss_only needs labels")
        # Position t predicts label t + 1, so the last position predicts nothing.
        predicting_BT = torch.nn.functional.pad(labels_BT[:, 1:] != IGNORE_INDEX, (0, 1))
        targets_N = labels_BT[:, 1:][predicting_BT[:, :-1]]
        total = vocabulary_loss(self.lm_head, hidden_BTD[predicting_BT], targets_N)
        tokens = torch.as_tensor(len(targets_N) if count is None else count, device=total.device)
        step = ObjectiveStep(
            labels_BT,
            labels_BT.shape[1],
            own,
            logits_at=lambda rows_N, positions_N: self.lm_head(hidden_BTD[rows_N, positions_N]),
            likeliest=lambda: self._likeliest(hidden_BTD),
        )
        return self._with_losses({LM: LossTerm(total, tokens, 1.0, {}), **further}, step)

    @torch.no_grad()
    def _likeliest(self, hidden_BTD: Tensor) -> Tensor:
        """The id that each position predicts, ``[B, T]``; the logits of one row at a time are held."""
        return torch.stack([self.lm_head(row_TD).argmax(dim=-1) for row_TD in hidden_BTD])

    def _with_losses(self, terms: dict[str, LossTerm], step: ObjectiveStep, **rest: Any) -> LlavaOutput:
        objective = self.objective if step.inputs else None
        if objective is not None:
            terms = {**terms, **objective.terms(step)}
        loss = sum(term.weight * term.mean for term in terms.values()) if terms else None
        lm_loss = terms[LM].mean if LM in terms else None
        return LlavaOutput(
            **{**rest, "loss": cast(Any, loss), "lm_loss": lm_loss, "terms": terms, "labels": step.labels}
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        images: Tensor | None = None,
        attention_mask: Tensor | None = None,
        extras: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continues prompts that may hold images.

        Args:
            input_ids: ``[B, T]`` with ``IMAGE_TOKEN_INDEX`` where an image stands.
            images: Shared pixels ``[N, 3, S, S]``.
            attention_mask: ``[B, T]``; default: all valid.
            extras: A system's further inputs.
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
            input_ids, images, attention_mask=attention_mask, padding_side="left", extras=extras
        )
        return super().generate(inputs_embeds=batch.inputs_embeds, attention_mask=batch.attention_mask.long(), **kwargs)

    @without_bars()
    def save_pretrained(
        self, save_directory: str | os.PathLike[str], state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Saves everything that ``load_pretrained_model`` needs: weights, towers, config, tokenizer, pixels.

        Args:
            save_directory: Folder to write.
            state_dict: Tensors by their names in memory, instead of the model's own.
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
