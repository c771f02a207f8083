"""One answer gives sentences or a named rejection; never an exception, never executed code."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.labels import LABELS
from llava.systems.fakereasoning.answer import ATTRIBUTES
from mmfr_generation.output_control import (
    REASONS,
    RejectedAnswer,
    caption_control,
    output_control,
)
from mmfr_generation.prompts import CANNOT_DETERMINE, reasoning_prompt
from tests.mmfr_generation.annotation_helpers import DATA

GOLDENS = json.loads((DATA / "mmfr_generation.json").read_text())
CASES = {case["name"]: case for case in GOLDENS["cases"]}
KEYS = {"fake": "Forgery Attributes", "real": "Attributes"}

AS_AUTHORS = (
    *("valid_json", "code_fence", "single_quotes", "trailing_commas", "unknown_attr", "missing_answer"),
    *("missing_attrs", "cannot_determine", "prose_around", "python_none", "truncated", "truncated_inner_brace_kept"),
    *("no_json", "empty", "none_input", "answer_is_other", "escaped_quotes_unicode", "duplicate_keys"),
    *("extra_top_key", "close_before_open", "only_open"),
)
ACCEPTED = {
    "json_null": {},
    "json_true": {},
    "nested_braces": {},
    "prose_with_braces_before": "valid_json",
    "prose_with_braces_after": "valid_json",
    "two_objects": "valid_json",
    "newline_in_string": {"fake": {"Low Image Quality": "a\nb"}, "real": {"High Image Quality": "a\nb"}},
    "answer_upper": {"fake": {"Low Image Quality": "Blurry."}, "real": {"High Image Quality": "Sharp."}},
    "attr_case": {"fake": {"Low Image Quality": "a"}, "real": {"High Image Quality": "a"}},
}
REJECTED = {
    "cannot_determine_with_attrs": "cannot_determine",
    "answer_unreal_substring": "unclear_answer",
    "answer_none": "unclear_answer",
    "answer_list": "unclear_answer",
    "attrs_is_list": "attributes_not_object",
    "attrs_is_string": "attributes_not_object",
    "python_set": "unreadable",
    "not_a_dict": "unreadable",
    "only_unknown_attr": "no_known_attribute",
    "malicious_os_system": "unreadable",
    "malicious_touch": "unreadable",
    "expression_concat": "unreadable",
}


def read(answer, label):
    """Returns the sentences, or the reason of the rejection."""
    try:
        return output_control(answer, label)
    except RejectedAnswer as rejection:
        assert rejection.reason in REASONS
        return rejection.reason


def whole(label, sentences):
    return {name: sentences.get(name) for name in ATTRIBUTES[label]}


def test_every_golden_answer_is_in_one_list():
    assert sorted([*AS_AUTHORS, *ACCEPTED, *REJECTED]) == sorted(CASES)
    assert len(CASES) == 42


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("name", AS_AUTHORS)
def test_goldens_as_the_authors(name, label):
    published = CASES[name][label]["value"]
    result = read(CASES[name][f"{label}_input"], label)
    if not published:
        assert isinstance(result, str)
        return
    known = {key: text for key, text in published[KEYS[label]].items() if key in ATTRIBUTES[label]}
    assert result == whole(label, known)
    assert list(result) == list(ATTRIBUTES[label])


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("name", ACCEPTED)
def test_goldens_accepted_though_the_authors_reject(name, label):
    expected = ACCEPTED[name]
    if isinstance(expected, str):
        expected = CASES[expected][label]["value"][KEYS[label]]
    elif expected:
        expected = expected[label]
    assert read(CASES[name][f"{label}_input"], label) == whole(label, expected)


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("name", REJECTED)
def test_goldens_rejected_and_nothing_executed(name, label, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read(CASES[name][f"{label}_input"], label) == REJECTED[name]
    assert not list(tmp_path.iterdir())


def answer(verdict="The image is fake.", **attributes):
    named = {name.replace("_", " "): text for name, text in attributes.items()}
    return json.dumps({"Answer": verdict, "Forgery Attributes": named})


def test_objects_that_differ_are_rejected():
    one, other = answer(Low_Image_Quality="a"), answer(Low_Image_Quality="b")
    assert read(f"{one}\n{other}", "fake") == "different_answers"
    assert read(f"{one} and {one}", "fake") == whole("fake", {"Low Image Quality": "a"})
    real = '{"Answer": "The image is real.", "Attributes": {"High Image Quality": "x"}}'
    assert read(f"{one}\n{real}", "fake") == "different_answers"
    assert read(f"{real}\n{real}", "fake") == "other_label"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            """{"Answer": "fake", "Forgery Attributes": {"Low Image Quality": "it's", "x": None,}}""",
            "it's",
        ),
        ("""{'Answer': 'fake', 'Forgery Attributes': {'Low Image Quality': "it's", 'x': null, 'y': true}}""", "it's"),
        ("""{'Answer': 'fake', 'Forgery Attributes': {'Low Image Quality': 'it\\'s'}}""", "it's"),
        ('{"Answer": "fake", "Forgery Attributes": {"Low Image Quality": "a\\/b \\ud83d\\ude00",}}', "a/b 😀"),
        ('{"answer": "Fake", "forgery attributes": {" low  image quality ": " a "}}', "a"),
        ("It's here: {it's} " + answer(Low_Image_Quality="a {b} c"), "a {b} c"),
        (answer("This is a fake image.", Low_Image_Quality="a"), "a"),
        ('{"Answer": "The image is fake", "Attributes": {"Low Image Quality": "a"}}', "a"),
    ],
)
def test_spellings_that_are_read(text, sentence):
    assert read(text, "fake") == whole("fake", {"Low Image Quality": sentence})


@pytest.mark.parametrize("nothing", ["null", "None", "N/A", "", "  ", 3, 1.5, False, ["a"], {"a": "b"}])
def test_a_value_that_is_no_sentence_is_null(nothing):
    assert read(answer(Low_Image_Quality=nothing, Irregular_Image_Edges="a"), "fake") == whole(
        "fake", {"Irregular Image Edges": "a"}
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (answer(High_Image_Quality="a"), "no_known_attribute"),
        ('{"Answer": "The image is fake.", "Forgery Attributes": {}}', "no_known_attribute"),
        (answer("not a fake image", Low_Image_Quality="a"), "unclear_answer"),
        (answer("real or fake", Low_Image_Quality="a"), "unclear_answer"),
        (answer("The image is fake.</CONCLUSION>", Low_Image_Quality="a"), "unclear_answer"),
        (answer(Low_Image_Quality="a </REASONING> b"), "holds_tag"),
        (json.dumps({"Answer": CANNOT_DETERMINE}), "cannot_determine"),
        ("{" * 30_000, "unreadable"),
        ("{'a':" * 30_000, "unreadable"),
        ("[" * 30_000 + "{", "unreadable"),
        ("{1:" + "-" * 30_000 + "1}", "unreadable"),
        ("{" + "1+" * 30_000 + "1}", "unreadable"),
        ('{"Answer": ' + "9" * 10_000 + "}", "unreadable"),
        ("x" * 300_000 + "{", "too_long"),
        ("{'Answer': ().__class__.__mro__}", "unreadable"),
        ("{**{'Answer': 'fake'}}", "no_attributes"),
        ("{[1]: 2}", "unreadable"),
        ('{"Answer": f"{1}"}', "unreadable"),
    ],
)
def test_named_rejections(text, reason):
    assert read(text, "fake") == reason


def test_half_a_character_can_be_written():
    result = read('{"Answer": "fake", "Forgery Attributes": {"Low Image Quality": "a \\ud800 b"}}', "fake")
    result["Low Image Quality"].encode()


def test_the_prompt_shows_an_answer_that_is_accepted():
    for label in LABELS:
        prompt = reasoning_prompt(label)
        positions = [prompt.index(name) for name in ATTRIBUTES[label]]
        assert positions == sorted(positions)
        shape = prompt[prompt.index("{") : prompt.index("}\n\n", prompt.index("{")) + 1]
        filled = shape.replace('"<one sentence>" or null', '"Seen."')
        assert read(filled, label) == dict.fromkeys(ATTRIBUTES[label], "Seen.")
        assert read(prompt, label) == "cannot_determine"


def mutations(count):
    """Golden answers with pieces cut, doubled, swapped or replaced."""
    chance = random.Random(8)
    seeds = [case[f"{label}_input"] or "" for case in CASES.values() for label in LABELS]
    noise = [
        "{",
        "}",
        '"',
        "'",
        ":",
        ",",
        "\\",
        "\n",
        "\0",
        "é",
        "\ud800",
        "None",
        "null",
        "[",
        "(",
        "lambda: 0",
        "b''",
    ]
    for _ in range(count):
        text = list(chance.choice(seeds) * chance.randint(1, 2))
        for _ in range(chance.randint(1, 8)):
            at = chance.randint(0, len(text))
            if chance.random() < 0.5:
                text[at : at + chance.randint(0, 12)] = []
            else:
                text.insert(at, chance.choice(noise))
        yield "".join(text)


def test_a_thousand_fuzzed_answers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcomes = set()
    for text in mutations(1000):
        for label in LABELS:
            result = read(text, label)
            if isinstance(result, dict):
                assert tuple(result) == ATTRIBUTES[label]
                assert all(value is None or (isinstance(value, str) and value.strip()) for value in result.values())
                json.dumps(result, ensure_ascii=False).encode()
                result = "accepted"
            outcomes.add(result)
    assert {"accepted", "unreadable", "no_answer", "other_label"} <= outcomes
    assert not list(tmp_path.iterdir())


literals = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.fixed_dictionaries({"Answer": literals, "Forgery Attributes": literals}), st.sampled_from([json.dumps, repr]))
def test_any_literal_is_read_without_an_exception(value, spell):
    read(spell(value), "fake")


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_is_read_without_an_exception(text):
    read(text, "real")
    try:
        assert caption_control(text)
    except RejectedAnswer as rejection:
        assert rejection.reason in REASONS
