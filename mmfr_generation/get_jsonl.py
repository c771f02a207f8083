"""Turns a folder of images into request files for the Batch API, or says what they would cost."""

import base64
import json
import math
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from llava.cli import (
    DefaultsHelpFormatter,
    OptionParser,
    exit_status,
    format_list,
    log,
    positive_float,
    positive_int,
    progress,
    run_cli,
)
from llava.errors import DataError, ImageReadError, OptionError
from llava.files import atomic_file, exclusive_lock, file_errors, write_jsonl
from llava.labels import LABELS
from mmfr_generation.api.answers import ENDPOINT, image_of, read_lines, request_id
from mmfr_generation.api.costs import BATCH_FACTOR, CHARACTERS_PER_TOKEN, PRICES, TILE_RULES, Price, TileRule, dollars
from mmfr_generation.images import EncodedImage, encode_image, list_images, read_reason
from mmfr_generation.prompts import TASKS, prompt_for


@dataclass(frozen=True)
class Question:
    """What is the same in every request of a set."""

    prompt: str
    model: str
    max_tokens: int
    detail: str = "auto"
    limit_name: str = "max_tokens"

    def request(self, custom_id: str, url: str) -> dict[str, Any]:
        """Returns one request; ``url`` is the image's data URL."""
        image = {"type": "image_url", "image_url": {"url": url, "detail": self.detail}}
        content = [{"type": "text", "text": self.prompt}, image]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            self.limit_name: self.max_tokens,
        }
        return {"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": body}

    def asks_like(self, request: dict[str, Any]) -> bool:
        """Whether a request that was written earlier asks the same about its image."""
        try:
            url = request["body"]["messages"][0]["content"][1]["image_url"]["url"]
            return request == self.request(request["custom_id"], url)
        except (KeyError, IndexError, TypeError):
            return False


@dataclass
class Outcome:
    """What became of the images of a folder.

    Attributes:
        written: Number of requests written now.
        kept: Number of images whose requests existed before.
        withdrawn: ``custom_id`` of each request whose image is gone, or is another one now.
        files: Request files written now.
        skipped: ``path: reason`` of each image that could not be put into a request.
        unread: Path of each of these that could not be read, whose earlier request stays.
        image_tokens: Tokens of the images counted now.
    """

    written: int = 0
    kept: int = 0
    withdrawn: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)
    image_tokens: int = 0


def write_requests(
    image_folder: Path,
    output_folder: Path,
    set_name: str,
    file_stem: str,
    question: Question,
    *,
    max_bytes: int,
    images_per_file: int,
) -> Outcome:
    """Writes request files ``<file_stem>_0001.jsonl`` and so on, each complete before it gets its name.

    Images whose requests exist already are left out, so that a run that was stopped resumes and one with new images
    adds to what exists. A request whose image is gone or was replaced under its name is withdrawn; a replaced one is
    asked about anew. A stopped and resumed run gives the same files as an uninterrupted one.

    Args:
        image_folder: Where the images are.
        output_folder: Where the request files go.
        set_name: Path of the image folder in the data set; the start of every ``custom_id``.
        file_stem: Start of the request files' names.
        question: What to ask.
        max_bytes: Largest size of a request file.
        images_per_file: Largest number of requests in a file.

    Raises:
        DataError: The output folder holds requests that ask something else.
    """
    outcome = Outcome()
    for path in sorted(output_folder.glob("*.jsonl")):
        next(_same_requests(path, question), None)  # of other sets, the first request speaks for its file
    there, next_number = _requests_there(output_folder, file_stem, question)
    ids = frozenset().union(*there.values())
    current: set[str] = set()
    lines: list[bytes] = []
    size = 0

    def close_file() -> None:
        nonlocal lines, size, next_number
        path = output_folder / f"{file_stem}_{next_number:04d}.jsonl"
        with atomic_file(path) as file:
            file.writelines(lines)
        outcome.files.append(path)
        outcome.written += len(lines)
        lines, size, next_number = [], 0, next_number + 1

    for name, image in _images(image_folder, set_name, outcome):
        custom_id = request_id(name, image.data)
        current.add(custom_id)
        if custom_id in ids:
            outcome.kept += 1
            continue
        url = f"data:{image.media_type};base64,{base64.b64encode(image.data).decode('ascii')}"
        line = (json.dumps(question.request(custom_id, url), ensure_ascii=False) + "\n").encode()
        if len(line) > max_bytes:
            outcome.skipped.append(f"{name}: its request has {len(line):,} bytes, --max-bytes is {max_bytes:,}")
            continue
        if lines and (size + len(line) > max_bytes or len(lines) >= images_per_file):
            close_file()
        lines.append(line)
        size += len(line)
    if lines:
        close_file()
    for path, own in there.items():
        stale = {custom_id for custom_id in own - current if image_of(custom_id) not in outcome.unread}
        outcome.withdrawn += sorted(stale)
        _withdraw(path, stale)
    return outcome


def _withdraw(path: Path, stale: Collection[str]) -> None:
    """Takes requests out of a file, which is removed where none is left."""
    if not stale:
        return
    kept = [line for _, line in read_lines(path) if line is not None and _own_id(line) not in stale]
    if kept:
        write_jsonl(path, kept)
    else:
        with file_errors(path, "deleted"):
            path.unlink()


def measure(image_folder: Path, set_name: str, rule: TileRule, detail: str) -> tuple[int, Outcome]:
    """Counts the images that can be sent and their tokens, and writes nothing."""
    outcome, count = Outcome(), 0
    for _, image in _images(image_folder, set_name, outcome):
        count += 1
        outcome.image_tokens += rule.tokens(image.width, image.height, detail)
    return count, outcome


def _images(image_folder: Path, set_name: str, outcome: Outcome) -> Iterator[tuple[str, EncodedImage]]:
    """Yields the path in the set and the content of each image that can be asked about; notes the others."""
    paths = list(list_images(image_folder))
    if not paths:
        raise DataError(f"there is no image in {image_folder}")
    for path in progress(paths, desc="images", unit="", delay=2):
        name = (PurePosixPath(set_name) / path).as_posix()
        try:
            name.encode()
        except UnicodeEncodeError:
            outcome.skipped.append(f"{name!a}: its name is not UTF-8; rename it")
            continue
        try:
            yield name, encode_image(image_folder / path)
        except ImageReadError as error:
            outcome.skipped.append(f"{name}: {read_reason(error, image_folder / path)}")
            outcome.unread.add(name)


def _requests_there(output_folder: Path, file_stem: str, question: Question) -> tuple[dict[Path, frozenset[str]], int]:
    """Returns the ids in each request file of this set, and the number of the next file."""
    numbers = {
        int(path.stem.removeprefix(f"{file_stem}_")): path
        for path in output_folder.glob("*.jsonl")
        if path.stem.startswith(f"{file_stem}_") and path.stem.removeprefix(f"{file_stem}_").isdecimal()
    }
    there: dict[Path, frozenset[str]] = {}
    for _, path in sorted(numbers.items()):
        there[path] = frozenset(_own_id(request) for request in _same_requests(path, question))
    return there, max(numbers, default=0) + 1


def _same_requests(path: Path, question: Question) -> Iterator[dict[str, Any]]:
    for line_number, request in read_lines(path):
        if request is None or not question.asks_like(request):
            raise DataError(
                f"{path}, line {line_number}, asks something else (another task, label, model, prompt, or limit); a "
                "folder holds one such setting: name another --output-folder, or remove the old request files first"
            )
        yield request


def _own_id(request: dict[str, Any]) -> str:
    """Returns a request's id with its image's digest, which requests of earlier versions do not name."""
    custom_id = str(request["custom_id"])
    if image_of(custom_id) != custom_id:
        return custom_id
    url = request["body"]["messages"][0]["content"][1]["image_url"]["url"]
    return request_id(custom_id, base64.b64decode(url.partition(",")[2]))


def limit_name(model: str) -> str:
    """Returns what a model's API calls the limit of an answer: reasoning models take another name."""
    plain = model.rpartition("/")[2].removeprefix("ft:")
    return "max_completion_tokens" if re.match(r"o\d|gpt-(?:[5-9]|\d\d)", plain) else "max_tokens"


def cost_report(count: int, image_tokens: int, question: Question, prices: Price | None) -> str:
    """Says how many tokens and dollars the annotation of a set takes at most."""
    text_tokens = count * math.ceil(len(question.prompt) / CHARACTERS_PER_TOKEN)
    output_tokens = count * question.max_tokens
    lines = [
        f"images: {count}",
        f"image tokens: {image_tokens}",
        f"prompt tokens: about {text_tokens}",
        f"answer tokens: at most {output_tokens}",
    ]
    if prices is None:
        lines.append(f"cost: no price is known for {question.model}; give --input-price and --output-price")
    else:
        batch, direct = (
            dollars(prices, image_tokens + text_tokens, output_tokens, batch=batch) for batch in (True, False)
        )
        lines.append(f"cost: at most ${batch:.4f} in batches, ${direct:.4f} directly")
        lines.append(
            f"  (${prices.input:g} and ${prices.output:g} for a million tokens in and out, "
            f"batches at {BATCH_FACTOR:.0%})"
        )
    return "\n".join(lines)


def check_set_name(set_name: str) -> str:
    """Returns the set's name as a relative path with ``/``.

    Raises:
        OptionError: It is absolute, empty, or climbs out of the data set.
    """
    path = PurePosixPath(set_name)
    if path.is_absolute() or not path.parts or ".." in path.parts:
        raise OptionError(f"--set-name {set_name!r} must be a relative path such as photos or gallery/1_fake")
    return path.as_posix()


def _price(text: str) -> float:
    """Reads an amount of zero or more, for ``type=`` of an option."""
    return 0.0 if text.strip() in {"0", "0.0"} else positive_float(text)


def build_parser() -> OptionParser:
    """Returns the options of this script."""
    parser = OptionParser(
        description="Write Batch API request files that ask for an annotation of every image in a folder. Each request "
        "is named after its image: SET_NAME/path below the image folder. Run again, it adds what is missing.",
        formatter_class=DefaultsHelpFormatter,
    )
    parser.add_argument(
        "--image-folder", type=Path, required=True, help="folder of images; its subfolders are searched too"
    )
    parser.add_argument("--output-folder", type=Path, help="folder for the request files; not needed for --dry-run")
    parser.add_argument("--label", choices=LABELS, help="class of all these images; not needed for captions")
    parser.add_argument(
        "--set-name", help="path of the image folder in the data set, e.g. gallery/1_fake; by default the folder's name"
    )
    parser.add_argument("--task", choices=TASKS, default="reasoning", help="what to ask for")
    parser.add_argument("--model", default="gpt-4o-2024-08-06", help="model that annotates")
    parser.add_argument("--max-tokens", type=positive_int, default=300, help="limit of each answer, in tokens")
    parser.add_argument(
        "--limit-name",
        choices=("auto", "max_tokens", "max_completion_tokens"),
        default="auto",
        help="what the model's API calls that limit; auto: by the model's name",
    )
    parser.add_argument(
        "--detail", choices=("auto", "low", "high"), default="auto", help="resolution at which the model sees the image"
    )
    parser.add_argument("--max-bytes", type=positive_int, default=95_000_000, help="largest size of a request file")
    parser.add_argument("--images-per-file", type=positive_int, default=50, help="most requests in a file")
    parser.add_argument("--dry-run", action="store_true", help="write nothing; print tokens and cost")
    parser.add_argument("--input-price", type=_price, metavar="USD", help="price of a million input tokens")
    parser.add_argument("--output-price", type=_price, metavar="USD", help="price of a million output tokens")
    parser.add_argument(
        "--image-tokens", type=positive_int, nargs=2, metavar=("BASE", "TILE"), help="tokens of an image and of a tile"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes request files or prints the cost; returns its exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.task == "reasoning" and options.label is None:
        parser.error("--task reasoning needs --label real or --label fake")
    if options.output_folder is None and not options.dry_run:
        parser.error("--output-folder is needed, unless with --dry-run")
    if (options.input_price is None) != (options.output_price is None):
        parser.error("--input-price and --output-price go together")
    set_name = check_set_name(options.set_name or options.image_folder.resolve().name)
    limit = limit_name(options.model) if options.limit_name == "auto" else options.limit_name
    prompt = prompt_for(options.task, options.label)
    question = Question(prompt, options.model, options.max_tokens, options.detail, limit)
    if options.dry_run:
        rule = TILE_RULES.get(options.model, TileRule())
        if options.image_tokens:
            rule = TileRule(*options.image_tokens)
        known = PRICES.get(options.model)
        prices = known if options.input_price is None else Price(options.input_price, options.output_price)
        count, outcome = measure(options.image_folder, set_name, rule, options.detail)
        print(cost_report(count, outcome.image_tokens, question, prices))
    else:
        asked = [options.task] if options.task == "caption" else [options.label, options.task]
        stem = "_".join([*PurePosixPath(set_name).parts, *asked])
        with exclusive_lock(options.output_folder / stem):
            outcome = write_requests(
                options.image_folder,
                options.output_folder,
                set_name,
                stem,
                question,
                max_bytes=options.max_bytes,
                images_per_file=options.images_per_file,
            )
        count = outcome.written + outcome.kept
        print(f"requests written: {outcome.written} in {len(outcome.files)} files in {options.output_folder}")
        if outcome.kept:
            print(f"requests that existed already: {outcome.kept}")
        if outcome.withdrawn:
            names = format_list([image_of(custom_id) for custom_id in outcome.withdrawn])
            print(f"requests withdrawn, their images are gone or others now: {len(outcome.withdrawn)}\n{names}")
    if outcome.skipped:
        log(f"left out: {len(outcome.skipped)} images\n{format_list(outcome.skipped)}")
    return exit_status(done=count, left_out=len(outcome.skipped))


if __name__ == "__main__":
    sys.exit(run_cli(main))
