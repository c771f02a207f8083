"""Prints samples of a training file as a model will see them.

What carries no loss is grey; without colours, what is supervised stands in [[ ]].
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedTokenizerBase

from llava.cli import OptionParser, run_cli
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.data.checks import find_problem, is_file, tokenize_records
from llava.data.prompting import TokenizedConversation, fitting_length
from llava.data.records import Record, read_records
from llava.errors import CheckpointError, OptionError
from llava.model.builder import DEFAULT_CONTEXT_LENGTH, load_tokenizer
from llava.model.checkpoint_files import read_json, resolve_folder
from llava.model.configuration import LlavaConfig
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.verdict import VerdictTokens
from llava.systems import registry
from llava.systems.base import AnswerFormat, CheckpointFiles

_GREY, _REVERSED, _PLAIN = "\033[2m", "\033[7m", "\033[0m"
_PUBLISHED_IMAGE_TOKENS = 576
"""Positions of an image where a model's config does not describe its towers: CLIP's patches of 14 in 336 pixels."""


def spans(tokenized: TokenizedConversation, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str]]:
    """Gives a sample in pieces: ``image``, ``masked`` or ``supervised``, and the text that its ids spell."""
    before: list[int] = []
    pairs = zip(tokenized.input_ids, tokenized.labels, strict=True)
    for kind, members in groupby(pairs, key=_kind):
        ids = [index for index, _ in members]
        if kind == "image":
            before = []
            yield from [(kind, "")] * len(ids)
            continue
        # A tokenizer spells some ids differently at the start of a text, so the text up to here is spelled each time.
        yield kind, _spelled(tokenizer, before + ids)[len(_spelled(tokenizer, before)) :]
        before = before + ids


def _kind(pair: tuple[int, int]) -> str:
    index, label = pair
    if index == IMAGE_TOKEN_INDEX:
        return "image"
    return "masked" if label == IGNORE_INDEX else "supervised"


def _spelled(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def describe(
    record: Record,
    tokenized: TokenizedConversation | str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    answer_format: AnswerFormat,
    verdict: VerdictTokens | None,
    max_length: int,
    num_image_tokens: int,
    image_folder: Path | None,
    colored: bool,
) -> str:
    """Returns a sample for people: a line of facts, its text, and what is wrong with it."""
    image = record.image or "no image"
    if record.image and image_folder and not is_file(image_folder / record.image):
        image += f" (not in {image_folder})"
    facts = f"{record.origin}: {image}, verdict {record.verdict(answer_format).verdict or 'none'}"
    placeholder_tokens = {IMAGE_TOKEN_INDEX: num_image_tokens}
    problem = find_problem(record, tokenized, answer_format, verdict, max_length, placeholder_tokens)
    if isinstance(tokenized, str):
        return f"{facts}\nproblem: {problem}"
    kept = fitting_length(tokenized.input_ids, placeholder_tokens, max_length)
    shown = TokenizedConversation(tokenized.input_ids[:kept], tokenized.labels[:kept])
    images = shown.input_ids.count(IMAGE_TOKEN_INDEX)
    supervised = sum(label != IGNORE_INDEX for label in shown.labels)
    text = "".join(_marked(kind, piece, num_image_tokens, colored) for kind, piece in spans(shown, tokenizer))
    lines = [f"{facts}, {kept + images * (num_image_tokens - 1)} tokens, {supervised} of them supervised", text]
    if kept < len(tokenized.input_ids):
        lines.append(f"cut off after {max_length} tokens: {len(tokenized.input_ids) - kept} more")
    if problem:
        lines.append(f"problem: {problem}")
    return "\n".join(lines)


def _marked(kind: str, text: str, num_image_tokens: int, colored: bool) -> str:
    if kind == "image":
        text = f"<image: {num_image_tokens} tokens>"
        return f"{_REVERSED}{text}{_PLAIN}" if colored else text
    if kind == "masked":
        return f"{_GREY}{text}{_PLAIN}" if colored else text
    return text if colored else f"[[{text}]]"


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = OptionParser(prog="python -m llava.data.show_samples", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="training file")
    parser.add_argument("-n", type=_count, default=3, metavar="N", help="how many samples (default 3; 0: none)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model_name_or_path", metavar="PATH", help="model whose tokenizer and lengths count")
    source.add_argument("--tokenizer", metavar="PATH", help="folder with a tokenizer")
    parser.add_argument("--system", help="whose answers these are (default: the model's system, else that of MMFR)")
    parser.add_argument("--version", choices=sorted(conv_templates), default="v1", help="prompt template (default v1)")
    parser.add_argument("--max_length", type=int, help=f"default: the model's, else {DEFAULT_CONTEXT_LENGTH}")
    parser.add_argument(
        "--num_image_tokens",
        type=int,
        help=f"positions that an image takes (default: the model's, else {_PUBLISHED_IMAGE_TOKENS})",
    )
    parser.add_argument("--image_folder", type=Path, help="say which images are missing here")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="auto: on a terminal")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of samples, 0 or more")
    return int(text)


def run(arguments: argparse.Namespace) -> None:
    """Prints the first samples and how many there are."""
    folder = resolve_folder(arguments.model_name_or_path or arguments.tokenizer, "the tokenizer")
    tokenizer = load_tokenizer(folder)
    records = read_records([arguments.file])
    arguments = _with_lengths(arguments, folder)
    answer_format = _answer_format(arguments, folder)
    for text in _described(records[: arguments.n], tokenizer, answer_format, arguments):
        print(f"{text}\n")
    verdicts = Counter(record.verdict(answer_format).verdict or "no verdict" for record in records)
    counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
    print(f"{min(arguments.n, len(records))} of {len(records)} records shown; verdicts of all: {counts}")


def _answer_format(arguments: argparse.Namespace, folder: Path) -> AnswerFormat:
    """The words of the named system, else of the model's, else of the system in whose words MMFR data are written."""
    name = arguments.system
    if name is None and arguments.model_name_or_path:
        with suppress(CheckpointError):
            name = registry.identify(CheckpointFiles(folder, read_json(folder / "config.json"))).name
    found = registry.answer_format(name or registry.DEFAULT)
    if found is None:
        raise OptionError(f"the system {name!r} has no answers, so there are no samples to show")
    return found


def _described(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    answer_format: AnswerFormat,
    arguments: argparse.Namespace,
) -> Iterator[str]:
    tokenized_records = tokenize_records(records, tokenizer, conv_templates[arguments.version])
    verdict = VerdictTokens.from_tokenizer(tokenizer, answer_format.verdict_prefix, answer_format.verdict_words)
    wanted = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    colored = arguments.color == "always" or (arguments.color == "auto" and wanted)
    for record, tokenized in zip(records, tokenized_records, strict=True):
        yield describe(
            record,
            tokenized,
            tokenizer=tokenizer,
            answer_format=answer_format,
            verdict=verdict,
            max_length=arguments.max_length,
            num_image_tokens=arguments.num_image_tokens,
            image_folder=arguments.image_folder,
            colored=colored,
        )


def _with_lengths(arguments: argparse.Namespace, folder: Path) -> argparse.Namespace:
    """Fills in the lengths that were not given: the model's own, or the usual ones where it does not tell."""
    stored = read_json(folder / "config.json") if arguments.model_name_or_path else {}
    filled = argparse.Namespace(**vars(arguments))
    if filled.max_length is None:
        filled.max_length = stored.get("tokenizer_model_max_length") or DEFAULT_CONTEXT_LENGTH
    if filled.num_image_tokens is None:
        filled.num_image_tokens = _image_tokens(stored, folder)
    return filled


def _image_tokens(stored: Mapping[str, Any], folder: Path) -> int:
    if not stored.get("vision_tower_config"):
        return _PUBLISHED_IMAGE_TOKENS
    try:
        with torch.device("meta"):
            return LlavaLlamaForCausalLM(LlavaConfig.from_dict(dict(stored))).get_model().num_image_tokens()
    except (TypeError, KeyError, StrictDataclassError) as error:
        raise CheckpointError(f"{folder}: config.json is wrong: {error.__cause__ or error}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parsed = build_parser().parse_args(arguments)
    return run_cli(lambda: run(parsed))


if __name__ == "__main__":
    sys.exit(main())
