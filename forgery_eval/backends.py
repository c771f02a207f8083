"""Where predictions come from beside a checkpoint: an endpoint, a linear probe, or another program's file.

Each becomes what an evaluation knows already: an endpoint and a probe are checkpoints of their own systems, made here
in the result folder; foreign predictions become a run's file. Imports no torch.
"""

import argparse
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from forgery_eval.benchmarks import Sample
from forgery_eval.masks import read_mask
from forgery_eval.store import Prediction, Run, RunStore, read_run
from llava.cli import OptionParser, inform, positive_float, positive_int
from llava.endpoints import KEY_VARIABLE, Endpoint
from llava.errors import DataError, MissingFileError
from llava.files import atomic_write, digest_file, file_errors, write_json
from llava.systems import registry

MODEL, OPENAI, PROBE, REPLAY = "model", "openai", "probe", "replay"
SYSTEMS = {OPENAI: "endpoint", PROBE: "baseline"}
"""Whose checkpoints the backends make; also in whose words an endpoint is asked unless ``--system`` names others."""
_NEEDS = {OPENAI: ("base_url", "model"), PROBE: ("backbone", "train_data"), REPLAY: ("replay_file", "answer_format")}
_OF = {
    OPENAI: ("base_url", "model", "api_key_env", "concurrency", "timeout", "retries", "price"),
    PROBE: ("backbone", "train_data", "feature_cache"),
    REPLAY: ("replay_file",),
}
_ALSO_OF_THE_JUDGE = ("concurrency", "timeout", "retries")
_FOLDER = "backend"
_REPLIES = "replies.jsonl"


class Price(NamedTuple):
    """Price of a million tokens of questions and of answers, in any currency."""

    prompt: float
    completion: float


def add_backend_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say where predictions come from."""
    group = parser.add_argument_group("backend")
    add_backend(group)
    group.add_argument("--base-url", metavar="URL", help="openai: address of the endpoint, up to and with /v1")
    group.add_argument("--model", metavar="NAME", help="openai: name of the model there")
    group.add_argument(
        "--api-key-env",
        metavar="VARIABLE",
        help=f"openai: environment variable that holds the key (default: {KEY_VARIABLE}); the key is never stored",
    )
    group.add_argument("--concurrency", type=positive_int, help="openai, judge: requests at a time (default: 8)")
    group.add_argument(
        "--timeout", type=positive_float, help="openai, judge: longest wait for a reply, in s (default: 120)"
    )
    group.add_argument(
        "--retries", type=positive_int, help="openai, judge: how often a question is repeated (default: 5)"
    )
    group.add_argument(
        "--price",
        nargs=2,
        type=price,
        metavar=("IN", "OUT"),
        help="openai: price of a million tokens of questions and of answers, to count the cost",
    )
    group.add_argument(
        "--backbone",
        metavar="SOURCE",
        help="probe: CLIP folder or hub id, timm:<name>, a tower of ours, or a checkpoint whose towers are taken",
    )
    group.add_argument(
        "--train-data", nargs="+", type=Path, metavar="DATA", help="probe: labelled images that it is fitted on"
    )
    group.add_argument(
        "--feature-cache", type=Path, metavar="FOLDER", help="probe: where features are kept (default: beside it)"
    )
    group.add_argument(
        "--predictions",
        dest="replay_file",
        type=Path,
        metavar="FILE",
        help="replay: JSONL file of another program, see --rescore; name its --answer-format",
    )


def add_backend(group: Any) -> None:
    """Adds the option that names the backend."""
    group.add_argument(
        "--backend",
        choices=(MODEL, OPENAI, PROBE, REPLAY),
        default=MODEL,
        help="model (default): --model-path; openai: a vision-language model behind an OpenAI-compatible endpoint; "
        "probe: a linear probe on a frozen backbone; replay: predictions of another program",
    )


def price(text: str) -> float:
    """Reads a price, for ``type=`` of an option."""
    return 0.0 if text in ("0", "0.0") else positive_float(text)


def check_backend(parser: OptionParser, parsed: argparse.Namespace) -> None:
    """Refuses options that are missing, or that would do nothing."""
    for backend, names in _OF.items():
        for name in names:
            used = parsed.backend == backend or (parsed.judge and name in _ALSO_OF_THE_JUDGE)
            if getattr(parsed, name) is not None and not used:
                parser.error(f"{_flag(name)} needs --backend {backend}")
    missing = [_flag(name) for name in _NEEDS.get(parsed.backend, ()) if getattr(parsed, name) is None]
    if missing:
        parser.error(f"--backend {parsed.backend} needs {' and '.join(missing)}")
    if parsed.backend != MODEL and parsed.rescore:
        parser.error("--rescore computes metrics of predictions that exist; it has no use for --backend")


def _flag(name: str) -> str:
    return "--predictions" if name == "replay_file" else f"--{name.replace('_', '-')}"


def make_checkpoint(arguments: argparse.Namespace) -> None:
    """Makes the checkpoint that a backend is, in the result folder, and names it as the model.

    Raises:
        UserError: It cannot be made.
    """
    if arguments.backend not in SYSTEMS:
        return
    name = SYSTEMS[arguments.backend]
    system = registry.component(name, "system")
    folder = arguments.result_folder / _FOLDER / arguments.backend
    if arguments.backend == OPENAI:
        key = arguments.api_key_env or KEY_VARIABLE
        Endpoint(arguments.base_url, arguments.model, key)  # says what is wrong with the address
        words = arguments.options_of
        config = system.config(base_url=arguments.base_url, model=arguments.model, words=words, key_variable=key)
        with file_errors(folder, "written"):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", config)
    else:
        cache = arguments.feature_cache or folder.with_name("features")
        with file_errors(folder, "written"):
            folder.parent.mkdir(parents=True, exist_ok=True)
        about = system.fit(arguments.backbone, arguments.train_data, folder, cache, device=arguments.device)
        inform(f"probe on {about['images']} images, {about['fakes']} of them fake; inverse ridge {about['strength']:g}")
    arguments.model_path, arguments.model_base, arguments.system = str(folder), None, name


def tune(system: Any, arguments: argparse.Namespace, run: Run) -> None:
    """Says how an endpoint is asked, and lets what failed before be asked again; any other system stays as it is."""
    if arguments.backend != OPENAI:
        return
    system.tune(
        concurrency=arguments.concurrency or 8,
        timeout=arguments.timeout or 120.0,
        retries=arguments.retries or 5,
        replies=arguments.result_folder / _FOLDER / _REPLIES,
    )
    _forget_failures(arguments.result_folder / "predictions" / f"{run.key}.jsonl")


def _forget_failures(file: Path) -> None:
    """Cuts a run's file before its first failure: what came after lies in the file of replies and is free."""
    if not file.is_file():
        return
    with file_errors(file, "read"):
        lines = file.read_bytes().splitlines(keepends=True)
    kept = next((k for k, line in enumerate(lines) if k and b'"error": ""' not in line), len(lines))
    if kept < len(lines):
        atomic_write(file, b"".join(lines[:kept]))


def finish(system: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Closes an endpoint's replies; returns what stands in the metrics: tokens, and the cost if prices are known."""
    if arguments.backend != OPENAI:
        return {}
    usage = with_cost(system.usage, Price(*arguments.price) if arguments.price else None)
    system.close()
    inform(usage_words(usage))
    if system.endpoint.repeated:
        inform(f"{system.endpoint.repeated} questions were asked again")
    return {"usage": usage}


def with_cost(usage: Mapping[str, Any], prices: Price | None) -> dict[str, Any]:
    """Returns counted tokens with their prices and cost, if prices are known."""
    if prices is None:
        return dict(usage)
    millions = usage["prompt_tokens"] * prices.prompt + usage["completion_tokens"] * prices.completion
    return {**usage, "price": list(prices), "cost": millions / 1e6}


def usage_words(usage: Mapping[str, Any]) -> str:
    """Returns tokens and cost in words."""
    counted = f"{usage['prompt_tokens']:,} tokens of questions and {usage['completion_tokens']:,} of answers"
    cost = f"; cost {usage['cost']:.4f}" if "cost" in usage else ""
    left = f"; {usage['uncounted']:,} replies came without a count" if usage["uncounted"] else ""
    return f"{usage['replies']:,} replies, {counted}{left}{cost}"


def replay(arguments: argparse.Namespace, samples: Sequence[Sample], images: str) -> Path:
    """Turns another program's predictions into a run's file of the result folder.

    Args:
        arguments: The command line.
        samples: The samples.
        images: Their digest.

    Raises:
        UserError: They cannot be read, or none is of a sample.
    """
    from forgery_eval.metrics.scoring import match

    file: Path = arguments.replay_file
    if not file.is_file():
        raise MissingFileError(f"there is no file {file}")
    _, predictions = read_run(file, arguments.answer_format)
    by_file = {str(Path(sample.image).absolute()): sample.id for sample in samples}
    ids = {sample.id for sample in samples}
    named = {key if key in ids else by_file.get(str(Path(key).absolute()), key): p for key, p in predictions.items()}
    if len(named) < len(predictions):
        raise DataError(f"{file} has two predictions of one image, by its id and by its path")
    settings = {
        "system": registry.spec(arguments.answer_format).name,
        "replayed": digest_file(file),
        "images": images,
    }
    run = Run(settings, {"sets": arguments.sets, "max_sample": arguments.max_sample}, 256)
    with closing(RunStore(arguments.result_folder / "predictions", run, [sample.id for sample in samples])) as store:
        found = match(samples, named)[store.done :]
        for start in range(0, len(found), run.batch_size):
            pairs = list(zip(samples[store.done + start :], found[start : start + run.batch_size], strict=False))
            store.write([_own(sample, p) for sample, p in pairs], _masks(file.parent, pairs))
    return store.path


def _own(sample: Sample, prediction: Prediction) -> Prediction:
    if prediction.label not in (-1, sample.label):
        raise DataError(f"{sample.id} has another label in the predictions than in the data set")
    return replace(prediction, id=sample.id, label=sample.label, mask=None)


def _masks(folder: Path, pairs: Sequence[tuple[Sample, Prediction]]) -> dict[str, np.ndarray]:
    found = {sample.id: read_mask(folder, prediction.mask) for sample, prediction in pairs if prediction.mask}
    return {name: np.asarray(mask, np.float32) / 255 for name, mask in found.items() if mask is not None}
