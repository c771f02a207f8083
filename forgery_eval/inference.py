"""Tells real images from fake ones: verdict, P(fake) and reasons for a file, a folder or a list.

Exit status: 0 all images were analysed, 1 nothing could be done, 3 some images could not be read.
"""

import argparse
import csv
import errno
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace
from functools import partial
from glob import has_magic
from itertools import chain, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import quote

from tqdm import tqdm

from forgery_eval.answers import AnswerKind
from forgery_eval.fingerprints import file_identity, model_fingerprint, weight_locations
from forgery_eval.html_report import HtmlReport, provenance_of
from forgery_eval.model_options import (
    LOCATIONS,
    SPEED,
    add_batch_size,
    add_model_options,
    analyze_options,
    loading_options,
    open_detector,
    parse_with_system,
)
from forgery_eval.names import NameTable
from forgery_eval.pages.overlay import draw_overlay
from forgery_eval.runner import Batch, analyze_batches
from forgery_eval.store import AnswersFile
from forgery_eval.workers import WorkerPool, add_workers, check_workers, split
from llava.abstention import CALIBRATION
from llava.cli import SOME_FAILED, OptionParser, inform, is_verbose, log, note, progress, run_cli
from llava.errors import DataError, FileError, ImageReadError
from llava.files import atomic_file, digest_file, file_errors
from llava.images import describe_passed_over, list_images
from llava.provenance import Provenance
from llava.report import SCORE_SOURCES
from llava.sources import EncodedSource, load_source, refuse_url, standard_input, web_image
from llava.systems import registry
from llava.systems.base import AnalyzeOptions
from llava.tables import LIST_SUFFIXES, NameFinder, is_url, stream_sources

if TYPE_CHECKING:
    import numpy as np

    from llava import ForgeryReport

_MANY = 20
"""From more images than these on, a row each is printed."""
_COUNTED = 10_000
"""So many images are counted before the first is analysed; from then on, their number is not known beforehand."""
_OVERLAY_ENDING = ".attention.png"
_STDIN = "-"
Item = Path | EncodedSource
"""An image: a file, or what was piped or lies on the web."""
_CSV_HEADER = ("image", "verdict", "fake_probability", "error")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = OptionParser(description=__doc__)
    images = parser.add_argument_group("images")
    images.add_argument(
        "--img_path",
        required=True,
        nargs="+",
        action="extend",
        help="images, folders (with subfolders), patterns such as 'a/*.png', .txt lists or tables; - is standard input",
    )
    images.add_argument(
        "--allow-urls", action="store_true", help="fetch http and https addresses (public ones, up to 64 MB, 30 s)"
    )
    images.add_argument("--json", type=Path, metavar="OUT.jsonl", help="write one line an image; run again to resume")
    images.add_argument("--sort", choices=("score",), help="print a short table, the most likely fakes first")
    images.add_argument(
        "--csv", type=Path, metavar="OUT.csv", help="write a row an image: image, verdict, score, error"
    )
    images.add_argument(
        "--html",
        type=Path,
        metavar="OUT.html",
        help="write the reports as a page, and whether each verdict holds after JPEG, resizing and cropping",
    )
    images.add_argument("--attention-map", type=Path, metavar="FOLDER", help="draw where the model looked")
    images.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="calibration with a rule of abstention, from forgery eval --calibrate (default: the model's own, if any)",
    )
    images.add_argument("--no-abstain", action="store_true", help="give every verdict, however unsure")
    images.add_argument(
        "--hash-images",
        action="store_true",
        help="with --json: know images again by their contents (default: by path, size and time of change)",
    )
    add_batch_size(images)
    add_workers(images)
    add_model_options(parser)
    parsed = parse_with_system(parser, arguments)
    check_workers(parsed, "detect", sys.argv[1:] if arguments is None else arguments)
    if parsed.workers and parsed.html:
        parser.error("--html asks the model again about each image, which workers do not; leave out --workers")
    if parsed.hash_images and not parsed.json:
        parser.error("--hash-images says how --json knows images again; it needs --json")
    finder = NameFinder(Path())
    parsed.img_path = [path for word in parsed.img_path for path in _paths(word, finder, parsed.allow_urls)]
    finder.report("--img_path")
    return parsed


def _paths(word: str, finder: NameFinder, allow_urls: bool) -> Sequence[Item]:
    """Returns what an argument names: itself, or what its pattern matches.

    Raises:
        ImageReadError: It is an address on the web, and these are not allowed; or standard input cannot be read.
    """
    if is_url(word):
        if not allow_urls:
            raise refuse_url(word)
        return [web_image(word, allowed=True)]
    if word == _STDIN:
        return [standard_input(sys.stdin.buffer)]
    path = finder.find(word)
    if path.exists() or not has_magic(word):
        return [path]
    root = Path(path.anchor or ".")
    return sorted(root.glob(str(path.relative_to(path.anchor)))) or [path]


def main(arguments: argparse.Namespace) -> int:
    """Analyses the images as the arguments say; returns the exit status.

    Raises:
        UserError: Nothing could be done: wrong options, no images, no model, or files that cannot be written.
    """
    options = analyze_options(arguments, attention=arguments.attention_map is not None)
    passed_over: list[Path] = []
    found = _all_images(arguments, passed_over)
    first = list(islice(found, _COUNTED))
    total = len(first) if len(first) < _COUNTED else None
    items = chain(first, found)
    if arguments.json is None:
        failed = _Inference(arguments, options, None).run(items, total)
    else:
        settings = {
            "model": _fingerprint(arguments),
            "system": arguments.options_of,
            **{name: value for name, value in loading_options(arguments).items() if name not in SPEED},
            **vars(options),
            **_rule_settings(arguments),
        }
        with closing(AnswersFile(arguments.json, settings)) as answers:
            failed = _Inference(arguments, options, answers).run(items, total)
    if passed_over:
        inform(describe_passed_over(passed_over))
    if failed:
        log(f"{failed} images could not be analysed; they are named above")
    return SOME_FAILED if failed else 0


def _fingerprint(arguments: argparse.Namespace) -> list[Any]:
    """What tells the model, its base and its towers from others in the same places; empty without a model."""
    if arguments.model_path is None:
        return []
    files = registry.read_files(arguments.model_path, arguments.model_base)
    return model_fingerprint(weight_locations(files.folder, [getattr(arguments, name) for name in LOCATIONS]))


def _rule_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What answers depend on beside model and options: the rule, if there is one."""
    if arguments.no_abstain:
        return {"abstain": False}
    own = Path(arguments.model_path or "") / CALIBRATION
    file = arguments.calibration or (own if own.is_file() else None)
    return {} if file is None else {"calibration": digest_file(file)}


def _all_images(arguments: argparse.Namespace, passed_over: list[Path] | None = None) -> Iterator[Item]:
    """Yields the images of all paths, each once."""
    paths = arguments.img_path
    with closing(NameTable()) as seen:
        # A folder alone has each file once.
        once = len(paths) == 1 and isinstance(paths[0], Path) and paths[0].is_dir()
        for path in paths:
            with file_errors(str(path), "read"):
                for item in _images_of(path, arguments.allow_urls, passed_over):
                    if once or seen.add(str(item)):
                        yield item


def _images_of(path: Item, allow_urls: bool, passed_over: list[Path] | None) -> Iterator[Item]:
    if isinstance(path, EncodedSource):
        yield path
    elif path.suffix.lower() in LIST_SUFFIXES and path.is_file():
        name = None
        for name in stream_sources(path):
            yield web_image(name, allowed=allow_urls) if isinstance(name, str) else name
        if name is None:
            yield from list_images(path)  # says so
    else:
        yield from list_images(path, passed_over)


class _Inference:
    """One run over the images.

    Args:
        arguments: The command line.
        options: How images are analysed.
        answers: Where answers are written; None prints them.
    """

    def __init__(self, arguments: argparse.Namespace, options: AnalyzeOptions, answers: AnswersFile | None) -> None:
        self._arguments = arguments
        self._options = options
        self._answers = answers
        self._failed = 0
        self._short = False
        self._rows: list[tuple[float, str]] = []
        self._constant = AnswerKind.of(arguments.options_of).constant_stages
        self._left_out = () if is_verbose() else self._constant
        self._html: HtmlReport | None = None
        self._table = _Table(arguments.csv, answers)
        self._ask = partial(_told, contents=arguments.hash_images)

    def run(self, items: Iterable[Item], total: int | None) -> int:
        """Analyses what has no answer yet; returns how many images failed, in earlier runs too.

        Args:
            items: The images, gone through once.
            total: Their number; None for very many.
        """
        many = total is None or total > _MANY
        self._short = self._arguments.sort is not None or (many and not is_verbose())
        done = len(self._answers.done) if self._answers else 0
        if done and self._arguments.html is not None:
            note(f"{done} images were analysed by an earlier run and are not in {self._arguments.html}")
        with ExitStack() as stack:
            batches = self._batches(self._remaining(items), stack)
            stack.enter_context(self._html or nullcontext())
            stack.enter_context(self._table)
            bar = stack.enter_context(progress(total=total, initial=done, unit=" images"))
            for batch in batches:
                self._finish(batch)
                bar.update(len(batch.items))
        for _, row in sorted(self._rows):
            print(row)
        return self._failed

    def _batches(self, items: Iterator[Item], stack: ExitStack) -> Iterator[Batch[Item]]:
        """Opens the model, here or in workers, and analyses the images, in order."""
        arguments, options = self._arguments, self._options
        rule = {"calibration": arguments.calibration, "abstain": not arguments.no_abstain}
        if arguments.workers:
            pool = stack.enter_context(WorkerPool(arguments, options, **rule))
            self._note_dtype(pool.describe)
            size = pool.batch_size if arguments.batch_size == "auto" else arguments.batch_size
            finished = pool.analyze_in_order(split(items, size), _itself, options, self._ask)
            return (Batch(done.items, done.result.reports, asked=done.result.asked) for done in finished)
        detector = open_detector(arguments, **rule)
        self._note_dtype(detector.system.describe(options))
        if arguments.html is not None:
            options = replace(options, attention=options.attention or detector.has_attention)
            self._html = HtmlReport(arguments.html, detector, options, self._constant)
        return analyze_batches(detector, items, _itself, options, arguments.batch_size)

    def _note_dtype(self, described: Mapping[str, Any]) -> None:
        if self._answers is not None:
            self._answers.set_dtype(described.get("dtype"), is_automatic=self._arguments.dtype == "auto")

    def _remaining(self, items: Iterable[Item]) -> Iterator[Item]:
        for file in items:
            error = self._answers.done.get(str(file)) if self._answers else None
            if error is None:
                yield file
            elif error:
                self._fail(f"could not analyse {error} ({self._arguments.json} says)")

    def _finish(self, batch: Batch[Item]) -> None:
        """Prints or writes a batch, and draws its overlays."""
        told = batch.asked or [self._ask(file) for file in batch.items]
        for file, report, (says, _) in zip(batch.items, batch.reports, told, strict=True):
            if report.error:
                self._fail(f"cannot analyse {report.error}")
            elif self._answers is None:
                self._print(file, report, says)
            if self._html is not None:
                self._html.add(file, report)
            if report.attention is not None and self._arguments.attention_map is not None:
                target = self._overlay(file)
                try:
                    save_overlay(file, target, report.attention)
                except DataError as error:
                    self._fail(f"cannot draw over {error}")
        self._table.write(batch)
        if self._answers is not None:
            pairs = [(str(file), report) for file, report in zip(batch.items, batch.reports, strict=True)]
            self._answers.write(pairs, [{"provenance": s.to_dict(), "identity": known} for s, known in told])

    def _overlay(self, file: Item) -> Path:
        folder: Path = self._arguments.attention_map
        if isinstance(file, EncodedSource):
            return folder / f"{quote(file.name, safe='')}{_OVERLAY_ENDING}"
        paths = [path for path in self._arguments.img_path if isinstance(path, Path)]
        return overlay_path(
            file, next((path for path in paths if path == file or path in file.parents), paths[0]), folder
        )

    def _print(self, file: Item, report: "ForgeryReport", provenance: Provenance) -> None:
        if self._arguments.sort:
            score = report.fake_probability
            self._rows.append((2.0 if score is None else -score, short_row(file, report)))
        else:
            short = self._short
            tqdm.write(short_row(file, report) if short else describe(file, report, self._left_out, provenance))

    def _fail(self, complaint: str) -> None:
        self._failed += 1
        log(complaint)


def _itself(item: Item) -> Item:
    return item


def _told(item: Item, contents: bool) -> tuple[Provenance, list[int] | str | None]:
    """What an image's file says of its origin, and what tells it from another file."""
    identity = None if isinstance(item, EncodedSource) else file_identity(str(item), contents=contents)
    return provenance_of(item), identity


class _Table:
    """A CSV table of the answers, a row an image, written as they come; none without a path.

    Args:
        path: The table. One that this command wrote is replaced.
        answers: Answers of an earlier run, whose rows come first.
    """

    def __init__(self, path: Path | None, answers: AnswersFile | None) -> None:
        self._stack = ExitStack()
        self._file: IO[str] | None = None
        if path is None:
            return
        with file_errors(path, "write"):
            if path.is_file() and path.stat().st_size and not _is_own_table(path):
                raise DataError(f"{path} is no table of this command; name another file")
            self._file = self._stack.enter_context(
                path.open("w", encoding="utf-8", errors="backslashreplace", newline="")
            )
        self._path = path
        self._add([_CSV_HEADER])
        self._add([entry["image"], *_values(entry)] for entry in (answers.lines() if answers else ()))

    def __enter__(self) -> "_Table":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def write(self, batch: Batch[Item]) -> None:
        """Adds a row for each image of a batch, and returns when they are written."""
        pairs = zip(batch.items, batch.reports, strict=True)
        self._add([[str(file), *_values(report.to_dict())] for file, report in pairs])

    def _add(self, rows: Iterable[Sequence[Any]]) -> None:
        if self._file is not None:
            with file_errors(self._path, "write"):
                csv.writer(self._file).writerows(rows)
                self._file.flush()


def _is_own_table(path: Path) -> bool:
    with path.open("rb") as table:
        return table.readline().strip() == ",".join(_CSV_HEADER).encode()


def _values(entry: Mapping[str, Any]) -> list[Any]:
    return [entry["label"], entry["fake_probability"], entry["error"]]


def short_row(file: Item, report: "ForgeryReport") -> str:
    """Returns a report as a row: verdict, P(fake), name."""
    score = "-" if report.fake_probability is None else f"{report.fake_probability:.4f}"
    return f"{report.label or 'none':<5} {score:>6}  {file}"


def describe(
    file: Item, report: "ForgeryReport", left_out: Sequence[str] = (), provenance: Provenance | None = None
) -> str:
    """Returns a report for reading, without some of its stages; last what the file says of itself."""
    lines = [f"{file}", f"  verdict     {_verdict(report)}"]
    if report.fake_probability is not None and report.score_source is not None:
        lines.append(f"  P(fake)     {report.fake_probability:.4f}  (read {SCORE_SOURCES[report.score_source]})")
    if report.answer_probability is not None:
        lines.append(f"  of answer   {report.answer_probability:.4f}  (read at its verdict)")
    if report.probabilities:
        each = " ".join(f"{probability:.4f}" for probability in report.probabilities)
        lines.append(f"  of answers  {each}")
    if report.agrees is False:
        lines.append("  note        the text and the score disagree")
    if report.off_distribution:
        lines.append("  note        this model was not trained to be asked for the score alone")
    if report.tag:
        lines.append(f"  tag         {report.tag}")
    if report.marked is not None:
        lines.append(f"  mask        {100 * report.marked:.1f} % of the image")
    shown = {stage: text for stage, text in report.stages.items() if stage not in left_out}
    lines += [f"  {stage.lower():<11} {text}" for stage, text in shown.items() if text]
    if report.text and not report.stages:
        lines.append(f"  answer      {report.text}")
    if provenance is not None:
        lines.append(f"  provenance  {provenance.line}")
    return "\n".join(lines) + "\n"


def _verdict(report: "ForgeryReport") -> str:
    if report.abstained:
        return f"no verdict: {report.abstained_because or 'the system declines to give one'}"
    return report.label or f"none: {'the answer' if report.text else 'this model'} gives no verdict"


def save_overlay(file: Item, target: Path, attention: "np.ndarray") -> None:
    """Draws where the model looked over an image; the file appears only when it is complete.

    Raises:
        DataError: The image is no longer the one that was analysed, or its name is too long to add to.
        FileError: The overlay cannot be written, for example since the disk is full.
    """
    try:
        drawn = draw_overlay(load_source(file), attention)
    except (ImageReadError, DataError) as error:
        raise DataError(f"{file}, which changed after it was analysed: {error}") from error
    try:
        with atomic_file(target) as stream:
            drawn.save(stream, format="PNG")
    except FileError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.ENAMETOOLONG:
            raise DataError(f"{file}: the name of its overlay, {_OVERLAY_ENDING} added, is too long") from error
        raise


def overlay_path(file: Path, root: Path, folder: Path) -> Path:
    """Returns where an image's overlay goes: below ``folder`` as the image is below ``root``.

    The images of a list keep their whole path, so that no two overlays have one name.
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
    return run_cli(lambda: main(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(run())
