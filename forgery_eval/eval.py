"""Evaluates a model on a data set: every figure with its interval, and a report page.

The data set is an MMFR tree or one of its sets, folders real and fake (in it or in each subfolder), or a CSV or JSONL
manifest. Predictions are written as they come; run the same command again and it goes on where it was killed.

Exit status: 0 all pictures were judged, 1 nothing could be done, 3 some pictures could not be judged.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from forgery_eval.benchmarks import Sample, open_benchmark
from forgery_eval.command import run_judging
from forgery_eval.model_options import (
    add_answer_options,
    add_batch_size,
    add_model_options,
    analyze_options,
    loading_options,
    open_detector,
)
from forgery_eval.predictions import Prediction, Run, RunStore, images_digest, read_run, weights_digest
from llava.cli import OptionParser
from llava.systems.fakereasoning import protocol

if TYPE_CHECKING:
    from llava import ForgeryDetector, ForgeryReport
    from llava.systems.base import AnalyzeOptions

_VERSIONS = ("torch", "transformers", "pillow")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = OptionParser(description=__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--dataset_path", required=True, type=Path, help="data set")
    data.add_argument("--result_folder", required=True, type=Path, help="where metrics, report and predictions go")
    data.add_argument("--sets", nargs="+", metavar="NAME", help="only these evaluation sets (default: all)")
    data.add_argument("--max_sample", type=_positive, metavar="N", help="the first N of each class and set")
    add_batch_size(data)

    figures = parser.add_argument_group("figures")
    figures.add_argument("--clip_path", help="folder or hub id of a CLIP model, for CSS")
    figures.add_argument("--paper-protocol", action="store_true", help="the authors' protocol, quirks included")
    figures.add_argument(
        "--rescore",
        nargs="?",
        const=True,
        metavar="FILE",
        help="only compute the figures again, from the result folder's predictions or from this JSONL file",
    )
    scores = figures.add_mutually_exclusive_group()
    scores.add_argument(
        "--calibrate", action="store_true", help="fit temperature and bias on a fifth of the ids, report on the rest"
    )
    scores.add_argument("--calibration", type=Path, metavar="FILE", help="apply what --calibrate has saved")

    add_model_options(parser)
    add_answer_options(parser)
    parsed = parser.parse_args(arguments)
    if parsed.paper_protocol:
        parser.set_defaults(**protocol.SETTINGS)
        parsed = parser.parse_args(arguments)
    return parsed


def _positive(text: str) -> int:
    if not (text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return int(text)


def main(arguments: argparse.Namespace) -> int:
    """Evaluates as the arguments say; returns how many pictures could not be judged."""
    results = _results()
    # Opened first, so that what is wrong with them is said before hours of judging.
    calibration = results.Calibration.load(arguments.calibration) if arguments.calibration else None
    similarity = results.open_similarity(arguments.clip_path) if arguments.clip_path else None
    if arguments.rescore:
        samples, predictions, about = _rescored(arguments)
    else:
        samples = open_benchmark(arguments.dataset_path, sets=arguments.sets, max_sample=arguments.max_sample)
        predictions, about = judge(samples, arguments)
    about = {"data": arguments.dataset_path.resolve().name, **about}
    results.write_results(
        arguments.result_folder,
        samples,
        predictions,
        about,
        similarity=similarity,
        calibration=calibration,
        fit_calibration=arguments.calibrate,
        paper=arguments.paper_protocol,
    )
    print(f"written: {arguments.result_folder / 'metrics.json'} and {arguments.result_folder / 'report.html'}")
    failed = sum(1 for prediction in predictions if prediction.error)
    if failed:
        print(f"{failed} pictures could not be judged; metrics.json names them", file=sys.stderr)
    return failed


def _results() -> ModuleType:
    try:
        return import_module("forgery_eval.results")
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed; it comes with: pip install 'fakereasoning[eval]'") from None


def _rescored(arguments: argparse.Namespace) -> tuple[list[Sample], list[Prediction], dict[str, Any]]:
    from forgery_eval.scoring import match

    file = _predictions_file(arguments)
    header, found = read_run(file)
    chosen = header.get("chosen", {})
    samples = open_benchmark(
        arguments.dataset_path,
        sets=arguments.sets or chosen.get("sets"),
        max_sample=arguments.max_sample or chosen.get("max_sample"),
    )
    return samples, match(samples, found), {"run": file.stem, "settings": header.get("settings", {})}


def _predictions_file(arguments: argparse.Namespace) -> Path:
    if arguments.rescore is not True:
        file = Path(arguments.rescore)
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {file}")
        return file
    folder = arguments.result_folder / "predictions"
    files = sorted(folder.glob("*.jsonl"))
    if len(files) != 1:
        said = ", ".join(str(file) for file in files) or "none"
        raise ValueError(f"{folder} must hold the predictions of one run, or name one after --rescore; there: {said}")
    return files[0]


def judge(samples: Sequence[Sample], arguments: argparse.Namespace) -> tuple[list[Prediction], dict[str, Any]]:
    """Judges what is not judged yet, batch by batch, and returns every sample's prediction and what was run.

    Raises:
        CheckpointError: The model cannot be opened.
        ValueError: The options cannot be met.
    """
    options = analyze_options(arguments)
    if arguments.model_path is None:
        open_detector(arguments)  # says how to get a model
    settings = {
        "weights": weights_digest(_weight_files(arguments)),
        **loading_options(arguments),
        **asdict(options),
        "orientation": not arguments.paper_protocol,
        "batch_size": arguments.batch_size,
        "images": images_digest([s.id for s in samples], [s.image for s in samples]),
        "versions": {name: version(name) for name in _VERSIONS},
    }
    for place in ("model_base", "vision_tower", "dino_weights"):
        del settings[place]  # their contents are in the weights' digest, wherever they lie
    detector = open_detector(arguments)
    settings |= detector.system.describe(options)
    size = detector.system.batch_size(options) if arguments.batch_size == "auto" else arguments.batch_size
    run = Run(settings, {"sets": arguments.sets, "max_sample": arguments.max_sample}, size)
    with closing(RunStore(arguments.result_folder / "predictions", run, [s.id for s in samples])) as store:
        judge_rest(detector, samples, options, store, oriented=not arguments.paper_protocol)
    _, found = read_run(store.path)
    return [found[sample.id] for sample in samples], {"run": run.key, "settings": settings}


def judge_rest(
    detector: "ForgeryDetector",
    samples: Sequence[Sample],
    options: "AnalyzeOptions",
    store: RunStore,
    *,
    oriented: bool = True,
) -> None:
    """Judges the samples that the store does not have, and writes each batch before the next begins."""
    rest = samples[store.done :]
    pictures = (sample.image if oriented else _unturned(sample.image) for sample in rest)
    reports = detector.analyze_many(pictures, batch_size=store.batch_size, **vars(options))
    with tqdm(total=len(samples), initial=store.done, unit=" images") as progress:
        for batch in _batches(rest, store.batch_size):
            start = time.perf_counter()
            judged = list(islice(reports, len(batch)))
            seconds = (time.perf_counter() - start) / len(batch)
            for report in judged:
                if report.error:
                    progress.write(f"cannot judge {report.error}", file=sys.stderr)
            store.write([_prediction(s, report, seconds) for s, report in zip(batch, judged, strict=True)])
            progress.update(len(batch))


def _batches(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def _prediction(sample: Sample, report: "ForgeryReport", seconds: float) -> Prediction:
    return Prediction(
        id=sample.id,
        label=sample.label,
        verdict=report.label,
        fake_probability=report.fake_probability,
        answer_probability=report.answer_probability,
        score_source=report.score_source,
        text=report.text,
        stages=report.stages,
        attributes=report.attributes,
        error=report.error,
        seconds=round(seconds, 4),
    )


def _unturned(image: Path) -> Any:
    """The picture without its EXIF orientation; its path where it cannot be read, for the detector to say why."""
    from llava.errors import ImageReadError
    from llava.images import load_image

    try:
        return load_image(image, apply_orientation=False)
    except ImageReadError:
        return image


def _weight_files(arguments: argparse.Namespace) -> list[str | None]:
    """Every place that weights may come from."""
    from llava.model.checkpoint_files import resolve_folder

    folder = resolve_folder(arguments.model_path, "model")
    places = [str(folder), arguments.model_base, arguments.vision_tower, arguments.dino_weights]
    places.append(os.environ.get("DINO_WEIGHT"))
    named = (
        ("config.json", "mm_vision_tower"),
        ("config.json", "mm_dino_tower"),
        ("adapter_config.json", "base_model_name_or_path"),
    )
    for name, field in named:
        if (folder / name).is_file():
            try:
                places.append(json.loads((folder / name).read_bytes()).get(field))
            except ValueError:
                raise ValueError(f"{folder / name} is not JSON") from None
    return places


def run(arguments: Any = None) -> int:
    """Runs the command; returns its exit status."""
    return run_judging(lambda: main(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(run())
