"""The verdicts that a model in training gives by itself, without the reasoning that its labels would give away."""

from collections.abc import Callable
from contextlib import AbstractContextManager

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
) -> Callable[[list[Sample]], list[int | None]]:
    """Returns a function from samples to verdicts: real 0, fake 1, None where an answer has none.

    Args:
        model: The model without PEFT's wrapper; its adapters act all the same.
        context_length: Longest sequence.
        score_only: Score the verdict alone rather than generate an answer and read it.
        max_new_tokens: Longest answer.
        precision: Gives the context in which the model computes.
    """
    kind = registry.component(model.config.system, "system")
    system = kind(model.tokenizer, model, model.image_processor, context_length)
    options = system.options(score_only=score_only, max_new_tokens=max_new_tokens)

    of_image = list(model.get_model().image_inputs(None, model.image_processor))

    def predict(samples: list[Sample]) -> list[int | None]:
        prepared = [
            system.prepare_pixels(sample.image, extras={name: sample.extras[name] for name in of_image})
            for sample in samples
        ]
        with torch.no_grad(), precision():
            reports = system.analyze_batch(prepared, options)
        return [None if report.said is None else LABELS.index(report.said) for report in reports]

    return predict
