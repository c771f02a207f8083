"""FakeClue, LOKI and DD-VQA in their public layouts, whole and broken."""

import json
import shutil
from pathlib import Path

import pytest

from forgery_eval.benchmarks import open_benchmark
from llava.errors import DataError
from llava.labels import FAKE, REAL

TREES = Path(__file__).parents[1] / "data" / "goldens_fakevlm"
FAKECLUE, LOKI, DDVQA = TREES / "fakeclue", TREES / "loki", TREES / "ddvqa"
LOKI_LIST = Path("data/image/image_tf_0922.json")
DEEPFAKES = Path("DQ_FF++/test_set/Deepfakes/Deepfakes.json")


def copied(tree: Path, target: Path) -> Path:
    shutil.copytree(tree, target / tree.name)
    return target / tree.name


def changed(tree: Path, file: Path | str, change) -> Path:
    """The tree with another content of one of its lists."""
    content = json.loads((tree / file).read_text())
    (tree / file).write_text(json.dumps(change(content) or content))
    return tree


# --- FakeClue


@pytest.mark.parametrize("path", [FAKECLUE, FAKECLUE / "data_json" / "test.json"], ids=["folder", "list"])
def test_fakeclue_is_turned_round_and_grouped(path):
    samples = open_benchmark(path)
    rows = json.loads((FAKECLUE / "data_json/test.json").read_text())
    assert [sample.label for sample in samples] == [1 - row["label"] for row in rows]
    assert [sample.groups["category"] for sample in samples] == [row["cate"] for row in rows]
    assert [sample.groups["source"] for sample in samples] == ["doc", "satellite", "ff++"]
    assert {sample.set for sample in samples} == {"fakeclue"}
    assert all(sample.image.is_file() for sample in samples)
    assert samples[2].answers == (rows[2]["conversations"][1]["value"],)
    assert samples[2].reference == "Hair strands end in the air; the pupils have different shapes."


def test_fakeclues_training_split_is_read_by_its_list():
    samples = open_benchmark(FAKECLUE / "data_json" / "train.json")
    assert [sample.id for sample in samples][:1] == ["train/doc/fake/sheet_demo_2/page_0001.png"]
    assert all(sample.image.is_file() for sample in samples)


def test_fakeclue_unpacked_into_a_folder_too_many(tmp_path):
    tree = copied(FAKECLUE, tmp_path)
    (tree / "test").rename(tree / "inner")
    (tree / "test").mkdir()
    (tree / "inner").rename(tree / "test" / "test")
    assert all(sample.image.is_file() for sample in open_benchmark(tree))


def test_a_missing_image_of_fakeclue_is_kept_and_counted(tmp_path):
    tree = copied(FAKECLUE, tmp_path)
    gone = open_benchmark(tree)[1].image
    gone.unlink()
    again = open_benchmark(tree)
    assert len(again) == 3 and again[1].image == gone


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "real"}, r"row 2: label must be 1 \(real\) or 0 \(fake\), not 'real'"),
        ({"label": True}, "row 2: label must be"),
        ({"label": 2}, "row 2: label must be"),
        ({"image": "../secret.png"}, "row 2: image must be a path below test"),
        ({"image": ["a.png", "b.png"]}, "row 2: image must be a path"),
        ({"cate": None}, "row 2: cate must name"),
        ({"conversations": "no"}, "row 2: conversations must be a list"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, "row 2: the answer must be a text"),
    ],
)
def test_a_wrong_row_of_fakeclue_is_named(tmp_path, change, message):
    tree = changed(copied(FAKECLUE, tmp_path), "data_json/test.json", lambda rows: rows[1].update(change))
    with pytest.raises(DataError, match=message):
        open_benchmark(tree)


def test_a_list_of_fakeclue_that_is_none(tmp_path):
    with pytest.raises(DataError, match="must hold a list"):
        open_benchmark(changed(copied(FAKECLUE, tmp_path), "data_json/test.json", lambda rows: {"rows": rows}))
    tree = changed(tmp_path / "fakeclue", "data_json/test.json", lambda _: ["doc/fake/a.png"])
    with pytest.raises(DataError, match="row 1: a row must be an object"):
        open_benchmark(tree)


def test_fakeclue_without_answers_still_has_its_labels(tmp_path):
    tree = changed(
        copied(FAKECLUE, tmp_path), "data_json/test.json", lambda rows: [r.pop("conversations") for r in rows] and rows
    )
    samples = open_benchmark(tree)
    assert [sample.label for sample in samples] == [FAKE, REAL, FAKE]
    assert samples[0].reference is None and samples[0].answers == ()


# --- LOKI


@pytest.mark.parametrize("path", [LOKI, LOKI / LOKI_LIST], ids=["folder", "list"])
def test_each_image_of_loki_is_one_sample(path):
    samples = open_benchmark(path)
    assert [(s.id, s.label) for s in samples] == [("doc/real/paper/en/d_02.png", REAL), ("animal/fake/a_01.png", FAKE)]
    assert [s.groups["category"] for s in samples] == ["doc", "animal"]
    assert all(s.image.is_file() and s.set == "loki" for s in samples)


def test_choices_of_loki_are_read_by_their_letter(tmp_path):
    def ask_by_letters(rows):
        for row in rows:
            row |= {"choices": ["No", "Yes"], "answer": {"No": "A", "Yes": "B"}[row["answer"]]}

    tree = changed(copied(LOKI, tmp_path), LOKI_LIST, ask_by_letters)
    assert [sample.label for sample in open_benchmark(tree)] == [REAL, FAKE]
    changed(tree, LOKI_LIST, lambda rows: rows[0].update(answer="D"))
    with pytest.raises(DataError, match="row 1: the answer 'D' is none of the choices"):
        open_benchmark(tree)


def choose(kind: str, answer: str, *paths: str, **changes) -> dict:
    """A question of LOKI's that asks which of some images is of a class."""
    images = [f"/mnt/FakeImage_dataset/{path}" for path in paths]
    choices = ["The first one.", "The second one.", "The third one."][: len(paths)]
    asked = {"question_type": f"image_{kind}_doc", "metric": "multi-choice", "choices": choices, "answer": answer}
    return {**asked, "image_path": images, **changes}


def test_choices_between_images_of_loki_say_what_each_is(tmp_path):
    real, fake, others = "doc/real/paper/en/d_02.png", "animal/fake/a_01.png", ("doc/b.png", "doc/c.png")
    questions = [
        choose("fake_from_real", "B", real, fake),
        choose("real_from_fake", "A", real, fake),  # the same pair in the other wording
        choose("real_from_fake", "C", fake, others[0], others[1]),
    ]
    samples = open_benchmark(changed(copied(LOKI, tmp_path), LOKI_LIST, lambda rows: rows + questions))
    assert {s.id: s.label for s in samples} == {real: REAL, fake: FAKE, others[0]: FAKE, others[1]: REAL}
    chosen = {s.id: s.chosen_from for s in samples}
    assert chosen == {real: (), fake: ((real,),), others[0]: (), others[1]: ((fake, others[0]),)}
    assert {s.id: s.groups["category"] for s in samples}[others[0]] == "doc"


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (
            choose("fake_from_real", "A", "doc/real/paper/en/d_02.png", "doc/x.png"),
            "is fake, but by .*row 1 it is real",
        ),
        (choose("fake_from_real", "C", "doc/x.png", "doc/y.png"), "the answer 'C' is none of the choices"),
        (choose("fake_from_real", "A", "doc/x.png", "doc/y.png", choices=["Left", "Right"]), "as in 'The first one"),
        (choose("fake_from_real", "The third one.", "doc/x.png", "doc/y.png"), "image 3, but there are 2"),
        (choose("real_from_fake", "A", "doc/x.png"), "must list the images to choose from"),
        (choose("real_from_fake", "A", "doc/x.png", "doc/x.png"), "lists an image twice"),
        (choose("real_from_fake", "A", "doc/x.png", "doc/y.png", image_path="doc/x.png"), "must list the images"),
    ],
)
def test_a_wrong_choice_between_images_of_loki_is_named(tmp_path, question, message):
    tree = changed(copied(LOKI, tmp_path), LOKI_LIST, lambda rows: [*rows, question])
    with pytest.raises(DataError, match=f"row 5: .*{message}"):
        open_benchmark(tree)


def test_open_questions_of_loki_give_the_reference_text(tmp_path, capsys):
    def explain(rows):
        open_question = {"question_type": "image_abnormal_explanation_animal", "choices": [], "question": "Why?"}
        lost = {**open_question, "image_path": "a/FakeImage_dataset/animal/fake/none.png", "answer": "Six legs."}
        found = {**open_question, "image_path": rows[2]["image_path"], "answer": " Its left eye is missing. "}
        select = {**found, "question_type": "image_abnormal_select_animal", "choices": ["Eye", "Ear"], "answer": "A"}
        between = {**select, "question_type": "image_select_animal", "image_path": ["a.png", "b.png"]}
        return [lost, *rows, found, {**found, "answer": "Another text."}, select, between]

    samples = open_benchmark(changed(copied(LOKI, tmp_path), LOKI_LIST, explain))
    assert [sample.reference for sample in samples] == [None, "Its left eye is missing."]
    assert "3 questions do not say" in (said := capsys.readouterr().err)
    assert all(f"row {number}: image_" in said for number in (1, 8, 9))


def test_other_questions_of_loki_are_named_and_left_out(tmp_path, capsys):
    other = {"question_type": "image_abnormal_explanation_animal", "image_path": "a/FakeImage_dataset/x.png"}
    tree = changed(copied(LOKI, tmp_path), LOKI_LIST, lambda rows: [*rows, other])
    assert len(open_benchmark(tree)) == 2
    assert "1 questions do not say" in (said := capsys.readouterr().err)
    assert "row 5: image_abnormal_explanation_animal" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "Yes"}, "row 2: doc/real/paper/en/d_02.png is real, but by .*row 1 it is fake"),
        ({"answer": "Maybe"}, "row 1: the answer must be Yes or No, not 'Maybe'"),
        ({"answer": None}, "row 1: the answer must be Yes or No"),
        ({"image_path": "/elsewhere/d_02.png"}, "row 1: image_path must have a path below FakeImage_dataset"),
        ({"image_path": "/x/FakeImage_dataset/../../d.png"}, "row 1: image_path must have"),
        ({"question_type": 3}, "row 1: question_type must be a text"),
    ],
)
def test_a_wrong_row_of_loki_is_named(tmp_path, change, message):
    tree = changed(copied(LOKI, tmp_path), LOKI_LIST, lambda rows: rows[0].update(change))
    with pytest.raises(DataError, match=message):
        open_benchmark(tree)


# --- DD-VQA


@pytest.mark.parametrize("path", [DDVQA, DDVQA / "DQ_FF++", DDVQA / "DQ_FF++/test_set"], ids=["root", "both", "set"])
def test_ddvqa_gives_a_sample_a_video(path):
    samples = {sample.id: sample for sample in open_benchmark(path)}
    assert {name: sample.label for name, sample in samples.items()} == {"0_901_902": FAKE, "5_903": REAL}
    fake = samples["0_901_902"]
    assert fake.groups == {"method": "Deepfakes"} and fake.set == "ddvqa"
    assert fake.image.name == "0000.png" and fake.image.is_file()
    assert len(fake.answers) == 2 and fake.reference == "Its eyebrows do not match."
    assert fake.questions["Do the person's eyes look real/fake?"][0].startswith("The eyes look fake")


def test_frames_of_ddvqa_by_key_or_missing(tmp_path):
    tree = copied(DDVQA, tmp_path)
    frame = tree / "frames/Deepfakes/901_902/0000.png"
    (tree / "images").mkdir()
    frame.rename(tree / "images/0_901_902.png")
    shutil.rmtree(tree / "frames")
    found = {sample.id: sample.image for sample in open_benchmark(tree)}
    assert found["0_901_902"] == tree / "images/0_901_902.png"
    assert not found["5_903"].exists() and found["5_903"].name == "0000.png"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda videos: {"5_901": videos["0_901_902"]}, "'5_901' is no video of Deepfakes"),
        (lambda videos: {"0_901_902": {"1": videos["0_901_902"]["1"]}}, "has no question '0'"),
        (lambda videos: {"0_901_902": {"0": {"question": "q", "answer": []}}}, "must have questions"),
        (lambda videos: {"0_901_902": {"0": {"question": "q", "answer": "text"}}}, "must have questions"),
        (lambda videos: {"0_901_902": ["q"]}, "must have questions"),
        (lambda videos: [videos], "must hold an object whose keys are videos"),
    ],
)
def test_a_wrong_file_of_ddvqa_is_named(tmp_path, change, message):
    tree = changed(copied(DDVQA, tmp_path), DEEPFAKES, change)
    with pytest.raises(DataError, match=message):
        open_benchmark(tree)


def test_an_unknown_method_of_ddvqa_is_named(tmp_path):
    tree = copied(DDVQA, tmp_path)
    (tree / "DQ_FF++/test_set/Other").mkdir()
    (tree / "DQ_FF++/test_set/Other/Other.json").write_text("{}")
    with pytest.raises(DataError, match="unknown method; known: Deepfakes"):
        open_benchmark(tree)
