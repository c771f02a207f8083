"""Trains a small tokenizer on training files, for a model that is trained from scratch.

It cuts text at the byte level, so any text is decoded exactly. Sentences that occur in every sample (the templates'
opening, the question, the summary, tags, attribute names) are single tokens each, which makes sequences short.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llava.cli import OptionParser, run_cli
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import conv_templates
from llava.data.checks import tokenize_records
from llava.data.prompting import TokenizedConversation
from llava.data.records import Record, read_records
from llava.errors import DataError, OptionError
from llava.files import atomic_folder
from llava.model.verdict import VerdictTokens
from llava.systems.fakereasoning.answer import (
    ATTRIBUTES,
    FORCED_SUMMARY,
    HIGH_LEVEL_PREFIX,
    LOW_LEVEL_PREFIX,
    QUESTION,
    STAGES,
    SUMMARY,
    VERDICT_PREFIX,
    VERDICT_WORDS,
)

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
"""Their ids are 0 to 3."""
_CHECKED_RECORDS = 1000


def constant_texts() -> list[str]:
    """Returns the texts that become one token each, with the white space around them in the format.

    The opening ``<`` of a CONCLUSION is a token of its own: the probability mapper ignores the first piece before a
    verdict, and the rest must still contain the tag.
    """
    templates = [template for template in conv_templates.values() if template.sep2 == SPECIAL_TOKENS["eos_token"]]
    *stages, conclusion = STAGES
    texts = [f"{t.system}{t.sep}{t.roles[0]}: " for t in templates]
    texts += [f"{template.sep}{template.roles[1]}:" for template in templates]
    texts += [QUESTION, f" {FORCED_SUMMARY}", f" {SUMMARY}", f" {LOW_LEVEL_PREFIX}", f" {HIGH_LEVEL_PREFIX}"]
    texts += [f" {name}:" for names in ATTRIBUTES.values() for name in names]
    texts += [text for stage in stages for text in (f"<{stage}>", f" </{stage}>\n\n", f"</{stage}>")]
    texts += [f"{conclusion}>", f" </{conclusion}>"]
    return list(dict.fromkeys(texts))


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 2000, *, image_token: bool = False
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE with the constant texts as tokens of their own.

    Args:
        texts: What to learn pieces from.
        vocab_size: Most entries that the vocabulary may have, without the image's mark.
        image_token: Whether the image's mark is an entry, the last one, as transformers' LLaVA needs it.

    Raises:
        OptionError: The vocabulary cannot hold even single bytes.
    """
    constants = constant_texts()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(SPECIAL_TOKENS) + len(alphabet) + len(constants)
    if vocab_size <= least:
        raise OptionError(f"--vocab_size must be above {least}, the size of bytes and constant texts")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(constants),
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_without_constants(texts, constants), trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in constants])
    if image_token:
        tokenizer.add_special_tokens([DEFAULT_IMAGE_TOKEN])
    opening = SPECIAL_TOKENS["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{opening} $A", pair=f"{opening} $A $B", special_tokens=[(opening, tokenizer.token_to_id(opening))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, padding_side="right", **SPECIAL_TOKENS
    )
    VerdictTokens.from_tokenizer(fast, VERDICT_PREFIX, VERDICT_WORDS)
    return fast


def _without_constants(texts: Iterable[str], constants: Sequence[str]) -> Iterator[str]:
    longest_first = sorted(constants, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)))
    for text in texts:
        yield from pattern.split(text)
    # Often enough that every word of a verdict is learnt as one token, whatever the texts say.
    yield from [f" {VERDICT_PREFIX.split(' ', 1)[1]} {word}" for word in VERDICT_WORDS] * 100


def measure(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, version: str = "v1") -> list[int]:
    """Returns the tokens of each record's prompt and answer, without its image.

    Raises:
        DataError: A record cannot be tokenised.
    """
    counts = []
    tokenized = tokenize_records(records, tokenizer, conv_templates[version])
    for record, result in zip(records, tokenized, strict=True):
        if not isinstance(result, TokenizedConversation):
            raise DataError(f"{record.origin}: {result}")
        counts.append(len(result.input_ids) - (record.image is not None))
    return counts


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = OptionParser(prog="python -m llava.demo.tokenizer", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="training files")
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder for the tokenizer")
    parser.add_argument(
        "--image_token",
        action="store_true",
        help=f"an entry for {DEFAULT_IMAGE_TOKEN}, as transformers' LLaVA needs it",
    )
    parser.add_argument("--vocab_size", type=int, default=2000, help="most entries of the vocabulary (default 2000)")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Trains and saves a tokenizer."""
    records = read_records(arguments.files)
    texts = [turn["value"].replace(DEFAULT_IMAGE_TOKEN, "") for record in records for turn in record.turns]
    with atomic_folder(arguments.output_dir) as partial:
        shown = tqdm(texts, "reading", unit=" turns", leave=False)
        tokenizer = train_tokenizer(shown, arguments.vocab_size, image_token=arguments.image_token)
        tokenizer.save_pretrained(partial)
    counts = measure(records[:_CHECKED_RECORDS], tokenizer)
    print(
        f"{arguments.output_dir}: {len(tokenizer)} entries; a sample takes {sum(counts) / len(counts):.1f} tokens on "
        f"average, {max(counts)} at most, image not counted ({len(counts)} records)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    arguments = build_parser().parse_args(argv)
    return run_cli(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
