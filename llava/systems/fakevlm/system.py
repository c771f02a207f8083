"""FakeVLM at work: a verdict and its clues in free text, and P(fake) at the verdict's word."""

from typing import Any, ClassVar

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import OptionError
from llava.model.answering import ImageAnswers
from llava.report import ForgeryReport
from llava.systems.base import AnalyzeOptions, AnswerFormat
from llava.systems.fakevlm.answer import FORMAT, QUESTION, parse_answer
from llava.systems.fakevlm.options import FakeVLMOptions
from llava.systems.language_model import LanguageModelSystem, fill_conversation


class FakeVLM(LanguageModelSystem):
    """The published system (arXiv 2503.14905)."""

    name = "FakeVLM"
    options: ClassVar[type[AnalyzeOptions]] = FakeVLMOptions
    answer_format: AnswerFormat = FORMAT

    def prompt(self, options: FakeVLMOptions) -> str:
        """Returns what the model is asked, up to where its answer begins."""
        return fill_prompt(options.conv_mode or self.model.config.conv_mode, options.question or QUESTION)

    def describe(self, options: FakeVLMOptions) -> dict[str, Any]:
        """All that changes an answer beside weights, options and pixels; the image mode is among it."""
        return {**super().describe(options), "image_mode": self.model.config.image_aspect_ratio}

    @property
    def score_is_off_distribution(self) -> bool:
        """No: every answer that the model was trained on opens with its verdict."""
        return False

    def report(self, answers: ImageAnswers, options: FakeVLMOptions) -> ForgeryReport:
        """Turns answers into a report: text of the first one, mean of the scores."""
        first, scores = answers.answers[0], [answer.fake_probability for answer in answers.answers]
        parsed = parse_answer(first.text, tolerant=options.tolerant)
        return ForgeryReport(
            label=parsed.verdict,
            fake_probability=sum(scores) / len(scores),
            score_source=first.source,
            stages=parsed.stages,
            text=first.text,
            system=self.name,
            probabilities=scores if options.samples > 1 else [],
            notice=self.notice,
        )


def fill_prompt(style: str, question: str) -> str:
    """Returns a question about an image in a prompt style or template, up to where the answer begins.

    Raises:
        OptionError: There is no such style, or the question shows an image itself.
    """
    if style != "raw":
        return fill_conversation(style, question)
    if DEFAULT_IMAGE_TOKEN in question:
        raise OptionError(f"the question must not hold {DEFAULT_IMAGE_TOKEN}: the image stands before it")
    return f"{DEFAULT_IMAGE_TOKEN}{question}"
