"""Turns the annotator's answers into a reasoning or caption file; rejected answers are kept with their reasons."""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.cli import DefaultsHelpFormatter, OptionParser, exit_status, inform, progress, run_cli
from llava.errors import MissingFileError
from llava.files import write_json, write_jsonl
from llava.labels import LABELS, Label
from mmfr_generation.api.answers import Answer, image_of, read_answer, read_lines
from mmfr_generation.output_control import (
    REASONS,
    Reasoning,
    RejectedAnswer,
    screened_caption,
    screened_reasoning,
)
from mmfr_generation.prompts import TASKS, Task

REJECTS = ".rejects.jsonl"
"""Ending of the file of rejected answers, which can lie among the answers and is none."""


@dataclass
class Annotations:
    """What a set of answers gives.

    Attributes:
        accepted: Reasoning or caption of each image, in the order of the answers.
        rejected: ``custom_id``, ``reason``, ``detail``, ``answer`` and ``where`` of each image that has no accepted
            answer, and of each line that names no image.
    """

    accepted: dict[str, Reasoning | str] = field(default_factory=dict)
    rejected: list[dict[str, Any]] = field(default_factory=list)


def answer_files(paths: Sequence[Path]) -> list[Path]:
    """Returns the given files, and the ``.jsonl`` files of the given folders by name.

    Raises:
        MissingFileError: A path does not exist, or a folder holds no such file.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.glob("*.jsonl") if not file.name.endswith(REJECTS))
            if not inside:
                raise MissingFileError(f"there is no .jsonl file in {path}; give the folder that batch_api.py wrote")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise MissingFileError(f"there is no file or folder {path}")
    return files


def read_annotation(answer: Answer, task: Task, label: Label | None) -> Reasoning | str:
    """Reads what one answer says of its image.

    Raises:
        RejectedAnswer: It gives no annotation.
        ValueError: The task is ``reasoning`` and no label is given.
    """
    if answer.failure:
        raise RejectedAnswer("request_failed", answer.failure[:500])
    if answer.refusal:
        raise RejectedAnswer("refused", answer.refusal[:500])
    if answer.finish_reason == "content_filter":
        raise RejectedAnswer("filtered")
    if answer.finish_reason == "length":
        raise RejectedAnswer("truncated")
    if task == "caption":
        return screened_caption(answer.text)
    if label is None:
        raise ValueError("the reasoning task needs a label")
    return screened_reasoning(answer.text, label)


def collect(files: Sequence[Path], task: Task, label: Label | None) -> Annotations:
    """Reads answer files; of an image that was answered more than once, the last accepted answer counts.

    Answers about an earlier content of an image, which was then replaced under its name, do not count.
    """
    result = Annotations()
    rejected: dict[str, dict[str, Any]] = {}
    asked: dict[str, str] = {}
    for file in files:
        for where, answer in _answers(file):
            if answer is None or not answer.custom_id:
                rejected[where] = _reject("", RejectedAnswer("unreadable_line"), None, where)
                continue
            image = image_of(answer.custom_id)
            if asked.setdefault(image, answer.custom_id) != answer.custom_id:
                asked[image] = answer.custom_id
                result.accepted.pop(image, None)
            try:
                result.accepted[image] = read_annotation(answer, task, label)
                rejected.pop(image, None)
            except RejectedAnswer as rejection:
                if image not in result.accepted:
                    rejected[image] = _reject(image, rejection, answer.text, where)
    result.rejected = list(rejected.values())
    return result


def _answers(file: Path) -> Iterator[tuple[str, Answer | None]]:
    for number, line in progress(read_lines(file), desc=file.name, unit=" answers", leave=False, delay=2):
        yield f"{file.name}, line {number}", None if line is None else read_answer(line)


def _reject(custom_id: str, rejection: RejectedAnswer, answer: str | None, where: str) -> dict[str, Any]:
    return {
        "custom_id": custom_id,
        "reason": rejection.reason,
        "detail": rejection.detail,
        "answer": answer,
        "where": where,
    }


def report(result: Annotations) -> str:
    """Says how many answers were accepted and rejected, and why."""
    lines = [
        f"total: {len(result.accepted) + len(result.rejected)}",
        f"failure: {len(result.rejected)}",
        f"success: {len(result.accepted)}",
    ]
    for reason, count in Counter(entry["reason"] for entry in result.rejected).most_common():
        lines.append(f"  {count} {reason}: {REASONS[reason]}")
    bare = sum(isinstance(value, dict) and not any(value.values()) for value in result.accepted.values())
    if bare:
        lines.append(f"note: {bare} accepted without a sentence for any attribute; they serve a verdict file only")
    return "\n".join(lines)


def build_parser() -> OptionParser:
    """Returns the options of this script."""
    parser = OptionParser(
        description="Turn the annotator's answers into a reasoning file {image: {attribute: sentence or null}}, or "
        "into a caption file {image: caption}. Rejected answers go to a second file, each with its reason.",
        formatter_class=DefaultsHelpFormatter,
    )
    parser.add_argument(
        "--input", type=Path, nargs="+", required=True, help="answer files (.jsonl), or folders that batch_api.py wrote"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--label", choices=LABELS, help="class of the images that were asked about; not for captions")
    parser.add_argument("--task", choices=TASKS, default="reasoning", help="what was asked for")
    parser.add_argument("--rejects", type=Path, help="file for rejected answers; by default OUTPUT.rejects.jsonl")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the reasoning or caption file and the rejects, and prints the counts; returns its exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.task == "reasoning" and options.label is None:
        parser.error("--task reasoning needs --label real or --label fake")
    result = collect(answer_files(options.input), options.task, options.label)
    rejects = options.rejects or options.output.with_name(options.output.name + REJECTS)
    write_json(options.output, result.accepted)
    write_jsonl(rejects, result.rejected)
    print(report(result))
    inform(f"written: {options.output} and {rejects}")
    return exit_status(done=len(result.accepted), left_out=len(result.rejected))


if __name__ == "__main__":
    sys.exit(run_cli(main))
