"""Samples: pure functions of their key, true to what was done, and pinned."""

import hashlib
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from llava.labels import FAKE, REAL
from llava.systems.fakereasoning.answer import ATTRIBUTES, parse_answer, write_answer, write_reasoning
from mmfr_generation.synthetic.faults import FAULTS
from mmfr_generation.synthetic.generators import GENERATORS, SEEN
from mmfr_generation.synthetic.sample import WEAKEST, Key, Sample, make_sample

PINNED = "27f9e3a7343e59c9653c4405f6368bf4d1e9617427b4f86a9611e0ea9ab0b252"
"""Digest over the decoded pixels, masks and truth of 20 images. File bytes are left out, since another zlib packs the
same pixels otherwise; another JPEG library may still decode to other pixels and so change it."""


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [make_sample(Key(6, 80, "train", "", k % 2, k // 2)) for k in range(400)]


def test_twenty_images_are_pinned():
    digest = hashlib.sha256()
    names = list(GENERATORS)
    for k in range(20):
        split, name = ("train", "") if k < 6 else ("evaluation", names[k])
        sample = make_sample(Key(2024, 112, split, name, REAL if k % 4 == 0 else FAKE, k))
        digest.update(sample.stem.encode() + sample.suffix.encode() + sample.pixels_HWC.tobytes())
        digest.update(b"".join(mask.tobytes() for mask in sample.masks.values()))
        digest.update(json.dumps(sample.truth, sort_keys=True).encode())
    assert digest.hexdigest() == PINNED


def test_a_sample_depends_on_nothing_but_its_key():
    key = Key(1, 64, "evaluation", "halo", FAKE, 3)
    first = make_sample(key)
    make_sample(replace(key, index=4))
    np.random.default_rng(0).random(3)
    again = make_sample(key)
    assert first.data == again.data and first.truth == again.truth and first.stem == again.stem


@pytest.mark.parametrize(
    "change",
    [{"seed": 2}, {"split": "train", "set": ""}, {"set": "ringing"}, {"label": REAL}, {"index": 4}],
    ids=lambda change: next(iter(change)),
)
def test_every_part_of_the_key_matters(change):
    key = Key(1, 64, "evaluation", "halo", FAKE, 3)
    first, other = make_sample(key), make_sample(replace(key, **change))
    assert first.stem != other.stem
    assert not np.array_equal(first.pixels_HWC, other.pixels_HWC)


def test_the_file_holds_the_pixels_in_the_size_asked_for(samples):
    suffixes = set()
    for sample in samples[:60]:
        with Image.open(io.BytesIO(sample.data)) as image:
            assert image.format == {".jpg": "JPEG", ".png": "PNG"}[sample.suffix]
            assert image.size == (80, 80)
            assert np.array_equal(np.asarray(image.convert("RGB")), sample.pixels_HWC)
        suffixes.add(sample.suffix)
        assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", sample.stem)
    assert suffixes == {".jpg", ".png"}


def test_reals_are_photographs_with_true_attributes_only(samples):
    for sample in samples[0::2]:
        truth = sample.truth
        assert truth["label"] == "real" and truth["source"] == "camera"
        assert truth["generator"] is None and truth["strength"] is None
        assert truth["faults"] == [] and sample.masks == {}
        assert tuple(truth["attributes"]) == ATTRIBUTES["real"]


def test_fakes_speak_of_their_trace_and_their_fault_and_of_nothing_else(samples):
    for sample in samples[1::2]:
        truth = sample.truth
        generator = GENERATORS[truth["generator"]]
        expected = {generator.attribute} | {FAULTS[fault] for fault in truth["faults"]}
        assert {name for name, text in truth["attributes"].items() if text} == expected
        assert tuple(truth["attributes"]) == ATTRIBUTES["fake"]
        assert set(sample.masks) == set(truth["faults"]) | ({generator.name} if generator.local else set())
        for mask in sample.masks.values():
            assert mask.shape == (80, 80) and mask.dtype == bool and 0.002 < mask.mean() < 0.6


def test_the_mix_is_what_the_card_says(samples):
    fakes = [s.truth for s in samples[1::2]]
    assert {t["generator"] for t in fakes} == set(SEEN)
    strengths = np.asarray([t["strength"] for t in fakes])
    assert strengths.min() >= WEAKEST and strengths.max() == 1.0
    assert 0.15 < (strengths == 1).mean() < 0.35
    assert len(set(strengths[strengths < 1])) > 100
    assert 0.4 < np.mean([t["source"] == "camera" for t in fakes]) < 0.6
    assert 0.25 < np.mean([bool(t["faults"]) for t in fakes]) < 0.45
    assert {fault for t in fakes for fault in t["faults"]} == set(FAULTS)
    for generator in SEEN:
        assert {t["source"] for t in fakes if t["generator"] == generator} == {"camera", "clean"}


def test_every_form_of_answer_can_be_written_and_read_back(samples):
    for sample in samples[:40]:
        truth = sample.truth
        reasoning = write_reasoning(truth["label"], truth["attributes"])
        for form in ("cot", "reasoning", "verdict"):
            answer = write_answer(truth["label"], reasoning=reasoning, caption=truth["caption"], form=form)
            parsed = parse_answer(answer)
            assert parsed.verdict == truth["label"] and not parsed.problem
        parsed = parse_answer(write_answer(truth["label"], reasoning=reasoning, caption=truth["caption"]))
        assert parsed.attributes == {name: text for name, text in truth["attributes"].items() if text}


def test_texts_are_many_and_their_words_few():
    texts, words = set(), set()
    for k in range(500):
        truth = make_sample(Key(8, 64, "train", "", k % 2, k // 2)).truth
        text = " ".join([truth["caption"], *(s for s in truth["attributes"].values() if s)])
        texts.add(text)
        words |= set(re.findall(r"[a-z]+", text.lower()))
    assert len(texts) > 490
    assert len(words) < 400


def test_strength_can_be_set_for_a_sheet():
    key = Key(1, 64, "evaluation", "halo", FAKE, 3)
    weak, strong = make_sample(key, strength=0.2), make_sample(key, strength=1.0)
    assert weak.stem == strong.stem
    assert (weak.truth["strength"], strong.truth["strength"]) == (0.2, 1.0)
    assert not np.array_equal(weak.pixels_HWC, strong.pixels_HWC)
