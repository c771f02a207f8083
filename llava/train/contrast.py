"""Contrast as a further loss of the language model's stage: what each record brings to it, and how it is counted."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llava.data.records import Record
from llava.labels import FAKE, LABELS
from llava.model.contrast import TERMS, ContrastSettings
from llava.model.language_contrast import ATTRIBUTES, HAS_IMAGE, NO_WORD, WORDS
from llava.systems.base import AnswerFormat, TrainingObjective


class ContrastInputs:
    """Gives a record's forgery attributes and their sentences, whatever its answer was shortened to.

    Args:
        settings: How contrast is made.
        records: The training records with their whole answers.
        answer_format: Words of the system that is trained.
        tokenizer: The model's.
    """

    def __init__(
        self,
        settings: ContrastSettings,
        records: Sequence[Record],
        answer_format: AnswerFormat,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.settings, self.answer_format, self.tokenizer = settings, answer_format, tokenizer
        self.names = answer_format.attributes.get(LABELS[FAKE], ())
        self.whole = {record.origin: record for record in records}

    def __call__(self, record: Record) -> dict[str, Tensor]:
        """Returns the inputs by name: words ``[settings.words]``, attributes ``[A]``, whether there is an image ``[]``.

        The text is the sentence of each forgery attribute after its name; of answers that name no attributes, the
        explanation of a fake image. With ``authentic``, other images have the same of what speaks for them.
        """
        answer = self.whole.get(record.origin, record).verdict(self.answer_format)
        is_fake = answer.verdict == LABELS[FAKE]
        named = {name: text for name, text in answer.attributes.items() if not is_fake or name in self.names}
        text = " ".join(f"{name}: {sentence}" for name, sentence in named.items())
        text = text or answer.stages.get(self.answer_format.explanation or "", "")
        words = torch.full((self.settings.words,), NO_WORD)
        if text and (is_fake or self.settings.authentic):
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"][: self.settings.words]
            words[: len(ids)] = torch.tensor(ids, dtype=torch.long)
        return {
            WORDS: words,
            ATTRIBUTES: torch.tensor([name in answer.attributes for name in self.names], dtype=torch.bool),
            HAS_IMAGE: torch.tensor(record.image is not None),
        }


class ContrastObjective:
    """An objective with the losses of contrast, which the model itself computes, beside a system's own.

    Args:
        inputs: Of the records.
        own: The system's objective, or None.
    """

    def __init__(self, inputs: ContrastInputs, own: TrainingObjective | None) -> None:
        self.inputs, self.own = inputs, own
        self.trained_whole: tuple[str, ...] = () if own is None else own.trained_whole
        self.searches_predictions = own is not None and own.searches_predictions

    def terms(self, step: Any) -> dict[str, Any]:
        """Returns the system's losses."""
        return {} if self.own is None else self.own.terms(step)

    def count(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the system's counts; those of contrast depend on other processes' batches, so the forward tells."""
        return {**({} if self.own is None else self.own.count(batch)), **dict.fromkeys(TERMS)}

    def sample_inputs(self, record: Record) -> Mapping[str, Any]:
        """Returns the system's further inputs of a record, and those of contrast."""
        return {**({} if self.own is None else self.own.sample_inputs(record)), **self.inputs(record)}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Returns what the system logs."""
        return {} if self.own is None else self.own.metrics(sums)
