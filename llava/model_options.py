"""The options that say which model is opened, and how; for every command that opens one. Imports no torch."""

import argparse
from typing import TYPE_CHECKING, Any

from llava.assets import demo_model_folder

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
    "image_aspect_ratio",
    "decode",
    "prompt_lookup",
)
LOCATIONS = ("model_base", "vision_tower", "dino_weights")
"""Those loading options that name weights outside the checkpoint."""
SPEED = ("decode", "prompt_lookup")
"""Those that change how long an answer takes, and not the answer."""


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which model is opened, and how."""
    model = parser.add_argument_group("model")
    add_which_model(model)
    model.add_argument("--vision-tower", help="CLIP tower: folder or hub id, where the checkpoint does not hold it")
    model.add_argument("--dino-weights", help="DINOv2 .pth or folder, where the checkpoint does not hold it")
    model.add_argument(
        "--image-aspect-ratio", choices=("crop", "pad"), help="how images become square (default: the checkpoint's way)"
    )
    model.add_argument("--device", default="auto", help="auto (default), cuda, cuda:1, mps, cpu")
    model.add_argument("--dtype", default="auto", help="auto (default), float32, bfloat16, float16")
    model.add_argument("--device-map", help="auto: spread the model over all GPUs")
    model.add_argument("--load-8bit", action="store_true", help="language model in 8 bits (bitsandbytes)")
    model.add_argument("--load-4bit", action="store_true", help="language model in 4 bits (bitsandbytes)")
    model.add_argument("--attn-implementation", default="auto", help="auto (default), sdpa, eager, flash_attention_2")
    model.add_argument(
        "--decode",
        default="auto",
        help="auto (default), eager, static (cache of fixed size), compile (that and CUDA graphs); same answers",
    )
    model.add_argument(
        "--prompt-lookup",
        type=int,
        default=0,
        metavar="N",
        help="guess N tokens at a time from what was seen, and check them; same greedy answers (default: 0, off)",
    )


def add_which_model(group: Any) -> None:
    """Adds the options that name a checkpoint."""
    group.add_argument(
        "--model-path",
        default=demo_model_folder(),
        help="folder or hub id of a checkpoint (default: the embedded demonstration model)",
    )
    group.add_argument(
        "--model-base",
        help="base of a LoRA folder that names none, or of a model without tokenizer",
    )
    group.add_argument("--system", help="the checkpoint's system, where its files do not tell it")


def loading_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns how the model is opened."""
    return {name: getattr(arguments, name) for name in _LOADING}


def open_detector(arguments: argparse.Namespace, **rule: Any) -> "ForgeryDetector":
    """Opens the model, and says what must be known of it.

    Args:
        arguments: The command line.
        **rule: ``calibration`` and ``abstain`` of ``ForgeryDetector.from_pretrained``.

    Raises:
        CheckpointError: No model is named, or it cannot be opened.
        OptionError: A loading option cannot be met.
    """
    from llava import ForgeryDetector

    detector = ForgeryDetector.from_pretrained(
        arguments.model_path, system=arguments.system, **rule, **loading_options(arguments)
    )
    detector.announce()
    return detector
