"""The options of FakeReasoning's answers. Imports no torch."""

from dataclasses import dataclass

from llava.cli import option
from llava.errors import OptionError
from llava.systems.base import SCORE_KINDS, AnalyzeOptions, ScoreKind
from llava.systems.fakereasoning.answer import FORCED_SUMMARY


@dataclass(frozen=True)
class FakeReasoningOptions(AnalyzeOptions):
    """How images are analysed by FakeReasoning.

    Attributes:
        conv_mode: Prompt template instead of the one in the model's config.
        assistant_prefix: Beginning of the answer, which the model then continues.
        force_summary: Begin the answer with the constant SUMMARY, so that it is not decoded.
        score: Which P(fake) is reported beside an answer: ``answer``, at the verdict that follows the model's own
            reasoning; ``prompt``, from one more forward without the answer; ``auto``, what the model's config says.
    """

    conv_mode: str | None = option(None, "prompt template (default: the model's; published: llava_v1)")
    assistant_prefix: str = ""
    force_summary: bool = option(False, "give the constant SUMMARY, so that it is not decoded")
    score: ScoreKind = option(
        "auto",
        "P(fake) after the model's own answer, from its prompt without an answer, or auto (default): the model's",
        choices=SCORE_KINDS,
    )

    def __post_init__(self) -> None:
        """Checks ranges.

        Raises:
            OptionError: A value is unknown, or two exclude each other.
        """
        super().__post_init__()
        if self.score not in SCORE_KINDS:
            raise OptionError(f"score must be one of {', '.join(SCORE_KINDS)}, not {self.score!r}")
        if self.force_summary and self.assistant_prefix:
            raise OptionError("force_summary and assistant_prefix both begin the answer; give one of them")
        if self.score_only and (self.prefix or self.score == "answer"):
            raise OptionError("score_only asks for no answer, so assistant_prefix and score='answer' have no meaning")

    @property
    def prefix(self) -> str:
        """Beginning of the answer that the model is given."""
        return FORCED_SUMMARY if self.force_summary else self.assistant_prefix
