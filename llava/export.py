"""Writes a model as a serving engine takes it; see the section "Serving engines" of the documentation."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava.cli import OptionParser, inform, run_cli
from llava.merge import add_opening, open_merged

if TYPE_CHECKING:
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

ENGINES = {"vllm": "vLLM; SGLang too, where the form is llava"}
FORMS = {
    "auto": "llava where it can be, else llama (default)",
    "llava": "one folder that the engine serves as it is, image and question in",
    "llama": "the language model as a plain Llama, and a client that sends it prompt embeddings",
}
BASE_URL = "http://127.0.0.1:8000/v1"


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = OptionParser(description=__doc__)
    parser.add_argument("--model-path", required=True, help="model, or LoRA folder, which is merged")
    parser.add_argument("--model-base", help="base model; default: the one that adapter_config.json names")
    parser.add_argument("--save-model-path", required=True, type=Path, help="new folder to write")
    parser.add_argument("--engine", choices=tuple(ENGINES), default="vllm", help=_listed(ENGINES))
    parser.add_argument("--form", choices=tuple(FORMS), default="auto", help=_listed(FORMS))
    parser.add_argument(
        "--base-url", metavar="URL", help=f"address that the client sends to, up to and with /v1 (default: {BASE_URL})"
    )
    parser.add_argument(
        "--served-name", metavar="NAME", help="name of the language model there (default: the folder to write)"
    )
    add_opening(parser)
    return parser


def _listed(texts: dict[str, str]) -> str:
    return "; ".join(f"{name}: {text}" for name, text in texts.items())


def export(arguments: argparse.Namespace) -> None:
    """Writes what the arguments say.

    Raises:
        UserError: The model cannot be opened, the form cannot hold it, or it cannot be written.
    """
    from llava.endpoints import Endpoint
    from llava.errors import OptionError
    from llava.files import atomic_folder
    from llava.model.serving_files import CLIENT, LANGUAGE_MODEL, write_client, write_llama, write_llava
    from llava.model.transformers_llava import describe_unlike

    target: Path = arguments.save_model_path
    base_url, name = arguments.base_url or BASE_URL, arguments.served_name or f"{target}/{LANGUAGE_MODEL}"
    Endpoint(base_url, name)  # says what is wrong with the address
    with atomic_folder(target) as folder:  # first, so that a folder that exists is refused before a model is read
        checkpoint, model = open_merged(arguments)
        form = arguments.form
        if form == "auto":
            form = "llama" if describe_unlike(model) else "llava"
        if form == "llava" and (arguments.base_url or arguments.served_name):
            raise OptionError("the form llava has no client, so --base-url and --served-name would do nothing")
        if form == "llava":
            write_llava(model, folder, checkpoint.tokenizer_folder)
        else:
            _check_asks_by_embeddings(model)
            for part in (LANGUAGE_MODEL, CLIENT):
                (folder / part).mkdir()
            write_llama(model, folder / LANGUAGE_MODEL)
            write_client(model, folder / CLIENT, base_url=base_url, name=name, source=checkpoint.folder)
    print(f"saved {target} (form {form})")
    inform(_next_step(target, form, model))


def _check_asks_by_embeddings(model: "LlavaLlamaForCausalLM") -> None:
    """Refuses a model whose system cannot ask a served one.

    Raises:
        OptionError: It is a plain LLaVA's, or analyses images in a way of its own.
    """
    from llava.errors import OptionError
    from llava.systems import registry
    from llava.systems.language_model import LanguageModelSystem

    if not model.config.system:
        raise OptionError("a plain LLaVA belongs to no system, so nobody would ask it; name one with --system")
    system = registry.component(model.config.system, "system")
    if getattr(system, "analyze_batch", None) is not LanguageModelSystem.analyze_batch:
        raise OptionError(
            f"{registry.spec(model.config.system).title} analyses images in a way of its own, which cannot ask a "
            "language model by prompt embeddings"
        )


def _next_step(target: Path, form: str, model: "LlavaLlamaForCausalLM") -> str:
    config = model.config
    lengths = [config.tokenizer_model_max_length, config.max_position_embeddings]
    length = min(length for length in lengths if length)
    if form == "llava":
        return f"serve it with: vllm serve {target} --max-model-len {length}"
    return (
        f"serve it with: vllm serve {target}/language_model --enable-prompt-embeds --max-model-len {length}\n"
        f"ask it with: forgery detect IMAGE --model-path {target}/client"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parsed = build_parser().parse_args(arguments)
    return run_cli(lambda: export(parsed))
