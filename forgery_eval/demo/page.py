"""The demonstration's page: each image with its report, where the model looked, and what is true."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from forgery_eval.pages.base import image_source, render
from forgery_eval.pages.overlay import draw_grey_mask, draw_overlay
from llava import ForgeryReport
from llava.images import load_image
from llava.labels import LABELS
from llava.report import SCORE_SOURCES

_SIDE = 336
"""Longer side of an image on the page, in pixels."""
_ROLES = {
    "seen": "seen in training",
    "unseen-known-mechanism": "not seen in training, but others of its mechanism were",
    "unseen-own-mechanism": "not seen in training, nor any of its mechanism",
}


@dataclass(frozen=True)
class Truth:
    """What is known of a sample.

    Attributes:
        label: ``real`` or ``fake``; None for an image that is neither, and gets no verdict from a good model.
        generator: What made a fake; None for a real image.
        trace: What the generator does, one sentence.
        role: Whether training saw the generator, see ``_ROLES``.
        strength: Of the trace, up to 1.
        caption: What the image shows.
        attributes: Sentence of each attribute that it has.
        mask: File with 255 where something is wrong in one part only, or None.
        delivery: Steps that it went through after it was made, or None.
        credit: Whose photograph it is a crop of, or None.
    """

    label: str | None
    generator: str | None
    trace: str | None
    role: str | None
    strength: float | None
    caption: str
    attributes: Mapping[str, str]
    mask: Path | None
    delivery: str | None = None
    credit: str | None = None

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any], folder: Path) -> "Truth":
        """Reads an entry of ``samples.json``, whose files lie in ``folder``."""
        plain: dict[str, Any] = {name: entry.get(name) for name in cls.__dataclass_fields__ if name != "mask"}
        return cls(**plain, mask=folder / entry["mask"] if entry["mask"] else None)

    def met_by(self, report: ForgeryReport) -> bool:
        """Whether a report says the truth; of an image that is neither, by giving no verdict."""
        return report.abstained if self.label is None else report.label == self.label

    @property
    def in_words(self) -> str:
        """Label, and for a fake its generator and whether training saw it."""
        if self.label is None:
            return "neither a photograph nor a rendered scene"
        words = self.label
        if self.generator is not None and self.role is not None:
            strength = "" if self.strength is None else f" at strength {self.strength:.2f}"
            words += f", by {self.generator.replace('_', ' ')}{strength} ({_ROLES[self.role]})"
        return f"{words}; sent on: {self.delivery}" if self.delivery else words


@dataclass(frozen=True)
class Shown:
    """An image, its report, and what is true if that is known."""

    file: Path
    report: ForgeryReport
    truth: Truth | None


def demo_page(shown: Sequence[Shown], notice: str) -> str:
    """Returns the page; it needs no other file.

    Args:
        shown: The images, in order.
        notice: What must be known of the model.
    """
    known = [item for item in shown if item.truth]
    constant = constant_stages([item.report for item in shown])
    return render(
        "demo.html",
        notice=notice,
        own=[_card(item, constant) for item in shown if item.truth is None],
        samples=[_card(item, constant) for item in known],
        right=sum(1 for item in known if item.truth and item.truth.met_by(item.report)),
        withheld=sum(1 for item in known if item.truth and item.truth.label and item.report.abstained),
    )


def constant_stages(reports: Sequence[ForgeryReport]) -> set[str]:
    """Returns the stages that are the same in the answers of both verdicts, and so tell nothing of an image."""
    if {report.label for report in reports} < set(LABELS):
        return set()
    answers = [report.stages for report in reports if report.stages]
    return {
        stage
        for stage in (answers[0] if answers else ())
        if len({stages.get(stage) for stages in answers}) == 1 and len(answers) > 1
    }


def _card(item: Shown, constant: set[str]) -> dict[str, Any]:
    """What the page shows of one image."""
    report, truth = item.report, item.truth
    if report.error:
        return {"name": item.file.name, "error": report.error}
    trace = {"trace": truth.trace} if truth and truth.trace else {}
    credit = {"photograph": truth.credit} if truth and truth.credit else {}
    return {
        "name": item.file.name,
        "error": "",
        "images": _images(item),
        "report": report,
        "source": SCORE_SOURCES[report.score_source] if report.score_source else "",
        "stages": {stage.lower(): text for stage, text in report.stages.items() if text and stage not in constant},
        "truth": truth,
        "facts": {"caption": truth.caption, **truth.attributes, **trace, **credit} if truth else {},
    }


def _images(item: Shown) -> list[tuple[str, str]]:
    """Caption and source of each image of a card: itself, where the model looked, predicted and true mask."""
    image = load_image(item.file)
    scale = _SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    large = image.resize(size, Image.Resampling.LANCZOS)
    drawn = [("image" if item.truth else item.file.name, large)]
    if item.report.attention is not None:
        heat = Image.fromarray(np.ascontiguousarray(item.report.attention, dtype=np.float32))
        resized = np.asarray(heat.resize(size, Image.Resampling.BICUBIC))
        drawn.append(("where the model looked", draw_overlay(large, resized)))
    if item.report.mask is not None:
        grey = Image.fromarray((np.asarray(item.report.mask, dtype=np.float32) * 255).astype(np.uint8))
        drawn.append(("predicted mask: what the model calls forged", draw_grey_mask(large, grey)))
    if item.truth and item.truth.mask:
        with Image.open(item.truth.mask) as mask:
            drawn.append(("true mask: where it is wrong", draw_grey_mask(large, mask)))
    return [(caption, image_source(shown)) for caption, shown in drawn]
