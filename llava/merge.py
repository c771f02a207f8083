"""Merges a LoRA folder into its base, or writes a checkpoint in another layout."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava.cli import OptionParser, note, run_cli

if TYPE_CHECKING:
    import torch

    from llava.model.checkpoint import Checkpoint
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

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
    add_opening(parser)
    return parser


def add_opening(parser: argparse.ArgumentParser) -> None:
    """Adds the options by which a model is opened to be written."""
    parser.add_argument("--vision-tower", help="CLIP tower: folder or hub id, if the checkpoint does not hold it")
    parser.add_argument("--dino-weights", help="DINOv2 .pth or folder, if the checkpoint does not hold it")
    parser.add_argument("--system", help="the checkpoint's system, where its files do not tell it")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16; default: the adapter's")


def merge(arguments: argparse.Namespace) -> None:
    """Merges and saves as the arguments say.

    Raises:
        UserError: The model cannot be opened or written; the message says why.
    """
    from llava.files import atomic_folder
    from llava.model.saving import save_published

    checkpoint, model = open_merged(arguments)
    if arguments.layout == "published":
        save_published(model, arguments.save_model_path, checkpoint.config, checkpoint.tokenizer_folder)
    else:
        with atomic_folder(arguments.save_model_path) as folder:
            model.save_pretrained(folder)
    print(f"saved {arguments.save_model_path} ({arguments.layout} layout)")


def open_merged(arguments: argparse.Namespace) -> "tuple[Checkpoint, LlavaLlamaForCausalLM]":
    """Opens a model in the dtype that is written, its adapter merged in float32.

    Args:
        arguments: ``model_path``, ``model_base``, and those of ``add_opening``.

    Raises:
        UserError: It cannot be opened, or holds numbers that the dtype cannot; the message says why.
    """
    from llava.model.adapter import check_finite
    from llava.model.builder import load_pretrained_model
    from llava.model.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(arguments.model_path, arguments.model_base, system=arguments.system)
    dtype = _written_dtype(arguments.dtype, checkpoint)
    check_finite(checkpoint.tensors, f"{checkpoint.folder} or its base")
    _, model, _, _ = load_pretrained_model(
        arguments.model_path,
        arguments.model_base,
        device="cpu",
        dtype=dtype if checkpoint.adapter is None else "float32",
        vision_tower=arguments.vision_tower,
        dino_weights=arguments.dino_weights,
        system=arguments.system,
    )
    if checkpoint.adapter is not None:
        _say_what_is_lost(checkpoint, dtype)
        model.to(dtype)
        model.config.dtype = dtype
    _check_range(model, dtype)
    return checkpoint, model


def _written_dtype(name: str, checkpoint: "Checkpoint") -> "torch.dtype":
    """The named dtype; else the adapter's, or the model's own where there is no adapter."""
    import torch

    from llava.model.builder import resolve_dtype
    from llava.model.checkpoint import stored_dtype

    if name != "auto":
        return resolve_dtype(name, checkpoint, torch.device("cpu"))
    if checkpoint.adapter is None:
        return stored_dtype(checkpoint)
    return checkpoint.adapter.dtype


def _say_what_is_lost(checkpoint: "Checkpoint", dtype: "torch.dtype") -> None:
    """Tells how much of the update the written dtype loses; float32 loses nothing."""
    import torch

    from llava.model.adapter import describe_lost, measure_lost

    if dtype in (torch.float32, torch.float64):
        return
    before, after = checkpoint.tensors, checkpoint.with_update().tensors
    lost = measure_lost(before, {name: t for name, t in after.items() if t is not before[name]}, dtype)
    note(describe_lost(lost, dtype, "--dtype float32"))


def _check_range(model: "LlavaLlamaForCausalLM", dtype: "torch.dtype") -> None:
    """Refuses weights that the written dtype cannot hold.

    Raises:
        CheckpointError: Some are NaN or infinite in it.
    """
    from llava.errors import CheckpointError
    from llava.model.checkpoint_files import list_keys

    wrong = [name for name, value in model.named_parameters() if not value.isfinite().all()]
    if wrong:
        raise CheckpointError(
            f"in {str(dtype).removeprefix('torch.')} these weights are NaN or infinite: {list_keys(wrong)}; nothing "
            "was written; try --dtype bfloat16 or float32"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parsed = build_parser().parse_args(arguments)
    return run_cli(lambda: merge(parsed))
