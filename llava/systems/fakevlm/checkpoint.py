"""FakeVLM's files: transformers' LLaVA layout of versions 4 and 5, both ways.

Versions 4 and 5 differ in the names of tensors; both are read, and those of version 4 are written, which version 5 and
serving engines read too. The image processor's settings are in ``preprocessor_config.json`` or, since version 5, within
``processor_config.json``.
"""

from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import LlavaConfig as TransformersConfig

from llava.errors import CheckpointError
from llava.model.branches import FIRST
from llava.model.checkpoint_files import TensorLike
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.clip_encoder import MODEL_FIELDS
from llava.model.transformers_llava import KEY_MAP, LANGUAGE_FIELDS, SELECTED, llava_files
from llava.systems.base import CheckpointFormat


class _Format:
    """Transformers' LLaVA layout as a ``CheckpointFormat``."""

    key_map = KEY_MAP
    asks_as_trained = True
    tower_types: Mapping[str, str] = {FIRST: "clip"}
    tower_variables: Mapping[str, str] = {}

    def infer_config(self, config: Mapping[str, Any], tensors: Mapping[str, TensorLike]) -> dict[str, Any]:
        """Returns our config for transformers' one; ours as it is.

        Raises:
            CheckpointError: The config is not one of a LLaVA with a Llama and a CLIP tower.
        """
        if config.get("model_type") != "llava":
            return {"mm_fusion_type": FIRST, **config}
        try:
            theirs = TransformersConfig.from_dict(dict(config))
        except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
            raise CheckpointError(f"config.json is no LLaVA's: {error.__cause__ or error}") from error
        language, vision = theirs.text_config.to_dict(), theirs.vision_config.to_dict()
        _check_kind(language, vision)
        length = config.get("tokenizer_model_max_length") or language["max_position_embeddings"]
        select = config.get("vision_feature_select_strategy", "default")
        if select not in SELECTED:
            raise CheckpointError(f"config.json: unknown vision_feature_select_strategy {select!r}")
        return {
            **{name: language[name] for name in LANGUAGE_FIELDS if name in language},
            "pad_token_id": theirs.pad_token_id,
            "tie_word_embeddings": theirs.tie_word_embeddings,
            "mm_fusion_type": FIRST,
            "mm_projector_type": "mlp2x_gelu",
            "vision_tower_config": {
                "type": "clip",
                **{name: vision[name] for name in MODEL_FIELDS},
                "select_layer": theirs.vision_feature_layer,
                "select_feature": SELECTED[select],
            },
            "mm_vision_select_layer": theirs.vision_feature_layer,
            "mm_vision_select_feature": SELECTED[select],
            "mm_image_processor": config.get("mm_image_processor"),
            "image_aspect_ratio": _image_mode(config),
            "tokenizer_model_max_length": length,
            "conv_mode": config.get("conv_mode", "raw"),
            "notice": config.get("notice", ""),
        }

    def infer_tower(self, branch: str, tensors: Mapping[str, TensorLike]) -> dict[str, Any]:
        """Returns nothing: the config tells all of the tower."""
        return {}

    def published_files(self, model: LlavaLlamaForCausalLM) -> dict[str, "dict[str, Any] | str"]:
        """Returns the files that transformers needs beside weights and tokenizer, by name: JSON values or text.

        Raises:
            CheckpointError: The tokenizer has no ``<image>``, or the model is not one that transformers' LLaVA can be.
        """
        return llava_files(model)


def _check_kind(language: Mapping[str, Any], vision: Mapping[str, Any]) -> None:
    if language.get("model_type") != "llama" or vision.get("model_type") != "clip_vision_model":
        raise CheckpointError(
            f"a LLaVA of a {language.get('model_type')} and a {vision.get('model_type')} is not supported; "
            "FakeVLM is one of a llama and a clip_vision_model"
        )


def _image_mode(config: Mapping[str, Any]) -> str:
    """``pad`` or ``crop``: as our own field says, else as the image processor does."""
    own = config.get("image_aspect_ratio")
    processor = config.get("mm_image_processor") or {}
    return own or ("pad" if processor.get("do_pad") else "crop")


FORMAT: CheckpointFormat = _Format()
