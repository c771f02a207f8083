"""Judges pictures: verdict, P(fake) and reasoning for a file, a folder or a list.

Exit status: 0 all pictures were judged, 1 nothing could be done, 3 some pictures could not be read.
"""

import argparse
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from forgery_eval.answers_file import AnswersFile, model_fingerprint
from forgery_eval.image_files import list_images
from forgery_eval.overlay import draw_overlay
from llava.cli import OptionParser, run_or_explain
from llava.systems.base import AnalyzeOptions
from llava.systems.fakereasoning.text import FORCED_SUMMARY, STAGES

if TYPE_CHECKING:
    import numpy as np

    from llava import ForgeryDetector, ForgeryReport

SOME_FAILED = 3
_MODEL_OPTIONS = (
    "model_base",
    "device",
    "dtype",
    "device_map",
    "load_8bit",
    "load_4bit",
    "attn_implementation",
    "vision_tower",
    "dino_weights",
)
_SOURCES = {
    "verdict": "before the verdict word of the model's own answer",
    "forced": "after the missing verdict was opened for the model",
    "prompt": "without an answer",
    "detector": "from the system's own head",
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = OptionParser(description=__doc__)
    images = parser.add_argument_group("pictures")
    images.add_argument("--img_path", required=True, type=Path, help="picture, folder (with subfolders) or .txt list")
    images.add_argument("--json", type=Path, metavar="OUT.jsonl", help="write one line a picture; run again to go on")
    images.add_argument("--attention-map", type=Path, metavar="FOLDER", help="draw where the model looked")
    images.add_argument(
        "--batch-size",
        type=_batch_size,
        default="auto",
        help="pictures at a time (default auto: what fits and is fast)",
    )

    model = parser.add_argument_group("model")
    model.add_argument("--model-path", help="folder or hub id of a checkpoint")
    model.add_argument("--model-base", help="base of a LoRA folder, where the folder does not name it")
    model.add_argument("--vision-tower", help="CLIP tower: folder or hub id, where the checkpoint does not hold it")
    model.add_argument("--dino-weights", help="DINOv2 .pth or folder, where the checkpoint does not hold it")
    model.add_argument("--device", default="auto", help="auto (default), cuda, cuda:1, mps, cpu")
    model.add_argument("--dtype", default="auto", help="auto (default), float32, bfloat16, float16")
    model.add_argument("--device-map", help="auto: spread the model over all GPUs")
    model.add_argument("--load-8bit", action="store_true", help="language model in 8 bits (bitsandbytes)")
    model.add_argument("--load-4bit", action="store_true", help="language model in 4 bits (bitsandbytes)")
    model.add_argument("--attn-implementation", default="auto", help="auto (default), sdpa, eager, flash_attention_2")

    answer = parser.add_argument_group("answer")
    answer.add_argument("--question", help="ask this in the place of the published question")
    answer.add_argument("--conv-mode", help="prompt template (default: the model's; published: llava_v1)")
    answer.add_argument("--force-summary", action="store_true", help="give the constant SUMMARY, so it is not decoded")
    answer.add_argument("--score-only", action="store_true", help="only P(fake), from one forward, without an answer")
    answer.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy; the authors' is 0.2")
    answer.add_argument("--top_p", type=float, help="sample from the likeliest words of this probability")
    answer.add_argument("--num_beams", type=int, default=1, help="beam search if above 1")
    answer.add_argument("--max_new_tokens", type=int, default=512, help="longest answer (default: 512)")
    answer.add_argument("--samples", type=int, default=1, help="answers a picture; P(fake) is their mean")
    answer.add_argument("--seed", type=int, default=0, help="of sampling")
    answer.add_argument("--tolerant", action="store_true", help="also read verdicts that are not in the strict format")
    return parser.parse_args(arguments)


def _batch_size(text: str) -> int | str:
    if text != "auto" and not (text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be auto or a number above 0, not {text!r}")
    return text if text == "auto" else int(text)


def analyze_options(arguments: argparse.Namespace) -> AnalyzeOptions:
    """Returns how pictures are to be judged.

    Raises:
        ValueError: Options exclude each other or are out of range.
    """
    names = {field.name for field in fields(AnalyzeOptions)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    prefix = FORCED_SUMMARY if arguments.force_summary else ""
    return AnalyzeOptions(assistant_prefix=prefix, attention=arguments.attention_map is not None, **given)


def main(arguments: argparse.Namespace) -> int:
    """Judges the pictures as the arguments say; returns how many could not be judged."""
    options = analyze_options(arguments)
    total = sum(1 for _ in list_images(arguments.img_path))
    model_options = {name: getattr(arguments, name) for name in _MODEL_OPTIONS}
    if arguments.json is None:
        return _judge(_open(arguments, model_options), arguments, options, None, total)
    settings = {"model": model_fingerprint(arguments.model_path), **model_options, **vars(options)}
    with closing(AnswersFile(arguments.json, settings)) as answers:
        return _judge(_open(arguments, model_options), arguments, options, answers, total)


def _open(arguments: argparse.Namespace, model_options: dict[str, Any]) -> "ForgeryDetector":
    from llava import ForgeryDetector

    return ForgeryDetector.from_pretrained(arguments.model_path, **model_options)


def _judge(
    detector: "ForgeryDetector",
    arguments: argparse.Namespace,
    options: AnalyzeOptions,
    answers: AnswersFile | None,
    total: int,
) -> int:
    done = answers.done if answers else set()
    waiting: deque[Path] = deque()

    def files() -> Iterator[Path]:
        for file in list_images(arguments.img_path):
            if str(file) not in done:
                waiting.append(file)
                yield file

    failed = 0
    reports = detector.analyze_many(files(), batch_size=arguments.batch_size, **vars(options))
    for report in tqdm(reports, unit=" images", total=total, initial=len(done)):
        file = waiting.popleft()
        if report.error:
            failed += 1
            tqdm.write(f"cannot judge {report.error}", file=sys.stderr)
        elif answers is None:
            tqdm.write(describe(file, report))
        if report.attention is not None:
            save_overlay(file, overlay_path(file, arguments.img_path, arguments.attention_map), report.attention)
        if answers is not None:
            answers.write(str(file), report.to_dict())
    if failed:
        print(f"{failed} pictures could not be judged; they are named above", file=sys.stderr)
    return failed


def describe(file: Path, report: "ForgeryReport") -> str:
    """Returns a report for reading."""
    lines = [f"{file}", f"  verdict     {report.label or 'none: the answer gives no verdict'}"]
    if report.fake_probability is not None and report.score_source is not None:
        lines.append(f"  P(fake)     {report.fake_probability:.4f}  (read {_SOURCES[report.score_source]})")
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
    """Draws where the model looked over a picture; the file appears only when it is whole."""
    from llava.mm_utils import load_image

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    draw_overlay(load_image(file), attention).save(partial, format="PNG")
    partial.replace(target)


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
    return folder / f"{inside}.attention.png"


def run(arguments: Any = None) -> int:
    """Runs the command; returns its exit status."""
    failed = 0

    def command() -> None:
        nonlocal failed
        failed = main(parse_arguments(arguments))

    return run_or_explain(command) or (SOME_FAILED if failed else 0)


if __name__ == "__main__":
    sys.exit(run())
