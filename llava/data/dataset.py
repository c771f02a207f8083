"""From records to samples."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from llava.conversation import Conversation
from llava.data.collator import Sample
from llava.data.prompting import arrange_of, fill_template, fitting_length, tokenize_conversation
from llava.data.records import Record
from llava.errors import DataError, ImageReadError, OptionError
from llava.images import load_image
from llava.mm_utils import IMAGE_PLACEHOLDER, process_images
from llava.model.configuration import LlavaConfig
from llava.model.multimodal_encoder.base import PixelFormat
from llava.systems.base import AnswerFormat

ExtraInputs = Callable[[Record], Mapping[str, Tensor]]
ImageInputs = Callable[[Image.Image | None, Any], Mapping[str, Tensor]]

WORDS_OF_AN_IMAGE = 128
"""How many words an image counts in ``SupervisedDataset.lengths``, as published."""


class SupervisedDataset(Dataset[Sample]):
    """Samples of a list of records; an image is read when its sample is asked for.

    Args:
        records: What ``check_records`` returned.
        answer_format: Words of the system that is trained.
        image_folder: Where the records' images lie; None if their paths are complete.
        tokenizer: The model's.
        template: Prompt template.
        model_config: The model's; it says how pixels are made.
        image_processor: The model's.
        placeholder_tokens: How many tokens each placeholder id becomes.
        max_length: Longest sequence, image positions included; what lies beyond is cut off.
        verdict_only_share: Share of the records, 0..1, whose answer is shortened to its verdict.
        seed: Chooses them, see ``shorten_answers``.
        extra_inputs: Gives a system's further inputs of a record, by name.
        placeholders: What stands for images and other tokens in a prompt's text, and the id of each.
        image_inputs: Gives what the model's token sources make of an image, by name.

    Raises:
        OptionError: The share is not within 0..1.
    """

    def __init__(
        self,
        records: Sequence[Record],
        *,
        answer_format: AnswerFormat,
        image_folder: Path | None,
        tokenizer: PreTrainedTokenizerBase,
        template: Conversation,
        model_config: LlavaConfig,
        image_processor: Any,
        placeholder_tokens: Mapping[int, int],
        max_length: int,
        verdict_only_share: float = 0.0,
        seed: int = 0,
        extra_inputs: ExtraInputs | None = None,
        placeholders: Mapping[str, int] = IMAGE_PLACEHOLDER,
        image_inputs: ImageInputs | None = None,
    ) -> None:
        self.answer_format = answer_format
        self.records = shorten_answers(records, answer_format, verdict_only_share, seed)
        self.image_folder = image_folder or Path()
        self.tokenizer = tokenizer
        self.template = template
        self.model_config = model_config
        self.image_processor = image_processor
        self.placeholder_tokens = placeholder_tokens
        self.extra_inputs = extra_inputs
        self.placeholders = placeholders
        self.image_inputs = image_inputs
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        """Returns a sample.

        Raises:
            DataError: Its image cannot be read.
        """
        record = self.records[index]
        filled = fill_template(record.turns, self.template, record.system_prompt, arrange_of(self.answer_format))
        tokenized = tokenize_conversation(filled, self.tokenizer, self.placeholders)
        kept = fitting_length(tokenized.input_ids, self.placeholder_tokens, self.max_length)
        image = self.image(record)
        own = {} if self.image_inputs is None else self.image_inputs(image, self.image_processor)
        return Sample(
            torch.tensor(tokenized.input_ids[:kept], dtype=torch.long),
            torch.tensor(tokenized.labels[:kept], dtype=torch.long),
            self.pixels(image),
            record.forgery_label(self.answer_format),
            extras={**own, **(self.extra_inputs(record) if self.extra_inputs else {})},
            question=self.question(record),
        )

    @cached_property
    def modality_lengths(self) -> list[int]:
        """Words of each record's turns, negative for a record without an image."""
        words = (sum(len(turn["value"].split()) for turn in record.turns) for record in self.records)
        return [-count if record.image is None else count for record, count in zip(self.records, words, strict=True)]

    @property
    def lengths(self) -> list[int]:
        """Words of each record's turns, an image counted as ``WORDS_OF_AN_IMAGE``."""
        return [length + WORDS_OF_AN_IMAGE if length > 0 else -length for length in self.modality_lengths]

    def image(self, record: Record) -> Image.Image | None:
        """Returns a record's image; None without one.

        Raises:
            DataError: It cannot be read.
        """
        if record.image is None:
            return None
        try:
            return load_image(self.image_folder / record.image)
        except ImageReadError as error:
            raise DataError(f"{record.origin}: {error}") from error

    @property
    def questions(self) -> list[str]:
        """What each record asks first, see ``question``."""
        return [self.question(record) for record in self.records]

    def question(self, record: Record) -> str:
        """Returns what a record asks first, without what stands for its image."""
        asked = record.turns[0]["value"]
        for mark in self.placeholders:
            asked = asked.replace(mark, "")
        return asked.strip()

    def pixels(self, image: Image.Image | None) -> Tensor:
        """Returns an image as pixels as towers expect them; zeros without one."""
        if image is None:
            return torch.zeros(PixelFormat(**self.model_config.pixel_format()).shape)
        return process_images([image], self.image_processor, self.model_config)[0]


def shorten_answers(records: Sequence[Record], answer_format: AnswerFormat, share: float, seed: int) -> list[Record]:
    """Shortens the answers of some records to their verdict; the questions stay.

    Which ones depends on the seed and the number of records alone, so every process, worker and epoch chooses alike.

    Args:
        records: Records; one without a verdict stays as it is.
        answer_format: Words of the system that is trained.
        share: Share of them to shorten, 0..1, to the nearest record.
        seed: Of the choice.

    Raises:
        OptionError: The share is not within 0..1.
    """
    if not 0 <= share <= 1:
        raise OptionError(f"verdict_only_share must lie within 0 and 1, not {share}")
    chosen = set(random.Random(seed).sample(range(len(records)), round(share * len(records))))
    return [_shortened(record, answer_format) if index in chosen else record for index, record in enumerate(records)]


def _shortened(record: Record, answer_format: AnswerFormat) -> Record:
    turns = []
    for turn in record.turns:
        short = answer_format.shorten(turn["value"]) if turn["from"] == "gpt" else None
        turns.append(turn if short is None else {**turn, "value": short})
    return replace(record, turns=tuple(turns))
