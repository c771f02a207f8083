"""The verdicts that a model in training gives by itself, without the reasoning that its labels would give away."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from llava.data.collator import Sample
from llava.labels import LABELS
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.systems import registry


def verdict_predictor(
    model: LlavaLlamaForCausalLM,
    *,
    context_length: int,
    score_only: bool,
    max_new_tokens: int,
    precision: Callable[[], AbstractContextManager],
    in_step: Sequence[str] = (),
) -> Callable[[list[Sample]], list[int | None]]:
    """Returns a function from samples to verdicts: real 0, fake 1, None where an answer has none.

    Args:
        model: The model without PEFT's wrapper; its adapters act all the same.
        context_length: Longest sequence.
        score_only: Score the verdict alone rather than generate an answer and read it.
        max_new_tokens: Longest answer.
        precision: Gives the context in which the model computes.
        in_step: What all samples ask, if every process must run the model equally often.
    """
    kind = registry.component(model.config.system, "system")
    system = kind(model.tokenizer, model, model.image_processor, context_length)
    options = system.options(score_only=score_only, max_new_tokens=max_new_tokens)

    one_by_one = len({system.validation_question(asked) for asked in in_step}) > 1
    of_image = list(model.get_model().image_inputs(None, model.image_processor))

    def predict(samples: list[Sample]) -> list[int | None]:
        prepared = [
            system.prepare_pixels(sample.image, extras={name: sample.extras[name] for name in of_image})
            for sample in samples
        ]
        questions = [system.validation_question(sample.question) for sample in samples]
        verdicts: list[int | None] = [None] * len(samples)
        for rows in _asked_together(questions, one_by_one):
            asked = replace(options, question=questions[rows[0]])
            with torch.no_grad(), precision():
                reports = system.analyze_batch([prepared[row] for row in rows], asked)
            for row, report in zip(rows, reports, strict=True):
                verdicts[row] = None if report.said is None else LABELS.index(report.said)
        return verdicts

    return predict


def _asked_together(questions: Sequence[str | None], one_by_one: bool) -> list[list[int]]:
    """Rows by what they are asked; each row by itself if a batch is to be run one by one."""
    if one_by_one:
        return [[row] for row in range(len(questions))]
    together: dict[str | None, list[int]] = {}
    for row, question in enumerate(questions):
        together.setdefault(question, []).append(row)
    return list(together.values())
