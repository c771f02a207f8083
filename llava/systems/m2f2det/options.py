"""The options of M2F2-Det's answers. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from llava.cli import option
from llava.errors import OptionError
from llava.systems.base import AnalyzeOptions
from llava.systems.m2f2det.answer import PROMPTS

PROMPT_CHOICES = ("auto", *PROMPTS)
TOKEN_CHOICES = ("own", "swapped")


@dataclass(frozen=True)
class M2F2DetOptions(AnalyzeOptions):
    """How images are analysed by M2F2-Det.

    Attributes:
        prompt: ``judge`` or ``explain`` as the authors ask, ``training`` as they train; ``auto``: as the model was
            trained if that was here, else ``judge``, or ``explain`` for a question.
        detector_token: ``own``: the prompt's token is made of the detector's two probabilities; ``swapped``: of the two
            exchanged, so that one sees whether answers follow it. Label and score are the detector's either way.
    """

    prompt: Literal["auto", "judge", "explain", "training"] = option(
        "auto", "judge or explain as the authors ask, training as they train; auto (default)", choices=PROMPT_CHOICES
    )
    detector_token: Literal["own", "swapped"] = option(
        "own",
        "own (default); swapped: exchange P(real) and P(fake) in the prompt's token, to see whether answers follow it",
        choices=TOKEN_CHOICES,
    )

    def __post_init__(self) -> None:
        """Checks ranges.

        Raises:
            OptionError: A value is unknown, or two exclude each other.
        """
        super().__post_init__()
        if self.prompt not in PROMPT_CHOICES:
            raise OptionError(f"prompt must be one of {', '.join(PROMPT_CHOICES)}, not {self.prompt!r}")
        if self.detector_token not in TOKEN_CHOICES:
            raise OptionError(f"detector_token must be one of {', '.join(TOKEN_CHOICES)}, not {self.detector_token!r}")
        if self.prompt == "judge" and self.question is not None:
            raise OptionError("the prompt judge has its own question; ask yours with the prompt explain or training")
