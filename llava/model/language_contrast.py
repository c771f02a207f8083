"""Contrast within a language model: images by their tokens, texts by the embeddings of their words.

Both already lie in one space, the language model's, so nothing is added to the model and nothing to its files.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.constants import IGNORE_INDEX
from llava.errors import CheckpointError
from llava.model.contrast import Contrast, ContrastSettings, Entries
from llava.model.objective import LossTerm

WORDS, ATTRIBUTES, HAS_IMAGE = "contrast_words", "contrast_attributes", "contrast_has_image"
"""Inputs of a batch: ids of each text ``[B, T]``, attributes ``[B, A]``, whether there is an image ``[B]``."""
NO_WORD = -1
"""Fills up a text's ids."""


def language_contrast(values: Mapping[str, object]) -> ContrastSettings:
    """Reads the settings of contrast for a language model.

    Raises:
        CheckpointError: They are wrong, or ask for what needs tensors of its own.
    """
    settings = ContrastSettings.from_dict(values)
    if settings.queue or settings.learn_temperature:
        raise CheckpointError(
            "contrast: queue and learn_temperature are for the tower stage; here negatives come from all processes "
            "and the temperature is fixed, so that a checkpoint holds nothing but the model"
        )
    return settings


def contrast_terms(
    settings: ContrastSettings, image_tokens_BPD: Tensor, embed_tokens: nn.Module, inputs: Mapping[str, Tensor]
) -> dict[str, LossTerm]:
    """Returns the losses of a batch; every process must call it equally often.

    Args:
        settings: How contrast is made.
        image_tokens_BPD: What the images are to the language model, one image a row.
        embed_tokens: Its embedding of ids.
        inputs: Those above, and ``forgery_labels`` ``[B]`` if known.
    """
    words_BT = inputs[WORDS]
    is_word_BT = words_BT != NO_WORD
    embedded_BTD = embed_tokens(words_BT.clamp(min=0))
    sums_BD = (embedded_BTD.float() * is_word_BT[..., None]).sum(dim=1)
    if settings.text == "frozen":
        sums_BD = sums_BD.detach()
    labels_B = inputs.get("forgery_labels", torch.full_like(words_BT[:, 0], IGNORE_INDEX))
    entries = Entries(
        image=F.normalize(image_tokens_BPD.float().mean(dim=1), dim=1),
        text=F.normalize(sums_BD, dim=1),
        has_text=is_word_BT.any(dim=1),
        attributes=inputs[ATTRIBUTES],
        labels=labels_B,
    )
    has_image_B = inputs[HAS_IMAGE]
    losses = Contrast(settings).to(sums_BD.device)
    return losses(entries.map(lambda values: values[has_image_B]))
