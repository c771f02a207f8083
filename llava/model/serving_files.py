"""Writes models as serving engines take them.

A model that transformers' LLaVA can be is one folder. Any other is a plain Llama, beside a client: all that makes
prompt embeddings of an image and a question, and where they are sent (see ``llava.model.served``).
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AddedToken, PreTrainedTokenizerBase

from llava.abstention import CALIBRATION
from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import CheckpointError
from llava.mm_utils import tokenize_placeholders
from llava.model.builder import load_tokenizer
from llava.model.checkpoint import SERVED
from llava.model.checkpoint_layout import stored_state_dict
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.saving import published_config, save_sharded
from llava.model.transformers_llava import IMAGE_TOKEN, KEY_MAP, LANGUAGE_FIELDS, describe_unlike, llava_files

LANGUAGE_MODEL, CLIENT = "language_model", "client"
"""Folders of a model that is asked by prompt embeddings."""
_LLAMA = ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")
_LAYERS = ("model.layers.", "lm_head.")
_TRIAL = "Is this image real or fake?\nSay why."
_STARTS = ("{{ bos_token }}", "{{ bos_token + ' ' }}")
"""What a chat template begins with: engines add no such mark to it, and tokenizers cut what follows in two ways."""


def write_llava(model: LlavaLlamaForCausalLM, folder: Path, tokenizer_folder: Path) -> None:
    """Writes a folder that vLLM, SGLang and transformers' ``LlavaForConditionalGeneration`` open.

    Where the tokenizer lacks ``<image>``, it and the vocabulary get it. Its row is the mean of the others, so that its
    logit is never the largest.

    Args:
        model: A model with one CLIP tower and a two-layer projector; it gets the word, too.
        folder: An empty folder.
        tokenizer_folder: Where the model's tokenizer came from.

    Raises:
        CheckpointError: Transformers' LLaVA cannot be this model, or its tokenizer cuts prompts otherwise.
    """
    reason = describe_unlike(model)
    if reason:
        raise CheckpointError(f"{reason}; use --form llama")
    add_image_word(model)
    files = llava_files(model)
    tokenizer, template = _matching_words(model, str(files["chat_template.jinja"]), tokenizer_folder)
    files["chat_template.jinja"] = template
    tokenizer.save_pretrained(folder)
    save_sharded(llava_tensors(stored_state_dict(model), model.config.tie_word_embeddings), folder)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2, sort_keys=True) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def llava_tensors(stored: Mapping[str, Tensor], is_tied: bool) -> dict[str, Tensor]:
    """Returns native tensors by transformers' names; a tied output layer is stored once, as the embedding."""
    return KEY_MAP.to_published({name: t for name, t in stored.items() if not (is_tied and name == "lm_head.weight")})


def add_image_word(model: LlavaLlamaForCausalLM) -> None:
    """Gives tokenizer and vocabulary the word ``<image>`` where they lack it."""
    tokenizer, config = model.tokenizer, model.config
    assert tokenizer is not None
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        _add_word(tokenizer)
    missing = tokenizer.get_vocab()[IMAGE_TOKEN] + 1 - config.vocab_size
    if missing <= 0:
        return
    embedding = model.get_input_embeddings()
    embedding.weight = _with_means(embedding.weight, missing)
    embedding.num_embeddings += missing
    head = model.lm_head
    head.weight = embedding.weight if config.tie_word_embeddings else _with_means(head.weight, missing)
    head.out_features += missing
    config.vocab_size += missing


def _add_word(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)


def _with_means(weight_VD: Tensor, number: int) -> nn.Parameter:
    mean_1D = weight_VD.detach().float().mean(dim=0, keepdim=True).to(weight_VD.dtype)
    return nn.Parameter(torch.cat([weight_VD.detach(), mean_1D.expand(number, -1)]), requires_grad=False)


def _matching_words(
    model: LlavaLlamaForCausalLM, template: str, tokenizer_folder: Path
) -> tuple[PreTrainedTokenizerBase, str]:
    """Returns a tokenizer and a chat template by which an engine's prompts have the ids that they have here.

    Raises:
        CheckpointError: There are none.
    """
    assert model.tokenizer is not None
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _TRIAL}]}]
    begins = model.tokenizer("x").input_ids[:1] == [model.tokenizer.bos_token_id]
    starts = _STARTS if begins else ("",)
    for tokenizer in _tokenizers(model, tokenizer_folder):
        image_id = tokenizer.get_vocab()[IMAGE_TOKEN]
        for start in starts:
            text = tokenizer.apply_chat_template(
                messages, chat_template=start + template, add_generation_prompt=True, tokenize=False
            )
            bare = tokenizer.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=True, tokenize=False
            )
            own = tokenize_placeholders(bare, model.tokenizer, {IMAGE_TOKEN: IMAGE_TOKEN_INDEX})
            if tokenizer(text, add_special_tokens=False).input_ids == [image_id if i < 0 else i for i in own]:
                return tokenizer, start + template
    raise CheckpointError(
        f"the tokenizer cuts the text around {IMAGE_TOKEN} otherwise than the model was trained with, so an engine "
        "would ask it something else; use --form llama"
    )


def _tokenizers(model: LlavaLlamaForCausalLM, folder: Path) -> Iterator[PreTrainedTokenizerBase]:
    """The model's tokenizer, and its other ways to begin a text behind a special token."""
    assert model.tokenizer is not None
    yield model.tokenizer
    for legacy in (True, False):
        other = load_tokenizer(folder, legacy=legacy)
        if IMAGE_TOKEN not in other.get_vocab():
            _add_word(other)
        yield other


def write_llama(model: LlavaLlamaForCausalLM, folder: Path) -> None:
    """Writes the language model as ``LlamaForCausalLM``, with its tokenizer.

    Args:
        model: The model.
        folder: An empty folder.
    """
    assert model.tokenizer is not None
    save_sharded(llama_tensors(stored_state_dict(model), model.config.tie_word_embeddings), folder)
    _write_json(llama_config(model), folder / "config.json")
    generation = model.generation_config
    special = {name: getattr(generation, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json({name: i for name, i in special.items() if i is not None}, folder / "generation_config.json")
    model.tokenizer.save_pretrained(folder)


def llama_tensors(stored: Mapping[str, Tensor], is_tied: bool) -> dict[str, Tensor]:
    """Returns those of a model's tensors that are Llama's; a tied output layer is stored once, as the embedding."""
    left_out = ("lm_head.",) if is_tied else ()
    return {name: t for name, t in stored.items() if name.startswith(_LLAMA) and not name.startswith(left_out)}


def llama_config(model: LlavaLlamaForCausalLM) -> dict[str, Any]:
    """Returns the language model's config, as transformers 4 and 5 read it."""
    config = model.config
    language = {name: getattr(config, name) for name in LANGUAGE_FIELDS if getattr(config, name, None) is not None}
    return {
        **published_config(language, model),
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "pad_token_id": model.generation_config.pad_token_id,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def write_client(model: LlavaLlamaForCausalLM, folder: Path, *, base_url: str, name: str, source: Path) -> None:
    """Writes all of a model but its layers: what makes prompt embeddings, and whom they are sent to.

    Args:
        model: The model.
        folder: An empty folder.
        base_url: Address of the engine, up to and with ``/v1``.
        name: Name of the language model there.
        source: Folder of the model, whose calibration is copied if there is one.
    """
    assert model.tokenizer is not None
    save_sharded(client_tensors(stored_state_dict(model)), folder)
    towers = {"mm_vision_tower": None, "mm_dino_tower": None}  # they are in the folder
    served = {
        "base_url": base_url,
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_hidden_layers": model.config.num_hidden_layers,
    }
    _write_json({**model.config.to_dict(), **towers, SERVED: served}, folder / "config.json")
    model.tokenizer.save_pretrained(folder)
    if (source / CALIBRATION).is_file():
        shutil.copyfile(source / CALIBRATION, folder / CALIBRATION)


def client_tensors(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns those of a model's tensors that make prompt embeddings, and the last norm, without which no Llama is."""
    return {name: tensor for name, tensor in stored.items() if not name.startswith(_LAYERS)}


def _write_json(values: Mapping[str, Any], file: Path) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
