"""The results as a table in Markdown and as a page with pictures."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from forgery_eval.pages.base import COLOURS, image_source, render
from forgery_eval.pages.charts import figure
from llava.images import load_image
from llava.labels import LABELS
from scripts.ablation.results import METRICS, collect
from scripts.ablation.runs import VARIANTS, Workplace

Rows = list[list[str]]
_PICTURES = 6
_NEAR = 0.1
"""Differences in AUROC up to this have a picture of their own, beside rows that are at chance."""


def tables(found: Mapping[str, Any]) -> dict[str, Rows]:
    """Returns every table by its heading, the first row of each being the heads of its columns."""
    result = {"Variants": _variants(found), "Claims": _claims(found)}
    if found["scores"]:
        heads = ["P(fake)", "AUROC", "ECE", "within 0.01–0.99", "side of 0.5 as the text says"]
        rows = [
            [row["way"], *(f"{row[key]:.3f}" for key in ("auroc", "ece", "unsure", "as_text"))]
            for row in found["scores"]
        ]
        result["Ways to read a score from forgery-aware fusion"] = [heads, *rows]
    if found["mapper"]:
        heads = [
            "towers",
            "mapper loss at first",
            "at last",
            "teacher-forced accuracy",
            "accuracy of generated verdicts",
        ]
        keys = ("first_loss", "last_loss", "forced", "generated")
        rows = [[row["title"], *(f"{row[key]:.3f}" for key in keys)] for row in found["mapper"]]
        result["The mapper in training, and the model's own verdicts"] = [heads, *rows]
    if found["probes"]:
        heads = ["tower", "against", "AUROC after FACL", "AUROC of the other", "difference", "d", "FACL is better"]
        rows = [
            [
                row["tower"],
                row["other"],
                f"{row['facl']:.3f}",
                f"{row['than']:.3f}",
                *_difference(row["difference"]),
                row["verdict"],
            ]
            for row in found["probes"]
        ]
        result["Linear probes of forgery attributes on fake images"] = [heads, *rows]
    return result


def _variants(found: Mapping[str, Any]) -> Rows:
    heads = ["variant", "seeds", *METRICS.values(), "AUROC against forgery-aware fusion", "d", "minutes a run"]
    rows = [heads]
    for row in found["rows"].values():
        minutes = np.mean([done["seconds"] for done in row["done"]]) / 60
        numbers = [_number(row["metrics"][metric]) for metric in METRICS]
        against = _difference(row["against"].get("auroc"))
        rows.append([row["title"], str(len(row["seeds"])), *numbers, *against, f"{minutes:.1f}"])
    rows += [[title, "not run", *["–"] * (len(heads) - 2)] for title in found["missing"].values()]
    return rows


def _claims(found: Mapping[str, Any]) -> Rows:
    rows = [["claim", "difference in AUROC", "d", "here"]]
    return [*rows, *([one["claim"], *_difference(one["difference"]), one["verdict"]] for one in found["claims"])]


def _difference(values: Mapping[str, Any] | None) -> list[str]:
    """Mean with its interval, and effect size."""
    if values is None:
        return ["–", "–"]
    effect = "–" if values["effect"] is None else f"{values['effect']:+.1f}"
    return [f"{values['mean']:+.3f} ({values['low']:+.3f} to {values['high']:+.3f})", effect]


def _number(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.3f}"


def note(found: Mapping[str, Any]) -> str:
    """Says over what the numbers are."""
    done = [one for row in found["rows"].values() for one in row["done"]]
    machines = ", ".join(dict.fromkeys(one["machine"] for one in done)) or "–"
    dates = sorted(one["date"][:10] for one in done)
    when = "–" if not dates else dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return (
        f"{found['images']} test images of other seeds than all training data; means over seeds; 95 % intervals of "
        "paired differences over draws of seeds and images; d is the mean difference over its spread between seeds. "
        f"{machines}; {when}."
    )


def as_text(found: Mapping[str, Any]) -> str:
    """Returns all tables in Markdown."""
    parts = [note(found)]
    for heading, rows in tables(found).items():
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        lines.insert(1, "|" + "---|" * len(rows[0]))
        parts += [f"### {heading}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def as_page(place: Workplace, seeds: Sequence[int], found: Mapping[str, Any]) -> str:
    """Returns the page: tables, intervals as pictures, and the images on which variants differ most."""
    rows = found["rows"].values()
    differences = {row["title"]: row["against"]["auroc"] for row in rows if row["against"].get("auroc")}
    near = {title: values for title, values in differences.items() if abs(values["mean"]) <= _NEAR}
    drawn = {"differences": differences, "near": near if len(near) < len(differences) else {}}
    charts = [figure(partial(draw_intervals, differences=values), name) for name, values in drawn.items() if values]
    charts += [figure(partial(draw_seeds, found=found), "seeds")] if found["rows"] else []
    return render(
        "ablation.html", note=note(found), tables=tables(found), charts=charts, pictures=pictures(place, seeds)
    )


def draw_intervals(axes: Axes, *, differences: Mapping[str, Mapping[str, Any]]) -> None:
    """Draws each variant's difference in AUROC to the base variant, with its interval."""
    for place, values in enumerate(differences.values()):
        axes.plot([values["low"], values["high"]], [place, place], color=COLOURS["real"])
        axes.plot(values["mean"], place, "o", color=COLOURS["fake"])
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_yticks(range(len(differences)), [*differences])
    axes.set(xlabel="AUROC against\nforgery-aware fusion")


def draw_seeds(axes: Axes, *, found: Mapping[str, Any]) -> None:
    """Draws every run's AUROC."""
    for place, row in enumerate(found["rows"].values()):
        values = [metrics["auroc"] for metrics in row["by_seed"].values()]
        axes.plot(values, [place] * len(values), "o", color=COLOURS["fake"], alpha=0.7)
    axes.set_yticks(range(len(found["rows"])), [row["title"] for row in found["rows"].values()])
    axes.set(xlabel="AUROC of each seed")


def pictures(place: Workplace, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Returns the images whose P(fake) differs most between variants, with what each says on average over seeds.

    Random towers know nothing of an image, so that they are left out.
    """
    samples, found = collect(place, seeds)
    scores = {
        name: np.mean([one.scores for one in by_seed.values()], axis=0)
        for name, by_seed in found.items()
        if VARIANTS[name].towers != "random"
    }
    if not scores:
        return []
    spread = np.nan_to_num(np.ptp(np.stack(list(scores.values())), axis=0))
    result = []
    for index in np.argsort(-spread, kind="stable")[:_PICTURES]:
        sample = samples[int(index)]
        said = {VARIANTS[name].title: f"{values[index]:.2f}" for name, values in scores.items()}
        source = Markup(image_source(load_image(sample.image)))
        result.append({"source": source, "truth": LABELS[sample.label], "set": sample.set, "said": said})
    return result
