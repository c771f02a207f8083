"""The demonstration's page: each picture with what the model says of it, where it looked, and what is true."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from forgery_eval.overlay import draw_mask, draw_overlay
from forgery_eval.page import COLOURS, escaped, page, picture_source
from llava import ForgeryReport
from llava.report import SCORE_SOURCES

_SIDE = 336
"""Longer side of a picture on the page, in pixels."""
_SHOWN = ("CAPTION", "REASONING", "CONCLUSION")
"""Stages that are not the same in every answer."""
_ROLES = {
    "seen": "seen in training",
    "unseen-known-mechanism": "not seen in training, but others of its mechanism were",
    "unseen-own-mechanism": "not seen in training, nor any of its mechanism",
}
_STYLE = f"""
body{{max-width:1100px}}
.card{{margin:1.2rem 0;padding:1rem;display:grid;grid-template-columns:minmax(0,1fr);gap:1rem}}
.pictures{{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:.6rem;align-content:start}}
@media (min-width:900px){{.card{{grid-template-columns:500px minmax(0,1fr)}}
.pictures{{grid-template-columns:repeat(3,1fr)}}}}
figure{{margin:0}}figure img{{width:100%;display:block;border-radius:4px}}figcaption{{font-size:12px;color:var(--soft)}}
.card h2{{margin:0 0 .4rem;border:0;font-size:1.1rem}}.card h2 small{{font-weight:normal}}
.word{{color:#fff;border-radius:4px;padding:.05rem .5rem}}
.word.real{{background:{COLOURS["real"]}}}.word.fake{{background:{COLOURS["fake"]}}}.word.none{{background:#6b7480}}
.bar{{height:.5rem;border-radius:4px;background:{COLOURS["real"]};overflow:hidden;max-width:22rem;margin:.3rem 0}}
.bar i{{display:block;height:100%;background:{COLOURS["fake"]}}}
dt{{font-size:12px;color:var(--soft);margin-top:.5rem}}dd{{margin:0}}details{{margin-top:.7rem}}
pre{{white-space:pre-wrap;font-size:12px}}
summary{{cursor:pointer;color:var(--soft)}}
"""


@dataclass(frozen=True)
class Truth:
    """What is known of a sample.

    Attributes:
        label: ``real`` or ``fake``.
        generator: What made a fake; None for a real image.
        trace: What the generator does, one sentence.
        role: Whether training saw the generator, see ``_ROLES``.
        strength: Of the trace, up to 1.
        caption: What the picture shows.
        attributes: Sentence of each attribute that it has.
        mask: File with 255 where something is wrong in one place only, or None.
    """

    label: str
    generator: str | None
    trace: str | None
    role: str | None
    strength: float | None
    caption: str
    attributes: Mapping[str, str]
    mask: Path | None

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any], folder: Path) -> "Truth":
        """Reads an entry of ``samples.json``, whose files lie in ``folder``."""
        plain = {name: entry[name] for name in cls.__dataclass_fields__ if name != "mask"}
        return cls(**plain, mask=folder / entry["mask"] if entry["mask"] else None)

    @property
    def in_words(self) -> str:
        """Label, and for a fake its generator and whether training saw it."""
        if self.generator is None or self.role is None:
            return self.label
        name = self.generator.replace("_", " ")
        return f"{self.label}, by {name} at strength {self.strength:.2f} ({_ROLES[self.role]})"


@dataclass(frozen=True)
class Shown:
    """A picture, what was said of it, and what is true if that is known."""

    file: Path
    report: ForgeryReport
    truth: Truth | None


def demo_page(shown: Sequence[Shown], notice: str) -> str:
    """Returns the page; it needs no other file.

    Args:
        shown: The pictures, in order.
        notice: What must be known of the model.
    """
    known = [item for item in shown if item.truth]
    right = sum(1 for item in known if item.truth and item.report.label == item.truth.label)
    parts = [
        "<h1>Real or fake, and why</h1>",
        f'<p class="notice">{escaped(notice)}</p>' if notice else "",
        "<p>Heat marks where the fusion of the two image towers looked. A mask, where there is one, is the true place "
        "of a fault.</p>",
    ]
    if len(known) < len(shown):
        parts += ["<h2>Your pictures</h2>", *(_card(item) for item in shown if item.truth is None)]
    parts += [
        "<h2>Samples</h2>",
        f"<p>Rendered scenes that training did not see: {right} of {len(known)} are called what they are.</p>",
        *(_card(item) for item in shown if item.truth),
    ]
    return page("Real or fake, and why", parts, _STYLE)


def _card(item: Shown) -> str:
    if item.report.error:
        return f'<article class="card"><div><b>{escaped(item.file.name)}</b><p>could not be judged</p></div></article>'
    return f'<article class="card"><div class="pictures">{_pictures(item)}</div><div>{_words(item)}</div></article>'


def _pictures(item: Shown) -> str:
    from llava.images import load_image

    picture = load_image(item.file)
    scale = _SIDE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    large = picture.resize(size, Image.Resampling.LANCZOS)
    figures = [_figure(large, "picture" if item.truth else item.file.name)]
    if item.report.attention is not None:
        heat = Image.fromarray(np.ascontiguousarray(item.report.attention, dtype=np.float32))
        looked = draw_overlay(large, np.asarray(heat.resize(size, Image.Resampling.BICUBIC)))
        figures.append(_figure(looked, "where the model looked"))
    if item.truth and item.truth.mask:
        with Image.open(item.truth.mask) as mask:
            wrong = np.asarray(mask.convert("L").resize(size, Image.Resampling.BICUBIC)) > 127
        figures.append(_figure(draw_mask(large, wrong), "true mask: where it is wrong"))
    return "".join(figures)


def _figure(picture: Image.Image, caption: str) -> str:
    said = escaped(caption)
    return f'<figure><img alt="{said}" src="{picture_source(picture)}"><figcaption>{said}</figcaption></figure>'


def _words(item: Shown) -> str:
    report, truth = item.report, item.truth
    verdict = report.label or "none"
    parts = [f'<h2>Called <span class="word {verdict}">{report.label or "neither"}</span>']
    if truth:
        mark = "✓" if report.label == truth.label else "✗"
        parts.append(f" <small>{mark} it is {escaped(truth.in_words)}</small>")
    parts.append("</h2>")
    if report.fake_probability is not None and report.score_source is not None:
        parts.append(f'<div class="bar"><i style="width:{100 * report.fake_probability:.1f}%"></i></div>')
        parts.append(f"<b>P(fake) {report.fake_probability:.3f}</b> <small>read {SCORE_SOURCES[report.score_source]}")
        if report.answer_probability is not None:
            parts.append(f"; {report.answer_probability:.3f} at the verdict of its answer")
        parts.append("</small>")
    if report.agrees is False:
        parts.append("<br><small>text and score disagree</small>")
    parts.append(_list({stage.lower(): report.stages[stage] for stage in _SHOWN if report.stages.get(stage)}))
    parts.append(f"<details><summary>The whole answer</summary><pre>{escaped(report.text)}</pre></details>")
    if truth:
        trace = {"trace": truth.trace} if truth.trace else {}
        true = {"caption": truth.caption, **truth.attributes, **trace}
        parts.append(f"<details><summary>What is true of it</summary>{_list(true)}</details>")
    return "".join(parts)


def _list(texts: Mapping[str, str]) -> str:
    return f"<dl>{''.join(f'<dt>{escaped(name)}</dt><dd>{escaped(text)}</dd>' for name, text in texts.items())}</dl>"
