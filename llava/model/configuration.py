"""The model's config."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from llava.errors import CheckpointError
from llava.native_crops import NativeCrops

CPM_SEARCHES = ("labels", "predictions")
"""Where a probability mapper may look for the verdict in training."""


@strict
class LlavaConfig(LlamaConfig):
    """Everything that changes what the model answers.

    The ``mm_*``, ``image_aspect_ratio`` and ``tokenizer_*`` fields are LLaVA's. Ours:

    Attributes:
        system: Short name of the system that the model was trained as; empty for a plain LLaVA.
        vision_tower_config: Tower of the branch ``clip``, see ``multimodal_encoder``; None for a model without images.
        dino_tower_config: Tower of the branch ``dino``.
        extra_tower_configs: Towers of further branches, by the branch's name.
        token_source_configs: What is spliced into a prompt beside the images, by name; see ``model.token_sources``.
        mm_dino_tower: Where the second tower's weights came from: path or hub id, as ``mm_vision_tower`` for the first.
        mm_image_processor: Settings of the image processor that makes the pixels which the towers share.
        mm_native_crops: Crops at the image's own resolution beside the shared pixels, for towers that want them, as
            ``{"size": 64, "per_side": 3}``; see ``llava.native_crops``.
        mm_fusion_type: Name in the registry of fusions.
        mm_fusion_config: The fusion's own settings.
        cpm_search: Where the probability mapper looks for the verdict in training. A config file without this field
            means ``predictions``, the authors' way; ours are written with it.
        cpm_temperature: tau of the probability mapper.
        cpm_weight: Weight of the mapper's loss.
        cpm_tokens: How the tokenizer spells the verdict, see ``VerdictTokens``.
        contrast: How images are contrasted with texts in training, see ``ContrastSettings``; None for not at all.
        conv_mode: Prompt template that the model is asked with.
        verdict_only_share: Share of training answers that were only a CONCLUSION, so that asking for the score alone
            is what the model was trained for; 0 for the published weights.
        default_score: Which score a report gives as P(fake) unless asked otherwise: ``answer``, after the model's own
            answer, or ``prompt``, without one.
        notice: What whoever reads this model's answers must know; reports carry it and commands say it.
    """

    model_type = "llava_llama"

    mm_vision_tower: str | None = None
    mm_dino_tower: str | None = None
    mm_hidden_size: int | None = None
    mm_projector_type: str = "mlp2x_gelu"
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str = "patch"
    mm_patch_merge_type: str = "flat"
    mm_use_im_start_end: bool = False
    mm_use_im_patch_token: bool = False
    image_aspect_ratio: str | None = "pad"
    tokenizer_model_max_length: int | None = 2048
    tokenizer_padding_side: str = "right"
    system: str = ""
    vision_tower_config: dict[str, Any] | None = None
    dino_tower_config: dict[str, Any] | None = None
    extra_tower_configs: dict[str, Any] | None = None
    token_source_configs: dict[str, Any] | None = None
    mm_image_processor: dict[str, Any] | None = None
    mm_native_crops: dict[str, Any] | None = None
    mm_fusion_type: str = "forgery_aware"
    mm_fusion_config: dict[str, Any] | None = None
    cpm_search: str = "labels"
    cpm_temperature: float = 10.0
    cpm_weight: float = 1.0
    cpm_tokens: dict[str, Any] | None = None
    contrast: dict[str, Any] | None = None
    conv_mode: str = "llava_v1"
    verdict_only_share: float = 0.0
    default_score: Literal["answer", "prompt"] = "answer"
    notice: str = ""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Reads a config file's contents; see ``cpm_search`` for a file without that field."""
        return super().from_dict({"cpm_search": "predictions", **config_dict}, **kwargs)

    def validate_attention_groups(self) -> None:
        """Refuses heads that cannot share keys and values evenly; called whenever a config is made.

        Raises:
            ValueError: They cannot.
        """
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if groups and heads % groups:
            raise ValueError(f"{heads} attention heads cannot share {groups} key and value heads evenly")

    def tower_configs(self) -> dict[str, dict[str, Any]]:
        """Returns the config of each branch's tower, by the branch's name; the first one's pixels all others share."""
        known = {"clip": self.vision_tower_config, "dino": self.dino_tower_config, **(self.extra_tower_configs or {})}
        return {branch: config for branch, config in known.items() if config is not None}

    def pixel_format(self) -> dict[str, Any]:
        """Returns side, mean and standard deviation of the shared pixels, and the crops beside them.

        Raises:
            CheckpointError: The config has towers but no image processor, or its crops make no sense.
        """
        if self.mm_image_processor is None:
            raise CheckpointError("the config has a vision tower but no mm_image_processor")
        processor = self.mm_image_processor
        size = processor["crop_size"] if processor.get("do_center_crop", True) else processor["size"]
        if not isinstance(size, dict) or size.get("height") != size.get("width") or size.get("height") is None:
            raise CheckpointError(f"the image processor gives pixels of size {size}, but towers take squares")
        return {
            "size": size["height"],
            "mean": tuple(processor["image_mean"]),
            "std": tuple(processor["image_std"]),
            "crops": NativeCrops.from_config(self.mm_native_crops),
        }
