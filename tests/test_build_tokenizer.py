"""A tokenizer of one's own: any text is decoded exactly, and verdicts are found wherever they occur."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava.constants import IGNORE_INDEX
from llava.conversation import conv_templates
from llava.data.prompting import fill_template, tokenize_conversation
from llava.data.records import Record, read_records
from llava.demo.tokenizer import SPECIAL_TOKENS, build_parser, constant_texts, main, measure, run, train_tokenizer
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_tokenizer
from llava.model.verdict import VerdictTokens
from llava.systems.fakereasoning.answer import (
    ATTRIBUTES,
    FORCED_SUMMARY,
    QUESTION,
    SUMMARY,
    VERDICT_PREFIX,
    VERDICT_WORDS,
    complete_to_verdict,
    write_answer,
    write_reasoning,
)

CAPTIONS = ("The image shows two red cars on a street.", "The image shows one green house, lit from the left.")
ANSWERS = [
    write_answer(label, caption=caption, reasoning=write_reasoning(label, {name: "The light falls well on it."}))
    for label, names in ATTRIBUTES.items()
    for name in names
    for caption in CAPTIONS
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tokenizer")
    turns = [
        [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": answer}] for answer in ANSWERS
    ]
    rows = [{"image": "a.png", "conversations": pair} for pair in turns]
    (place / "train.json").write_text(json.dumps(rows))
    run(build_parser().parse_args([str(place / "train.json"), "--output-dir", str(place / "own")]))
    return place


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder / "own")


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


plain = st.text(st.characters(codec="utf-8"))
pieces = st.one_of(plain, st.sampled_from([*constant_texts(), *ANSWERS, " ", "\n", "\n\n", "  ", "<", "</", ">", "\t"]))
written = st.lists(pieces, max_size=6).map("".join)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=written.filter(lambda text: not any(token in text for token in SPECIAL_TOKENS.values())))
def test_any_text_is_decoded_exactly(tokenizer, text):
    assert tokenizer.decode(encode(tokenizer, text)) == text
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(question=written, answer=written, version=st.sampled_from(sorted(conv_templates)))
def test_exactly_the_answer_is_supervised(tokenizer, question, answer, version):
    if any(token in question + answer for token in (*SPECIAL_TOKENS.values(), "<image>")):
        return
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    tokenized = tokenize_conversation(fill_template(turns, conv_templates[version]), tokenizer)
    labels = [label for label in tokenized.labels if label != IGNORE_INDEX]
    assert tokenizer.decode(labels) == f" {answer}{conv_templates[version].sep2}"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=written, word=st.sampled_from(VERDICT_WORDS))
def test_a_verdict_is_found_wherever_it_stands(tokenizer, before, word):
    found = VerdictTokens.from_tokenizer(tokenizer, VERDICT_PREFIX, VERDICT_WORDS)
    ids = encode(tokenizer, f"{before}{VERDICT_PREFIX} {word}. </CONCLUSION></s>")
    place = max(i for i in range(len(ids)) if tuple(ids[i : i + len(found.pattern)]) == found.pattern)
    assert ids[place + len(found.pattern)] == (found.real if word == "real" else found.fake)
    assert tokenizer.decode(ids[place + len(found.pattern) :]) == f" {word}. </CONCLUSION></s>"


def test_the_pattern_stands_only_in_a_conclusion(tokenizer):
    pattern = VerdictTokens.from_tokenizer(tokenizer, VERDICT_PREFIX, VERDICT_WORDS).pattern
    assert tokenizer.decode(list(pattern)) == VERDICT_PREFIX[1:]
    for text in (
        f" {FORCED_SUMMARY}",
        " <CAPTION> This image is real",
        "</CONCLUSION> This image",
        "this image is fake",
    ):
        ids = encode(tokenizer, text)
        assert all(tuple(ids[i : i + len(pattern)]) != pattern for i in range(len(ids)))


@pytest.mark.parametrize("answer", [ANSWERS[0], FORCED_SUMMARY, "", ANSWERS[3].split(" </REASONING>")[0], "It is odd."])
@pytest.mark.parametrize("version", sorted(conv_templates))
def test_answers_brought_to_the_verdict_end_in_the_pattern(tokenizer, answer, version):
    conversation = conv_templates[version].copy()
    conversation.append_message(conversation.roles[0], f"<image>\n{QUESTION}")
    conversation.append_message(conversation.roles[1], None)
    found = VerdictTokens.from_tokenizer(tokenizer, VERDICT_PREFIX, VERDICT_WORDS)
    ids = tokenizer_image_token(f"{conversation.get_prompt()} {complete_to_verdict(answer)}", tokenizer)
    assert tuple(ids[-len(found.pattern) :]) == found.pattern


def test_constant_texts_are_one_token_and_samples_short(tokenizer, folder):
    for text in constant_texts():
        assert len(encode(tokenizer, text)) == 1, text
    records = read_records([folder / "train.json"])
    counts = measure(records, tokenizer)
    assert max(counts) < 50
    first = records[0]
    conversation = fill_template(first.turns, conv_templates["v1"])
    assert counts[0] == len(tokenize_conversation(conversation, tokenizer).input_ids) - 1
    text_only = Record(None, ({"from": "human", "value": QUESTION}, first.turns[1]), "x")
    assert measure([text_only], tokenizer)[0] == counts[0] - 1  # the line break after the image


def test_a_prompt_begins_once_and_ends_with_the_closing_mark(tokenizer):
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id] == [
        0,
        1,
        2,
        3,
    ]
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": ANSWERS[0]}]
    ids = tokenize_conversation(fill_template(turns, conv_templates["llava_v1"]), tokenizer).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in ids


def test_texts_without_a_verdict_still_give_one_a_spelling():
    own = train_tokenizer(["Nothing of the kind stands here."] * 3, 600)
    found = VerdictTokens.from_tokenizer(own, VERDICT_PREFIX, VERDICT_WORDS)
    assert [own.decode([index]) for index in (found.real, found.fake)] == [" real", " fake"]


def test_the_vocabulary_keeps_within_its_size(folder):
    texts = [f"word{number} other{number % 7}" for number in range(3000)] * 2
    assert len(train_tokenizer(texts, 400)) == 400
    assert SUMMARY not in constant_texts() and f" {SUMMARY}" in constant_texts()
    with pytest.raises(ValueError, match="--vocab_size must be above"):
        train_tokenizer(texts, 200)


def test_wrong_input_is_explained_and_leaves_nothing(folder, tmp_path, capsys):
    train = str(folder / "train.json")
    for arguments, message in (
        ([str(tmp_path / "absent.json"), "--output_dir", str(tmp_path / "own")], "no data file"),
        ([train, "--output_dir", str(tmp_path / "own"), "--vocab_size", "10"], "--vocab_size must be above"),
        ([train, "--output_dir", str(folder / "own")], "exists and is not empty"),
    ):
        assert main(arguments) == 1
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
