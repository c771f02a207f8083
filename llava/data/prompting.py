"""From a conversation to ids and a label mask, by construction: what the assistant says is supervised, nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from llava.conversation import Conversation
from llava.mm_utils import tokenizer_image_token

_SPEAKERS = {"human": 0, "gpt": 1}


@dataclass(frozen=True)
class TokenizedConversation:
    """Ids ``[T]`` and labels ``[T]`` of one conversation; a label is -100 where nothing is to be predicted."""

    input_ids: list[int]
    labels: list[int]


def fill_template(turns: Sequence[dict[str, Any]], template: Conversation) -> Conversation:
    """Puts a record's turns into a template; a question's ``<image>`` is moved to its front, as published.

    Raises:
        ValueError: A turn is not ``{"from": "human" | "gpt", "value": text}``.
    """
    conversation = template.copy()
    for index, turn in enumerate(turns):
        speaker, value = turn.get("from"), turn.get("value")
        if speaker not in _SPEAKERS or not isinstance(value, str):
            raise ValueError(f"turn {index} is not {{'from': 'human' or 'gpt', 'value': text}}")
        if DEFAULT_IMAGE_TOKEN in value:
            marks = value.count(DEFAULT_IMAGE_TOKEN)
            rest = value.replace(DEFAULT_IMAGE_TOKEN, "").strip()
            value = (f"{DEFAULT_IMAGE_TOKEN}\n" * marks + rest).strip()
        conversation.append_message(conversation.roles[_SPEAKERS[speaker]], value)
    return conversation


def tokenize_conversation(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> TokenizedConversation:
    """Tokenises a conversation and labels the assistant's words, closing mark included.

    The whole prompt is tokenised at once, as a model will see it; where each turn ends is found by tokenising the
    prompt up to there.

    Raises:
        ValueError: A turn has no answer, or the tokenizer joins pieces across the start of an answer, so that no
            boundary exists there.
    """
    ids = tokenizer_image_token(conversation.get_prompt(), tokenizer)
    labels = [IGNORE_INDEX] * len(ids)
    text = ""
    for given, said in conversation.turns():
        if not said:
            raise ValueError("a question has no answer")
        start = len(_common(tokenizer_image_token(text + given, tokenizer), ids))
        end = len(_common(tokenizer_image_token(text + given + said, tokenizer), ids))
        labels[start:end] = ids[start:end]
        text += given + said
    return TokenizedConversation(ids, labels)


def _common(part: list[int], whole: list[int]) -> list[int]:
    if whole[: len(part)] != part:
        raise ValueError(
            f"the tokenizer joins text across a turn's boundary: {part[-4:]} is not how the whole begins, "
            f"{whole[max(0, len(part) - 4) : len(part)]}"
        )
    return part
