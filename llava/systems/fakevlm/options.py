"""The options of FakeVLM's answers. Imports no torch."""

from dataclasses import dataclass
from typing import Literal, get_args

from llava.cli import option
from llava.errors import OptionError
from llava.systems.base import AnalyzeOptions

PromptStyle = Literal["raw", "chat", "chat_system"]
PROMPT_STYLES: tuple[PromptStyle, ...] = get_args(PromptStyle)
"""``raw``: image and question alone, as the authors evaluate; ``chat``: USER and ASSISTANT, as they train;
``chat_system``: the same after LLaVA's system sentence, their older recipe."""


@dataclass(frozen=True)
class FakeVLMOptions(AnalyzeOptions):
    """How images are analysed by FakeVLM.

    Attributes:
        conv_mode: Prompt style instead of the one in the model's config.
    """

    max_new_tokens: int = option(256, "longest answer, in tokens (default: 256, as published)", name="--max_new_tokens")
    conv_mode: PromptStyle | None = option(
        None, "prompt style (default: the model's; published: raw)", choices=PROMPT_STYLES
    )

    def __post_init__(self) -> None:
        """Checks ranges.

        Raises:
            OptionError: A value is unknown or out of range.
        """
        super().__post_init__()
        if self.conv_mode is not None and self.conv_mode not in PROMPT_STYLES:
            raise OptionError(f"conv_mode must be one of {', '.join(PROMPT_STYLES)}, not {self.conv_mode!r}")
