"""The options of a model and of its answers, which all commands that judge pictures share."""

import argparse
import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from llava.assets import demo_model_folder
from llava.systems.base import SCORE_KINDS, AnalyzeOptions
from llava.systems.fakereasoning.text import FORCED_SUMMARY

if TYPE_CHECKING:
    from llava import ForgeryDetector

_LOADING = (
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


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which model is opened, and how."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model-path",
        default=demo_model_folder(),
        help="folder or hub id of a checkpoint (default: the embedded demonstration model)",
    )
    model.add_argument("--model-base", help="base of a LoRA folder, where the folder does not name it")
    model.add_argument("--vision-tower", help="CLIP tower: folder or hub id, where the checkpoint does not hold it")
    model.add_argument("--dino-weights", help="DINOv2 .pth or folder, where the checkpoint does not hold it")
    model.add_argument("--device", default="auto", help="auto (default), cuda, cuda:1, mps, cpu")
    model.add_argument("--dtype", default="auto", help="auto (default), float32, bfloat16, float16")
    model.add_argument("--device-map", help="auto: spread the model over all GPUs")
    model.add_argument("--load-8bit", action="store_true", help="language model in 8 bits (bitsandbytes)")
    model.add_argument("--load-4bit", action="store_true", help="language model in 4 bits (bitsandbytes)")
    model.add_argument("--attn-implementation", default="auto", help="auto (default), sdpa, eager, flash_attention_2")


def add_batch_size(group: Any) -> None:
    """Adds the option that says how many pictures are judged at a time."""
    group.add_argument(
        "--batch-size",
        type=_batch_size,
        default="auto",
        help="pictures at a time (default auto: what fits and is fast)",
    )


def _batch_size(text: str) -> int | str:
    if text != "auto" and not (text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be auto or a number above 0, not {text!r}")
    return text if text == "auto" else int(text)


def add_answer_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say how pictures are judged."""
    answer = parser.add_argument_group("answer")
    answer.add_argument("--question", help="ask this in the place of the published question")
    answer.add_argument("--conv-mode", help="prompt template (default: the model's; published: llava_v1)")
    answer.add_argument("--force-summary", action="store_true", help="give the constant SUMMARY, so it is not decoded")
    answer.add_argument("--score-only", action="store_true", help="only P(fake), from one forward, without an answer")
    answer.add_argument(
        "--score",
        choices=SCORE_KINDS,
        default="auto",
        help="P(fake) after the model's own answer, from its prompt without an answer, or auto (default): the model's",
    )
    answer.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy; the authors' is 0.2")
    answer.add_argument("--top_p", type=float, help="sample from the likeliest words of this probability")
    answer.add_argument("--num_beams", type=int, default=1, help="beam search if above 1")
    answer.add_argument("--max_new_tokens", type=int, default=512, help="longest answer (default: 512)")
    answer.add_argument("--samples", type=int, default=1, help="answers a picture; P(fake) is their mean")
    answer.add_argument("--seed", type=int, default=0, help="of sampling")
    answer.add_argument("--tolerant", action="store_true", help="also read verdicts that are not in the strict format")


def loading_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns how the model is opened."""
    return {name: getattr(arguments, name) for name in _LOADING}


def analyze_options(arguments: argparse.Namespace, *, attention: bool = False) -> AnalyzeOptions:
    """Returns how pictures are to be judged.

    Raises:
        ValueError: Options exclude each other or are out of range.
    """
    names = {field.name for field in fields(AnalyzeOptions)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    prefix = FORCED_SUMMARY if arguments.force_summary else ""
    return AnalyzeOptions(assistant_prefix=prefix, attention=attention, **given)


def open_detector(arguments: argparse.Namespace) -> "ForgeryDetector":
    """Opens the model, and says what must be known of it.

    Raises:
        CheckpointError: No model is named, or it cannot be opened.
    """
    from llava import ForgeryDetector

    detector = ForgeryDetector.from_pretrained(arguments.model_path, **loading_options(arguments))
    if detector.notice:
        print(f"note: {detector.notice}", file=sys.stderr)
    return detector
