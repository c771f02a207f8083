"""Merges a LoRA folder into its base, or writes a checkpoint in another layout."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava.cli import OptionParser, run_cli

LAYOUTS = {
    "native": "self-contained, with towers and every setting (default)",
    "published": "the authors' own names",
}
_OLD_LAYOUTS = {"ours": "native"}


def _layout(name: str) -> str:
    return _OLD_LAYOUTS.get(name, name)


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = OptionParser(description=__doc__)
    parser.add_argument("--model-path", required=True, help="LoRA folder, or a merged model to write in another layout")
    parser.add_argument("--model-base", help="base model; default: the one that adapter_config.json names")
    parser.add_argument("--save-model-path", required=True, type=Path, help="new folder to write")
    parser.add_argument(
        "--layout",
        type=_layout,
        choices=tuple(LAYOUTS),
        default="native",
        help="; ".join(f"{name}: {text}" for name, text in LAYOUTS.items()),
    )
    parser.add_argument("--vision-tower", help="CLIP tower: folder or hub id, if the checkpoint does not hold it")
    parser.add_argument("--dino-weights", help="DINOv2 .pth or folder, if the checkpoint does not hold it")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16; default: the checkpoint's")
    return parser


def merge(arguments: argparse.Namespace) -> None:
    """Merges and saves as the arguments say.

    Raises:
        UserError: The model cannot be opened or written; the message says why.
    """
    from llava.files import atomic_folder
    from llava.model.builder import load_pretrained_model
    from llava.model.checkpoint import open_checkpoint, stored_dtype
    from llava.model.saving import save_published

    checkpoint = open_checkpoint(arguments.model_path, arguments.model_base)
    _, model, _, _ = load_pretrained_model(
        arguments.model_path,
        arguments.model_base,
        device="cpu",
        dtype=stored_dtype(checkpoint) if arguments.dtype == "auto" else arguments.dtype,
        vision_tower=arguments.vision_tower,
        dino_weights=arguments.dino_weights,
    )
    if arguments.layout == "published":
        save_published(model, arguments.save_model_path, checkpoint.config, checkpoint.tokenizer_folder)
    else:
        with atomic_folder(arguments.save_model_path) as folder:
            model.save_pretrained(folder)
    print(f"saved {arguments.save_model_path} ({arguments.layout} layout)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parsed = build_parser().parse_args(arguments)
    return run_cli(lambda: merge(parsed))
