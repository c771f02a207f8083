"""Judges pictures: verdict, P(fake) and reasoning for a file, a folder or a list.

Exit status: 0 all pictures were judged, 1 nothing could be done, 3 some pictures could not be read.
"""

import argparse
import errno
import hashlib
import os
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from forgery_eval.answers_file import AnswersFile, model_fingerprint
from forgery_eval.command import run_judging
from forgery_eval.model_options import (
    add_answer_options,
    add_batch_size,
    add_model_options,
    analyze_options,
    loading_options,
    open_detector,
)
from forgery_eval.overlay import draw_overlay
from llava.cli import OptionParser
from llava.images import list_images
from llava.report import SCORE_SOURCES
from llava.systems.base import AnalyzeOptions
from llava.systems.fakereasoning.answer import STAGES

if TYPE_CHECKING:
    import numpy as np

    from llava import ForgeryDetector, ForgeryReport

_OVERLAY_ENDING = ".attention.png"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = OptionParser(description=__doc__)
    images = parser.add_argument_group("pictures")
    images.add_argument("--img_path", required=True, type=Path, help="picture, folder (with subfolders) or .txt list")
    images.add_argument("--json", type=Path, metavar="OUT.jsonl", help="write one line a picture; run again to go on")
    images.add_argument("--attention-map", type=Path, metavar="FOLDER", help="draw where the model looked")
    add_batch_size(images)
    add_model_options(parser)
    add_answer_options(parser)
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace) -> int:
    """Judges the pictures as the arguments say; returns how many could not be judged."""
    options = analyze_options(arguments, attention=arguments.attention_map is not None)
    total = sum(1 for _ in list_images(arguments.img_path))
    if arguments.json is None:
        return _judge(open_detector(arguments), arguments, options, None, total)
    settings = {"model": model_fingerprint(arguments.model_path), **loading_options(arguments), **vars(options)}
    with closing(AnswersFile(arguments.json, settings)) as answers:
        return _judge(open_detector(arguments), arguments, options, answers, total)


def _judge(
    detector: "ForgeryDetector",
    arguments: argparse.Namespace,
    options: AnalyzeOptions,
    answers: AnswersFile | None,
    total: int,
) -> int:
    done = answers.done if answers else {}
    waiting: deque[Path] = deque()
    failed = 0

    def fail(complaint: str) -> None:
        nonlocal failed
        failed += 1
        tqdm.write(complaint, file=sys.stderr)

    def files() -> Iterator[Path]:
        for file in list_images(arguments.img_path):
            if str(file) not in done:
                waiting.append(file)
                yield file
            elif done[str(file)]:
                fail(f"could not judge {done[str(file)]} ({arguments.json} says)")

    reports = detector.analyze_many(files(), batch_size=arguments.batch_size, **vars(options))
    for report in tqdm(reports, unit=" images", total=total, initial=len(done)):
        file = waiting.popleft()
        if report.error:
            fail(f"cannot judge {report.error}")
        elif answers is None:
            tqdm.write(describe(file, report))
        if report.attention is not None:
            try:
                save_overlay(file, overlay_path(file, arguments.img_path, arguments.attention_map), report.attention)
            except ValueError as error:
                fail(f"cannot draw over {error}")
        if answers is not None:
            answers.write(str(file), report.to_dict())
    if failed:
        print(f"{failed} pictures could not be judged; they are named above", file=sys.stderr)
    return failed


def describe(file: Path, report: "ForgeryReport") -> str:
    """Returns a report for reading."""
    lines = [f"{file}", f"  verdict     {report.label or 'none: the answer gives no verdict'}"]
    if report.fake_probability is not None and report.score_source is not None:
        lines.append(f"  P(fake)     {report.fake_probability:.4f}  (read {SCORE_SOURCES[report.score_source]})")
    if report.answer_probability is not None:
        lines.append(f"  of answer   {report.answer_probability:.4f}  (read at its verdict)")
    if report.probabilities:
        each = " ".join(f"{chance:.4f}" for chance in report.probabilities)
        lines.append(f"  of answers  {each}")
    if report.agrees is False:
        lines.append("  note        the text and the score disagree")
    if report.off_distribution:
        lines.append("  note        this model was not trained to be asked for the score alone")
    for stage in STAGES:
        if report.stages.get(stage):
            lines.append(f"  {stage.lower():<11} {report.stages[stage]}")
    if report.text and not report.stages:
        lines.append(f"  answer      {report.text}")
    return "\n".join(lines) + "\n"


def save_overlay(file: Path, target: Path, attention: "np.ndarray") -> None:
    """Draws where the model looked over a picture; the file appears only when it is whole.

    Raises:
        ValueError: The picture is no longer the one that was judged, or its name is too long to add to.
        OSError: The overlay cannot be written, for example since the disk is full.
    """
    from llava.errors import ImageReadError
    from llava.images import load_image

    try:
        drawn = draw_overlay(load_image(file), attention)
    except (ImageReadError, ValueError) as error:
        raise ValueError(f"{file}, which changed after it was judged: {error}") from error
    partial = target.with_name(f".{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        drawn.save(partial, format="PNG")
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(f"{file}: the name of its overlay, {_OVERLAY_ENDING} added, is too long") from error
        raise


def overlay_path(file: Path, root: Path, folder: Path) -> Path:
    """Returns where a picture's overlay goes: below ``folder`` as the picture is below ``root``.

    The pictures of a list keep their whole path, so that no two overlays have one name.
    """
    if file == root:
        inside = Path(file.name)
    elif root.is_dir():
        inside = file.relative_to(root)
    else:
        inside = Path(*file.absolute().parts[1:])
    return folder / f"{inside}{_OVERLAY_ENDING}"


def run(arguments: Any = None) -> int:
    """Runs the command; returns its exit status."""
    return run_judging(lambda: main(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(run())
