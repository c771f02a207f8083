"""Runs compared on the images that they share: everything that is found of them, and the same in words.

Imports no torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from forgery_eval.matching import DataSet, Evaluation, Images
from forgery_eval.metrics.comparison import VERDICTS, Judged, add_holm, compare_runs, disagreements, shown_metrics
from forgery_eval.pages.tables import aligned, interval_words, number, p_value, signed, signed_interval
from llava.labels import LABELS

SIDES = ("only_first_right", "only_second_right")
_ON_THE_PAGE = ("accuracy", "strict_balanced_accuracy")
"""Differences that are not in the lines of the terminal, which are long enough."""


def compare(runs: Sequence[Evaluation], images: Images, data: DataSet, *, draws: int, seed: int) -> dict[str, Any]:
    """Compares runs on their common images.

    Args:
        runs: The runs.
        images: Their common images.
        data: Their data set, where it is known.
        draws: Number of bootstrap draws.
        seed: Of the draws.

    Returns:
        All that ``--json`` writes: the runs, ``clean`` and ``perturbed`` results of ``compare_runs``, and the
        disagreements of each pair.
    """

    def result(condition: str = "") -> tuple[dict[str, Any], list[Judged]]:
        found = [run.judged(images, condition) for run in runs]
        judged = [one for one, _ in found]
        compared = compare_runs(images.labels, judged, draws=draws, seed=seed)
        for part, (_, reasons) in zip(compared["runs"], found, strict=True):
            part["without_verdict"] = reasons
        return compared, judged

    clean, judged = result()
    conditions = list(dict.fromkeys(name for run in runs for name in run.perturbed))
    shared = [name for name in conditions if all(name in run.perturbed for run in runs)]
    perturbed = {name: result(name)[0] for name in shared}
    add_holm([pair for part in perturbed.values() for pair in part["pairs"]])
    return {
        "runs": [_about(run, images) for run in runs],
        "draws": draws,
        "seed": seed,
        "clean": clean,
        "disagreements": _disagreements(images, judged, clean["pairs"], data),
        "perturbed": perturbed,
        "perturbed_in_some_only": [name for name in conditions if name not in shared],
    }


def _about(run: Evaluation, images: Images) -> dict[str, Any]:
    settings = run.metrics.get("settings", {})
    return {
        "name": run.name,
        "system": settings.get("system"),
        "data": run.metrics.get("data"),
        "run": run.metrics.get("run"),
        "verdicts_by": run.verdicts_by,
        "images": images.counts[run.name],
        "only_here": images.only[run.name],
        "calibrated_on": run.fitted_on,
    }


def _disagreements(
    images: Images, judged: Sequence[Judged], pairs: Sequence[Mapping[str, Any]], data: DataSet
) -> list[dict[str, Any]]:
    """Of each pair the images that one run has right and the other wrong, and how many of each label and group."""
    by_name = {run.name: run for run in judged}
    groups = [_groups(images, place, data) for place in range(len(images.ids))]
    found = []
    for pair in pairs:
        two = by_name[pair["first"]], by_name[pair["second"]]
        places = disagreements(images.labels, *two)
        compared = np.flatnonzero(two[0].known(VERDICTS) & two[1].known(VERDICTS))
        counts: dict[str, dict[str, dict[str, int]]] = {}
        for key, own in (("images", compared), *zip(SIDES, places, strict=True)):
            for name, value in (item for place in own for item in groups[place].items()):
                part = counts.setdefault(name, {}).setdefault(value, dict.fromkeys(("images", *SIDES), 0))
                part[key] += 1
        listed = [[_entry(images, place, two, groups[place]) for place in own] for own in places]
        about = {"first": pair["first"], "second": pair["second"], "counts": counts}
        found.append({**about, **dict(zip(SIDES, listed, strict=True))})
    return found


def _groups(images: Images, place: int, data: DataSet) -> dict[str, str]:
    sample = data.samples.get(images.ids[place])
    return {"label": LABELS[images.labels[place]], **({"set": sample.set, **sample.groups} if sample else {})}


def _entry(images: Images, place: int, two: Sequence[Judged], groups: Mapping[str, str]) -> dict[str, Any]:
    scores = [float(run.scores[place]) for run in two]
    return {
        "id": images.ids[place],
        "groups": dict(groups),
        "verdicts": [LABELS[run.verdicts[place]] for run in two],
        "fake_probabilities": [None if score != score else score for score in scores],
    }


# --- in words


def describe(found: Mapping[str, Any]) -> str:
    """Returns a comparison in plain lines and tables.

    Args:
        found: What ``compare`` returned.
    """
    words = f"second run minus first, with 95 % intervals of {found['draws']} paired draws:"
    parts = [
        "\n  ".join(counts_in_words(found)),
        aligned(_run_rows(found["clean"]["runs"])),
        f"{words}\n{aligned(_pair_rows({'': found['clean']}))}",
    ]
    if found["perturbed"]:
        parts.append(f"after perturbations, alike:\n{aligned(_pair_rows(found['perturbed']))}")
    return "\n\n".join(parts)


def counts_in_words(found: Mapping[str, Any]) -> list[str]:
    """Says which images are compared, and then of each run which images it has and which get no verdict."""
    clean = found["clean"]
    lines = [f"{clean['images']} images are common to all runs, {clean['real']} real and {clean['fake']} fake"]
    for about, part in zip(found["runs"], clean["runs"], strict=True):
        words = [f"{about['name']}: {about['images']} images, {about['only_here']} of them in no other run"]
        if about["calibrated_on"]:
            words.append(f"{about['calibrated_on']} more left out, which it was calibrated on")
        if part["without_verdict"]:
            reasons = ", ".join(f"{reason} {count}" for reason, count in part["without_verdict"].items())
            words.append(f"{clean['images'] - part['with_verdict']} common ones without a verdict ({reasons})")
        lines.append(", ".join(words))
    return lines


def _run_rows(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    titles = shown_metrics(runs)
    rows = [["", "verdicts", *titles.values()]]
    for run in runs:
        cells = []
        for name in titles:
            value, bounds = run["metrics"].get(name), run["intervals"].get(name)
            cells.append(number(value) + (f" ({interval_words(bounds)})" if bounds else ""))
        rows.append([run["name"], str(run["with_verdict"]), *cells])
    return rows


def _pair_rows(conditions: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A row a pair and condition, by the condition's name."""
    pairs = [(name, pair) for name, part in conditions.items() for pair in part["pairs"]]
    titles = shown_metrics([pair for _, pair in pairs])
    titles = {name: titles[name] for name in titles if name not in _ON_THE_PAGE}
    rows = [["", "images", *titles.values(), "only 1st, only 2nd right", "McNemar p", "p (Holm)", "same", "kappa"]]
    for name, pair in pairs:
        differences = [
            signed(pair["metrics"][metric]) + (f" ({signed_interval(bounds)})" if bounds else "")
            for metric in titles
            for bounds in [pair["intervals"].get(metric)]
        ]
        right = f"{pair['only_first_right']}, {pair['only_second_right']}"
        tests = [p_value(pair["p"]), p_value(pair["p_holm"]), number(pair["agreement"]), number(pair["kappa"])]
        title = " ".join(filter(None, (name, f"{pair['second']} − {pair['first']}")))
        rows.append([title, str(pair["images"]), *differences, right, *tests])
    return rows
