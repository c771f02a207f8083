"""Analyses the bundled samples with the embedded model, prints the verdicts and reasons, and writes one HTML page.

Images of your own (files, folders, .txt lists) are analysed as well, before the samples.

Exit status: 0 all images were analysed, 1 nothing could be done, 3 some images could not be read.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from forgery_eval.demo.page import Shown, Truth, demo_page
from forgery_eval.inference import describe
from llava.assets import SAMPLES
from llava.cli import SOME_FAILED, OptionParser, log, progress, run_cli
from llava.files import atomic_write, read_json
from llava.images import list_images

if TYPE_CHECKING:
    from llava import ForgeryDetector


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = OptionParser(prog="demo.sh", description=__doc__)
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="image, folder or .txt list")
    parser.add_argument("--out", type=Path, default=Path("demo.html"), help="the page (default: demo.html)")
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace) -> int:
    """Analyses the images and writes the page; returns the exit status.

    Raises:
        UserError: An image's path holds nothing, there is no embedded model, or the page cannot be written.
    """
    from llava import ForgeryDetector

    own = [(file, None) for path in arguments.images for file in list_images(path)]
    detector = ForgeryDetector.from_pretrained()
    detector.announce()
    shown = analyze_shown(detector, [*own, *read_samples()])
    atomic_write(arguments.out, demo_page(shown, detector.notice))
    print(f"written: {arguments.out.resolve()}")
    return SOME_FAILED if any(item.report.error for item in shown) else 0


def read_samples() -> list[tuple[Path, Truth | None]]:
    """Returns the bundled samples with what is true of them."""
    entries = read_json(SAMPLES / "samples.json")["samples"]
    return [(SAMPLES / entry["image"], Truth.from_entry(entry, SAMPLES)) for entry in entries]


def analyze_shown(detector: "ForgeryDetector", images: Sequence[tuple[Path, Truth | None]]) -> list[Shown]:
    """Analyses the images and prints each report as it comes."""
    shown = []
    reports = detector.analyze_many([file for file, _ in images], attention=True)
    for (file, truth), report in zip(images, progress(reports, total=len(images), unit=" images"), strict=True):
        shown.append(Shown(file, report, truth))
        if report.error:
            log(f"cannot analyse {report.error}")
        else:
            text = describe(Path(file.name), report)
            tqdm.write(f"{text}  truth       {truth.in_words}\n" if truth else text)
    return shown


def run(arguments: Any = None) -> int:
    """Runs the command; returns its exit status."""
    return run_cli(lambda: main(parse_arguments(arguments)))
