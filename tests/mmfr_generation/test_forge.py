"""Photographs become a data set whose truth is known; every picture here is drawn by the test."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from forgery_eval.benchmarks import open_benchmark
from llava.errors import DataError, MissingFileError
from llava.labels import FAKE, REAL
from mmfr_generation import validate
from mmfr_generation.forge import manipulations, photographs, showcase
from mmfr_generation.forge.__main__ import main
from mmfr_generation.forge.job import ForgeJob
from mmfr_generation.forge.manipulations import MANIPULATIONS, draw_region, manipulate, membrane
from mmfr_generation.forge.photographs import cut, find_photographs, split_photographs
from mmfr_generation.forge.sample import METHODS, SEEN, colour_name, make_forged
from mmfr_generation.synthetic.card import auc
from mmfr_generation.synthetic.sample import Key

COUNTS = ("--train", "48", "--eval", "1", "--size", "96", "--seed", "3")


def picture(seed: int, size: tuple[int, int] = (150, 200)) -> Image.Image:
    """Soft colours with detail and grain, different for each seed."""
    rng = np.random.default_rng(seed)
    planes = []
    for _ in range(3):
        broad = ndimage.gaussian_filter(rng.standard_normal(size), 18)
        fine = ndimage.gaussian_filter(rng.standard_normal(size), 1.5)
        planes.append(rng.uniform(80, 170) + 45 * broad / broad.std() + 14 * fine / fine.std())
    grain = rng.normal(0, 2, (*size, 3))
    return Image.fromarray(np.clip(np.stack(planes, axis=-1) + grain, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    (root / "sub").mkdir()
    for number in range(6):
        picture(number, (150 + 7 * number, 200 - 5 * number)).save(
            root / ("sub" if number % 2 else "") / f"{number}.png"
        )
    return root


@pytest.fixture(scope="module")
def found(folder):
    return find_photographs(folder, 64)


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("forged") / "d"
    (folder.parent / "credits.txt").write_text("All drawn by the test, CC0.")
    credits = ("--credits", str(folder.parent / "credits.txt"))
    assert main(["--images", str(folder), "--out", str(out), *COUNTS, *credits, "--workers", "1"]) == 0
    return out


@pytest.fixture(scope="module")
def records(written) -> list[dict]:
    return [json.loads(line) for line in (written / "manifest.jsonl").read_text("utf-8").splitlines()]


def tree(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_two_workers_write_the_same_and_what_is_missing_is_mended(folder, written, tmp_path):
    given = ["--images", str(folder), "--out", str(tmp_path / "two"), *COUNTS]
    given += ["--credits", str(folder.parent / "credits.txt")]
    assert main([*given, "--workers", "2"]) == 0
    assert tree(tmp_path / "two") == tree(written)
    for path in (next((tmp_path / "two").glob("laion/*/*")), next((tmp_path / "two").glob("masks/**/*.png"))):
        path.unlink()
    assert main([*given, "--workers", "1"]) == 0
    assert tree(tmp_path / "two") == tree(written)


def test_other_photographs_are_another_set(written, tmp_path):
    for number in range(3):
        picture(50 + number).save(tmp_path / f"{number}.png")
    with pytest.raises(DataError, match="holds another run"):
        main(["--images", str(tmp_path), "--out", str(written), *COUNTS])


def test_the_tree_is_a_valid_one(written, records):
    for part in ("forgery_reasoning_cot.json",):
        assert validate.main([str(written / part), "--image-folder", str(written)]) == 0
    sets = {sample.set for sample in open_benchmark(written)}
    assert sets == set(METHODS)
    sample = next(sample for sample in open_benchmark(written) if sample.set == "copy_move" and sample.label == FAKE)
    assert sample.groups["generator"] in ("copy_move", "recoloured_part") and sample.attributes
    assert {record["label"] for record in records if record["split"] == "train"} == {"real", "fake"}


def test_no_photograph_is_on_both_sides(records):
    sides = {split: {r["photograph"] for r in records if r["split"] == split} for split in ("train", "evaluation")}
    assert sides["train"] and sides["evaluation"] and not sides["train"] & sides["evaluation"]


def test_both_classes_have_the_same_photographs(records):
    for split in ("train", "evaluation"):
        chosen = [r for r in records if r["split"] == split]
        real, fake = (sorted(r["photograph"] for r in chosen if r["label"] == name) for name in ("real", "fake"))
        assert real == fake


def test_training_has_only_what_is_seen(records):
    trained = {r["generator"] for r in records if r["split"] == "train" and r["generator"]}
    assert trained <= set(SEEN) and trained & set(MANIPULATIONS) and trained - set(MANIPULATIONS)
    assert "removal_exemplar" not in SEEN and "channel_shift" not in SEEN and "copy_move" in SEEN


def test_a_local_manipulation_has_a_mask_and_a_place(written, records):
    local = [r for r in records if r["generator"] in MANIPULATIONS]
    assert {r["generator"] for r in local} >= set(MANIPULATIONS) - {"splice_hard"}
    for record in records:
        assert set(record["masks"]) == ({record["generator"]} if record["generator"] in MANIPULATIONS else set())
        sentences = [sentence for sentence in record["attributes"].values() if sentence]
        assert len(sentences) == 1 if record["label"] == "fake" else sentences
    for record in local:
        with Image.open(written / record["image"]) as image:
            size = image.size
        with Image.open(written / record["masks"][record["generator"]]) as mask:
            assert mask.size == size
            pixels = np.asarray(mask)
        assert set(np.unique(pixels)) <= {0, 255}
        (sentence,) = [sentence for sentence in record["attributes"].values() if sentence]
        middle = (pixels.nonzero()[1].mean() + 0.5) / pixels.shape[1]
        place = "at the left" if middle < 1 / 3 else "at the right" if middle > 2 / 3 else "in the middle"
        assert place in sentence


def test_captions_are_measured(written, records):
    for record in records[:60]:
        with Image.open(written / record["image"]) as image:
            red, green, blue = np.asarray(image.convert("RGB")).reshape(-1, 3).mean(axis=0)
        assert f"on average {colour_name(red, green, blue)} and " in record["caption"]
    wanted = {(200, 10, 10): "red", (10, 200, 10): "green", (10, 10, 200): "blue", (99, 100, 101): "grey"}
    wanted |= {(200, 200, 0): "yellow", (0, 200, 200): "cyan", (200, 0, 200): "purple", (200, 0, 20): "red"}
    assert {colour: colour_name(*map(float, colour)) for colour in wanted} == wanted


def test_the_card_names_photographs_and_credits(written, records):
    card = (written / "card.md").read_text("utf-8")
    assert "All drawn by the test, CC0." in card
    for record in records:
        assert record["photograph"] in card


# --- photographs


def test_a_broken_a_small_and_a_repeated_file_are_left_out(tmp_path, capsys):
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    picture(0).save(tmp_path / "again.png")
    picture(9, (40, 300)).save(tmp_path / "small.png")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    names = {photograph.name for photograph in find_photographs(tmp_path, 64)}
    assert len(names) == 3 and "small.png" not in names
    said = capsys.readouterr().err
    assert "broken.jpg" in said and "small.png: its shorter side has 40 pixels" in said


def test_another_file_of_a_photograph_stays_on_its_side(tmp_path):
    for number in range(8):
        image = picture(number)
        image.save(tmp_path / f"{number}.png")
        image.resize((170, 130)).save(tmp_path / f"{number}_small.jpg", quality=80)
    found = find_photographs(tmp_path, 64)
    assert len(found) == 16 and len({photograph.group for photograph in found}) == 8
    for seed in range(5):
        sides = split_photographs(found, 0.3, seed)
        train, evaluation = ({photograph.name[0] for photograph in side} for side in sides)
        assert not train & evaluation and len(evaluation) == 2


def test_without_grouping_the_split_leaks(tmp_path, monkeypatch):
    monkeypatch.setattr(photographs, "_ALIKE", 2.0)
    for number in range(8):
        picture(number).save(tmp_path / f"{number}.png")
        picture(number).resize((170, 130)).save(tmp_path / f"{number}_small.jpg", quality=80)
    found = find_photographs(tmp_path, 64)
    leaks = [
        {photograph.name[0] for photograph in train} & {photograph.name[0] for photograph in evaluation}
        for train, evaluation in (split_photographs(found, 0.3, seed) for seed in range(5))
    ]
    assert any(leaks)


def test_what_another_set_evaluates_on_is_left_out_with_its_other_files(tmp_path):
    source, small = tmp_path / "photographs", ("--train", "0", "--eval", "1", "--size", "64", "--workers", "1")
    source.mkdir()
    for number in range(6):
        picture(number).save(source / f"{number}.png")
        picture(number).resize((170, 130)).save(source / f"{number}_small.jpg", quality=80)
    test, rest = tmp_path / "test", tmp_path / "rest"
    assert main(["--images", str(source), "--out", str(test), *small, "--eval-share", "0.3"]) == 0
    assert main(["--images", str(source), "--out", str(rest), *small, "--train", "40", "--without", str(test)]) == 0
    shown = {
        folder: {json.loads(line)["photograph"][0] for line in (folder / "manifest.jsonl").read_text().splitlines()}
        for folder in (test, rest)
    }
    assert shown[test] and len(shown[rest]) >= 4 and not shown[test] & shown[rest]


def test_a_set_of_other_photographs_cannot_be_left_out(folder, written, tmp_path):
    given = ["--images", str(folder), "--out", str(tmp_path / "o"), *COUNTS]
    with pytest.raises(MissingFileError):
        main([*given, "--without", str(tmp_path / "nowhere")])
    other = tmp_path / "other"
    other.mkdir()
    for number in range(3):
        picture(70 + number).save(other / f"other_{number}.png")
    with pytest.raises(DataError, match="made from the same folder"):
        main(["--images", str(other), "--out", str(tmp_path / "o"), *COUNTS, "--without", str(written)])
    (tmp_path / "manifest.jsonl").write_text('{"split": "evaluation", "photograph": null}\n')
    with pytest.raises(DataError, match="evaluates on no photograph"):
        main([*given, "--without", str(tmp_path)])
    lone = tmp_path / "lone"
    lone.mkdir()
    evaluated = {
        line["photograph"]
        for line in map(json.loads, (written / "manifest.jsonl").read_text("utf-8").splitlines())
        if line["split"] == "evaluation"
    }
    for name in evaluated:
        (lone / name).parent.mkdir(exist_ok=True)
        (lone / name).write_bytes((folder / name).read_bytes())
    picture(99).save(lone / "one.png")
    with pytest.raises(DataError, match="fewer than 2 photographs are left"):
        main(["--images", str(lone), "--out", str(tmp_path / "o"), *COUNTS, "--without", str(written)])
    assert not (tmp_path / "o").exists()


def test_one_photograph_is_too_few(tmp_path):
    picture(0).save(tmp_path / "one.png")
    with pytest.raises(DataError, match="holds 1 usable photographs; at least 2"):
        find_photographs(tmp_path, 64)
    with pytest.raises(MissingFileError):
        find_photographs(tmp_path / "nowhere", 64)


def test_half_of_the_crops_are_native(folder, found):
    pixels = np.asarray(Image.open(found[0].path).convert("RGB"), np.float32).transpose(2, 0, 1) / np.float32(255)
    windows = np.lib.stride_tricks.sliding_window_view(pixels[0], (8, 8)).reshape(-1, 64)
    native = 0
    for seed in range(40):
        crop = cut(found[0], (70, 80), np.random.default_rng(seed))
        assert crop.shape == (3, 70, 80) and crop.dtype == np.float32
        native += bool((np.abs(windows - crop[0, :8, :8].ravel()).max(axis=1) < 1e-6).any())
    assert 10 <= native <= 30
    wide = cut(found[0], (400, 400), np.random.default_rng(0))
    assert wide.shape[1:] == pixels.shape[1:]


# --- manipulations


@pytest.mark.parametrize("name", MANIPULATIONS)
def test_a_manipulation_changes_its_mask_and_nothing_else(name):
    rng = np.random.default_rng(5)
    image, other = (
        np.asarray(picture(seed, (120, 150)), np.float32).transpose(2, 0, 1) / np.float32(255) for seed in (1, 2)
    )
    for _ in range(4):
        made = manipulate(image, other, MANIPULATIONS[name], 0.9, rng)
        changed = (np.rint(made.image * 255) != np.rint(image * 255)).any(axis=0)
        assert made.kind.name == name
        assert not (changed & ~made.mask).any()
        assert made.mask.mean() >= manipulations.LEAST_AREA and changed[made.mask].mean() > 0.6
        assert made.image.min() >= 0 and made.image.max() <= 1


def test_where_nothing_would_be_seen_the_part_is_recoloured():
    flat = np.full((3, 90, 90), 0.5, np.float32)
    made = manipulate(flat, flat, MANIPULATIONS["copy_move"], 0.5, np.random.default_rng(0))
    assert made.kind.name == "recoloured_part" and made.mask.mean() >= manipulations.LEAST_AREA


def test_the_membrane_is_harmonic():
    """A linear image is its own filling; inside, each pixel is the mean of its four neighbours."""
    rows, columns = np.mgrid[:60, :70].astype(np.float64)
    linear = np.stack([0.01 * rows + 0.003 * columns, 0.5 - 0.004 * rows, 0.2 + 0.0 * rows]).astype(np.float32)
    region = draw_region(60, 70, np.random.default_rng(2))
    region[:1] = region[-1:] = False
    assert region.any()
    damaged = np.where(region, 0, linear).astype(np.float32)
    inside = ndimage.binary_erosion(region)
    assert np.abs(membrane(damaged, region) - linear)[:, inside].max() < 1e-5
    rough = np.random.default_rng(1).random((3, 60, 70)).astype(np.float32)
    filled = membrane(rough, region)
    around = sum(np.roll(filled, shift, axis) for shift, axis in ((1, 1), (-1, 1), (1, 2), (-1, 2))) / 4
    assert np.abs(filled - around)[:, inside].max() < 1e-5
    assert np.array_equal(filled[:, ~region], rough[:, ~region])


def test_a_copy_comes_from_the_image():
    """Along a ramp of columns, a copy holds values of the image; a splice those of the other."""
    ramp = np.broadcast_to(np.linspace(0.2, 0.6, 120, dtype=np.float32), (3, 120, 120)).copy()
    other = np.full_like(ramp, 0.95)
    region = draw_region(120, 120, np.random.default_rng(0))
    copied = manipulations.copy_move(ramp, other, region, 1.0, np.random.default_rng(1))
    assert copied.min() >= 0.19 and copied.max() <= 0.61
    spliced = manipulations.splice_hard(ramp, other, region, 1.0, np.random.default_rng(1))
    assert (spliced[:, region] == np.float32(0.95)).all() and np.array_equal(spliced[:, ~region], ramp[:, ~region])


# --- fairness


@pytest.mark.slow
def test_what_is_not_the_image_says_nothing_about_the_class(found):
    """The intervals of size, type, tables, mean colour and delivery include 0.5."""
    from tests.mmfr_generation.synthetic.test_synthetic_fairness import carries_nothing

    training, evaluation = split_photographs(found, 0.25, 0)
    job = ForgeJob(tuple(training), tuple(evaluation), 1600, 0, 72, 9, "mixed", 0.25)
    samples = [(key, job.make(key)) for key in job.keys()]  # noqa: SIM118 - no mapping
    fake = [key.label == FAKE for key, _ in samples]
    cues = {
        "size": [[float(side) for side in sample.pixels_HWC.shape[:2]] for _, sample in samples],
        "type": [[float(sample.suffix == end) for end in (".jpg", ".png", ".webp")] for _, sample in samples],
        "colour": [[float(x) for x in sample.pixels_HWC.mean(axis=(0, 1))] for _, sample in samples],
        "steps": [[float(len(sample.truth["delivery"]))] for _, sample in samples],
        "quality": [[float(sample.truth["jpeg_quality"])] for _, sample in samples],
    }
    for features in cues.values():
        carries_nothing(features, fake)
    sizes = {label: [float(len(s.data)) for key, s in samples if key.label == label] for label in (REAL, FAKE)}
    area, _ = auc(sizes[REAL], sizes[FAKE])
    assert abs(area - 0.5) < 0.1


def test_an_image_depends_on_its_key_alone(found):
    key = Key(1, 80, "train", "", FAKE, 5, "mixed")
    first = make_forged(key, found)
    make_forged(Key(1, 80, "train", "", REAL, 9, "mixed"), found)
    assert make_forged(key, found).data == first.data
    assert make_forged(Key(2, 80, "train", "", FAKE, 5, "mixed"), found).data != first.data


def test_no_delivery_leaves_the_first_file(found):
    sample = make_forged(Key(1, 80, "train", "", REAL, 5, "none"), found)
    assert sample.truth["delivery"] == [] and sample.suffix in (".jpg", ".png")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--size", "20"], "size must be 64 to 512"),
        (["--train", "0", "--eval", "0"], "not both 0"),
        (["--seed", "-1"], "seed must be 0 or more"),
        (["--eval-share", "1.5"], "must be between 0 and 1"),
        (["--delivery", "pigeon"], "invalid choice"),
    ],
)
def test_wrong_options_are_named(folder, tmp_path, capsys, given, message):
    with pytest.raises(SystemExit) as ended:
        main(["--images", str(folder), "--out", str(tmp_path / "o"), *given])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_crops_of_a_photograph_are_added_to_the_samples_and_only_once(folder, tmp_path):
    listed = {"about": "Here.", "samples": [{"image": "01_real.png"}]}
    (tmp_path / "samples.json").write_text(json.dumps(listed))
    for _ in range(2):
        assert showcase.main(["--images", str(folder), "--credit", "The test, CC0", "--out", str(tmp_path)]) == 0
    first, *added = json.loads((tmp_path / "samples.json").read_text())["samples"]
    assert first == listed["samples"][0] and [entry["label"] for entry in added] == ["real", "fake", "fake"]
    for entry in added:
        assert entry["credit"] == "The test, CC0" and (tmp_path / entry["image"]).is_file()
    assert added[2]["generator"] == "splice_hard" and (tmp_path / added[2]["mask"]).is_file()
    assert added[1]["trace"] and added[0]["trace"] is None
