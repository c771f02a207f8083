"""Words: true of the image, varied, and few."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.systems.fakereasoning.answer import AUTHENTIC_ATTRIBUTES
from mmfr_generation.synthetic import wording
from mmfr_generation.synthetic.faults import draw_faulty_scene, draw_scene
from mmfr_generation.synthetic.generators import GENERATORS
from mmfr_generation.synthetic.scenes import SCENES

kinds = pytest.mark.parametrize("kind", SCENES, ids=lambda kind: kind.name)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def is_prose(text: str) -> bool:
    return bool(re.fullmatch(r"(?:[A-Z][A-Za-z ,]*\. )*[A-Z][A-Za-z ,]*\.", text)) and "  " not in text


@given(st.lists(st.text("abc ", max_size=5), min_size=1, max_size=5), st.integers(0, 99))
def test_expand_takes_one_of_the_choices(options, seed):
    said = wording.expand("x [" + "|".join(options) + "] {slot}", rng(seed), {"slot": "y"})
    assert said in {f"X {option} y" for option in options}


def test_expand_fills_slots_with_choices_and_capitals():
    said = {wording.expand("{a_} and {a}", rng(seed), {"a": "[one|two]"}) for seed in range(40)}
    assert said == {"One and one", "One and two", "Two and one", "Two and two"}


@kinds
def test_captions_say_how_many_and_where_the_light_is(kind):
    for seed in range(12):
        scene = draw_scene(kind, seed, 64)
        said = wording.caption(scene, rng(seed))
        assert is_prose(said), said
        assert f"the {scene.light.name}" in said
        assert ("right" in said) != ("left" in said)
        for thing in scene.facts.things:
            assert f"{wording.NUMBERS[thing.count]} {thing.colour}".strip() in said
        assert (scene.facts.text in said) if scene.facts.text else True


def test_a_broken_word_is_not_read_out():
    seen = 0
    for seed in range(60):
        scene = draw_faulty_scene(SCENES[seed % len(SCENES)], seed, 64, rng(seed))
        if scene.fault == "text":
            seen += 1
            assert scene.facts.text not in wording.caption(scene, rng(seed)).split(".")[-2]
            assert "we read" not in wording.caption(scene, rng(seed))
    assert seen >= 3


def test_things_grown_together_are_counted():
    kind = next(kind for kind in SCENES if kind.name == "still life")
    for seed in range(40):
        sound, faulty = draw_scene(kind, seed, 64), draw_faulty_scene(kind, seed, 64, rng(seed))
        more = sum(t.count for t in faulty.facts.things) - sum(t.count for t in sound.facts.things)
        assert more == (1 if faulty.fault == "fused" else 0)


@kinds
def test_authentic_sentences_are_of_the_scene(kind):
    for seed in range(12):
        scene = draw_scene(kind, seed, 64)
        sentences = wording.authentic(scene, clear=seed % 2 == 0, rng=rng(seed))
        assert tuple(sentences) == AUTHENTIC_ATTRIBUTES
        said = {name: text for name, text in sentences.items() if text}
        assert len(said) >= 2
        assert all(is_prose(text) for text in said.values()), said
        if seed % 2:
            assert sentences["High Image Quality"] is None
        light = said.get("Consistent Lighting and Shadows")
        if light and "fall to the" in light:
            away = "left" if scene.light.name == "right" else "right"
            assert f"fall to the {away}" in light


@pytest.mark.parametrize("generator", GENERATORS.values(), ids=lambda generator: generator.name)
def test_traces_are_graded_by_strength(generator):
    scene = draw_scene(SCENES[0], 1, 64)
    mask = np.zeros((64, 64), bool)
    mask[20:40, :10] = True
    for strength, grades in ((0.2, "faint|weak|slight"), (0.6, "clear|visible|plain"), (1.0, "strong|heavy|marked")):
        for seed in range(10):
            said = wording.trace(scene, generator.mechanism, strength, rng(seed), mask if generator.local else None)
            assert is_prose(said), said
            if not (generator.local and "smooth patch" in said.lower() and "border" not in said):
                assert re.search(grades, said.lower()), said
            assert ("at the left" in said) == generator.local


@kinds
def test_faults_are_named_and_placed(kind):
    for seed in range(12):
        scene = draw_faulty_scene(kind, seed, 112, rng(seed))
        said = wording.fault(scene, rng(seed))
        assert is_prose(said), said
        assert re.search(r"(?i)at the left|at the right|in the middle", said)
        if scene.fault == "shadow":
            assert f"falls to the {scene.light.name}" in said


def test_a_sound_scene_has_no_fault_to_write_about():
    with pytest.raises(ValueError, match="no fault"):
        wording.fault(draw_scene(SCENES[0], 0, 64), rng())


@pytest.mark.parametrize(("first", "said"), [(0, "at the left"), (27, "in the middle"), (54, "at the right")])
def test_places_are_thirds_of_the_width(first, said):
    mask = np.zeros((64, 64), bool)
    mask[10:50, first : first + 10] = True
    assert wording.place(mask) == said
