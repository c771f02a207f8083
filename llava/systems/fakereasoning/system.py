"""FakeReasoning at work: an answer in four stages, and P(fake) at its verdict."""

from typing import Any, ClassVar

from llava.model.answering import ImageAnswers
from llava.report import ForgeryReport
from llava.systems.base import AnalyzeOptions, AnswerFormat
from llava.systems.fakereasoning.answer import FORCED_SUMMARY, FORMAT, QUESTION, parse_answer
from llava.systems.fakereasoning.options import FakeReasoningOptions
from llava.systems.language_model import LanguageModelSystem, fill_conversation


class FakeReasoning(LanguageModelSystem):
    """The published system (arXiv 2503.21210)."""

    name = "FakeReasoning"
    options: ClassVar[type[AnalyzeOptions]] = FakeReasoningOptions
    answer_format: AnswerFormat = FORMAT

    @property
    def verdict_temperature(self) -> float:
        """The probability mapper's tau."""
        return self.model.config.cpm_temperature

    def prompt(self, options: FakeReasoningOptions) -> str:
        """Returns what the model is asked, up to where its answer begins."""
        return fill_conversation(options.conv_mode or self.model.config.conv_mode, options.question or QUESTION)

    def answer_prefix(self, options: FakeReasoningOptions) -> str:
        """Returns the beginning of the answer that the model is given.

        A model that also learnt answers of a CONCLUSION alone would choose between both forms: an answer to the
        published question is a whole one, and so begins with its constant SUMMARY.
        """
        chooses = 0 < self.model.config.verdict_only_share < 1
        if not chooses or options.prefix or options.score_only or options.question:
            return options.prefix
        return FORCED_SUMMARY

    def describe(self, options: FakeReasoningOptions) -> dict[str, Any]:
        """All that changes an answer beside weights, options and pixels."""
        described, prefix = super().describe(options), self.answer_prefix(options)
        return described if prefix == options.prefix else {**described, "answer_prefix": prefix}

    def reports_prompt_score(self, options: FakeReasoningOptions) -> bool:
        """Whether P(fake) without an answer is asked for, by the options or by the model's config."""
        return (self.model.config.default_score if options.score == "auto" else options.score) == "prompt"

    def report(self, answers: ImageAnswers, options: FakeReasoningOptions) -> ForgeryReport:
        """Turns answers into a report: text of the first one, mean of the scores."""
        first, scores = answers.answers[0], [answer.fake_probability for answer in answers.answers]
        parsed = parse_answer(first.text, tolerant=options.tolerant)
        of_answers, without = sum(scores) / len(scores), answers.prompt_probability
        return ForgeryReport(
            label=parsed.verdict,
            fake_probability=of_answers if without is None else without,
            answer_probability=None if without is None else of_answers,
            score_source=first.source if without is None else "prompt",
            stages=parsed.stages,
            attributes=parsed.attributes,
            text=first.text,
            system=self.name,
            probabilities=scores if options.samples > 1 else [],
            off_distribution=without is not None and self.score_is_off_distribution,
            notice=self.notice,
        )
