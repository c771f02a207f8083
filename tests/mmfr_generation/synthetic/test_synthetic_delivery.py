"""Delivery: the same for both classes, masks carried along, and nothing said that is no longer true."""

import hashlib
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from forgery_eval.benchmarks import open_benchmark
from forgery_eval.perturbations import GRID
from llava.errors import OptionError
from llava.image_operations import Step, apply_steps
from llava.labels import FAKE, REAL
from mmfr_generation.synthetic import delivery
from mmfr_generation.synthetic.__main__ import main
from mmfr_generation.synthetic.delivery import draw_chain, draw_frame, is_cut, unsure_attributes
from mmfr_generation.synthetic.sample import Key, make_sample
from mmfr_generation.synthetic.writer import Run

COUNTS = ("--train", "40", "--eval", "1", "--size", "64", "--seed", "5", "--delivery", "mixed")
DIGEST_WITHOUT = "744d7203e97b70608fad136ab16b3da3fc265f2265f901b7f6e1bde0b9145510"


def tree(root) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("mixed") / "d"
    assert main(["--out", str(out), *COUNTS, "--workers", "1"]) == 0
    return out


@pytest.fixture(scope="module")
def samples():
    return [make_sample(Key(3, 96, "train", "", k % 2, k // 2, "mixed")) for k in range(160)]


def test_without_delivery_the_images_are_those_of_before():
    digest = hashlib.sha256()
    for index in range(6):
        for label in (REAL, FAKE):
            digest.update(make_sample(Key(11, 64, "train", "", label, index)).data)
    assert digest.hexdigest() == DIGEST_WITHOUT


def test_the_scene_and_the_trace_do_not_depend_on_delivery():
    for index in range(8):
        key = Key(4, 64, "train", "", FAKE, index)
        plain, sent = make_sample(key).truth, make_sample(replace(key, delivery="mixed")).truth
        same = ("generator", "strength", "source", "scene", "light", "jpeg_quality")
        assert {name: plain[name] for name in same} == {name: sent[name] for name in same}
        assert "delivery" not in plain and isinstance(sent["delivery"], list)


def test_two_workers_write_the_same_and_another_delivery_is_refused(written, tmp_path):
    assert main(["--out", str(tmp_path / "two"), *COUNTS, "--workers", "2"]) == 0
    assert tree(tmp_path / "two") == tree(written)
    with pytest.raises(Exception, match="delivery mixed, not None"):
        main(["--out", str(written), *COUNTS[:-2], "--workers", "1"])


def test_half_are_untouched_and_sizes_and_files_are_many(samples):
    touched = [sample for sample in samples if sample.truth["delivery"]]
    assert 0.35 < len(touched) / len(samples) < 0.65
    assert len({sample.pixels_HWC.shape for sample in samples}) > 60
    assert {sample.suffix for sample in samples} >= {".jpg", ".png", ".webp"}
    lengths = Counter(len(sample.truth["delivery"]) for sample in touched)
    assert set(lengths) == {1, 2, 3, 4}


@pytest.mark.parametrize("label", [REAL, FAKE])
def test_what_was_done_can_be_done_again(label):
    """The recorded chain on the first file's pixels gives the image that was then saved without loss."""

    def suits(sample) -> bool:
        return bool(sample.truth["delivery"]) and not sample.truth["frame"] and sample.suffix == ".png"

    keys = (Key(3, 96, "train", "", label, index, "mixed") for index in range(200))
    key, sample = next((key, sample) for key in keys if suits(sample := make_sample(key)))
    steps = [Step(done.pop("step"), done) for done in map(dict, sample.truth["delivery"])]
    image, _ = apply_steps(Image.fromarray(make_sample(replace(key, delivery="none")).pixels_HWC), steps)
    assert np.array_equal(np.asarray(image), sample.pixels_HWC)


def test_masks_have_the_size_of_their_image_and_are_not_empty(samples):
    masked = [sample for sample in samples if sample.masks]
    assert len(masked) > 15
    for sample in masked:
        for name, mask in sample.masks.items():
            assert mask.shape == sample.pixels_HWC.shape[:2] and mask.any(), name
        assert set(sample.truth["faults"]) <= set(sample.masks)


def test_a_fault_that_was_cut_away_is_not_spoken_of(monkeypatch):
    def lies_left(sample) -> bool:
        return any(sample.masks[fault].any(axis=0).nonzero()[0].max() < 43 for fault in sample.truth["faults"])

    keys = (Key(3, 64, "train", "", FAKE, index) for index in range(200))
    key, plain = next((key, sample) for key in keys if lies_left(sample := make_sample(key)))
    (fault,) = plain.truth["faults"]
    cut = Step("crop", {"left": 0.7, "right": 0, "top": 0, "bottom": 0})
    monkeypatch.setattr("mmfr_generation.synthetic.sample.draw_frame", lambda rng: cut)
    sample = make_sample(replace(key, delivery="mixed"))
    assert fault not in sample.masks and sample.truth["faults"] == []
    assert sum(sentence is not None for sentence in sample.truth["attributes"].values()) == 1
    assert sum(sentence is not None for sentence in plain.truth["attributes"].values()) >= 1


def test_what_is_said_of_a_cut_image_names_no_thing(samples):
    for sample in samples:
        way = [*sample.truth["frame"], *sample.truth["delivery"]]
        cut = any(step["step"] in ("crop", "rotate") for step in way)
        assert ("a part of a" in sample.truth["caption"]) == cut
        if sample.truth["label"] == "real":
            spoken = {name for name, sentence in sample.truth["attributes"].items() if sentence}
            assert spoken and "Consistent Lighting and Shadows" not in unsure_attributes([Step("blur")])
            assert not (cut and "Semantic Rationality" in spoken)
            assert not (sample.truth["delivery"] and "High Image Quality" in spoken)


def test_the_middle_stays_in_the_image():
    """Local traces have their middle within 0.28 to 0.72 of both sides: the widest cuts leave it."""
    corners = np.zeros((200, 200), bool)
    for row in (56, 143):
        for column in (56, 143):
            corners[row : row + 2, column : column + 2] = True
    image = Image.new("RGB", (200, 200))
    for seed in range(400):
        rng = np.random.default_rng(seed)
        frame, chain = draw_frame(rng), draw_chain(rng)
        steps = [step for step in (frame, *chain) if step and step.name in ("crop", "rotate")]
        _, masks = apply_steps(image, steps, {"corners": corners})
        assert masks["corners"].sum() >= 8, steps
    widest = delivery.WIDEST_FRAME
    shares = [draw_frame(np.random.default_rng(seed)) for seed in range(300)]
    assert max(max(step.values.values()) for step in shares if step) <= widest
    assert 0.5 < sum(step is not None for step in shares) / 300 < 0.7


def test_only_compression_occurs_twice():
    double = 0
    for seed in range(500):
        names = Counter(step.name for step in draw_chain(np.random.default_rng(seed)))
        assert all(count == 1 for name, count in names.items() if name not in ("jpeg", "webp", "avif"))
        double += names["jpeg"] > 1
    assert double > 20
    assert is_cut([Step("rotate")]) and not is_cut([Step("letterbox")])


def test_what_erases_traces_is_drawn_beyond_what_evaluation_tries():
    """A detector that saw no real image with so much noise takes it for a generator's grain."""
    values = {"noise": "sigma", "resize": "factor", "jpeg": "quality", "webp": "quality"}
    drawn = [step for seed in range(3000) for step in draw_chain(np.random.default_rng(seed))]
    for name, value in values.items():
        tried = [step.values[value] for cell in GRID if cell.step == name for step in cell.fixed]
        found = [step.values[value] for step in drawn if step.name == name]
        assert tried and min(found) < min(tried) and max(found) >= max(tried), name


def test_evaluation_groups_by_what_happened(written):
    groups = [sample.groups for sample in open_benchmark(written)]
    records = [json.loads(line) for line in (written / "manifest.jsonl").read_text("utf-8").splitlines()]
    chains = {r["image"].removeprefix("evaluation_sets/"): r["delivery"] for r in records}
    for sample in open_benchmark(written):
        chain = chains[sample.id]
        assert sample.groups["last_delivery"] == (chain[-1]["step"] if chain else "untouched")
        assert sample.groups["delivery"].startswith(str(len(chain)) if chain else "untouched")
    assert {group["delivery"] for group in groups} > {"untouched"}


def test_the_card_says_it(written):
    card = (written / "card.md").read_text("utf-8")
    assert "--delivery mixed" in card and "Steps:" in card and "rendered at 64 x 64" in card


def test_an_unknown_delivery_is_refused():
    with pytest.raises(OptionError, match="delivery must be one of none, mixed, not 'pigeon'"):
        Run(2, 0, 64, 1, "pigeon")
