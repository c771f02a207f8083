"""Evaluates a model on a data set: every metric with its interval, and a report page.

The data set is an MMFR tree or one of its sets, folders real and fake (in it or in each subfolder), or a CSV or JSONL
manifest. Predictions are written as they come; run the same command again and it resumes where it was killed.

Exit status: 0 all images were analysed, 1 nothing could be done, 3 some images could not be analysed.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgery_eval import backends
from forgery_eval.answers import AnswerKind
from forgery_eval.benchmarks import Sample, describe_layouts, list_passed_over, open_benchmark
from forgery_eval.conditions import Conditions, Plan, RunEvidence, read_evidence
from forgery_eval.fingerprints import images_digest, weight_locations, weights_digest
from forgery_eval.judge import Judge, add_judge_options, check_judge
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
from forgery_eval.perturbations import Perturbation, choose_perturbations
from forgery_eval.store import Prediction, Run, read_run, system_of
from forgery_eval.workers import WorkerPool, add_workers, check_workers
from llava.abstention import LIGHT_DELIVERIES, AbstentionRule
from llava.cli import SOME_FAILED, OptionParser, format_list, inform, log, needs_extra, positive_int, run_cli, share
from llava.errors import DataError, MissingFileError, OptionError
from llava.images import describe_passed_over
from llava.labels import LABELS
from llava.systems import registry
from llava.systems.base import AnalyzeOptions, EvaluationProtocol
from llava.tables import LABEL_MAP_HELP, parse_label_map

if TYPE_CHECKING:
    from forgery_eval.faithfulness import Faithfulness
    from llava import ForgeryDetector

_VERSIONS = ("torch", "transformers", "pillow")
_PREDICTIONS = "predictions"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = OptionParser(description=__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--dataset_path", required=True, type=Path, help="data set")
    data.add_argument("--result_folder", required=True, type=Path, help="where metrics, report and predictions go")
    data.add_argument("--sets", nargs="+", metavar="NAME", help="only these evaluation sets (default: all)")
    data.add_argument("--max_sample", type=positive_int, metavar="N", help="the first N of each class and set")
    data.add_argument("--label-map", type=parse_label_map, metavar="WORD=real,…", help=LABEL_MAP_HELP)
    data.add_argument(
        "--list-benchmarks", action=_ListBenchmarks, nargs=0, help="say what each data set needs on disk, and end"
    )
    data.add_argument(
        "--hash-images",
        action="store_true",
        help="know images by their contents, also where they were copied (default: by name, size and time of change)",
    )
    add_batch_size(data)
    add_workers(data)
    _add_metrics(parser)
    _add_reliability(parser)
    backends.add_backend_options(parser)
    add_judge_options(parser)
    add_model_options(parser)
    parsed = parse_with_system(parser, arguments)
    check_workers(parsed, "eval", sys.argv[1:] if arguments is None else arguments)
    if parsed.workers and (parsed.rescore or parsed.backend in (backends.OPENAI, backends.REPLAY)):
        parser.error("--workers analyses with a model; leave it out with --rescore and the backends openai and replay")
    if parsed.faithfulness and parsed.backend in (backends.OPENAI, backends.REPLAY):
        parser.error(
            f"--faithfulness analyses covered images, and --backend {parsed.backend} says of none where it looked"
        )
    if parsed.answer_format and not (parsed.rescore or parsed.backend == backends.REPLAY):
        parser.error("--answer-format says how to read predictions that exist already; it needs --rescore")
    backends.check_backend(parser, parsed)
    check_judge(parser, parsed)
    _check_reliability(parser, parsed)
    if parsed.paper_protocol:
        settings = dict(_protocol(AnswerKind.of(parsed.options_of)).SETTINGS)
        parser.set_defaults(**settings)
        parsed = argparse.Namespace(**{**vars(parser.parse_args(arguments)), "options_of": parsed.options_of})
    return parsed


class _ListBenchmarks(argparse.Action):
    """Ends the command as ``--help`` does."""

    def __call__(self, parser: argparse.ArgumentParser, *given: object) -> None:
        print(describe_layouts())
        parser.exit()


def _add_metrics(parser: argparse.ArgumentParser) -> None:
    metrics = parser.add_argument_group("metrics")
    metrics.add_argument("--clip_path", help="folder or hub id of a CLIP model, for CSS")
    metrics.add_argument(
        "--score-maps",
        action="store_true",
        help="compare the model's attention or forgery map with the true masks, where it gives no mask",
    )
    metrics.add_argument(
        "--faithfulness",
        type=positive_int,
        metavar="N",
        help="of N images called fake, cover the region that the model's mask or map names, and others of its size and "
        "shape: does P(fake) fall more",
    )
    metrics.add_argument("--paper-protocol", action="store_true", help="the authors' protocol, quirks included")
    metrics.add_argument(
        "--rescore",
        nargs="?",
        const=True,
        metavar="FILE",
        help="only compute the metrics again, from the result folder's predictions or from this JSONL file",
    )
    metrics.add_argument(
        "--answer-format",
        metavar="SYSTEM",
        help="with --rescore: system in whose words the texts are (default: the run's)",
    )
    scores = metrics.add_mutually_exclusive_group()
    scores.add_argument(
        "--calibrate", action="store_true", help="fit temperature and bias on some of the ids, report on the rest"
    )
    scores.add_argument("--calibration", type=Path, metavar="FILE", help="apply what --calibrate has saved")
    metrics.add_argument(
        "--calibration-share", type=share, help="with --calibrate: share of the ids that is fitted on (default: 0.2)"
    )


def _add_reliability(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("robustness and abstention")
    group.add_argument(
        "--perturb",
        nargs="*",
        metavar="STEP",
        help="also under perturbations: STEP or STEP:STRENGTH (jpeg, blur:1.0, chain:3, …); by default the whole grid",
    )
    group.add_argument(
        "--perturbed-images", type=Path, metavar="FOLDER", help="also write the perturbed images, as PNG"
    )
    group.add_argument("--no-abstain", action="store_true", help="fit and apply no rule of abstention")
    group.add_argument(
        "--error-level",
        type=share,
        help="with --calibrate: error among given verdicts that is permitted (default: 0.1)",
    )
    group.add_argument(
        "--known-share",
        type=share,
        help="with --calibrate: share of known images that are let through (default: 0.95)",
    )
    group.add_argument(
        "--calibrate-perturbed",
        action="store_true",
        help="with --calibrate and --perturb: fit the rule on images under one condition each, drawn from their ids",
    )
    group.add_argument(
        "--stability",
        type=int,
        choices=range(len(LIGHT_DELIVERIES) + 1),
        metavar="K",
        help=f"with --calibrate: a verdict must last under K light deliveries, at most {len(LIGHT_DELIVERIES)}",
    )


def _check_reliability(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> None:
    """Refuses options that would do nothing."""
    fits = parsed.calibrate and not parsed.no_abstain
    for name in ("error_level", "known_share", "stability", "calibrate_perturbed"):
        if getattr(parsed, name) not in (None, False) and not fits:
            option = f"--{name.replace('_', '-')}"
            parser.error(f"{option} says how a rule of abstention is fitted; it needs --calibrate without --no-abstain")
    if parsed.calibration_share and not parsed.calibrate:
        parser.error("--calibration-share needs --calibrate")
    if parsed.calibrate_perturbed and parsed.perturb is None:
        parser.error("--calibrate-perturbed needs --perturb")
    if parsed.perturbed_images and (parsed.perturb is None or parsed.rescore):
        parser.error("--perturbed-images needs --perturb, and images that are analysed now")


def _protocol(answers: AnswerKind) -> EvaluationProtocol:
    protocol: EvaluationProtocol | None = registry.component(answers.system, "protocol")
    if protocol is None:
        raise OptionError(f"--paper-protocol: {answers.title} has no evaluation protocol of its own here")
    return protocol


@dataclass(frozen=True)
class Predicted:
    """What is scored.

    Attributes:
        samples: The samples.
        predictions: One a sample.
        answers: What the answers of their system can have.
        file: Where the predictions lie, and their masks beside it.
        about: What was run; stands in ``metrics.json``.
        evidence: What a rule of abstention needs beside the predictions.
        perturbed: What was predicted after perturbations.
        faithfulness: What was predicted of images whose regions are covered; None where that was not asked for.
    """

    samples: Sequence[Sample]
    predictions: Sequence[Prediction]
    answers: AnswerKind
    file: Path
    about: dict[str, Any]
    evidence: RunEvidence = field(default_factory=RunEvidence)
    perturbed: Mapping[Perturbation, RunEvidence] = field(default_factory=dict)
    faithfulness: "Faithfulness | None" = None


def main(arguments: argparse.Namespace) -> int:
    """Evaluates as the arguments say; returns the exit status.

    Raises:
        UserError: Nothing could be done: wrong options, data, model or files.
    """
    with needs_extra("eval"):
        from forgery_eval import results
        from forgery_eval.metrics.calibration import SHARE
        from forgery_eval.pages.summary import summary_lines
        from forgery_eval.verdicts import Evidence, FitSettings, Judgement

    # Opened first, so that what is wrong with them is known before hours of analysis.
    calibration = results.Calibration.load(arguments.calibration) if arguments.calibration else None
    similarity = results.open_similarity(arguments.clip_path) if arguments.clip_path else None
    perturbations = choose_perturbations(arguments.perturb)
    judge = Judge.of(arguments)
    rule = _rule(arguments)
    plan = Plan(
        perturbations,
        features=not arguments.no_abstain and (arguments.calibrate or (rule is not None and rule.known is not None)),
        deliveries=_deliveries(arguments, rule),
        images=arguments.perturbed_images,
    )
    if arguments.backend == backends.REPLAY:
        arguments.rescore = str(_replayed(arguments))
    found = read_predicted(arguments, plan) if arguments.rescore else predict(arguments, plan)
    fits = arguments.calibrate and not arguments.no_abstain
    fit_share = arguments.calibration_share or SHARE
    fit = None
    if fits:
        level, share = arguments.error_level or 0.1, arguments.known_share or 0.95
        fit = FitSettings(level, share, arguments.stability or 0, arguments.calibrate_perturbed, fit_share)
    metrics = results.write_results(
        arguments.result_folder,
        found.samples,
        found.predictions,
        {"data": arguments.dataset_path.resolve().name, "source": _source(arguments, found), **found.about},
        found.answers,
        similarity=similarity,
        calibration=calibration,
        fit_share=fit_share if arguments.calibrate else 0.0,
        protocol=_protocol(found.answers) if arguments.paper_protocol else None,
        masks=found.file.parent,
        judgement=Judgement(rule, fit, Evidence(found.evidence.features, found.evidence.delivered)),
        perturbed={
            (cell.step, cell.strength): Evidence(run.features, predictions=run.predictions)
            for cell, run in found.perturbed.items()
        },
        faithfulness=found.faithfulness,
        judge=judge,
    )
    for line in summary_lines(metrics):
        print(line)
    print(f"written: {arguments.result_folder / 'metrics.json'} and {arguments.result_folder / 'report.html'}")
    failed = sum(1 for prediction in found.predictions if prediction.error)
    if failed:
        log(f"{failed} images could not be analysed; metrics.json names them")
    return SOME_FAILED if failed else 0


def _source(arguments: argparse.Namespace, found: Predicted) -> dict[str, str]:
    """Where a comparison finds the data and the predictions, these from the result folder on, and in whose words."""
    file, folder = found.file.resolve(), arguments.result_folder.resolve()
    return {
        "data": str(arguments.dataset_path.resolve()),
        "predictions": str(file.relative_to(folder) if file.is_relative_to(folder) else file),
        "answers": found.answers.system,
    }


def _rule(arguments: argparse.Namespace) -> AbstentionRule | None:
    """The rule of a calibration file, or of the model's folder; None if there is none or one is fitted."""
    if arguments.no_abstain or arguments.calibrate:
        return None
    if arguments.calibration:
        return AbstentionRule.load(arguments.calibration)
    if not arguments.model_path or arguments.rescore or arguments.backend != backends.MODEL:
        return None
    return AbstentionRule.beside(registry.read_files(arguments.model_path, arguments.model_base).folder)


def _deliveries(arguments: argparse.Namespace, rule: AbstentionRule | None) -> int:
    if arguments.no_abstain:
        return 0
    return (arguments.stability or 0) if arguments.calibrate else rule.deliveries if rule else 0


def read_predicted(arguments: argparse.Namespace, plan: Plan) -> Predicted:
    """Reads predictions that exist already, those of perturbed images among them.

    Raises:
        UserError: There are none, they cannot be read, or they are of other data.
    """
    from forgery_eval import faithfulness
    from forgery_eval.metrics.scoring import match

    file = _predictions_file(arguments)
    header, predictions = read_run(file, arguments.answer_format)
    chosen = header.get("chosen", {})
    samples = open_benchmark(
        arguments.dataset_path,
        sets=arguments.sets or chosen.get("sets"),
        max_sample=arguments.max_sample or chosen.get("max_sample"),
        label_map=arguments.label_map,
    )
    known = _by_sample(predictions, samples, file, whole=not (arguments.sets or arguments.max_sample or chosen))
    matched = match(samples, known)
    answers = AnswerKind.of(arguments.answer_format or system_of(header))
    about = {"run": file.stem, "settings": header.get("settings", {})}
    evidence, perturbed = read_evidence(file, samples, plan, arguments.answer_format)
    most = arguments.faithfulness
    covered = faithfulness.read(file, header, samples, matched, most) if most else None
    return Predicted(samples, matched, answers, file, about, evidence, perturbed, covered)


def _replayed(arguments: argparse.Namespace) -> Path:
    """The run's file that another program's predictions become."""
    samples = open_benchmark(
        arguments.dataset_path, sets=arguments.sets, max_sample=arguments.max_sample, label_map=arguments.label_map
    )
    return backends.replay(arguments, samples, _images_digest(arguments, samples))


def _images_digest(arguments: argparse.Namespace, samples: Sequence[Sample]) -> str:
    ids, images = [sample.id for sample in samples], [sample.image for sample in samples]
    return images_digest(ids, images, contents=arguments.hash_images)


def _by_sample(
    predictions: Mapping[str, Prediction], samples: Sequence[Sample], file: Path, *, whole: bool
) -> dict[str, Prediction]:
    """Returns the predictions by the samples' ids, also where they name the images' files.

    Raises:
        DataError: Labels contradict the data set's, or two predictions are of one image.
    """
    by_file = {Path(sample.image).absolute(): sample.id for sample in samples}
    labels = {sample.id: sample.label for sample in samples}
    found, unknown = {}, []
    for name, prediction in predictions.items():
        known = name if name in labels else by_file.get(Path(name).absolute())
        if known is None:
            unknown.append(name)
        elif prediction.label not in (-1, labels[known]):
            own, true = LABELS[prediction.label], LABELS[labels[known]]
            raise DataError(f"{file}: {name} is labelled {own}, but in the data set it is {true}")
        elif known in found:
            raise DataError(f"{file} has two predictions of {known}, one of them as {name}")
        else:
            found[known] = replace(prediction, id=known)
    if unknown and whole:
        log(f"{len(unknown)} predictions are of no image of the data set and are left out:\n{format_list(unknown)}")
    return found


def _predictions_file(arguments: argparse.Namespace) -> Path:
    if arguments.rescore is not True:
        file = Path(arguments.rescore)
        if not file.is_file():
            raise MissingFileError(f"there is no file {file}")
        return file
    folder = arguments.result_folder / _PREDICTIONS
    files = sorted(folder.glob("*.jsonl"))
    if len(files) != 1:
        listed = ", ".join(str(file) for file in files) or "none"
        raise DataError(f"{folder} must hold the predictions of one run, or name one after --rescore; there: {listed}")
    return files[0]


def predict(arguments: argparse.Namespace, plan: Plan) -> Predicted:
    """Analyses what is not analysed yet, batch by batch, and returns every sample's prediction.

    Raises:
        UserError: The data or the model cannot be opened, the options cannot be met, or a file cannot be written.
    """
    from forgery_eval import faithfulness

    samples = open_benchmark(
        arguments.dataset_path,
        sets=arguments.sets,
        max_sample=arguments.max_sample,
        label_map=arguments.label_map,
    )
    backends.make_checkpoint(arguments)
    options = analyze_options(arguments, attention=arguments.score_maps)
    if arguments.paper_protocol:
        options = replace(options, color_management="none")
    if arguments.model_path is None:
        open_detector(arguments)  # says how to get a model
    settings = {
        "system": arguments.options_of,
        "weights": weights_digest(_weight_locations(arguments)),
        **{name: value for name, value in loading_options(arguments).items() if name not in (*LOCATIONS, *SPEED)},
        "dtype_is_automatic": arguments.dtype == "auto",  # "dtype" itself is what the model says of itself
        **asdict(options),
        "orientation": not arguments.paper_protocol,
        "images": _images_digest(arguments, samples),
        "versions": {name: known for name in _VERSIONS if (known := _version(name))},
    }
    with ExitStack() as stack:
        # Every prediction is kept whole; which verdicts are given is decided afterwards.
        model, run = _open_model(arguments, options, settings, stack)
        if arguments.faithfulness and model.has_attention:
            options = replace(options, attention=True)
            run = replace(run, settings={**run.settings, "attention": True})
        conditions = Conditions(
            model, samples, options, run, arguments.result_folder / _PREDICTIONS, not arguments.paper_protocol
        )
        path, predictions = conditions.predictions()
        if passed_over := list_passed_over(arguments.dataset_path):
            inform(describe_passed_over(passed_over))
        evidence, perturbed = conditions.evidence(path, plan)
        most = arguments.faithfulness
        covered = faithfulness.measure(conditions, path, predictions, most) if most else None
        usage = {} if isinstance(model, WorkerPool) else backends.finish(model.system, arguments)
    about = {"run": run.key, "settings": run.settings, **usage}
    answers = AnswerKind.of(arguments.options_of)
    return Predicted(samples, predictions, answers, path, about, evidence, perturbed, covered)


def _open_model(
    arguments: argparse.Namespace, options: AnalyzeOptions, settings: dict[str, Any], stack: ExitStack
) -> "tuple[ForgeryDetector | WorkerPool, Run]":
    """Opens the model, here or in workers; returns it, and the run with what only the model can say of itself."""
    chosen = {"sets": arguments.sets, "max_sample": arguments.max_sample}
    model: ForgeryDetector | WorkerPool
    if arguments.workers:
        model = pool = stack.enter_context(WorkerPool(arguments, options, abstain=False))
        run, size = Run(settings | pool.describe, chosen, 0), pool.batch_size
    else:
        model = detector = open_detector(arguments, abstain=False)
        run = Run(settings | detector.system.describe(options), chosen, 0)
        backends.tune(detector.system, arguments, run)
        size = detector.system.batch_size(options)
    return model, replace(run, batch_size=size if arguments.batch_size == "auto" else arguments.batch_size)


def _weight_locations(arguments: argparse.Namespace) -> list[str | None]:
    files = registry.read_files(arguments.model_path, arguments.model_base)
    return weight_locations(files.folder, [getattr(arguments, name) for name in LOCATIONS])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def run(arguments: Any = None) -> int:
    """Runs the command; returns its exit status."""
    return run_cli(lambda: main(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(run())
