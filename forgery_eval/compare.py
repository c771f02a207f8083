"""Puts evaluations side by side: a plain table with a row a metric and a column a run.

A run is a result folder of ``forgery eval``, or its ``metrics.json``. Metrics are over all images; what is undefined in
a run is a dash. Runs on different images are compared too, and it is said.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.cli import OptionParser, note, run_cli
from llava.errors import DataError, OptionError
from llava.files import read_json

_METRICS = "metrics.json"
_ABOUT = "settings"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = OptionParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="result folder of forgery eval")
    return parser.parse_args(arguments)


def read_metrics(run: Path) -> dict[str, Any]:
    """Returns what an evaluation wrote.

    Raises:
        UserError: There is no such file, or it is none of an evaluation's.
    """
    file = run / _METRICS if run.is_dir() else run
    content = read_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("detection"), dict) or "reasoning" not in content:
        raise DataError(f"{file} is no evaluation's; name a result folder of forgery eval")
    return content


def table(names: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table.

    Args:
        names: Heads of the columns.
        runs: What ``read_metrics`` returned for each.
    """
    rows: list[list[str]] = [["", *names]]
    for title, key in (("system", "system"), ("data", "data")):
        rows.append([title, *(str(run.get(key) or run.get(_ABOUT, {}).get(key) or "–") for run in runs)])
    found = [{**_detection(run), **_reasoning(run)} for run in runs]
    for metric in dict.fromkeys(name for metrics in found for name in metrics):
        rows.append([metric, *(metrics.get(metric, "–") for metrics in found)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(names) + 1)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _detection(run: Mapping[str, Any]) -> dict[str, str]:
    part = run["detection"]["all"]
    return {name: _number(value) for name, value in part["metrics"].items() if not isinstance(value, Mapping)}


def _reasoning(run: Mapping[str, Any]) -> dict[str, str]:
    part = run["reasoning"]["all"]["all"]
    return {name: _number(value) for name, value in part["metrics"].items()}


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def main(arguments: argparse.Namespace) -> int:
    """Prints the table; returns the exit status.

    Raises:
        UserError: A run cannot be read.
    """
    if len(arguments.runs) < 2:
        raise OptionError("name two runs or more to compare")
    runs = [read_metrics(run) for run in arguments.runs]
    if len({run.get(_ABOUT, {}).get("images") for run in runs}) > 1:
        note("these runs are not on the same images")
    print(table([str(run) for run in arguments.runs], runs))
    return 0


def run(arguments: Any = None) -> int:
    """Runs the command; returns its exit status."""
    return run_cli(lambda: main(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(run())
