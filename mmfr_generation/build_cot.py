"""Builds a training file from reasoning files and captions, in the layout of ``forgery_reasoning_cot.json``."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.cli import DefaultsHelpFormatter, OptionParser, exit_status, format_list, log, run_cli
from llava.errors import DataError, MissingFileError
from llava.files import file_errors, read_json, write_json, write_jsonl
from llava.labels import LABELS, Label
from llava.systems.fakereasoning.answer import ATTRIBUTES, FORM_STAGES, QUESTION, Form, write_answer, write_reasoning
from mmfr_generation.output_control import Reasoning

IMAGE_MARK = "<image>"


def training_record(
    image: str,
    label: Label,
    *,
    reasoning: Mapping[str, str | None] | None = None,
    caption: str = "",
    form: Form = "cot",
) -> dict[str, Any]:
    """Returns one conversation of a training file.

    Args:
        image: Path of the image below the training's image folder.
        label: Its class.
        reasoning: Sentence of each attribute; needed unless ``form`` is ``verdict``.
        caption: What the image shows; needed if ``form`` is ``cot``.
        form: Which stages the answer has.

    Raises:
        DataError: What the form needs is missing, or an attribute does not belong to the label.
    """
    text = write_reasoning(label, reasoning or {}) if "REASONING" in FORM_STAGES[form] else ""
    answer = write_answer(label, reasoning=text, caption=caption, form=form)
    return {
        "image": image,
        "conversations": [
            {"from": "human", "value": f"{IMAGE_MARK}\n{QUESTION}"},
            {"from": "gpt", "value": answer},
        ],
    }


def label_of(reasoning: Mapping[str, Any]) -> Label:
    """Returns the class of an image from the names of its attributes.

    Raises:
        DataError: No name is known, or they belong to both classes.
    """
    labels = [label for label in LABELS if any(name in reasoning for name in ATTRIBUTES[label])]
    if len(labels) != 1:
        found = ", ".join(map(str, reasoning)) or "none"
        raise DataError(f"its attributes do not say whether it is real or fake: {found}")
    return labels[0]


def read_reasoning(paths: Iterable[Path]) -> dict[str, Reasoning]:
    """Reads reasoning files into one.

    Raises:
        DataError: A file is no reasoning file, or two contradict each other.
    """
    merged: dict[str, Reasoning] = {}
    for path in paths:
        for image, reasoning in _read_object(path).items():
            if not isinstance(reasoning, dict) or not all(
                value is None or isinstance(value, str) for value in reasoning.values()
            ):
                raise DataError(f"{path}: {image!r} is not an object of attribute names and sentences or null")
            if merged.setdefault(image, reasoning) != reasoning:
                raise DataError(f"{path}: {image!r} has another reasoning in an earlier file")
    return merged


def read_captions(paths: Iterable[Path]) -> dict[str, str]:
    """Reads caption files into one.

    Raises:
        DataError: A file is no caption file, or two have different captions of an image.
    """
    merged: dict[str, str] = {}
    for path in paths:
        for image, caption in _read_object(path).items():
            if not isinstance(caption, str):
                raise DataError(f"{path}: the caption of {image!r} is not a text")
            if merged.setdefault(image, caption) != caption:
                raise DataError(f"{path}: {image!r} has another caption in an earlier file")
    return merged


def _read_object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path} must hold one JSON object whose keys are image paths")
    return value


def build(
    reasoning: Mapping[str, Reasoning], captions: Mapping[str, str], form: Form, image_folder: Path | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Builds the records of a training file, in the order of the reasoning.

    Args:
        reasoning: Attribute sentences of each image.
        captions: Caption of each image; used if ``form`` is ``cot``.
        form: Which stages the answers have.
        image_folder: If given, an image that is not in it is dropped.

    Returns:
        The records, and ``image`` and ``reason`` of each image that was dropped.
    """
    records: list[dict[str, Any]] = []
    dropped: list[dict[str, str]] = []
    for image, sentences in reasoning.items():
        try:
            if form == "cot" and not captions.get(image, "").strip():
                raise DataError("it has no caption")
            if image_folder is not None and not (image_folder / image).is_file():
                raise DataError(f"it is not in {image_folder}")
            caption = captions.get(image, "")
            records.append(training_record(image, label_of(sentences), reasoning=sentences, caption=caption, form=form))
        except DataError as error:
            dropped.append({"image": image, "reason": str(error)})
    return records, dropped


def write_training_file(path: Path, records: list[dict[str, Any]], dropped: list[dict[str, str]]) -> None:
    """Writes a training file, and beside it ``<path>.dropped.jsonl`` with what was left out, and prints both numbers.

    Raises:
        DataError: There is no record to write.
    """
    dropped_path = path.with_name(path.name + ".dropped.jsonl")
    if dropped:
        write_jsonl(dropped_path, dropped)
        names = [f"{entry['image']}: {entry['reason']}" for entry in dropped]
        log(f"dropped: {len(dropped)} images\n{format_list(names)}")
    else:
        with file_errors(dropped_path, "deleted"):
            dropped_path.unlink(missing_ok=True)
    if not records:
        raise DataError(f"no image is left, so {path} was not written")
    write_json(path, records)
    print(f"records: {len(records)} in {path}")


def build_parser() -> OptionParser:
    """Returns the options of this script."""
    parser = OptionParser(
        description="Build a training file from reasoning and captions. An image that lacks what the form needs is "
        "named, counted and left out, and listed in OUTPUT.dropped.jsonl.",
        formatter_class=DefaultsHelpFormatter,
    )
    parser.add_argument("--reasoning", type=Path, nargs="+", required=True, help="files of output_to_reasoning.py")
    parser.add_argument("--captions", type=Path, nargs="+", default=[], help="caption files; needed for --form cot")
    parser.add_argument(
        "--form",
        choices=tuple(FORM_STAGES),
        default="cot",
        help="cot: summary, caption, reasoning, conclusion; reasoning: the last two; verdict: the conclusion alone",
    )
    parser.add_argument("--image-folder", type=Path, help="drop images that are not in this folder")
    parser.add_argument("--output", type=Path, required=True, help="training file to write")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes a training file; returns its exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.form == "cot" and not options.captions:
        parser.error("--form cot needs --captions; ask for them with get_jsonl.py --task caption")
    if options.image_folder and not options.image_folder.is_dir():
        raise MissingFileError(f"there is no folder {options.image_folder}")
    reasoning, captions = read_reasoning(options.reasoning), read_captions(options.captions)
    records, dropped = build(reasoning, captions, options.form, options.image_folder)
    write_training_file(options.output, records, dropped)
    return exit_status(done=len(records), left_out=len(dropped))


if __name__ == "__main__":
    sys.exit(run_cli(main))
