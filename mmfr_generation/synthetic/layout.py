"""Where everything lies in the MMFR tree, and what the annotation files say."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from llava.labels import LABELS, REAL
from llava.systems.fakereasoning.answer import QUESTION, Form, write_answer, write_reasoning
from mmfr_generation.synthetic.sample import Key

Record = Mapping[str, Any]
"""A line of the manifest: ``sample.Sample.truth`` with ``image`` and ``masks``, paths relative to the data's root."""

MANIFEST = "manifest.jsonl"
TRAINING_FILES: dict[Form, str] = {
    "cot": "forgery_reasoning_cot.json",
    "reasoning": "forgery_reasoning_cot_reasoning.json",
    "verdict": "forgery_reasoning_cot_verdict.json",
}
EVALUATION = "evaluation_sets"
_CLASS_FOLDERS = ("0_real", "1_fake")
_FOLDER_SIZE = 1000
"""Images in each folder of the training tree."""


def image_path(key: Key, stem: str, suffix: str) -> str:
    """Returns where an image lies."""
    if key.split == "evaluation":
        return f"{EVALUATION}/{key.set}/{_CLASS_FOLDERS[key.label]}/{stem}{suffix}"
    part = key.index // _FOLDER_SIZE
    folder = f"laion/{part:05d}" if key.label == REAL else f"diffusiondb/part-{part + 1:06d}"
    return f"{folder}/{stem}{suffix}"


def mask_path(image: str, fault: str) -> str:
    """Returns where the mask of an image's fault lies."""
    return f"masks/{image.rpartition('.')[0]}_{fault}.png"


def annotation_files(records: Iterable[Record]) -> dict[str, str]:
    """Writes the annotation of a whole set.

    Args:
        records: The manifest's lines.

    Returns:
        Text of each file by its path: the manifest, the reasoning of both classes and of each evaluation set, and
        the training conversations in every form. Their order is that of the random file names.
    """
    ordered = sorted(records, key=lambda r: (r["split"] != "train", r["set"] or "", _name(r)))
    training = [r for r in ordered if r["split"] == "train"]
    files = {MANIFEST: "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ordered)}
    for label, folder in zip(LABELS, ("laion", "diffusiondb"), strict=True):
        files[f"{folder}_reasoning.json"] = _json(
            {r["image"]: r["attributes"] for r in training if r["label"] == label}
        )
    for form, name in TRAINING_FILES.items():
        files[name] = _json([_conversation(r, form) for r in training])
    for name in dict.fromkeys(r["set"] for r in ordered if r["split"] == "evaluation"):
        members = {r["image"].partition("/")[2]: r["attributes"] for r in ordered if r["set"] == name}
        files[f"{EVALUATION}/{name}/{name}_reasoning.json"] = _json(members)
    return files


def _name(record: Record) -> str:
    return str(record["image"]).rpartition("/")[2]


def _conversation(record: Record, form: Form) -> dict[str, Any]:
    reasoning = write_reasoning(record["label"], record["attributes"])
    answer = write_answer(record["label"], reasoning=reasoning, caption=record["caption"], form=form)
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": answer}]
    return {"image": record["image"], "conversations": turns}


def _json(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"
