"""The options of a model and of its answers, which all commands that judge pictures share."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from llava.assets import demo_model_folder
from llava.cli import add_options, read_options
from llava.systems import registry
from llava.systems.base import AnalyzeOptions, resolve

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
    """Adds the options that say how images are analysed."""
    add_options(parser.add_argument_group("answer"), _options_class())


def _options_class() -> type[AnalyzeOptions]:
    return resolve(registry.spec("fakereasoning").options)


def loading_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns how the model is opened."""
    return {name: getattr(arguments, name) for name in _LOADING}


def analyze_options(arguments: argparse.Namespace, *, attention: bool = False) -> AnalyzeOptions:
    """Returns how pictures are to be judged.

    Raises:
        ValueError: Options exclude each other or are out of range.
    """
    return read_options(_options_class(), arguments, attention=attention)


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
