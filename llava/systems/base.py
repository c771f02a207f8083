"""What a published system must offer to live here. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

if TYPE_CHECKING:
    from PIL import Image

    from llava.report import ForgeryReport

ScoreKind = Literal["auto", "answer", "prompt"]
SCORE_KINDS: tuple[ScoreKind, ...] = get_args(ScoreKind)


@dataclass(frozen=True)
class CheckpointFiles:
    """What can be told of a checkpoint before any weight is read.

    Attributes:
        folder: Where the files lie.
        config: Contents of ``config.json``.
    """

    folder: Path
    config: dict[str, Any]


@dataclass(frozen=True)
class AnalyzeOptions:
    """How images are to be judged.

    Attributes:
        question: What is asked in the place of the system's own question.
        conv_mode: Prompt template in the place of the one in the model's config.
        assistant_prefix: Beginning of the answer, which the model then goes on from.
        score_only: No answer, only P(fake), from one forward.
        score: Which P(fake) is reported beside an answer: ``answer``, at the verdict that follows the model's own
            reasoning; ``prompt``, from one more forward without the answer; ``auto``, what the model's config says.
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 decodes greedily; above, answers are sampled.
        top_p: Sample from the smallest set of words that has this probability; None means all.
        num_beams: Above 1, beam search.
        seed: Of sampling; an image's answer depends on it and on the picture, not on its place or batch.
        samples: Number of answers an image; above 1 they are sampled and P(fake) is their mean.
        tolerant: Also read verdicts that are not in the strict published format.
        attention: Also say where the model looked.
    """

    question: str | None = None
    conv_mode: str | None = None
    assistant_prefix: str = ""
    score_only: bool = False
    score: ScoreKind = "auto"
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float | None = None
    num_beams: int = 1
    seed: int = 0
    samples: int = 1
    tolerant: bool = False
    attention: bool = False

    def __post_init__(self) -> None:
        """Refuses what cannot be.

        Raises:
            ValueError: A value is out of range, or two exclude each other.
        """
        least = {"max_new_tokens": 1, "num_beams": 1, "samples": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, not {getattr(self, name)}")
        if not (self.temperature == 0 or 1e-6 <= self.temperature <= 1e6):
            raise ValueError(f"temperature must be 0 or from 0.000001 to 1000000, not {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples above 1 need a temperature above 0, or all answers would be the same")
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError("beam search and sampling exclude each other: set num_beams to 1 or temperature to 0")
        if self.score not in SCORE_KINDS:
            raise ValueError(f"score must be one of {', '.join(SCORE_KINDS)}, not {self.score!r}")
        if self.score_only and (self.samples > 1 or self.assistant_prefix or self.score == "answer"):
            raise ValueError(
                "score_only asks for no answer, so samples, assistant_prefix and score='answer' have no meaning"
            )


@runtime_checkable
class System(Protocol):
    """One published way to judge an image, from files to reports."""

    name: str
    notice: str

    @classmethod
    def opens(cls, files: CheckpointFiles) -> bool:
        """Whether these files are a checkpoint of this system, judged by their contents alone."""
        ...

    @classmethod
    def load(cls, path: str, **options: Any) -> "System":
        """Opens the checkpoint; ``options`` are those of ``load_pretrained_model``."""
        ...

    def prepare(self, image: "Image.Image") -> Any:
        """Turns a picture into what ``analyze_batch`` takes; runs beside the model, in another thread."""
        ...

    def batch_size(self, options: AnalyzeOptions) -> int:
        """A batch that fits and is fast on this device."""
        ...

    def prompt(self, options: AnalyzeOptions) -> str:
        """What the model is asked, up to where its answer begins."""
        ...

    def analyze_batch(self, prepared: Sequence[Any], options: AnalyzeOptions) -> "list[ForgeryReport]":
        """Judges a batch; one report an image, in order."""
        ...
