"""ForgeryReport: what a system says about one image. Imports no torch."""

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

ScoreSource = Literal["verdict", "forced", "prompt", "detector"]
SCORE_SOURCES: dict[ScoreSource, str] = {
    "verdict": "before the verdict word of the model's own answer",
    "forced": "after the missing verdict was opened for the model",
    "prompt": "without an answer",
    "detector": "from the system's own head",
}
"""Where a probability was read, in words."""
SCORE_KIND: dict[ScoreSource, str] = {
    "verdict": "answer",
    "forced": "answer",
    "prompt": "prompt",
    "detector": "detector",
}
"""Scores of one kind are comparable; calibrations are for one kind."""


_ARRAYS = ("attention", "mask", "features")
"""Fields that are no JSON values."""


@dataclass
class ForgeryReport:
    """The verdict on one image and the reasons for it.

    Attributes:
        label: ``"real"`` or ``"fake"`` as the text says; None when the text says neither. Where only a score was asked
            for (``score_source`` is ``prompt``) there is no text, and the label is what the score says.
        fake_probability: P(fake) in 0..1; None for a system without a score and for an image that cannot be read.
        score_source: Where the probability was read: ``verdict``, before the verdict word of the model's own answer;
            ``forced``, after the missing tags and the verdict's opening were appended for one forward; ``prompt``,
            without an answer; ``detector``, from a system's own head.
        answer_probability: P(fake) at the verdict of the answer where ``fake_probability`` was read without the answer
            (``score_source`` is ``prompt``); None where they are the same, or there is no answer.
        answer_label: What the text says, where the label is a detector's; empty if the text says neither. None where
            the label is the text's, or there is no text.
        stages: Text of each stage of the answer, in the answer's order.
        attributes: Sentence of each attribute that the reasoning names.
        text: The answer as decoded.
        system: Name of the system that answered.
        attention: Where the model looked, ``[height, width]`` over the image's own shape, or None.
        mask: Which pixels are forged, ``[height, width]`` over the image's own shape, bool or in 0..1, or None.
        probabilities: P(fake) of each answer where several were sampled; the score of the answer is their mean and
            the text is the first one's.
        tag: Kind of image or forgery that the system named before it answered; empty for most systems.
        details: Further values that only this system gives, as plain JSON values.
        off_distribution: Whether the score was asked for in a way that the model was not trained for.
        abstained: Whether no verdict is given: the system declined to, or a rule (``llava.abstention``) withheld it. A
            withheld verdict with its score lies in ``details``, and label, score, stages and text are empty.
        abstained_because: Why; empty if a verdict is given.
        notice: What whoever reads this must know of the model; empty for most.
        error: Why the image could not be analysed; empty if it was.
        features: What tells known images from others, as the towers saw this one, shape (D,); None from a system that
            gives none with its answers.
    """

    label: str | None
    fake_probability: float | None
    score_source: ScoreSource | None
    answer_probability: float | None = None
    answer_label: str | None = None
    stages: dict[str, str] = field(default_factory=dict)
    attributes: dict[str, str] = field(default_factory=dict)
    text: str = ""
    system: str = ""
    attention: "np.ndarray | None" = None
    mask: "np.ndarray | None" = None
    probabilities: list[float] = field(default_factory=list)
    tag: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    off_distribution: bool = False
    abstained: bool = False
    abstained_because: str = ""
    notice: str = ""
    error: str = ""
    features: "np.ndarray | None" = field(default=None, compare=False, repr=False)

    @property
    def said(self) -> str | None:
        """What the text says, or the label where there is none."""
        return self.label if self.answer_label is None else self.answer_label or None

    @property
    def agrees(self) -> bool | None:
        """Whether the score says what the text says; None when either says nothing."""
        if self.said is None or self.fake_probability is None:
            return None
        return (self.fake_probability >= 0.5) == (self.said == "fake")

    @property
    def marked(self) -> float | None:
        """Share of the image that the mask calls forged, from one half on; None without a mask."""
        return None if self.mask is None else float((self.mask >= 0.5).mean())

    def stage(self, name: str) -> str:
        """Returns the text of the stage of that name, in any case; an empty string if the answer has none."""
        return next((text for stage, text in self.stages.items() if stage.lower() == name.lower()), "")

    @property
    def summary(self) -> str:
        """Text of the stage ``summary``, or an empty string."""
        return self.stage("summary")

    @property
    def caption(self) -> str:
        """Text of the stage ``caption``, or an empty string."""
        return self.stage("caption")

    @property
    def reasoning(self) -> str:
        """Text of the stage ``reasoning``, or an empty string."""
        return self.stage("reasoning")

    @property
    def conclusion(self) -> str:
        """Text of the stage ``conclusion``, or an empty string."""
        return self.stage("conclusion")

    def to_dict(self) -> dict[str, Any]:
        """Returns everything but ``attention``, ``mask`` and ``features`` as plain JSON values.

        Whoever writes the mask to a file adds its path.
        """
        plain = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in _ARRAYS}
        return {**plain, "agrees": self.agrees}
