"""The options of FakeShield's answers and masks. Imports no torch."""

from dataclasses import dataclass

from llava.cli import option
from llava.errors import OptionError
from llava.systems.base import AnalyzeOptions
from llava.systems.fakeshield.answer import DOMAINS, MASK_QUESTIONS

TAGS = ("own", "none", *DOMAINS)
GATES = ("parsed", "published")


@dataclass(frozen=True)
class FakeShieldOptions(AnalyzeOptions):
    """How images are analysed by FakeShield.

    Attributes:
        max_new_tokens: Longest explanation, in tokens.
        conv_mode: Prompt template of the explainer; published: llava_v1.
        tag: Sentence before the question: the tagger's ``own``, ``none``, or that of a domain.
        mask: Whether the segmenter is asked where an image was changed.
        soft_mask: Give each pixel's probability in the mask rather than 0 or 1.
        gate: For which answers a mask is made: ``parsed``, those that call the image changed (where an answer says
            neither, P(fake) decides); ``published``, all but those that hold one phrase letter for letter.
        description: What the segmenter is told instead of the explainer's answer.
        mask_question: Which published wording asks for the mask, from 1.
    """

    max_new_tokens: int = option(1024, "longest answer, in tokens (default: 1024)", name="--max_new_tokens")
    conv_mode: str = option("llava_v1", "prompt template (default and published: llava_v1)")
    tag: str = option("own", "domain sentence before the question (default: the tagger's own)", choices=TAGS)
    mask: bool = option(True, "make no mask of what was changed", name="--no-mask")
    soft_mask: bool = option(False, "masks hold probabilities rather than 0 and 1")
    gate: str = option(
        "parsed",
        "images that get a mask: those that the answer calls changed (parsed, default), or all whose answer lacks the "
        "published code's phrase (published)",
        choices=GATES,
    )
    description: str | None = option(None, "describe the changed area yourself, for the mask")
    mask_question: int = option(
        1, "wording that asks for the mask (default: 1)", choices=range(1, len(MASK_QUESTIONS) + 1)
    )

    def __post_init__(self) -> None:
        """Checks ranges.

        Raises:
            OptionError: A value is unknown, or two exclude each other.
        """
        super().__post_init__()
        for name, known in (("tag", TAGS), ("gate", GATES)):
            if getattr(self, name) not in known:
                raise OptionError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        if not 1 <= self.mask_question <= len(MASK_QUESTIONS):
            raise OptionError(f"mask_question must be from 1 to {len(MASK_QUESTIONS)}, not {self.mask_question}")
        if self.description is not None and not self.description.strip():
            raise OptionError("description must say something; leave it out to use the explainer's answer")
        if self.description is not None and not self.mask:
            raise OptionError("description is for the mask, so it has no meaning without one")

    @property
    def makes_masks(self) -> bool:
        """Whether masks are asked for."""
        return self.mask and not self.score_only
