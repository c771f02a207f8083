"""FakeVLM's words: verdicts of free text, strict and tolerant, and what is asked where there is none."""

import json
from pathlib import Path

import pytest

from llava.labels import FAKE, REAL
from llava.systems.base import AnswerFormat, EvaluatedAnswer
from llava.systems.fakevlm import protocol
from llava.systems.fakevlm.answer import FORMAT, complete_to_verdict, parse_answer, shorten, write_answer

METRICS = Path(__file__).parents[1] / "data" / "goldens_fakevlm" / "metrics.json"
CASES = json.loads(METRICS.read_text())["by_the_authors_code"]["cases"]
OURS = {
    "This is a fake image. The fingers merge.": "fake",
    "This is a real image. Light is even.": "real",
    "This is a fake image. The sky is banded.": "fake",
    "This is a real image. Nothing odd.": "real",
    "This is not a fake image.": "real",
    "This is not a real image.": "fake",
    "THIS IS A FAKE IMAGE. BAD TEXT.": "fake",
    "Fake.": "fake",
    "Real": "real",
    "": None,
    "I can not tell.": None,
    ".": None,
    "The image looks fake. The eyes do not match.": "fake",
    "The image looks real/fake": None,
    "Both real and fake parts appear. It is fake.": "fake",
    "It is fake, not real.": "fake",
    "An unrealistic face. This is a fake image.": "fake",
    "It really is fake.": "fake",
    "Dr. Smith says so. This is a fake image.": "fake",
    "Well. This is a fake image.": "fake",
    "Well. Hm. This is a fake image.": "fake",
    "Is it real? This is a fake image.": "fake",
    "This is a fake image. Why? The roof bends.": "fake",
    "This is a fake image! It is odd": "fake",
    "\nThis is a real image.\nThe grain is even.": "real",
    "This image is AI-generated.": None,
    "The picture is authentic.": None,
    "counterfake": None,
    "surreal scene. It is fake.": "fake",
    "This is a Real image": "real",
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["text"][:40])
def test_every_canned_answer_is_read_by_its_words(case):
    assert parse_answer(case["text"]).verdict == OURS[case["text"]]


def test_the_format_is_one():
    assert isinstance(FORMAT, AnswerFormat)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("This isn't a real photo.", "fake"),
        ("It is hardly a fake image.", "real"),
        ("The image cannot be a real one.", "fake"),
        ("It isn’t fake at all.", "real"),
        ("I am not sure, but this is a fake image.", "fake"),
        ("The light is fakery and the realism is low.", None),
        ("It is neither real nor fake.", None),
        ("real-looking, yet odd", None),
    ],
)
def test_negations_turn_and_other_words_do_not_count(text, verdict):
    assert parse_answer(text).verdict == verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("This image is AI-generated.", "fake"),
        ("The picture is authentic.", "real"),
        ("It has not been manipulated.", "real"),
        ("A genuine photograph, not a synthetic one.", "real"),
    ],
)
def test_tolerant_reading_knows_words_of_the_same_meaning(text, verdict):
    assert parse_answer(text, tolerant=True).verdict == verdict
    assert parse_answer(text).verdict is None


def test_the_parts_of_an_answer():
    parsed = parse_answer("This is a fake image. The rim bends; no shadow.")
    assert parsed.stages == {"CONCLUSION": "This is a fake image.", "REASONING": "The rim bends; no shadow."}
    assert parsed.problem == ""
    late = parse_answer("The rim bends. It is a fake image.")
    assert late.stages == {"CONCLUSION": "It is a fake image.", "REASONING": "The rim bends."}
    nothing = parse_answer("The image looks real/fake")
    assert nothing.stages == {"REASONING": "The image looks real/fake"} and "real/fake" in nothing.problem
    assert "empty" in parse_answer("  ").problem


@pytest.mark.parametrize(
    ("answer", "before"),
    [
        ("This is a fake image. The rim bends.", "This is a"),
        ("The image looks fake.", "The image looks"),
        ("This is a real image; it is not a fake image.", "This is a"),
        ("It seems fake, not real.", "It seems"),
        ("Both real and fake parts appear. It is fake.", "Both real and fake parts appear. It is"),
        ("fake", ""),
        ("", "This is a"),
        ("I can not tell.", "This is a"),
        ("This is not a fake image.", "This is a"),
        ("This is a Fake image", "This is a"),
    ],
)
def test_an_answer_is_cut_before_the_word_that_decides(answer, before):
    assert complete_to_verdict(answer) == before


def test_training_answers():
    assert write_answer("fake", "The rim bends.") == "This is a fake image. The rim bends."
    assert shorten("This is a real image. Light is even.") == "This is a real image."
    assert shorten("Where?") is None
    assert FORMAT.parse_training(["Where?", "This is a fake image."]).verdict == "fake"
    conflict = FORMAT.parse_training(["This is a fake image.", "This is a real image."])
    assert conflict.verdict is None and "differently" in conflict.problem
    assert FORMAT.attribute_name("Low Image Quality") is None


def test_the_protocol_counts_as_the_authors_and_a_coin_as_wrong():
    answers = [
        EvaluatedAnswer(REAL, "This is a real image. Light is even.", 0.1, "This is a real image. Light is even."),
        EvaluatedAnswer(FAKE, "This is a fake image.", 0.9),
        EvaluatedAnswer(FAKE, "An unrealistic face. This is a fake image.", 0.9),
        EvaluatedAnswer(REAL, "", None),
    ]
    found = protocol.metrics(answers, lambda text, reference: {"rouge_l": float(text == reference)}, None)
    assert (found["r_acc"], found["f_acc"], found["acc"], found["coin"]) == (0.5, 0.5, 0.5, 0.25)
    assert found["f1"] == pytest.approx(2 * 1 / (2 + 2)) and found["rougel"] == 1.0 and found["css"] is None
    assert protocol.metric_line("fakeclue", found).startswith("fakeclue r_acc: 0.5000, ")
    assert "css: nan" in protocol.metric_line("fakeclue", found)
    nothing = protocol.metrics([], lambda text, reference: {}, None)
    assert nothing["acc"] is None and nothing["right_real"] == 0
