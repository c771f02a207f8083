"""Judges the bundled samples with the embedded model, prints what it says, and writes one HTML page.

Pictures of your own (files, folders, .txt lists) are judged as well, before the samples.

Exit status: 0 all pictures were judged, 1 nothing could be done, 3 some pictures could not be read.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from forgery_eval.command import run_judging
from forgery_eval.demo_page import Shown, Truth, demo_page
from forgery_eval.inference import describe
from llava.assets import SAMPLES
from llava.cli import OptionParser
from llava.files import atomic_write
from llava.images import list_images

if TYPE_CHECKING:
    from llava import ForgeryDetector


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = OptionParser(prog="demo.sh", description=__doc__)
    parser.add_argument("pictures", nargs="*", type=Path, metavar="PICTURE", help="picture, folder or .txt list")
    parser.add_argument("--out", type=Path, default=Path("demo.html"), help="the page (default: demo.html)")
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace) -> int:
    """Judges the pictures and writes the page; returns how many could not be judged."""
    from llava import ForgeryDetector

    own = [(file, None) for path in arguments.pictures for file in list_images(path)]
    detector = ForgeryDetector.from_pretrained()
    if detector.notice:
        print(f"note: {detector.notice}\n", file=sys.stderr)
    shown = judge(detector, [*own, *read_samples()])
    atomic_write(arguments.out, demo_page(shown, detector.notice))
    print(f"written: {arguments.out.resolve()}")
    return sum(1 for item in shown if item.report.error)


def read_samples() -> list[tuple[Path, Truth | None]]:
    """Returns the bundled samples with what is true of them."""
    entries = json.loads((SAMPLES / "samples.json").read_text(encoding="utf-8"))["samples"]
    return [(SAMPLES / entry["image"], Truth.from_entry(entry, SAMPLES)) for entry in entries]


def judge(detector: "ForgeryDetector", pictures: Sequence[tuple[Path, Truth | None]]) -> list[Shown]:
    """Judges the pictures and prints what is said of each as it comes."""
    shown = []
    reports = detector.analyze_many([file for file, _ in pictures], attention=True)
    for (file, truth), report in zip(
        pictures, tqdm(reports, total=len(pictures), unit=" images", disable=None), strict=True
    ):
        shown.append(Shown(file, report, truth))
        if report.error:
            tqdm.write(f"cannot judge {report.error}", file=sys.stderr)
        else:
            said = describe(Path(file.name), report)
            tqdm.write(f"{said}  truth       {truth.in_words}\n" if truth else said)
    return shown


def run(arguments: Any = None) -> int:
    """Runs the command; returns its exit status."""
    return run_judging(lambda: main(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(run())
