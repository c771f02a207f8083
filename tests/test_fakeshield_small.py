"""The data of the script that makes a small FakeShield: what each part is trained on, and fresh images."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava.errors import DataError
from llava.systems.fakeshield.answer import DOMAINS, QUESTION, is_tagged, parse_answer
from llava.tampered import read_changed, read_tampered
from mmfr_generation.synthetic.__main__ import main as render
from scripts import fakeshield_small_data as small

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    assert (
        render(["--out", str(folder / "data"), "--train", "24", "--eval", "1", "--size", "64", "--workers", "1"]) == 0
    )
    assert small.main(["train", str(folder), "--regions", "3", "--size", "64"]) == 0
    return folder


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_fakes_with_local_faults_and_as_many_real_images_are_taken(written):
    records = json.loads((written / "explainer.json").read_text())
    tree = {f"data/{one['image']}": one for one in lines(written / "data" / "manifest.jsonl")}
    verdicts = {}
    for record in records:
        question, answer = (turn["value"] for turn in record["conversations"])
        asked = question.removeprefix("<image>\n")
        assert is_tagged(asked) and asked.endswith(QUESTION) and (written / record["image"]).is_file()
        verdicts[record["image"]] = parse_answer(answer).verdict
    for name, verdict in verdicts.items():
        told = tree.get(name)
        assert verdict == ("fake" if told is None else told["label"])
        assert told is None or (told["split"] == "train" and (bool(told["masks"]) or verdict == "real"))
    counts = [list(verdicts.values()).count(verdict) for verdict in ("real", "fake")]
    assert counts[0] == min(counts[1], 12) and sum(name.startswith("small/") for name in verdicts) == 3


def test_a_tag_does_not_tell_the_verdict(written):
    """The domain is that of the scene; fakes and real images of a scene get the same sentence."""
    assert set(small.SCENE_DOMAINS.values()) == set(DOMAINS)
    tags: dict[str, set[str]] = {}
    for one in lines(written / "data" / "manifest.jsonl"):
        tags.setdefault(one["scene"], set()).add(small.domain_of(one))
    assert all(len(found) == 1 for found in tags.values())


def test_the_segmenters_table_has_masks_of_one_size_with_their_image(written):
    images, large = ([*read_tampered(written / f"{name}.jsonl")] for name in ("segmenter", "segmenter_large"))
    assert len(large) == 3 and {image.image for image in large} < {image.image for image in images}
    assert all(read_changed(image.masks).mean() >= 0.05 for image in large)
    assert images and all(image.description and image.label == 1 for image in images)
    for image in images:
        with Image.open(image.image) as opened:
            assert read_changed(image.masks).shape == (opened.height, opened.width)
        assert read_changed(image.masks).mean() >= 0.01


@pytest.mark.parametrize(("kind", "least", "most"), [(small.SMALL, 0.01, 0.16), (small.LARGE, 0.06, 0.35)])
def test_a_painted_region_is_of_its_size_and_the_only_change(kind, least, most):
    areas = []
    for seed in range(6):
        sample = small.painted_region(kind, 1, seed, 96, strength=1.0)
        areas.append(float(small.changed(sample).mean()))
        again = small.painted_region(kind, 1, seed, 96, strength=1.0)
        assert again.data == sample.data and sample.truth["label"] == "fake"
        assert any(sample.truth["attributes"].values())
    assert least < min(areas) and max(areas) < most
    other = small.painted_region(kind, 1, 0, 96, strength=0.3)
    first = small.painted_region(kind, 1, 0, 96, strength=1.0)
    outside = ~(small.changed(first) | small.changed(other))
    assert np.abs(first.pixels_HWC.astype(int) - other.pixels_HWC)[outside].mean() < 3  # JPEG apart


def test_fresh_images_are_of_three_kinds_and_large_enough(tmp_path):
    assert small.main(["fresh", str(tmp_path), "--count", "2", "--size", "64", "--seed", "7"]) == 0
    rows = lines(tmp_path / "fresh.jsonl")
    assert [row["set"] for row in rows] == [
        kind for kind in ("inpainting", "small inpainting", "scene") for _ in "1234"
    ]
    assert [row["label"] for row in rows] == ["fake", "real"] * 6 and len({row["image"] for row in rows}) == 12
    for row in rows:
        assert ("mask" in row) == (row["label"] == "fake")
        if "mask" in row:
            area = read_changed([tmp_path / row["mask"]]).mean()
            assert area >= 0.02 and row["area"] == next(name for end, name in small.AREAS if area < end)


def test_a_tree_without_local_faults_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.jsonl").write_text(
        '{"image": "a.png", "label": "real", "split": "train", "masks": {}}\n'
    )
    with pytest.raises(DataError, match="0 images with a local fault and 1 real ones"):
        small.write_train(tmp_path, 0.01, 1, 64, 1)


def test_the_script_says_what_it_takes():
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "train_small_fakeshield.sh", "--help"], capture_output=True, text=True, check=True
    )
    for name in ("FOLDER", "IMAGES", "REGIONS", "EVAL", "TAGGER_STEPS", "STEPS", "LAST_STEPS", "SEED", "PYTHON"):
        assert name in done.stdout
    assert "set -euo" not in done.stdout
