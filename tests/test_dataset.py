"""From records to samples, and what is refused before any weight is read."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.data.checks import check_records
from llava.data.collator import collate
from llava.data.dataset import SupervisedDataset, shorten_answers
from llava.data.prompting import (
    encode_together,
    fill_template,
    fitting_length,
    label_answers,
    tokenize_conversation,
)
from llava.data.records import Record, read_records
from llava.errors import DataError
from llava.model.builder import load_tokenizer
from llava.systems.fakereasoning.answer import FORMAT, QUESTION, parse_answer, write_answer
from tests.conftest import GOLDENS

IMAGES = GOLDENS / "images"
PATCHES = 25
V1 = conv_templates["v1"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(GOLDENS / "base")


@pytest.fixture
def mixed():
    return read_records([GOLDENS / "train_mixed.json"])


@pytest.fixture
def dataset_of(bundled):
    tokenizer, model, processor, max_length = bundled.base

    def build(records, **changes):
        options = {
            "image_folder": IMAGES,
            "tokenizer": tokenizer,
            "template": V1,
            "model_config": model.config,
            "image_processor": processor,
            "placeholder_tokens": {IMAGE_TOKEN_INDEX: PATCHES},
            "answer_format": FORMAT,
            "max_length": max_length,
        }
        return SupervisedDataset(records, **{**options, **changes})

    return build


@pytest.fixture
def check(tokenizer):
    def run(records, **changes):
        options = {
            "tokenizer": tokenizer,
            "template": V1,
            "max_length": 2048,
            "placeholder_tokens": {IMAGE_TOKEN_INDEX: PATCHES},
            "answer_format": FORMAT,
            "image_folder": IMAGES,
            "drop_invalid": False,
        }
        return check_records(records, **{**options, **changes})

    return run


def a_record(answer, question="<image>\nWell?", image="img0.png", origin="x.json, row 1"):
    return Record(image, ({"from": "human", "value": question}, {"from": "gpt", "value": answer}), origin)


def numbered(records):
    return [replace(record, origin=f"x.json, row {number}") for number, record in enumerate(records, start=1)]


FAKE = a_record(write_answer("fake", form="verdict"))
REAL = a_record(write_answer("real", form="verdict"), image="img1.png")


@pytest.mark.parametrize(("file", "rows", "prefix"), [("train", (0, 1, 2), "train"), ("train_mixed", (1, 3), "mixed")])
def test_batches_are_the_authors(bundled, dataset_of, file, rows, prefix):
    dataset = dataset_of(read_records([GOLDENS / f"{file}.json"]))
    batch = collate([dataset[row] for row in rows], bundled.base[0].pad_token_id, 2048)
    for name in ("input_ids", "labels", "attention_mask", "forgery_labels"):
        assert torch.equal(batch[name].long(), bundled.tensors[f"{prefix}/{name}"].long()), name
    assert torch.allclose(batch["images"], bundled.tensors[f"{prefix}/images"], atol=1e-6, rtol=0)


def test_a_batch_of_texts_alone_has_pixels_for_the_towers(bundled, dataset_of, mixed):
    dataset = dataset_of(mixed)
    batch = collate([dataset[3], dataset[4]], bundled.base[0].pad_token_id, 2048)
    assert batch["images"].shape == (2, 3, 70, 70) and not batch["images"].any()
    assert sorted(batch) == sorted(bundled.fact("mixed_textonly_first"))
    with torch.no_grad():
        assert bundled.base[1](**batch).loss.isfinite()


def test_lengths_are_the_authors(bundled, dataset_of, mixed):
    dataset = dataset_of(mixed)
    assert dataset.modality_lengths == bundled.fact("mixed_modality_lengths")
    assert dataset.lengths == bundled.fact("mixed_lengths")
    train = dataset_of(read_records([GOLDENS / "train.json"]))
    assert train.modality_lengths == bundled.fact("train_modality_lengths")
    assert [len(train[row].input_ids) for row in range(len(train))] == bundled.fact("train_lengths")


def test_what_is_supervised_is_what_the_authors_supervise(bundled, dataset_of):
    tokenizer = bundled.base[0]
    dataset = dataset_of(read_records([GOLDENS / "train.json"]))
    for row, text in enumerate(bundled.fact("train_label_texts")):
        labels = dataset[row].labels
        assert tokenizer.decode(labels[labels != IGNORE_INDEX]) == text


@pytest.mark.parametrize("row", [4, 5])
def test_both_turns_are_supervised(bundled, dataset_of, mixed, row):
    """The authors' ids; their mask went wrong here, so both answers are compared as texts."""
    expected = bundled.fact("two_turn", "text_only" if row == 4 else "with_image")
    sample = dataset_of(mixed)[row]
    assert sample.input_ids.tolist() == expected["input_ids"]
    assert sample.forgery_label == expected["forgery_label"]
    said = bundled.base[0].decode(sample.labels[sample.labels != IGNORE_INDEX])
    assert said == "<CONCLUSION> This image is real. </CONCLUSION></s> The texture is natural.</s>"


@pytest.mark.parametrize("row", [4, 5])
def test_the_masks_of_both_turns_are_the_authors(bundled, dataset_of, mixed, row):
    """With the older way to tokenise, in which the authors' mask of two turns is right."""
    expected = bundled.fact("two_turn", "text_only_legacy_true" if row == 4 else "with_image_legacy_true")
    older = AutoTokenizer.from_pretrained(GOLDENS / "base", legacy=True)
    sample = dataset_of(mixed, tokenizer=older)[row]
    assert sample.input_ids.tolist() == expected["input_ids"]
    assert sample.labels.tolist() == expected["labels"]


def test_workers_read_what_the_main_process_reads(bundled, dataset_of, mixed):
    def make_batch(samples):
        return collate(samples, bundled.base[0].pad_token_id, 2048)

    dataset = dataset_of(mixed, verdict_only_share=0.5)
    here, there = (
        list(DataLoader(dataset, batch_size=3, num_workers=workers, collate_fn=make_batch)) for workers in (0, 2)
    )
    for one, other in zip(here, there, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_sample_is_cut_after_its_image_was_put_in(bundled, dataset_of):
    records = read_records([GOLDENS / "train.json"])
    whole, cut = dataset_of(records), dataset_of(records, max_length=150)
    for row in range(3):
        kept = min(len(whole[row].input_ids), 150 - (PATCHES - 1))
        assert torch.equal(cut[row].input_ids, whole[row].input_ids[:kept])
        assert torch.equal(cut[row].labels, whole[row].labels[:kept])
    batch = collate([cut[row] for row in range(3)], 0, 150)
    spliced = bundled.base[1].prepare_inputs_labels_for_multimodal(
        batch["input_ids"], batch["images"], attention_mask=batch["attention_mask"], labels=batch["labels"]
    )
    assert torch.equal(spliced.labels, bundled.tensors["train_trunc150/exp_labels"])


@pytest.mark.parametrize(
    ("ids", "most", "kept"),
    [
        ([1, 2, 3], 3, 3),
        ([1, 2, 3], 2, 2),
        ([1, IMAGE_TOKEN_INDEX, 2, 3], 7, 3),
        ([1, IMAGE_TOKEN_INDEX, 2, 3], 8, 4),
        ([1, IMAGE_TOKEN_INDEX, 2, 3], 5, 1),
        ([1, IMAGE_TOKEN_INDEX, 2, IMAGE_TOKEN_INDEX, 3], 12, 4),
        ([1], 0, 0),
    ],
)
def test_what_fits(ids, most, kept):
    assert fitting_length(ids, {IMAGE_TOKEN_INDEX: 5}, most) == kept


texts = st.text(st.characters(codec="utf-8", exclude_characters="<>"), min_size=1).filter(str.strip)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=3), with_image=st.booleans())
def test_exactly_what_the_assistant_says_is_supervised(tokenizer, pairs, with_image):
    turns = [
        {"from": speaker, "value": text} for pair in pairs for speaker, text in zip(("human", "gpt"), pair, strict=True)
    ]
    if with_image:
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    conversation = fill_template(turns, V1)
    tokenized = tokenize_conversation(conversation, tokenizer)
    starts = [0, *(i + 1 for i, label in enumerate(tokenized.labels) if label == tokenizer.eos_token_id)]
    for start, stop, (_, answer) in zip(starts, starts[1:], pairs, strict=False):
        said = [label for label in tokenized.labels[start:stop] if label != IGNORE_INDEX]
        expected = tokenizer(f"x: {answer}</s>", add_special_tokens=False).input_ids
        assert said == expected[len(tokenizer("x:", add_special_tokens=False).input_ids) :]
    assert len(starts) == len(pairs) + 1
    together = encode_together([conversation, fill_template(turns[:2], V1)], tokenizer)
    assert label_answers(conversation, together) == tokenized


def test_an_image_that_cannot_be_read_is_named(dataset_of, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    dataset = dataset_of([a_record("x", image="a.png", origin="train.json, row 9")], image_folder=tmp_path)
    with pytest.raises(DataError, match=r"train\.json, row 9: .*a\.png: no image in"):
        dataset[0]


def test_paths_may_be_complete(dataset_of):
    complete = replace(FAKE, image=str(IMAGES / "img0.png"))
    assert torch.equal(dataset_of([complete], image_folder=None)[0].image, dataset_of([FAKE])[0].image)


def test_a_share_of_the_answers_is_only_the_verdict(dataset_of):
    long = write_answer("fake", caption="A car.", reasoning="Low Image Quality: it is so.")
    records = numbered([replace(a_record(long), image=f"{number}.png") for number in range(200)])
    dataset = dataset_of(records, verdict_only_share=0.3, seed=4)
    short = [record.origin for record in dataset.records if record.turns[1]["value"] == FAKE.turns[1]["value"]]
    assert len(short) == 60
    assert all(a.turns[0] == b.turns[0] for a, b in zip(records, dataset.records, strict=True))
    assert all(record.forgery_label(FORMAT) == 1 for record in dataset.records)
    again = [r.origin for r in shorten_answers(records, FORMAT, 0.3, 4) if r.turns[1]["value"] != long]
    assert again == short
    assert short != [r.origin for r in shorten_answers(records, FORMAT, 0.3, 5) if r.turns[1]["value"] != long]
    plain = dataset_of(records)
    assert plain.records == records
    assert sum(dataset.lengths) < sum(plain.lengths)


def test_only_the_answer_with_the_verdict_is_shortened(mixed):
    shortened = shorten_answers(mixed, FORMAT, 1.0, 0)
    assert [parse_answer(record.turns[1]["value"]).stages.keys() for record in shortened[:3]] == [{"CONCLUSION"}] * 3
    assert shortened[4].turns[2:] == mixed[4].turns[2:]
    assert shortened[6] == mixed[6]
    assert shorten_answers(mixed, FORMAT, 0.0, 0) == mixed
    for share in (-0.1, 1.1):
        with pytest.raises(ValueError, match="verdict_only_share"):
            shorten_answers(mixed, FORMAT, share, 0)


def test_good_records_pass(check, mixed):
    assert check(mixed[:6]) == mixed[:6]
    assert check(mixed[:6], drop_invalid=True) == mixed[:6]


def test_a_row_without_a_verdict_stops_or_is_dropped(check, mixed, caplog):
    with pytest.raises(DataError, match=r"^1 of 7 records .*--drop_invalid.*row 7: there is no <CONCLUSION>"):
        check(mixed)
    with caplog.at_level(logging.WARNING):
        assert check(mixed, drop_invalid=True) == mixed[:6]
    assert "dropped 1 of 7 records" in caplog.text and "row 7" in caplog.text


INVALID = {
    "no verdict": (a_record("It is fake."), "there is no <CONCLUSION>"),
    "another verdict": (a_record("<CONCLUSION> This image is odd. </CONCLUSION>"), "neither"),
    "unlike spelling": (a_record("<CONCLUSION>\nThis image is fake.\n</CONCLUSION>"), "does not spell its verdict"),
    "missing image": (replace(FAKE, image="img9.png"), "no image .*img9.png"),
    "name that no disk takes": (replace(FAKE, image=f"{'n' * 5000}.png"), "no image .*nnn.png"),
    "image is a folder": (replace(FAKE, image="../images"), "no image"),
    "cut verdict": (
        a_record(f"<CAPTION> {'long ' * 60}</CAPTION>\n\n{FAKE.turns[1]['value']}"),
        "is token 2[0-9][0-9]",
    ),
    "cut answer": (
        a_record(FAKE.turns[1]["value"], question=f"<image>\n{'why ' * 200}"),
        "no word of its answer lies within",
    ),
}


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_record_stops_or_is_dropped(check, name, caplog):
    wrong, why = INVALID[name]
    records = numbered([FAKE, wrong, REAL])
    with pytest.raises(DataError, match=rf"1 of 3 records.*x\.json, row 2: .*{why}"):
        check(records, max_length=200)
    assert check(records, max_length=200, drop_invalid=True) == [records[0], records[2]]
    assert "dropped 1 of 3" in caplog.text


def test_the_verdict_may_be_the_last_token_that_fits(check, tokenizer):
    tokenized = tokenize_conversation(fill_template(FAKE.turns, V1), tokenizer)
    fake = tokenizer(" fake", add_special_tokens=False).input_ids[-1]
    needed = tokenized.labels.index(fake) + 1 + PATCHES - 1
    assert check([FAKE], max_length=needed) == [FAKE]
    with pytest.raises(DataError, match=f"is token {needed}, but all after {needed - 1}"):
        check([FAKE], max_length=needed - 1)


def test_many_are_counted_and_the_first_are_named(check):
    with pytest.raises(DataError, match="12 of 13 records") as caught:
        check(numbered([FAKE, *[a_record("no")] * 12]))
    assert "row 6" in str(caught.value) and "row 7" not in str(caught.value) and "and 7 more" in str(caught.value)
    with pytest.raises(DataError, match="none of the 12 records"):
        check(numbered([a_record("no")] * 12), drop_invalid=True)


def test_a_data_set_without_images_is_refused(check):
    text = a_record(REAL.turns[1]["value"], question="Well?", image=None)
    with pytest.raises(DataError, match="none of the 1 records has an image"):
        check([text])
    assert check(numbered([text, FAKE])) == numbered([text, FAKE])
    with pytest.raises(DataError, match="none of the 1 records has an image"):
        check(numbered([text, replace(FAKE, image="img9.png")]), drop_invalid=True)


@pytest.mark.parametrize("name", ["IMG0.PNG", "..\\images\\img0.png", " img0.png ", (IMAGES / "img0.png").as_uri()])
def test_images_are_found_under_another_spelling(check, dataset_of, mixed, name, capsys):
    (found, other) = check([replace(mixed[0], image=name), mixed[1]])
    assert Path(found.image).resolve() == (IMAGES / "img0.png").resolve() and other == mixed[1]
    assert "1 names were found under another spelling" in capsys.readouterr().err
    assert torch.equal(dataset_of([found])[0].image, dataset_of([mixed[0]])[0].image)


def test_a_missing_folder_is_named(check):
    with pytest.raises(DataError, match="no image folder /absent"):
        check([FAKE], image_folder=Path("/absent"))


def test_a_tokenizer_that_joins_across_turns_is_refused(check, tokenizer):
    class Joining:
        """Makes other pieces of a question's end where an answer follows."""

        bos_token_id = tokenizer.bos_token_id

        def __call__(self, texts, **options):
            one = isinstance(texts, str)
            joined = [text.replace("ASSISTANT: <", "ASSISTANT~<") for text in ([texts] if one else texts)]
            return tokenizer(joined[0] if one else joined, **options)

    with pytest.raises(DataError, match="row 1: the tokenizer joins text"):
        check([FAKE], tokenizer=Joining())


def test_more_records_than_are_tokenized_together(check, monkeypatch):
    monkeypatch.setattr("llava.data.checks.TOKENIZED_TOGETHER", 4)
    records = numbered([FAKE, REAL, a_record("no")] * 5)
    assert check(records, drop_invalid=True) == [record for record in records if record.forgery_label(FORMAT) >= 0]


def test_the_question_of_the_data_is_read_as_published(tokenizer):
    behind = a_record("x", question=f"{QUESTION}\n<image>")
    before = a_record("x", question=f"<image>\n{QUESTION}")
    ids = [tokenize_conversation(fill_template(record.turns, V1), tokenizer).input_ids for record in (behind, before)]
    assert ids[0] == ids[1]
    assert ids[0].count(IMAGE_TOKEN_INDEX) == 1
