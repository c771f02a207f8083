"""The words of FakeReasoning: what is written can be read, and nothing else becomes a verdict."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.systems.fakereasoning import answer as words

plain = st.text(alphabet=st.characters(blacklist_categories=("Cs",), blacklist_characters="<>"), min_size=1).filter(
    lambda value: value.strip()
)
labels = st.sampled_from(words.LABELS)


def conclusion(said: str) -> str:
    return f"<CONCLUSION> {said} </CONCLUSION>"


@given(labels, plain, plain)
def test_a_written_answer_is_read_back(label, caption, reasoning):
    answer = words.write_answer(label, caption=caption, reasoning=reasoning)
    parsed = words.parse_answer(answer)
    assert parsed.verdict == label
    assert parsed.problem == ""
    assert tuple(parsed.stages) == words.STAGES
    assert parsed.stages["CAPTION"] == caption.strip()
    assert parsed.stages["REASONING"] == reasoning.strip()
    assert parsed.stages["SUMMARY"] == words.SUMMARY
    assert words.parse_answer(answer, tolerant=True).verdict == label


@given(labels, st.data())
def test_attribute_sentences_are_read_back(label, data):
    sentences = data.draw(
        st.dictionaries(
            st.sampled_from(words.ATTRIBUTES[label]),
            st.from_regex(r"[A-Za-z][a-z ,]{0,40}\.", fullmatch=True),
            min_size=1,
        )
    )
    reasoning = words.write_reasoning(label, sentences)
    assert words.parse_attributes(reasoning) == {name: " ".join(text.split()) for name, text in sentences.items()}
    high = [name for name in sentences if name in words.HIGH_LEVEL_ATTRIBUTES]
    assert (words.HIGH_LEVEL_PREFIX in reasoning) == bool(high)


@given(st.text())
def test_text_without_the_stage_never_has_a_verdict(noise):
    text = noise.replace("CONCLUSION", "")
    for tolerant in (False, True):
        parsed = words.parse_answer(text, tolerant=tolerant)
        assert parsed.verdict is None
        assert parsed.problem


@given(st.text(), st.booleans())
def test_any_text_is_read_without_an_exception(noise, tolerant):
    for text in (noise, conclusion(noise), f"<REASONING>{noise}<CONCLUSION>{noise}"):
        words.parse_answer(text, tolerant=tolerant)


@given(labels, st.text(alphabet="abcdefghij ,.!?-", min_size=1).filter(lambda value: value.strip(" .!?,-")))
def test_more_than_the_sentence_is_no_strict_verdict(label, extra):
    said = f"This image is {label}."
    for changed in (f"{extra} {said}", f"{said} {extra}", said.replace(label, extra + label)):
        assert words.parse_answer(conclusion(changed)).verdict is None


NEVER = [
    "This image is unrealistic.",
    "This image is realistic.",
    "This image is not fake.",
    "This image isn't real.",
    "This image is real or fake.",
    "This image is real. This image is fake.",
    "This image is fake. This image is real.",
    "This image is neither real nor fake.",
    "This image is real-looking.",
    "This image is faked.",
    "This image is surreal.",
    "Is this image fake?",
    "This image is fake?",
    "I cannot say.",
    "real",
    "",
]


@pytest.mark.parametrize("said", NEVER)
@pytest.mark.parametrize("tolerant", [False, True])
def test_ambiguous_conclusions_are_no_verdict(said, tolerant):
    parsed = words.parse_answer(conclusion(said), tolerant=tolerant)
    assert parsed.verdict is None
    assert parsed.problem


TOLERATED = [
    ("this image is fake.", "fake"),
    ("This image is real", "real"),
    ("THE IMAGE IS FAKE!", "fake"),
    ("The photo is real.", "real"),
    ("This is a fake image.", "fake"),
    ("Therefore, this image is\n real.", "real"),
]


@pytest.mark.parametrize(("said", "verdict"), TOLERATED)
def test_plain_variants_are_read_only_where_tolerated(said, verdict):
    assert words.parse_answer(conclusion(said)).verdict is None
    assert words.parse_answer(conclusion(said), tolerant=True).verdict == verdict


MALFORMED = [
    ("<CONCLUSION> This image is fake.", "fake"),
    ("<REASONING> This image is fake. </REASONING>", None),
    ("This image is fake.", None),
    ("<conclusion> This image is fake. </conclusion>", None),
    ("</CONCLUSION> This image is fake. <CONCLUSION>", None),
    ("<CONCLUSION> This image is fake. <REASONING> r </REASONING> </CONCLUSION>", None),
    (conclusion("This image is fake.") + conclusion("This image is real."), None),
    (conclusion("This image is fake.") + conclusion("This image is fake."), "fake"),
    (conclusion("This image is fake.") + "<CONCLUSION> This image", None),
]


@pytest.mark.parametrize(("answer", "tolerated"), MALFORMED)
def test_a_malformed_conclusion_is_no_strict_verdict(answer, tolerated):
    assert words.parse_answer(answer).verdict is None
    assert words.parse_answer(answer, tolerant=True).verdict == tolerated


def test_stages_keep_the_order_of_the_answer():
    parsed = words.parse_answer(f"{conclusion('This image is real.')} <CAPTION> c </CAPTION>")
    assert list(parsed.stages) == ["CONCLUSION", "CAPTION"]
    assert parsed.verdict == "real"


def test_forms_hold_their_stages():
    assert words.write_answer("fake", form="verdict") == "<CONCLUSION> This image is fake. </CONCLUSION>"
    reasoned = words.write_answer("real", reasoning="r", form="reasoning")
    assert tuple(words.parse_answer(reasoned).stages) == ("REASONING", "CONCLUSION")
    assert words.VERDICT_PREFIX in reasoned


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label": "maybe"}, "unknown label"),
        ({"label": "real", "form": "short"}, "unknown form"),
        ({"label": "real", "reasoning": "r"}, "CAPTION stage is empty"),
        ({"label": "real", "caption": "c", "reasoning": " "}, "REASONING stage is empty"),
        ({"label": "real", "caption": "<CONCLUSION>", "reasoning": "r"}, "holds a stage's tag"),
    ],
)
def test_an_answer_that_could_not_be_read_is_not_written(arguments, message):
    with pytest.raises(ValueError, match=message):
        words.write_answer(**arguments)


def test_reasoning_takes_only_the_labels_own_attributes():
    with pytest.raises(ValueError, match="no attribute of a real image: Low Image Quality"):
        words.write_reasoning("real", {"Low Image Quality": "Blurry."})
    with pytest.raises(ValueError, match="nothing to reason from"):
        words.write_reasoning("fake", {"Low Image Quality": None})


def test_attribute_names_have_one_spelling():
    assert words.attribute_name(" low  IMAGE quality ") == "Low Image Quality"
    assert words.attribute_name("quality") is None
    parsed = words.parse_attributes("LOW IMAGE QUALITY: blurry. low image quality: again. Other: x")
    assert parsed == {"Low Image Quality": "blurry."}


def test_an_attribute_inside_another_name_is_not_found():
    found = words.parse_attributes("Inconsistent Lighting and Shadows: the sun is low.")
    assert found == {"Inconsistent Lighting and Shadows": "the sun is low."}


def test_the_words_cost_no_torch():
    script = (
        "import sys, llava, llava.report, llava.systems.base, llava.systems.fakereasoning.answer;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
