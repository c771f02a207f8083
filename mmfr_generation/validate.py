"""Checks a training file, a reasoning file or an evaluation set, and finds images that two of them share."""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from tqdm import tqdm

from llava.cli import DefaultsHelpFormatter, OptionParser, run_cli
from llava.errors import DataError, FileError, MissingFileError
from llava.files import digest_file, file_errors, read_json, write_json
from llava.images import load_image
from llava.labels import Label
from llava.systems import registry
from llava.systems.fakereasoning.answer import ATTRIBUTES, FORMAT
from mmfr_generation.build_cot import IMAGE_MARK, label_of
from mmfr_generation.images import (
    hamming_distances,
    list_images,
    perceptual_hash,
    published_label,
    read_reason,
)

CHECKS = {
    "schema": "entries that are not of the layout",
    "image mark": f"conversations without exactly one {IMAGE_MARK}, in the first question",
    "verdict": "answers without a verdict",
    "attributes": "attributes that do not belong to the class",
    "label": "answers against the entry's label (FakeClue: 1 is real)",
    "folder": "verdict or attributes against the folder's class",
    "missing image": "images that are not there",
    "unreadable image": "images that do not open",
    "duplicate": "images that occur more than once, by path or by bytes",
    "leakage": "images that are also in the other set, or look like one there",
    "class": "evaluation sets without images of both classes",
}
"""Every fault that is checked for."""
_FAKECLUE_LABELS = {"real": 1, "fake": 0}
REMARKS = {
    "similar": "images that look alike in the same set",
    "file type": "classes that the file type alone tells apart",
    "no image": "conversations without an image",
    "no reasoning": "images of an evaluation set without reasoning",
    "balance": "classes of different size",
}
"""What is worth knowing and is no fault."""


@dataclass
class Findings:
    """What a check has found.

    Attributes:
        entries: Number of entries checked.
        found: Places of each fault or remark, by its name in ``CHECKS`` or ``REMARKS``.
    """

    entries: int = 0
    found: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, check: str, place: str) -> None:
        """Notes a fault or a remark."""
        self.found[check].append(place)

    @property
    def faults(self) -> int:
        """Number of faults."""
        return sum(len(self.found.get(check, ())) for check in CHECKS)

    def text(self, limit: int = 5) -> str:
        """Returns a readable report with the first ``limit`` places of each fault."""
        lines = [f"entries: {self.entries}", f"faults: {self.faults}"]
        for title, meanings in (("fault", CHECKS), ("note", REMARKS)):
            for check, meaning in meanings.items():
                places = self.found.get(check, [])
                if places:
                    lines.append(f"{title} · {check}: {len(places)} {meaning}")
                    lines += [f"    {place}" for place in places[:limit]]
                    if len(places) > limit:
                        lines.append(f"    … and {len(places) - limit} more")
        return "\n".join(lines)


@dataclass(frozen=True)
class SetImage:
    """An image of a set.

    Attributes:
        name: As the set names it.
        path: Where it is.
        sha256: Of its bytes.
        hash: Its perceptual hash, None for a nearly uniform image.
    """

    name: str
    path: Path
    sha256: str
    hash: int | None


def check_training_file(path: Path, image_folder: Path, findings: Findings) -> list[SetImage]:
    """Checks a training file; returns its images.

    Raises:
        UserError: It cannot be read or is not a list.
    """
    records = read_json(path)
    if not isinstance(records, list):
        raise DataError(f"{path} must hold a list of conversations")
    names = []
    for number, record in enumerate(records):
        findings.entries += 1
        image = _check_record(f"entry {number}", record, findings)
        if image is not None:
            names.append(image)
    return list(_read_images(names, image_folder, findings))


def check_reasoning_file(path: Path, image_folder: Path, findings: Findings) -> list[SetImage]:
    """Checks a reasoning file ``{image: {attribute: sentence or null}}``; returns its images.

    Raises:
        UserError: It cannot be read or is not an object.
    """
    reasoning = read_json(path)
    if not isinstance(reasoning, dict):
        raise DataError(f"{path} must hold an object whose keys are image paths")
    findings.entries += len(reasoning)
    for image, sentences in reasoning.items():
        _check_sentences(image, sentences, findings)
    return list(_read_images(list(reasoning), image_folder, findings))


def check_evaluation_set(folder: Path, findings: Findings) -> list[SetImage]:
    """Checks a folder with ``0_real``, ``1_fake`` and ``<name>_reasoning.json``; returns its images.

    Raises:
        UserError: The reasoning file is not JSON.
    """
    names = {
        label: [f"{folder.name}/{sub}/{name}" for name in list_images(folder / sub)] if (folder / sub).is_dir() else []
        for label, sub in (("real", "0_real"), ("fake", "1_fake"))
    }
    findings.entries += sum(map(len, names.values()))
    for label, images in names.items():
        if not images:
            findings.add("class", f"{folder} has no {label} image")
    if len(names["real"]) != len(names["fake"]):
        findings.add("balance", f"{folder}: {len(names['real'])} real, {len(names['fake'])} fake")
    suffixes = {label: {PurePosixPath(name).suffix.lower() for name in images} for label, images in names.items()}
    if all(suffixes.values()) and not suffixes["real"] & suffixes["fake"]:
        real, fake = (", ".join(sorted(suffixes[label])) for label in ("real", "fake"))
        findings.add("file type", f"{folder}: real images are {real}, fake ones {fake}")
    images = [name for some in names.values() for name in some]
    reasoning_path = folder / f"{folder.name}_reasoning.json"
    reasoning = read_json(reasoning_path) if reasoning_path.exists() else {}
    if not isinstance(reasoning, dict):
        findings.add("schema", f"{reasoning_path} is not an object")
        reasoning = {}
    for image, sentences in reasoning.items():
        _check_sentences(image, sentences, findings)
        if image not in images:
            findings.add("missing image", f"{image}, named in {reasoning_path}")
    without = sum(name not in reasoning for name in images)
    if without:
        findings.add("no reasoning", f"{folder}: {without} of {len(images)}")
    return list(_read_images(images, folder.parent, findings))


def _check_record(place: str, record: Any, findings: Findings) -> str | None:
    """Checks one conversation; returns its image's name."""
    turns = record.get("conversations") if isinstance(record, dict) else None
    problem = _layout_problem(record, turns)
    if problem or not isinstance(turns, list):
        findings.add("schema", f"{place}: {problem}")
        return None
    image = record.get("image")
    place = f"{place} ({image})" if image else place
    marks = [turn["value"].count(IMAGE_MARK) for turn in turns]
    if image is None:
        findings.add("no image", place)
        if sum(marks):
            findings.add("image mark", f"{place}: {sum(marks)} marks and no image")
        return None
    if marks[0] != 1 or sum(marks) != 1:
        findings.add("image mark", f"{place}: {marks[0]} in the first question, {sum(marks)} in all")
    words = registry.words_of([turns[1]["value"]], FORMAT)
    parsed = words.parse(turns[1]["value"])
    if parsed.verdict is None:
        findings.add("verdict", f"{place}: {parsed.problem}")
        return str(image)
    _check_label(place, record, parsed.verdict, findings)
    unknown_names = sorted(set(parsed.attributes) - set(words.attributes[parsed.verdict]))
    if unknown_names:
        findings.add("attributes", f"{place}: a {parsed.verdict} image with {', '.join(unknown_names)}")
    _check_folder(place, image, parsed.verdict, findings)
    return str(image)


def _check_label(place: str, record: dict[str, Any], verdict: Label, findings: Findings) -> None:
    """Checks the label that an entry of FakeClue has beside its answer."""
    if "label" not in record or "cate" not in record:
        return
    wanted = _FAKECLUE_LABELS.get(verdict)
    if isinstance(record["label"], bool) or record["label"] != wanted:
        findings.add("label", f"{place}: its answer says {verdict}, its label is {record['label']!r}")


def _layout_problem(record: Any, turns: Any) -> str:
    if not isinstance(record, dict):
        return "it is not an object"
    if "image" in record and not (isinstance(record["image"], str) and record["image"]):
        return '"image" is not a path'
    if not isinstance(turns, list) or len(turns) < 2 or len(turns) % 2:
        return '"conversations" is not a list of questions and answers'
    for number, turn in enumerate(turns):
        speaker = ("human", "gpt")[number % 2]
        if not isinstance(turn, dict) or turn.get("from") != speaker or not isinstance(turn.get("value"), str):
            return f'turn {number} is not {{"from": "{speaker}", "value": text}}'
        if not turn["value"].strip():
            return f"turn {number} is empty"
    return ""


def _check_sentences(image: str, sentences: Any, findings: Findings) -> None:
    if not isinstance(sentences, dict) or not all(
        value is None or isinstance(value, str) for value in sentences.values()
    ):
        findings.add("schema", f"{image}: not an object of attributes and sentences or null")
        return
    try:
        label = label_of(sentences)
    except DataError as error:
        findings.add("attributes", f"{image}: {error}")
        return
    unknown_names = sorted(set(sentences) - set(ATTRIBUTES[label]))
    if unknown_names:
        findings.add("attributes", f"{image}: unknown {', '.join(unknown_names)}")
    _check_folder(image, image, label, findings)


def _check_folder(place: str, image: str, label: Label, findings: Findings) -> None:
    folder = published_label(image)
    if folder is not None and folder != label:
        findings.add("folder", f"{place}: annotated as {label}, lies in a folder of {folder} images")


def _read_images(names: Iterable[str], image_folder: Path, findings: Findings) -> Iterator[SetImage]:
    """Opens each image once and yields those that open."""
    seen: set[str] = set()
    bytes_seen: dict[str, str] = {}
    for name in tqdm(list(names), desc=f"images in {image_folder}", unit="", delay=2):
        if name in seen:
            findings.add("duplicate", f"{name} occurs more than once")
            continue
        seen.add(name)
        path = image_folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            findings.add("schema", f"{name} leads out of the image folder")
            continue
        if not path.is_file():
            findings.add("missing image", f"{name} is not in {image_folder}")
            continue
        try:
            image = SetImage(name, path, digest_file(path), perceptual_hash(load_image(path)))
        except FileError as error:
            findings.add("unreadable image", f"{name}: {read_reason(error, path)}")
            continue
        if image.sha256 in bytes_seen:
            findings.add("duplicate", f"{name} has the same bytes as {bytes_seen[image.sha256]}")
        bytes_seen.setdefault(image.sha256, name)
        yield image


def check_similar(images: Sequence[SetImage], distance: int, findings: Findings) -> None:
    """Notes images of one set that look alike but are not the same file."""
    hashed = [image for image in images if image.hash is not None]
    for one, other in _near(hashed, hashed, distance):
        if one < other and hashed[one].sha256 != hashed[other].sha256:
            findings.add("similar", f"{hashed[other].name} looks like {hashed[one].name}")


def check_leakage(images: Sequence[SetImage], others: Sequence[SetImage], distance: int, findings: Findings) -> None:
    """Notes images that are in another set too: the same file, or one that looks the same."""
    by_bytes = {other.sha256: other for other in others}
    for image in images:
        if image.sha256 in by_bytes:
            findings.add("leakage", f"{image.name} is {by_bytes[image.sha256].name}")
    hashed = [image for image in images if image.hash is not None and image.sha256 not in by_bytes]
    hashed_others = [other for other in others if other.hash is not None]
    for one, other in _near(hashed, hashed_others, distance):
        findings.add("leakage", f"{hashed[one].name} looks like {hashed_others[other].name}")


def _near(images: Sequence[SetImage], others: Sequence[SetImage], distance: int) -> Iterator[tuple[int, int]]:
    """Yields the indices of all pairs whose hashes differ in at most ``distance`` bits."""
    hashes = np.array([other.hash for other in others], dtype=np.uint64)
    for index, image in enumerate(tqdm(images, desc="comparing", unit=" images", delay=2)):
        if image.hash is not None and len(hashes):
            for match in np.flatnonzero(hamming_distances(image.hash, hashes) <= distance):
                yield index, int(match)


def evaluation_sets(folder: Path) -> list[Path]:
    """Returns the folder itself if it is an evaluation set, else the sets in it.

    Raises:
        DataError: There is none.
    """

    def is_set(path: Path) -> bool:
        return (path / "0_real").is_dir() or (path / "1_fake").is_dir()

    with file_errors(folder, "read"):
        sets = [folder] if is_set(folder) else sorted(path for path in folder.iterdir() if is_set(path))
    if not sets:
        raise DataError(f"{folder} is no evaluation set and holds none: there is no 0_real or 1_fake in it")
    return sets


def check(path: Path, image_folder: Path | None, findings: Findings) -> list[SetImage]:
    """Checks a training file, a reasoning file, an evaluation set or a folder of sets; returns its images.

    Args:
        path: The file or folder.
        image_folder: Folder that the image paths of a file start from; by default the file's own.
        findings: Where faults and remarks are noted.

    Raises:
        UserError: There is nothing at the path, or it is none of these.
    """
    if path.is_dir():
        return [image for folder in evaluation_sets(path) for image in check_evaluation_set(folder, findings)]
    reader: Callable[[Path, Path, Findings], list[SetImage]]
    reader = check_training_file if isinstance(read_json(path), list) else check_reasoning_file
    return reader(path, image_folder or path.parent, findings)


def build_parser() -> OptionParser:
    """Returns the options of this script."""
    parser = OptionParser(
        description="Check a training file, a reasoning file or an evaluation set: layout, images, verdicts, "
        "duplicates; and with --against, whether its images are in another set too. Images are compared by bytes and "
        "by a perceptual hash, which survives scaling and compression but not mirroring or cropping.",
        formatter_class=DefaultsHelpFormatter,
    )
    parser.add_argument("path", type=Path, help="training or reasoning file (.json), evaluation set, or folder of sets")
    parser.add_argument("--image-folder", type=Path, help="where the file's image paths start; by default its folder")
    parser.add_argument("--against", type=Path, nargs="+", default=[], help="other files or sets that share no image")
    parser.add_argument("--against-image-folder", type=Path, help="where the image paths of those files start")
    parser.add_argument("--distance", type=int, default=6, help="bits of 64 in which the hashes of like images differ")
    parser.add_argument("--report", type=Path, help="also write every finding to this JSON file")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a report; returns 1 if there is a fault."""
    options = build_parser().parse_args(arguments)
    for folder in (options.image_folder, options.against_image_folder):
        if folder and not folder.is_dir():
            raise MissingFileError(f"there is no folder {folder}")
    findings = Findings()
    images = check(options.path, options.image_folder, findings)
    check_similar(images, options.distance, findings)
    for other in options.against:
        others = check(other, options.against_image_folder, Findings())
        check_leakage(images, others, options.distance, findings)
    print(findings.text())
    if options.report:
        write_json(options.report, {"entries": findings.entries, "faults": findings.faults, "found": findings.found})
    return 1 if findings.faults else 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
