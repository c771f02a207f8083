"""Analyses images with the region covered that a system names, and with others: the evidence of faithfulness.

The predictions of covered images have a file of their own below the clean run's, and are resumed like it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from forgery_eval.benchmarks import Sample
from forgery_eval.conditions import Conditions
from forgery_eval.covering import PLACEMENTS, SETTINGS, Covered, cover_image
from forgery_eval.metrics.faithfulness import CoveredScores
from forgery_eval.store import Prediction, Run, read_run
from llava.cli import inform, progress
from llava.errors import DataError, MissingFileError
from llava.files import digest_json

_FOLDER = "faithfulness"
_NAMES = ("named", *(f"random {number}" for number in range(1, PLACEMENTS + 1)))


@dataclass(frozen=True)
class Chosen:
    """Images whose regions are covered.

    Attributes:
        images: Each sample, its prediction, the share that its region takes, and the image covered in each way.
        left_out: How many images that are called fake were passed over on the way, by the reason.
    """

    images: Sequence[tuple[Sample, Prediction, float, Sequence[Covered]]]
    left_out: Mapping[str, int]

    @property
    def covered(self) -> list[Covered]:
        """All covered images, in order."""
        return [one for *_, covered in self.images for one in covered]


@dataclass(frozen=True)
class Faithfulness:
    """What covering showed.

    Attributes:
        scores: P(fake) of each image, as it is and covered.
        left_out: How many images that are called fake have none, by the reason.
        covered: How each image is covered, by its id.
    """

    scores: Sequence[CoveredScores]
    left_out: Mapping[str, int]
    covered: Mapping[str, Sequence[Covered]] = field(default_factory=dict)


def choose(
    samples: Sequence[Sample], predictions: Sequence[Prediction], folder: Path, most: int, *, are_maps: bool
) -> Chosen:
    """Chooses images that are called fake and have a score and a region, by a digest of their ids.

    Args:
        samples: The samples.
        predictions: One for each.
        folder: Where masks and maps are named from.
        most: How many are chosen.
        are_maps: Whether maps were asked for, see ``Covered``.
    """
    called = [pair for pair in zip(samples, predictions, strict=True) if _is_called_fake(pair[1])]
    called.sort(key=lambda pair: hashlib.sha256(pair[0].id.encode("utf-8", "surrogateescape")).digest())
    images: list[tuple[Sample, Prediction, float, Sequence[Covered]]] = []
    left_out = dict.fromkeys(("no mask or map", "an empty mask or map", "a region too large to be moved"), 0)
    for sample, prediction in progress(called, desc="regions", unit=" images", leave=False):
        if len(images) == most:
            break
        if not prediction.mask:
            left_out["no mask or map"] += 1
            continue
        own = {**vars(sample), "folder": folder, "named": prediction.mask, "is_map": are_maps, "seed": sample.id}
        covered = [Covered(**{**own, "id": f"{sample.id}#{name}", "placement": k}) for k, name in enumerate(_NAMES)]
        regions = covered[0].regions
        if len(regions) == len(covered):
            images.append((sample, prediction, float(regions[0].mean()), covered))
        else:
            left_out["a region too large to be moved" if regions else "an empty mask or map"] += 1
    return Chosen(images, left_out)


def _is_called_fake(prediction: Prediction) -> bool:
    score = prediction.fake_probability
    if score is None or prediction.error:
        return False
    return score >= 0.5 if prediction.verdict is None else prediction.verdict == "fake"


def measure(conditions: Conditions, clean: Path, predictions: Sequence[Prediction], most: int) -> Faithfulness:
    """Analyses covered images that are not analysed yet.

    Args:
        conditions: Has the model, the samples and the clean run.
        clean: The clean run's file.
        predictions: Of the samples.
        most: How many images are covered.
    """
    are_maps = bool(conditions.options.attention)
    chosen = choose(conditions.samples, predictions, clean.parent, most, are_maps=are_maps)
    if not chosen.images:
        return Faithfulness([], chosen.left_out)
    inform(f"faithfulness: {len(chosen.images)} images, each covered in {len(_NAMES)} ways")
    without_maps = replace(conditions, samples=chosen.covered, options=replace(conditions.options, attention=False))
    run = replace(conditions.run, settings=_settings(conditions.run.settings, chosen))
    _, found = without_maps.analyze(run, clean.parent / _FOLDER, cover_image)
    return _joined(chosen, found)


def read(
    clean: Path, header: Mapping[str, Any], samples: Sequence[Sample], predictions: Sequence[Prediction], most: int
) -> Faithfulness:
    """Reads what an earlier evaluation found of covered images.

    Args:
        clean: The clean run's file.
        header: Its first line.
        samples: The samples.
        predictions: One for each.
        most: How many images were covered.

    Raises:
        DataError: The run is another program's.
        MissingFileError: So many images were not covered.
    """
    settings = header.get("settings")
    if not isinstance(settings, Mapping) or "weights" not in settings:
        raise DataError(f"{clean} is not of forgery eval, so nothing lies beside it for --faithfulness")
    are_maps = bool(settings.get("attention"))
    chosen = choose(samples, predictions, clean.parent, most, are_maps=are_maps)
    if not chosen.images:
        return Faithfulness([], chosen.left_out)
    file = clean.parent / _FOLDER / f"{Run(_settings(settings, chosen), {}, 0).key}.jsonl"
    if not file.is_file():
        raise MissingFileError(
            f"{file.parent} holds no predictions of these {len(chosen.images)} images covered; run without --rescore"
        )
    return _joined(chosen, read_run(file)[1])


def _settings(clean: Mapping[str, Any], chosen: Chosen) -> dict[str, Any]:
    ids = digest_json([sample.id for sample, *_ in chosen.images])
    return {**clean, "faithfulness": {**SETTINGS, "chosen": ids}}


def _joined(chosen: Chosen, found: Mapping[str, Prediction]) -> Faithfulness:
    scores, failed = [], 0
    for sample, prediction, area, covered in chosen.images:
        after = [one.fake_probability if (one := found.get(each.id)) else None for each in covered]
        known = [value for value in after if value is not None]
        if prediction.fake_probability is None or len(known) < len(covered):
            failed += 1
            continue
        named, *random = known
        before = prediction.fake_probability
        scores.append(CoveredScores(sample.id, sample.set, area, before, named, tuple(random)))
    left_out = {**chosen.left_out, "no score when covered": failed}
    return Faithfulness(scores, left_out, {sample.id: covered for sample, *_, covered in chosen.images})
