"""Merges a LoRA folder into its base and saves one model."""

import argparse
import sys
from pathlib import Path

from llava.cli import OptionParser, run_cli


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = OptionParser(description=__doc__)
    parser.add_argument("--model-path", required=True, help="LoRA folder, or a merged model to write in another layout")
    parser.add_argument("--model-base", help="base model; default: the one that adapter_config.json names")
    parser.add_argument("--save-model-path", required=True, type=Path, help="new folder to write")
    parser.add_argument(
        "--layout",
        choices=("ours", "published"),
        default="ours",
        help="ours: self-contained, towers and every setting inside (default); published: the authors' names",
    )
    parser.add_argument("--vision-tower", help="CLIP tower: folder or hub id, where the checkpoint does not hold it")
    parser.add_argument("--dino-weights", help="DINOv2 .pth or folder, where the checkpoint does not hold it")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16; default: the checkpoint's")
    return parser.parse_args(arguments)


def merge(arguments: argparse.Namespace) -> None:
    """Merges and saves as the arguments say."""
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


if __name__ == "__main__":
    sys.exit(run_cli(lambda: merge(parse_arguments())))
