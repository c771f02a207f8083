"""Adds crops of a photograph to the bundled samples.

    python -m mmfr_generation.forge.showcase --images FOLDER --credit TEXT --out llava/assets/samples

One crop is real, one bears a generator's traces, and one has a part pasted in; which crops is decided by a seed alone.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from llava.cli import OptionParser, run_cli
from llava.files import read_json, write_json
from llava.labels import FAKE, REAL
from mmfr_generation.forge.photographs import find_photographs
from mmfr_generation.forge.sample import METHODS, MIN_SIDE, make_forged
from mmfr_generation.synthetic.sample import Key
from mmfr_generation.synthetic.showcase import LIST, SEED, write_entry

SIZE = 224
CHOSEN = (("transposed_convolution", REAL), ("transposed_convolution", FAKE), ("splice_hard", FAKE))
"""Method and class."""


def add_photographs(images: Path, credit: str, out: Path) -> None:
    """Writes the crops and adds them to ``samples.json``.

    Args:
        images: Folder of at least two photographs.
        credit: Who made them, and their licence.
        out: Folder that holds ``samples.json``.

    Raises:
        DataError: There are too few photographs.
        FileError: The list cannot be read, or the folder not be written.
    """
    listed, photographs = read_json(out / LIST), find_photographs(images, MIN_SIDE)
    entries = [entry for entry in listed["samples"] if "credit" not in entry]
    for name, label in CHOSEN:
        key = Key(SEED, SIZE, "evaluation", name, label, 0)
        entry = write_entry(out, len(entries) + 1, key, make_forged(key, photographs))
        method = METHODS[name] if label == FAKE else None
        told = {"trace": method.description, "role": method.role} if method else {}
        entries.append({**entry, **told, "credit": credit})
    write_json(out / LIST, {**listed, "samples": entries})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = OptionParser(prog="python -m mmfr_generation.forge.showcase", description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder of photographs, at least two")
    parser.add_argument("--credit", required=True, help="who made them, and their licence")
    parser.add_argument("--out", type=Path, required=True, help="folder of the samples")
    options = parser.parse_args(argv)
    return run_cli(lambda: add_photographs(options.images, options.credit, options.out))


if __name__ == "__main__":
    sys.exit(main())
