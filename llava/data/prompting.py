"""From a conversation to ids and a label mask, by construction: what the assistant says is supervised, nothing else."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from llava.conversation import Conversation
from llava.errors import DataError
from llava.mm_utils import IMAGE_PLACEHOLDER, join_chunks, split_placeholders, tokenize_placeholders
from llava.systems.base import AnswerFormat

Arrange = Callable[[str], str]
"""Places what stands for an image in a training question."""
Encode = Callable[[str], list[int]]
"""Gives the ids of a prompt, ``<image>`` included."""

_SPEAKERS = {"human": 0, "gpt": 1}


@dataclass(frozen=True)
class TokenizedConversation:
    """Ids ``[T]`` and labels ``[T]`` of one conversation; a label is -100 where nothing is to be predicted."""

    input_ids: list[int]
    labels: list[int]


def fill_template(
    turns: Sequence[dict[str, Any]], template: Conversation, system_prompt: str = "", arrange: Arrange | None = None
) -> Conversation:
    """Puts a record's turns into a template; a question's ``<image>`` is moved to its front, as published.

    Args:
        turns: The turns.
        template: The template.
        system_prompt: What stands first instead of the template's own text; empty for that.
        arrange: A system's own way to place what stands for an image in a question; None moves it to its front.

    Raises:
        DataError: A turn is not ``{"from": "human" | "gpt", "value": text}``.
    """
    conversation = template.copy()
    conversation.system = system_prompt or conversation.system
    for index, turn in enumerate(turns):
        speaker, value = turn.get("from"), turn.get("value")
        if speaker not in _SPEAKERS or not isinstance(value, str):
            raise DataError(f"turn {index} is not {{'from': 'human' or 'gpt', 'value': text}}")
        if arrange is not None and DEFAULT_IMAGE_TOKEN in value:
            value = arrange(value)
        elif DEFAULT_IMAGE_TOKEN in value:
            marks = value.count(DEFAULT_IMAGE_TOKEN)
            rest = value.replace(DEFAULT_IMAGE_TOKEN, "").strip()
            value = (f"{DEFAULT_IMAGE_TOKEN}\n" * marks + rest).strip()
        conversation.append_message(conversation.roles[_SPEAKERS[speaker]], value)
    return conversation


def arrange_of(answer_format: AnswerFormat) -> Arrange | None:
    """Returns a system's own way to place what stands for an image in a training question, if it has one."""
    found: Arrange | None = getattr(answer_format, "arrange", None)
    return found


def tokenize_conversation(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    placeholders: Mapping[str, int] = IMAGE_PLACEHOLDER,
) -> TokenizedConversation:
    """Tokenises a conversation and labels the assistant's words, closing mark included.

    The whole prompt is tokenised at once, as a model will see it; where each turn ends is found by tokenising the
    prompt up to there.

    Raises:
        DataError: A turn has no answer, or the tokenizer joins pieces across the start of an answer, so that no
            boundary exists there.
    """
    return label_answers(conversation, lambda prompt: tokenize_placeholders(prompt, tokenizer, placeholders))


def label_answers(conversation: Conversation, encode: Encode) -> TokenizedConversation:
    """Does what ``tokenize_conversation`` does with any way to tokenise, see ``encode_together``.

    Raises:
        DataError: As there.
    """
    prompts = _growing_prompts(conversation)
    ids = encode(prompts[-1])
    ends = [len(_common(encode(prompt), ids)) for prompt in prompts]
    labels = [IGNORE_INDEX] * len(ids)
    for start, end in zip(ends[::2], ends[1::2], strict=True):
        labels[start:end] = ids[start:end]
    return TokenizedConversation(ids, labels)


def encode_together(
    conversations: Iterable[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    placeholders: Mapping[str, int] = IMAGE_PLACEHOLDER,
) -> Encode:
    """Tokenises all prompts that labelling these conversations takes, in one call and each text only once.

    Returns:
        What gives the ids of any of these prompts, as ``tokenize_placeholders`` would.
    """
    prompts = {prompt for conversation in conversations for prompt in _growing_prompts(conversation)}
    chunks = list({chunk for prompt in prompts for chunk in split_placeholders(prompt, placeholders)[0]})
    ids = dict(zip(chunks, tokenizer(chunks).input_ids, strict=True))

    def encode(prompt: str) -> list[int]:
        texts, between = split_placeholders(prompt, placeholders)
        return join_chunks([ids[text] for text in texts], tokenizer.bos_token_id, between)

    return encode


def fitting_length(input_ids: Sequence[int], placeholder_tokens: Mapping[int, int], max_length: int) -> int:
    """Returns how many of the ids stay when a sequence is cut to ``max_length`` after its placeholders were filled.

    Args:
        input_ids: Ids with placeholders among them.
        placeholder_tokens: How many tokens each placeholder id becomes.
        max_length: Longest sequence.
    """
    if expanded_length(input_ids, placeholder_tokens) <= max_length:
        return len(input_ids)
    ends = accumulate(placeholder_tokens.get(index, 1) for index in input_ids)
    return sum(end <= max_length for end in ends)


def expanded_length(input_ids: Sequence[int], placeholder_tokens: Mapping[int, int]) -> int:
    """Returns the length of a sequence after its placeholders were filled."""
    return len(input_ids) + sum(input_ids.count(index) * (size - 1) for index, size in placeholder_tokens.items())


def _growing_prompts(conversation: Conversation) -> list[str]:
    """The prompt up to the end of each question and of each answer; the last one is the whole."""
    turns = conversation.turns()
    if not all(answer for _, answer in turns):
        raise DataError("a question has no answer")
    return list(accumulate(piece for turn in turns for piece in turn))


def _common(part: list[int], whole: list[int]) -> list[int]:
    if whole[: len(part)] != part:
        raise DataError(
            f"the tokenizer joins text across a turn's boundary: {part[-4:]} is not how the whole begins, "
            f"{whole[max(0, len(part) - 4) : len(part)]}"
        )
    return part
