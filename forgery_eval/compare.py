"""Compares evaluations: their metrics side by side, and paired on the images that all of them have.

A run is a result folder of forgery eval, or its metrics.json. The first table has the metrics that each run's own
evaluation gave. Below it all runs are compared on the same images, which are known by their ids in the data set:
differences of each pair (the second run minus the first) with 95 % intervals of a paired bootstrap, McNemar's exact
test on verdicts with Holm's correction over all pairs, and agreement. Verdicts are compared where both runs give one.
Perturbed images (forgery eval --perturb) are compared alike with alike.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forgery_eval.pages.tables import DASH, aligned
from llava.cli import OptionParser, needs_extra, note, positive_int, run_cli
from llava.errors import OptionError
from llava.files import atomic_write, is_file, write_json
from llava.tables import LABEL_MAP_HELP, parse_label_map

_ABOUT = "settings"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = OptionParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="result folder of forgery eval")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one page that needs no other file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument(
        "--dataset_path", type=Path, help="data set of the runs, for groups and images (default: where it was then)"
    )
    parser.add_argument("--label-map", type=parse_label_map, metavar="WORD=real,…", help=LABEL_MAP_HELP)
    parser.add_argument("--resamples", type=positive_int, default=1000, metavar="N", help="bootstrap draws (1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    parsed = parser.parse_args(arguments)
    if parsed.seed < 0:
        parser.error("--seed must not be negative")
    return parsed


def table(names: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table of what each evaluation gave, with a row a metric and a column a run.

    Args:
        names: Heads of the columns.
        runs: What ``read_metrics`` returned for each.
    """
    rows: list[list[str]] = [["", *names]]
    for title, key in (("system", "system"), ("data", "data")):
        rows.append([title, *(str(run.get(key) or run.get(_ABOUT, {}).get(key) or DASH) for run in runs)])
    found = [{**_detection(run), **_reasoning(run)} for run in runs]
    for metric in dict.fromkeys(name for metrics in found for name in metrics):
        rows.append([metric, *(metrics.get(metric, DASH) for metrics in found)])
    return aligned(rows)


def _detection(run: Mapping[str, Any]) -> dict[str, str]:
    part = run["detection"]["all"]
    return {name: _number(value) for name, value in part["metrics"].items() if not isinstance(value, Mapping)}


def _reasoning(run: Mapping[str, Any]) -> dict[str, str]:
    part = run["reasoning"]["all"]["all"]
    return {name: _number(value) for name, value in part["metrics"].items()}


def _number(value: Any) -> str:
    if value is None:
        return DASH
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def main(arguments: argparse.Namespace) -> int:
    """Prints the tables and writes the files that are asked for; returns the exit status.

    Raises:
        UserError: A run cannot be read, or the runs cannot be compared.
    """
    if len(arguments.runs) < 2:
        raise OptionError("name two runs or more to compare")
    with needs_extra("eval"):
        from forgery_eval import matching, paired
        from forgery_eval.pages.comparison import comparison_page
    metrics = [matching.read_metrics(run) for run in arguments.runs]
    names = matching.short_names(arguments.runs)
    side_by_side = table([str(run) for run in arguments.runs], metrics)
    files = [matching.predictions_file(run, own) for run, own in zip(arguments.runs, metrics, strict=True)]
    missing = [str(file) for file in files if not is_file(file)]
    if missing and not (arguments.html or arguments.json):
        note(f"only the metrics are compared, since there are no predictions of the images: {', '.join(missing)}")
        if len({run.get(_ABOUT, {}).get("images") for run in metrics}) > 1:
            note("these runs are not on the same images")
        print(side_by_side)
        return 0
    data = matching.open_data(metrics, arguments.dataset_path, arguments.label_map)
    runs = [
        matching.read_evaluation(file, name, own, data) for file, name, own in zip(files, names, metrics, strict=True)
    ]
    images = matching.match_images(runs, data.samples)
    found = paired.compare(runs, images, data, draws=arguments.resamples, seed=arguments.seed)
    print(f"{side_by_side}\n\n{paired.describe(found)}")
    if arguments.json:
        write_json(arguments.json, found)
        print(f"written: {arguments.json}")
    if arguments.html:
        atomic_write(arguments.html, comparison_page(found, data.samples))
        print(f"written: {arguments.html}")
    return 0


def run(arguments: Any = None) -> int:
    """Runs the command; returns its exit status."""
    return run_cli(lambda: main(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(run())
