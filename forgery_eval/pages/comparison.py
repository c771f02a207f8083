"""The page of a comparison: runs on the same images, differences of each pair, and where they disagree."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from markupsafe import Markup

from forgery_eval.benchmarks import Sample
from forgery_eval.metrics.comparison import shown_metrics
from forgery_eval.pages.base import image_source, render, thumbnail
from forgery_eval.pages.charts import forest_chart
from forgery_eval.pages.tables import (
    Cell,
    Table,
    metric_cell,
    number,
    p_value,
    signed,
    signed_interval,
)
from forgery_eval.paired import SIDES, counts_in_words

MOST_IMAGES = 48
"""Images that the page shows of all pairs together, but at least one of each side of a pair."""
_MOST_OF_A_SIDE = 6
MOST_LISTED = 50
_MOST_VALUES = 30
_LEVEL = 0.05
_DRAWN = ("balanced_accuracy", "auroc", "iou")
_BY = {"rule": "by the rule of abstention", "text": "by the answer", "score": "by P(fake) from 0.5 on"}


def comparison_page(found: Mapping[str, Any], samples: Mapping[str, Sample]) -> str:
    """Returns the page.

    Args:
        found: What ``paired.compare`` returned.
        samples: Those of the data set by id, where it is known; their images are shown.
    """
    clean, perturbed = found["clean"], found["perturbed"]
    counts, *of_runs = counts_in_words(found)
    return render(
        "comparison.html",
        counts=counts,
        of_runs=of_runs,
        draws=found["draws"],
        charts=_charts(clean),
        runs=_runs_table(found["runs"], clean["runs"]),
        pairs=_pairs_table({"": clean}),
        perturbed=_pairs_table(perturbed) if perturbed else None,
        under=_conditions_table(clean, perturbed) if perturbed else None,
        left_out=", ".join(found["perturbed_in_some_only"]),
        disagreements=list(_disagreements(found["disagreements"], samples)),
        with_images=bool(samples),
    )


def _charts(clean: Mapping[str, Any]) -> list[Markup]:
    """The runs, and the differences of the others to the first."""
    titles = shown_metrics(clean["runs"])
    drawn = {name: titles[name] for name in _DRAWN if name in titles} or titles
    first = clean["runs"][0]["name"]

    def row(part: Mapping[str, Any]) -> dict[str, tuple[float, Any]]:
        values = {name: part["metrics"].get(name) for name in drawn}
        return {drawn[n]: (value, part["intervals"].get(n)) for n, value in values.items() if value is not None}

    runs = {part["name"]: row(part) for part in clean["runs"]}
    others = {pair["second"]: row(pair) for pair in clean["pairs"] if pair["first"] == first}
    charts = [forest_chart(runs, "Runs on the same images")] if any(runs.values()) else []
    return charts + ([forest_chart(others, f"Difference to {first}", zero=True)] if any(others.values()) else [])


def _runs_table(runs: Sequence[Mapping[str, Any]], parts: Sequence[Mapping[str, Any]]) -> Table:
    titles = shown_metrics(parts)
    rows = [
        [
            Cell(part["name"], tuple(filter(None, (run["system"], _BY[run["verdicts_by"]])))),
            Cell(str(part["with_verdict"])),
            *(_metric(part, name) for name in titles),
        ]
        for run, part in zip(runs, parts, strict=True)
    ]
    return Table(["", "verdicts", *titles.values()], rows)


def _metric(part: Mapping[str, Any], name: str) -> Cell:
    reason = part["undefined"].get(name) or ""
    return metric_cell(name, part["metrics"].get(name), reason=reason, bounds=part["intervals"].get(name))


def _pairs_table(conditions: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row a pair and condition: differences, tests and agreement."""
    pairs = [(name, pair) for name, part in conditions.items() for pair in part["pairs"]]
    titles = shown_metrics([pair for _, pair in pairs])
    head = ["second − first", "images", "p (Holm)", *titles.values()]
    head += ["only first right", "only second right", "McNemar p", "agreement", "kappa"]
    rows = []
    for condition, pair in pairs:
        holm = pair["p_holm"]
        differs = ("differs",) if holm is not None and holm < _LEVEL else ()
        right = [Cell(str(pair[side])) for side in SIDES]
        agreement = [Cell(number(pair[name]), order=pair[name]) for name in ("agreement", "kappa")]
        rows.append(
            [
                Cell(f"{pair['second']} − {pair['first']}", (condition,) if condition else ()),
                Cell(str(pair["images"])),
                Cell(p_value(holm), differs, order=holm),
                *(_difference(pair, name) for name in titles),
                *right,
                Cell(p_value(pair["p"]), order=pair["p"]),
                *agreement,
            ]
        )
    return Table(head, rows).without_dashes()


def _difference(pair: Mapping[str, Any], name: str) -> Cell:
    value, bounds = pair["metrics"].get(name), pair["intervals"].get(name)
    reason = pair["undefined"].get(name) or ""
    return Cell(signed(value), (signed_interval(bounds),) if bounds else (), reason, order=value)


def _conditions_table(clean: Mapping[str, Any], perturbed: Mapping[str, Mapping[str, Any]]) -> Table:
    """Balanced accuracy of each run under each condition."""
    conditions = {"clean": clean, **perturbed}
    rows = [
        [Cell(name), *(_metric(run, "balanced_accuracy") for run in part["runs"])] for name, part in conditions.items()
    ]
    return Table(["balanced accuracy", *(run["name"] for run in clean["runs"])], rows, pinned=1).without_dashes()


# --- where runs disagree


def _disagreements(pairs: Sequence[Mapping[str, Any]], samples: Mapping[str, Sample]) -> Iterator[dict[str, Any]]:
    most = max(1, min(_MOST_OF_A_SIDE, MOST_IMAGES // (2 * len(pairs))))

    @cache
    def picture(name: str) -> str:
        small = thumbnail(samples[name].image) if name in samples else None
        return image_source(small) if small else ""

    for pair in pairs:
        names = pair["first"], pair["second"]
        sides = [
            {
                "title": f"Only {name} is right",
                "cards": [
                    {"image": shown, "id": entry["id"], "words": _entry_words(entry, names)}
                    for entry in pair[side][:most]
                    for shown in [picture(entry["id"])]
                    if shown
                ],
                "table": _listed(pair[side], names),
            }
            for name, side in zip(names, SIDES, strict=True)
            if pair[side]
        ]
        first, second = (len(pair[side]) for side in SIDES)
        yield {
            "title": f"{names[1]} − {names[0]}",
            "words": f"only {names[0]} is right on {first} images, only {names[1]} on {second}",
            "counts": [
                _counts(group, values, names)
                for group, values in pair["counts"].items()
                if sides and (group == "label" or len(values) > 1)
            ],
            "sides": sides,
        }


def _entry_words(entry: Mapping[str, Any], names: Sequence[str]) -> str:
    said = "; ".join(
        f"{name}: {verdict}" + ("" if score is None else f", P(fake) {score:.3f}")
        for name, verdict, score in zip(names, entry["verdicts"], entry["fake_probabilities"], strict=True)
    )
    return f"is {entry['groups']['label']} · {said}"


def _listed(entries: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Table:
    """The most confident images; the groups of each stand below its id."""
    rows = [
        [
            Cell(entry["id"], tuple(f"{name} {value}" for name, value in entry["groups"].items() if name != "label")),
            Cell(entry["groups"]["label"]),
            *(
                Cell(verdict, () if score is None else (f"P(fake) {score:.3f}",))
                for verdict, score in zip(entry["verdicts"], entry["fake_probabilities"], strict=True)
            ),
        ]
        for entry in entries[:MOST_LISTED]
    ]
    more = len(entries) - len(rows)
    left_out = f"{more} more; all of them are in the JSON file (--json)." if more else ""
    return Table(["image", "it is", *names], rows, left_out)


def _counts(group: str, values: Mapping[str, Mapping[str, int]], names: Sequence[str]) -> Table:
    """How many images of each value of a group only one run has right, those with the most first."""
    ranked = sorted(values.items(), key=lambda item: -sum(item[1][side] for side in SIDES))
    shown = [(value, part) for value, part in ranked if any(part[side] for side in SIDES)][:_MOST_VALUES]
    rows = [[Cell(value), *(Cell(str(part[key])) for key in ("images", *SIDES))] for value, part in shown]
    return Table([group, "images", *(f"only {name} right" for name in names)], rows)
