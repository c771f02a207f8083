"""Covering what a system names: regions, fill, and systems whose score depends on a known patch, or on none."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from forgery_eval.covering import MOST_OVERLAP, PLACEMENTS, Covered, cover, named_region, random_regions
from forgery_eval.eval import run
from forgery_eval.faithfulness import choose
from forgery_eval.masks import write_mask
from forgery_eval.metrics.faithfulness import CoveredScores, faithfulness_metrics
from forgery_eval.store import Prediction
from llava.labels import LABELS
from llava.report import ForgeryReport
from llava.systems import registry
from llava.systems.base import AnalyzeOptions, SystemSpec

SIZE, SIDE = (64, 48), 8
PATCHES = {"fake/0.png": (4, 4), "fake/1.png": (30, 20), "fake/2.png": (50, 38), "fake/3.png": (12, 33)}
"""Left and upper end of the red patch."""


class PatchSystem:
    """P(fake) is 0.05 and 0.9 times the share of a patch's pixels that are red; the folder says where it looks."""

    name = "Patch"
    notice = ""
    answer_format = None
    options: ClassVar = AnalyzeOptions

    def __init__(self, names: str, kind: str) -> None:
        self.names, self.has_attention = names, kind == "map"

    @classmethod
    def load(cls, path, **options):
        config = json.loads((Path(path) / "config.json").read_text())
        return cls(config["names"], config["kind"])

    def prepare(self, image):
        return np.asarray(image, int)

    def batch_size(self, options):
        return 4

    def describe(self, options):
        return {}

    def analyze_batch(self, prepared, options):
        return [self._report(pixels, options.attention) for pixels in prepared]

    def _report(self, pixels, attention):
        red = (pixels[..., 0] > 200) & (pixels[..., 1] < 60)
        score = 0.05 + 0.9 * min(1.0, red.sum() / SIDE**2)
        named = red if self.names == "patch" else np.roll(red, (24, 32), (0, 1))
        report = ForgeryReport(LABELS[int(score >= 0.5)], score, "detector", system=self.name)
        if not self.has_attention:
            return replace(report, mask=named)
        rows, columns = np.indices(red.shape)
        y, x = (int(np.mean(where)) if len(where) else 0 for where in np.nonzero(named))
        return replace(report, attention=-np.hypot(rows - y, columns - x)) if attention else report


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """Grey images, some with a red patch, and the system that finds it."""
    spec = SystemSpec("patch", "Patch", lambda files: files.config.get("model_type") == "patch", PatchSystem)
    known = {**registry.specs(), "patch": spec}
    monkeypatch.setattr(registry, "specs", lambda: known)
    for name in ("real/0.png", "real/1.png", *PATCHES):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((SIZE[1], SIZE[0], 3), 90, np.uint8)
        if name in PATCHES:
            x, y = PATCHES[name]
            pixels[y : y + SIDE, x : x + SIDE] = (255, 0, 0)
        Image.fromarray(pixels).save(tmp_path / "data" / name)
    return tmp_path / "data"


def model(folder: Path, names: str, kind: str = "mask") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "patch", "names": names, "kind": kind}))
    return folder


def given(photos: Path, opened: Path, results: Path, *more: str) -> list[str]:
    words = ["--dataset_path", photos, "--model-path", opened, "--result_folder", results, "--faithfulness", "10"]
    return [*map(str, words), *more]


def found_in(results: Path) -> dict:
    return json.loads((results / "metrics.json").read_text())["faithfulness"]


@pytest.mark.parametrize("kind", ["mask", "map"])
def test_a_score_that_depends_on_the_named_patch_falls_when_it_is_covered(photos, tmp_path, capsys, kind):
    results = tmp_path / "r"
    assert run(given(photos, model(tmp_path / "model", "patch", kind), results)) == 0
    found = found_in(results)
    part = found["all"]["metrics"]
    assert part["images"] == 4 and part["named_falls_more"] == 1 and part["fall_named"] == pytest.approx(0.9)
    # A random region covers at most a tenth of the named one, and so of the patch where that is the named one.
    assert part["fall_random"] <= 0.9 * (MOST_OVERLAP if kind == "mask" else 0.5)
    assert part["fall_difference"] == pytest.approx(part["fall_named"] - part["fall_random"])
    for image in found["images"]:
        assert image["before"] == pytest.approx(0.95) and image["named"] == pytest.approx(0.05)
        assert len(image["random"]) == PLACEMENTS
        # Of a map a tenth, and what is equally high: a mask's 64 of 3072 pixels are exact.
        assert image["area"] == SIDE**2 / 3072 if kind == "mask" else 0.0999 < image["area"] < 0.13
    assert "the named one falls more in a share of 1.000" in capsys.readouterr().out
    page = (results / "report.html").read_text()
    assert "<h2>Faithfulness</h2>" in page and "without the named region 0.050" in page
    rows = list(csv.DictReader((results / "metrics.csv").read_text().splitlines()))
    assert any((row["part"], row["name"], row["metric"]) == ("faithfulness", "all", "fall_named") for row in rows)


def test_a_score_that_ignores_what_the_system_names_does_not_fall(photos, tmp_path):
    results = tmp_path / "r"
    assert run(given(photos, model(tmp_path / "model", "elsewhere"), results)) == 0
    found = found_in(results)
    part = found["all"]["metrics"]
    assert part["images"] == 4 and part["fall_named"] == 0 and part["named_falls_more"] == 0
    # By hand: what a random region takes of the patch is what the score falls by.
    for image in found["images"]:
        x, y = PATCHES[image["id"].removeprefix("data/")]
        patch = np.zeros(SIZE[::-1], bool)
        patch[y : y + SIDE, x : x + SIDE] = True
        regions = random_regions(np.roll(patch, (24, 32), (0, 1)), image["id"])
        expected = [0.95 - 0.9 * (patch & region).sum() / SIDE**2 for region in regions]
        assert image["random"] == pytest.approx(expected)


def test_it_is_resumed_and_rescored(photos, tmp_path, capsys, monkeypatch):
    opened, results = model(tmp_path / "model", "patch"), tmp_path / "r"
    assert run(given(photos, opened, results)) == 0
    before = found_in(results)
    (file,) = (results / "predictions" / "faithfulness").glob("*.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 4 * (1 + PLACEMENTS)
    file.write_text("".join(lines[:7]) + lines[7][:20])
    analyzed = []
    whole = PatchSystem.analyze_batch
    monkeypatch.setattr(
        PatchSystem, "analyze_batch", lambda *given: analyzed.extend(given[1]) or whole(*given), raising=True
    )
    assert run(given(photos, opened, results)) == 0 and found_in(results) == before
    assert len(analyzed) == 4 * (1 + PLACEMENTS) - 4  # a whole batch of four was there
    monkeypatch.setattr(PatchSystem, "analyze_batch", None)
    rescore = ["--dataset_path", str(photos), "--result_folder", str(results), "--rescore", "--faithfulness"]
    assert run([*rescore, "10"]) == 0 and found_in(results) == before
    assert run([*rescore, "2"]) == 1
    assert "of these 2 images covered; run without --rescore" in capsys.readouterr().err


def test_without_a_mask_or_map_there_is_a_reason(photos, tmp_path, capsys):
    opened, results = model(tmp_path / "model", "patch"), tmp_path / "r"
    for file in photos.glob("fake/*"):
        file.unlink()
    assert run(given(photos, opened, results)) == 0  # nothing is called fake
    part = found_in(results)["all"]
    assert part["metrics"]["fall_named"] is None and "no image that is called fake" in part["undefined"]["fall_named"]
    assert "faithfulness: no image" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(given(photos, opened, results, "--backend", "openai", "--base-url", "http://h/v1", "--model", "m"))
    file = tmp_path / "foreign.jsonl"
    file.write_text("".join(json.dumps({"id": f"data/real/{k}.png", "verdict": "real"}) + "\n" for k in (0, 1)))
    words = ["--dataset_path", str(photos), "--result_folder", str(results), "--faithfulness", "1"]
    assert run([*words, "--rescore", str(file)]) == 1
    assert "not of forgery eval" in capsys.readouterr().err


# --- regions


def test_what_is_named():
    grey = np.arange(100, dtype=np.uint8).reshape(10, 10)
    assert named_region(grey, is_map=True).sum() == 10 and named_region(grey, is_map=True)[9].all()
    assert not named_region(grey, is_map=False).any()  # nothing reaches one half
    grey[0] = 200
    assert np.flatnonzero(named_region(grey, is_map=False).any(axis=1)).tolist() == [0]
    equal = np.where(np.arange(100).reshape(10, 10) < 25, 200, 3).astype(np.uint8)
    assert named_region(equal, is_map=True).sum() == 25  # equally high values are all named
    black_and_white = np.where(equal > 100, 255, 0).astype(np.uint8)
    assert named_region(black_and_white, is_map=True).sum() == 25
    assert not named_region(np.zeros((10, 10), np.uint8), is_map=True).any()


def test_random_regions_have_the_size_and_lie_elsewhere():
    region = np.zeros((40, 60), bool)
    region[5:15, 10:40] = True
    region[20:22, 3] = True
    regions = random_regions(region, "an id")
    assert len(regions) == PLACEMENTS and len({one.tobytes() for one in regions}) == PLACEMENTS
    for one in regions:
        assert one.sum() == region.sum() and (one & region).sum() <= MOST_OVERLAP * region.sum()
        # The same shape: some shift brings it back.
        y, x = np.argwhere(one)[0]
        shifts = [(5 + k - y, 10 + j - x) for k in range(40) for j in range(60)]
        assert any((np.roll(one, shift, (0, 1)) == region).all() for shift in shifts)
    assert all((a == b).all() for a, b in zip(regions, random_regions(region, "an id"), strict=True))
    assert any((a != b).any() for a, b in zip(regions, random_regions(region, "another"), strict=True))
    region[:30] = True
    assert random_regions(region, "an id") == []  # three quarters leave no room


def test_what_is_covered_takes_the_colour_around_it():
    pixels = np.empty((50, 200, 3), np.uint8)
    pixels[:, :100], pixels[:, 100:] = (200, 100, 40), (20, 60, 80)
    region = np.zeros((50, 200), bool)
    region[20:30, 10:20] = region[20:30, 180:190] = True
    holed = pixels.copy()
    holed[region] = (255, 0, 255)
    found = np.asarray(cover(Image.fromarray(holed), region))
    assert (found[~region] == holed[~region]).all()
    # An eighth of the side is 25 pixels: the other half is 80 away, over three times that, and has nearly no weight.
    assert np.abs(found.astype(int) - pixels)[region].max() <= 2
    assert found[25, 15].tolist() == pytest.approx([200, 100, 40], abs=2)
    middle = np.zeros((50, 200), bool)
    middle[:, 60:140] = True
    between = np.asarray(cover(Image.fromarray(pixels), middle), float)[25, 99:101].mean(axis=0)
    assert between.tolist() == pytest.approx([110, 80, 60], abs=1)  # as far from either side
    small = np.zeros((5, 20), bool)
    small[:, 6:14] = True  # a mask of another size than the image
    assert (
        np.asarray(cover(Image.fromarray(pixels), small)) == np.asarray(cover(Image.fromarray(pixels), middle))
    ).all()


def test_which_images_are_chosen(photos, tmp_path):
    from forgery_eval.benchmarks import open_benchmark

    samples = open_benchmark(photos)
    masks = {"data/fake/0.png": 0.05, "data/fake/1.png": 0.0, "data/fake/2.png": 0.9, "data/real/0.png": 0.05}
    predictions = []
    for sample in samples:
        mask = None
        if sample.id in masks:
            marked = np.zeros((40, 50), np.float32)
            marked[:, : round(50 * masks[sample.id])] = 1
            mask = write_mask(tmp_path, "run", sample.id, marked)
        predictions.append(Prediction(sample.id, sample.label, "fake", 0.9, mask=mask))
    chosen = choose(samples, predictions, tmp_path, 10, are_maps=False)
    assert sorted(sample.id for sample, *_ in chosen.images) == ["data/fake/0.png", "data/real/0.png"]
    assert chosen.left_out == {"no mask or map": 2, "an empty mask or map": 1, "a region too large to be moved": 1}
    assert [one.id for one in chosen.covered[:2]] == [f"{chosen.images[0][0].id}#{n}" for n in ("named", "random 1")]
    assert all(isinstance(one, Covered) for one in chosen.covered) and chosen.images[0][2] == pytest.approx(0.04)
    truth = [replace(sample, masks=(tmp_path / "masks" / "run" / f"{next(iter(masks))}.png",)) for sample in samples]
    unnamed = [replace(prediction, mask=None) for prediction in predictions]
    assert not choose(truth, unnamed, tmp_path, 10, are_maps=False).images  # the truth does not stand in for a name
    first = choose(samples, predictions, tmp_path, 1, are_maps=False).images
    assert [sample.id for sample, *_ in first] == [chosen.images[0][0].id]
    for changed in ({"verdict": "real"}, {"fake_probability": None}, {"error": "broken"}):
        others = [replace(prediction, **changed) for prediction in predictions]
        assert not choose(samples, others, tmp_path, 10, are_maps=False).images
    without = [replace(prediction, verdict=None, fake_probability=0.4) for prediction in predictions]
    assert not choose(samples, without, tmp_path, 10, are_maps=False).images


# --- metrics


def test_the_means_and_the_paired_interval():
    images = [
        CoveredScores("a", "s", 0.1, 0.9, 0.1, (0.9, 0.7)),  # 0.8 against 0.1
        CoveredScores("b", "s", 0.3, 0.8, 0.7, (0.5, 0.5)),  # 0.1 against 0.3
        CoveredScores("c", "t", 0.2, 1.0, 0.9, (0.9, 0.9)),  # as much as the others: not more
    ]
    found = faithfulness_metrics(images, draws=500)
    part = found["all"]["metrics"]
    assert part == pytest.approx(
        {
            "images": 3,
            "fall_named": 1 / 3,
            "fall_random": 0.5 / 3,
            "fall_difference": 0.5 / 3,
            "named_falls_more": 1 / 3,
            "area": 0.2,
        }
    )
    assert found["sets"]["t"]["intervals"]["fall_difference"] == pytest.approx([0, 0])
    # Of set s either image is drawn twice, in a quarter of the draws each: 0.7 and -0.2.
    assert found["sets"]["s"]["intervals"]["fall_difference"] == pytest.approx([-0.2, 0.7])
    assert found["images"][0]["random"] == [0.9, 0.7]
    paired = [CoveredScores(str(k), "s", 0.1, 0.9, 0.1 * (k % 8), (0.1 * (k % 8) + 0.1,)) for k in range(16)]
    part = faithfulness_metrics(paired, draws=200)["all"]
    low, high = part["intervals"]["fall_difference"]
    assert (low, high) == pytest.approx((0.1, 0.1))  # however much the falls themselves vary
    assert part["intervals"]["fall_named"][1] - part["intervals"]["fall_named"][0] > 0.1
    # That each image is of a set of its own makes nothing surer.
    apart = faithfulness_metrics([replace(one, set=one.id) for one in paired], draws=200)["all"]
    assert apart["intervals"] == part["intervals"]
