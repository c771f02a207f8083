"""Makes an evaluation set or a training file from any folder of real and fake images, or from a CSV table."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from llava.cli import DefaultsHelpFormatter, OptionParser, exit_status, format_list, inform, log, progress, run_cli
from llava.errors import DataError, FileError, ImageReadError, OptionError
from llava.files import file_errors, write_json
from llava.images import load_image
from llava.labels import CLASS_FOLDERS, LABELS, Label, label_from_folders
from llava.systems.fakereasoning.answer import FORM_STAGES, Form
from llava.tables import LABEL_MAP_HELP, Columns, NameFinder, Row, parse_label_map, read_label, read_rows
from mmfr_generation.build_cot import read_captions, read_reasoning, training_record, write_training_file
from mmfr_generation.get_jsonl import check_set_name
from mmfr_generation.images import list_images, read_reason
from mmfr_generation.output_control import Reasoning

SET_FOLDERS: dict[Label, str] = {"real": "0_real", "fake": "1_fake"}


def _hard_link(source: Path, target: Path) -> None:
    os.link(source.resolve(), target)


def _symbolic_link(source: Path, target: Path) -> None:
    target.symlink_to(source.resolve())


PLACING: dict[str, Callable[[Path, Path], Any]] = {
    "copy": shutil.copyfile,
    "hardlink": _hard_link,
    "symlink": _symbolic_link,
}
"""Ways to put an image into an evaluation set."""


@dataclass(frozen=True)
class LabelledImage:
    """An image and what is known of it.

    Attributes:
        path: Path below the root, with ``/``.
        label: Its class.
        caption: What it shows; empty if not known.
    """

    path: str
    label: Label
    caption: str = ""


def read_tree(root: Path, left_out: list[str]) -> Iterator[LabelledImage]:
    """Yields the images below folders named ``real`` or ``fake`` (or ``0_real``, ``1_fake``), at any depth.

    Args:
        root: Where to begin; its own name does not count.
        left_out: Takes ``path: reason`` of each image whose folders do not name its class.
    """
    for path in list_images(root):
        label = label_from_folders(path)
        if label is None:
            left_out.append(f"{path}: no folder above it, or more than one kind, is named real or fake")
        else:
            yield LabelledImage(path, label)


def read_table(table: Path, root: Path, words: Mapping[str, Label], left_out: list[str]) -> Iterator[LabelledImage]:
    """Yields the rows of a table with columns for image and label (see ``llava.tables``), and ``caption`` if any.

    Args:
        table: The table; image paths start from ``root`` or are absolute below it.
        root: Folder of the images.
        words: What the label column may hold beside the field's words, in lower case.
        left_out: Takes ``path: reason`` of each row that cannot be used.

    Raises:
        UserError: The table cannot be read or lacks a column.
    """
    finder = NameFinder(root)
    meanings = {word: LABELS.index(label) for word, label in words.items()}
    for row in read_rows(table):
        columns = Columns.find(row.values, row.where)
        image = str(row.values.get(columns.image) or "").strip()
        where = f"{row.where.removeprefix(f'{table}, ')}, {image or 'no image'}"
        path = _below(str(finder.find(image)), root) if image else ""
        try:
            label = read_label(row.values.get(str(columns.label)), columns.label, meanings, where)
        except DataError as error:
            left_out.append(str(error))
            continue
        if path:
            yield LabelledImage(path, LABELS[label], _caption(row))
        else:
            left_out.append(f"{where}: it is not a path below {root}")
    finder.report(table)


def _caption(row: Row) -> str:
    named = {str(name).strip().lower(): value for name, value in row.values.items()}
    return str(named.get("caption") or "").strip()


def _below(image: str, root: Path) -> str:
    """Returns an image's path below the root, or an empty text if it is not below."""
    path = Path(os.path.normpath(root / image)) if image else root
    base = Path(os.path.normpath(root))
    return path.relative_to(base).as_posix() if path != base and path.is_relative_to(base) else ""


def usable(images: Iterator[LabelledImage], root: Path, left_out: list[str]) -> list[LabelledImage]:
    """Returns the images that open, each once; notes the others."""
    seen: dict[str, Label] = {}
    kept = []
    for image in progress(images, desc="images", unit="", delay=2):
        if image.path in seen:
            left_out.append(f"{image.path}: it is listed more than once")
            continue
        seen[image.path] = image.label
        try:
            load_image(root / image.path)
        except ImageReadError as error:
            left_out.append(f"{image.path}: {read_reason(error, root / image.path)}")
            continue
        kept.append(image)
    return kept


def find_entry(entries: Mapping[str, Any], image: str, root: Path, set_name: str) -> Any | None:
    """Returns what a reasoning or caption file says of an image.

    Its key may be the path below the root, or that path behind the set's or the root folder's name.
    """
    return next((entries[name] for name in _names_of(image, root, set_name) if name in entries), None)


def _names_of(image: str, root: Path, set_name: str) -> list[str]:
    return list(dict.fromkeys((image, f"{set_name}/{image}", f"{root.name}/{image}")))


def check_names(
    entries: Mapping[str, Any], images: Sequence[LabelledImage], root: Path, set_name: str, option: str
) -> None:
    """Says which entries of reasoning or caption files fit no image.

    Raises:
        DataError: None does, though there are some.
    """
    fitting = {name for image in images for name in _names_of(image.path, root, set_name)}
    unused = [name for name in entries if name not in fitting]
    if unused and len(unused) == len(entries):
        wanted = " or ".join(_names_of(images[0].path, root, set_name))
        raise DataError(
            f"none of the {len(entries)} names in {option} fits an image, such as {unused[0]!r}; an image is named by "
            f"its path below {root}, or behind a set's name that --set-name gives, such as {wanted}"
        )
    if unused:
        log(f"note: {len(unused)} of {len(entries)} names in {option} fit no image\n{format_list(unused, 5)}")


def write_evaluation_set(
    images: Sequence[LabelledImage],
    root: Path,
    output: Path,
    set_name: str,
    reasoning: Mapping[str, Reasoning],
    place: Callable[[Path, Path], Any],
) -> Path:
    """Writes ``<output>/<set_name>/{0_real,1_fake}/…`` and ``<set_name>_reasoning.json``; returns the set's folder.

    Folders below the class become part of the file's name, since a set has none.

    Raises:
        UserError: The set is there already or cannot be written, or two images would get the same name.
    """
    folder = output / set_name
    targets: dict[str, LabelledImage] = {}
    for image in images:
        target = f"{SET_FOLDERS[image.label]}/{_flat_name(image.path)}"
        if target in targets:
            raise DataError(f"{image.path} and {targets[target].path} would both be named {target}; rename one")
        targets[target] = image
    sentences: dict[str, Reasoning] = {}
    unfinished = output / f".{set_name}.unfinished"
    with file_errors(folder, "written"):
        if folder.exists() and any(folder.iterdir()):
            raise FileError(f"{folder} is there already; name another --set-name or --output, or remove it first")
        if unfinished.exists():
            shutil.rmtree(unfinished)
        for sub in SET_FOLDERS.values():
            (unfinished / sub).mkdir(parents=True)
        for target, image in progress(targets.items(), desc="writing", unit=" images", delay=2):
            _place(place, root / image.path, unfinished / target)
            entry = find_entry(reasoning, image.path, root, set_name)
            if entry is not None:
                sentences[f"{set_name}/{target}"] = entry
        write_json(unfinished / f"{set_name}_reasoning.json", sentences)
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    print(f"images: {len(targets)} in {folder}, {len(sentences)} of them with reasoning")
    return folder


def _place(place: Callable[[Path, Path], Any], source: Path, target: Path) -> None:
    """Puts an image into a set; the source is named only where it is at fault."""
    with file_errors(source, "read"), source.open("rb"):
        pass
    place(source, target)


def _flat_name(path: str) -> str:
    """Joins the parts of a path with ``__``, leaving out those that only name the class."""
    parts = PurePosixPath(path).parts
    kept = [part for part in parts[:-1] if part.lower() not in CLASS_FOLDERS]
    return "__".join([*kept, parts[-1]])


def training_records(
    images: Sequence[LabelledImage],
    root: Path,
    set_name: str,
    reasoning: Mapping[str, Reasoning],
    captions: Mapping[str, str],
    form: Form,
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Returns the records of a training file whose image folder is the root, and what was dropped with its reason."""
    records: list[dict[str, Any]] = []
    dropped: list[dict[str, str]] = []
    for image in images:
        sentences = find_entry(reasoning, image.path, root, set_name)
        caption = image.caption or find_entry(captions, image.path, root, set_name) or ""
        try:
            records.append(training_record(image.path, image.label, reasoning=sentences, caption=caption, form=form))
        except DataError as error:
            dropped.append({"image": image.path, "reason": str(error)})
    return records, dropped


def label_words(real: Sequence[str], fake: Sequence[str]) -> dict[str, Label]:
    """Returns what a label column may hold.

    Raises:
        OptionError: A word means both classes.
    """
    both = {word.lower() for word in real} & {word.lower() for word in fake}
    if both:
        raise OptionError(
            f"{', '.join(sorted(both))} cannot mean both real and fake; see --real-words and --fake-words"
        )
    return {**{word.lower(): "real" for word in real}, **{word.lower(): "fake" for word in fake}}


def build_parser() -> OptionParser:
    """Returns the options of this script."""
    parser = OptionParser(
        description="Make an evaluation set or a training file from a tree with folders named real and fake, at any "
        "depth, or from a CSV table with the columns image and label (and caption, if there is one).",
        formatter_class=DefaultsHelpFormatter,
    )
    parser.add_argument("--input", type=Path, required=True, help="the tree, or the CSV table")
    parser.add_argument("--image-folder", type=Path, help="where the table's image paths start; by default its folder")
    parser.add_argument("--to", choices=("eval", "train"), required=True, help="what to make")
    parser.add_argument("--output", type=Path, required=True, help="folder of evaluation sets, or training file")
    parser.add_argument("--set-name", help="name of the evaluation set; by default that of the folder or table")
    parser.add_argument("--reasoning", type=Path, nargs="+", default=[], help="files of output_to_reasoning.py")
    parser.add_argument("--captions", type=Path, nargs="+", default=[], help="caption files")
    parser.add_argument(
        "--form",
        choices=tuple(FORM_STAGES),
        help="answers of the training file; by default the fullest there is data for",
    )
    parser.add_argument("--files", choices=tuple(PLACING), default="copy", help="how images get into an evaluation set")
    parser.add_argument("--real-words", nargs="+", default=["real"], help="further labels of a table that mean real")
    parser.add_argument("--fake-words", nargs="+", default=["fake"], help="further labels of a table that mean fake")
    parser.add_argument("--label-map", type=parse_label_map, metavar="WORD=real,…", help=LABEL_MAP_HELP)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes an evaluation set or a training file; returns its exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    left_out: list[str] = []
    if options.input.is_dir():
        if options.image_folder:
            parser.error("--image-folder belongs to a table; a tree is its own image folder")
        root = options.input.resolve()
        images = usable(read_tree(root, left_out), root, left_out)
    else:
        root = (options.image_folder or options.input.parent).resolve()
        words = label_words(options.real_words, options.fake_words)
        words |= {word: LABELS[number] for word, number in (options.label_map or {}).items()}
        images = usable(read_table(options.input, root, words, left_out), root, left_out)
    if left_out:
        log(f"left out: {len(left_out)} images\n{format_list(left_out)}")
    if not images:
        kind = "folders named real and fake" if options.input.is_dir() else "rows with an image and a label"
        first = f" (the first that was left out: {left_out[0]})" if left_out else ""
        raise DataError(f"{options.input} gives no usable image{first}; it needs {kind}")
    reasoning, captions = read_reasoning(options.reasoning), read_captions(options.captions)
    dropped: list[dict[str, str]] = []
    set_name = check_set_name(options.set_name or (root.name if options.input.is_dir() else options.input.stem))
    check_names(reasoning, images, root, set_name, "--reasoning")
    check_names(captions, images, root, set_name, "--captions")
    if options.to == "eval":
        if len(PurePosixPath(set_name).parts) > 1:
            parser.error("--set-name of an evaluation set is one folder's name")
        write_evaluation_set(images, root, options.output, set_name, reasoning, PLACING[options.files])
    else:
        captioned = bool(captions) or any(image.caption for image in images)
        form: Form = options.form or ("verdict" if not reasoning else "cot" if captioned else "reasoning")
        records, dropped = training_records(images, root, set_name, reasoning, captions, form)
        write_training_file(options.output, records, dropped)
        inform(f"form: {form}; train with the image folder {root}")
    return exit_status(done=len(images), left_out=len(left_out) + len(dropped))


if __name__ == "__main__":
    sys.exit(run_cli(main))
