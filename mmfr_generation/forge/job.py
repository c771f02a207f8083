"""A forged set as something that can be written: its images, its identity and its card."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import OptionError
from llava.files import digest_json
from llava.labels import FAKE, REAL
from mmfr_generation.forge.manipulations import MANIPULATIONS
from mmfr_generation.forge.photographs import Photograph
from mmfr_generation.forge.sample import METHODS, MIN_SIDE, make_forged, photograph_of
from mmfr_generation.synthetic.card import CARD, delivered_words, size_leak
from mmfr_generation.synthetic.delivery import DELIVERIES, Delivery
from mmfr_generation.synthetic.sample import MAX_SIZE, Key, Sample
from mmfr_generation.synthetic.writer import read_key

_CARD = """\
# Forged photographs

Crops of photographs in the layout of the MMFR dataset: real ones, and ones that were forged here. What is real or
fake, why, and where is known by construction. A real crop is as real as its photograph is. No image of a modern
generator is in it.

## Contents

| part | photographs | real | fake |
|---|---|---|---|
| training | {train_photos} | {train_real} | {train_fake} |
| each of {sets} evaluation sets | {eval_photos} | {per_set} | {per_set} |

The split is by photograph: no photograph, nor another file of it, is on both sides. The same images come again from
the same photographs with

    python -m mmfr_generation.forge --images FOLDER --out D {command}

- Crops have sides of {least} to {size} pixels; half of them are cut at native resolution, the others are shrunk from a
  wider window. A real and a fake of one number are of one photograph, so photograph and colours tell nothing.
- Fakes: one of the synthetic generators over the whole crop, or one local manipulation with a mask (255 where pixels
  were changed, small gaps closed; moved and cut with the image by its delivery).
{delivered}- Captions say what can be measured: mean colour and brightness of the image as it is.
- `manifest.jsonl` has for each image its label, photograph, method (`generator`), mechanism, strength, delivery, masks,
  caption and attributes.

## Methods, and what the size of a file gives away

The last column is the chance that a fake's file is larger than a real's of its set, with a 95 % interval.

| method | mechanism | role | attribute | what it does | larger file |
|---|---|---|---|---|---|
{rows}

## Photographs

{credits}
Training: {train_names}

Evaluation: {eval_names}
"""


@dataclass(frozen=True)
class ForgeJob:
    """What is to be written.

    Attributes:
        training: Photographs of the training tree.
        evaluation: Photographs of the evaluation sets; none is in both.
        train: Images of the training tree; half of them are fakes.
        eval: Real images, and as many fakes, of each evaluation set.
        size: Longest side of a crop in pixels.
        seed: Decides everything.
        delivery: What happens to the images after they were made.
        eval_share: Share of the photographs that are for evaluation; stands in the card.
        credits: Text about the photographs' origin and licences, for the card.

    Raises:
        OptionError: A number is out of its range, or a side has no photograph.
    """

    training: tuple[Photograph, ...]
    evaluation: tuple[Photograph, ...]
    train: int
    eval: int
    size: int
    seed: int
    delivery: Delivery
    eval_share: float
    credits: str = ""

    def __post_init__(self) -> None:
        if self.train < 0 or self.eval < 0 or self.train + self.eval == 0:
            raise OptionError("train and eval must be 0 or more, and not both 0")
        if not MIN_SIDE <= self.size <= MAX_SIZE:
            raise OptionError(f"size must be {MIN_SIDE} to {MAX_SIZE} pixels, not {self.size}")
        if self.seed < 0:
            raise OptionError(f"seed must be 0 or more, not {self.seed}")
        if self.delivery not in DELIVERIES:
            raise OptionError(f"delivery must be one of {', '.join(DELIVERIES)}, not {self.delivery!r}")
        if not (self.training and self.evaluation):
            raise OptionError("training and evaluation need a photograph each")

    def identity(self) -> dict[str, Any]:
        """Returns what the images depend on; photographs by their contents."""
        return {
            "kind": "forge",
            "photographs": digest_json([[p.digest for p in side] for side in (self.training, self.evaluation)]),
            **{name: getattr(self, name) for name in ("train", "eval", "size", "seed", "delivery", "eval_share")},
        }

    def keys(self) -> list[Key]:
        """Returns the key of every image; those of one photograph follow one another, so that it is opened once."""
        training = [Key(self.seed, self.size, "train", "", k % 2, k // 2, self.delivery) for k in range(self.train)]
        evaluation = [
            Key(self.seed, self.size, "evaluation", name, label, k, self.delivery)
            for name in METHODS
            for k in range(self.eval)
            for label in (REAL, FAKE)
        ]
        return [
            *sorted(training, key=lambda key: photograph_of(key, self.training)),
            *sorted(evaluation, key=lambda key: photograph_of(key, self.evaluation)),
        ]

    def make(self, key: Key) -> Sample:
        """Makes an image."""
        return make_forged(key, self.training if key.split == "train" else self.evaluation)

    def key_of(self, record: dict[str, Any]) -> Key:
        """Returns the key of a line of the manifest."""
        return read_key(record, self.delivery)

    def card(self, records: Sequence[Mapping[str, Any]], out: Path) -> dict[str, bytes]:
        """Returns the data card."""
        counts = Counter((r["split"], r["label"]) for r in records)
        masks = Counter(name for r in records for name in r["masks"])
        rows = []
        for name, method in METHODS.items():
            leak = size_leak([r for r in records if r["set"] == name], out)
            what = f"{method.description}{f' ({masks[name]} masks)' if name in MANIPULATIONS else ''}"
            rows.append(f"| {name} | {method.mechanism} | {method.role} | {method.attribute} | {what} | {leak} |")
        text = _CARD.format(
            train_photos=len(self.training),
            eval_photos=len(self.evaluation),
            train_real=counts["train", "real"],
            train_fake=counts["train", "fake"],
            sets=len(METHODS),
            per_set=self.eval,
            command=(
                f"--train {self.train} --eval {self.eval} --eval-share {self.eval_share:g} --size {self.size} "
                f"--seed {self.seed} --delivery {self.delivery}"
            ),
            least=MIN_SIDE,
            size=self.size,
            delivered=delivered_words(records),
            rows="\n".join(rows),
            credits=f"{self.credits.strip()}\n" if self.credits.strip() else "No credits were given.\n",
            train_names=", ".join(sorted(p.name for p in self.training)),
            eval_names=", ".join(sorted(p.name for p in self.evaluation)),
        )
        return {CARD: text.encode("utf-8", "backslashreplace")}
