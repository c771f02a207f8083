"""The request to the annotator, and the layout of its answer."""

import sys
from collections.abc import Sequence
from typing import Literal

from llava.cli import DefaultsHelpFormatter, OptionParser, run_cli
from llava.labels import LABELS, Label
from llava.systems.fakereasoning.answer import ATTRIBUTES

Task = Literal["reasoning", "caption"]
TASKS: tuple[Task, Task] = ("reasoning", "caption")

ANSWER_KEY = "Answer"
ATTRIBUTE_KEYS: dict[Label, str] = {"real": "Attributes", "fake": "Forgery Attributes"}
ANSWERS: dict[Label, str] = {"real": "The image is real.", "fake": "The image is fake."}
CANNOT_DETERMINE = "Can not determine if the image is real or fake."

GUIDES: dict[str, str] = {
    "Inconsistent Lighting and Shadows": "light sources, shadows or reflections that contradict each other",
    "Irregular Image Edges": "outlines that are jagged, melted, broken or run into the background",
    "Anomalous Image Texture": "surfaces that are waxy, repeated, over-smooth or noisy without cause",
    "Low Image Quality": "blur, artefacts or missing detail that a camera would not leave",
    "Semantic Irrationality": "things that cannot be so: anatomy, text, geometry, physics or common sense",
    "Consistent Lighting and Shadows": "light sources, shadows and reflections that agree with each other",
    "Smooth and Natural Image Edges": "outlines that are clean and belong to what they bound",
    "Natural and Consistent Image Texture": "surfaces with the fine, uneven detail of the real material",
    "High Image Quality": "sharpness, noise and detail as a camera leaves them",
    "Semantic Rationality": "things that fit together: anatomy, text, geometry, physics and common sense",
}
"""What to look for, by attribute."""

_ROLE: dict[Label, str] = {
    "real": "The image is known to be a real photograph or artwork, not made or changed by a generator.",
    "fake": "The image is known to be made or changed by an image generator.",
}


def reasoning_prompt(label: Label) -> str:
    """Returns the request for the attributes that show why an image is real or fake."""
    attributes = ATTRIBUTES[label]
    guides = "\n".join(f"{number}. {name}: {GUIDES[name]}." for number, name in enumerate(attributes, start=1))
    shape = ",\n".join(f'    "{name}": "<one sentence>" or null' for name in attributes)
    return (
        f"{_ROLE[label]} Your task is to say what in the picture itself shows it.\n\n"
        f"Look at the image under these aspects:\n{guides}\n\n"
        "For each aspect that you really see, write one sentence that names the thing or place in this image and what "
        "is to be seen there. For an aspect that you do not see, write null. Do not guess, do not speak of this "
        "request, and do not put one aspect's evidence under another.\n\n"
        "Answer with one JSON object and nothing else:\n"
        f'{{\n  "{ANSWER_KEY}": "{ANSWERS[label]}",\n  "{ATTRIBUTE_KEYS[label]}": {{\n{shape}\n  }}\n}}\n\n'
        f'If nothing in the image supports any aspect, answer {{"{ANSWER_KEY}": "{CANNOT_DETERMINE}"}} instead.'
    )


def caption_prompt() -> str:
    """Returns the request for a caption; it does not say whether the image is real or fake."""
    return (
        "Describe what this image shows in one to three plain sentences: the main subject, what surrounds it, and the "
        "style. Do not judge its quality or whether it is genuine. Answer with the description alone."
    )


def prompt_for(task: Task, label: Label | None) -> str:
    """Returns the request of a task.

    Raises:
        ValueError: The task is ``reasoning`` and no label is given.
    """
    if task == "caption":
        return caption_prompt()
    if label is None:
        raise ValueError("the reasoning task needs a label")
    return reasoning_prompt(label)


def build_parser() -> OptionParser:
    """Returns the options of this script."""
    parser = OptionParser(description="Print the request to the annotator.", formatter_class=DefaultsHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="reasoning", help="what is asked for")
    parser.add_argument("--label", choices=LABELS, default="fake", help="class of the images; not used for captions")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a prompt."""
    options = build_parser().parse_args(arguments)
    print(prompt_for(options.task, options.label))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
