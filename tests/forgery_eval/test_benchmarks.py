"""Every layout of an evaluation set becomes the same stream of samples."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from forgery_eval.benchmarks import list_passed_over, open_benchmark
from tests.trained import picture

DATA = Path(__file__).parents[1] / "data"
MMFR = DATA / "mmfr" / "evaluation_sets"
AUTHORS = json.loads((DATA / "metrics.json").read_text())["reasoning_dataset"]


def write_images(*files: Path) -> None:
    for number, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(number, (20, 20)).save(file)


@pytest.mark.parametrize("path", [MMFR.parent, MMFR, MMFR / "stablediffusion"], ids=["root", "tree", "set"])
@pytest.mark.parametrize("most", [None, 2])
def test_mmfr_is_read_as_the_authors_read_it(path, most):
    wanted = AUTHORS[f"max_sample_{most}_seed0"]
    samples = open_benchmark(path, max_sample=most)
    for label, name in enumerate(("real", "fake")):
        own = [sample for sample in samples if sample.label == label]
        found = [{"img_path": f"evaluation_sets/{s.id}", "reasoning": s.reference, "label": s.label} for s in own]
        assert found == wanted[name]
    assert {sample.set for sample in samples} == {"stablediffusion"}
    assert all(sample.image.is_file() for sample in samples)


def test_mmfr_names_the_attributes_that_have_a_sentence():
    samples = {sample.id: sample for sample in open_benchmark(MMFR)}
    assert set(samples["stablediffusion/1_fake/z.png"].attributes) == {
        "Irregular Image Edges",
        "Anomalous Image Texture",
        "Semantic Irrationality",
    }
    assert samples["stablediffusion/1_fake/y.png"].attributes == ()


def test_mmfr_counts_missing_images_and_takes_unnamed_ones(tmp_path):
    shutil.copytree(MMFR, tmp_path / "sets")
    (tmp_path / "sets/stablediffusion/0_real/a.png").unlink()
    write_images(tmp_path / "sets/stablediffusion/1_fake/more.jpg", tmp_path / "sets/other/0_real/o.png")
    samples = {sample.id: sample for sample in open_benchmark(tmp_path / "sets")}
    assert not samples["stablediffusion/0_real/a.png"].image.exists()
    assert samples["stablediffusion/1_fake/more.jpg"].reference is None
    assert [s.id for s in open_benchmark(tmp_path / "sets", sets=["other"])] == ["other/0_real/o.png"]
    with pytest.raises(ValueError, match=r"no set flux; it has other, stablediffusion"):
        open_benchmark(tmp_path / "sets", sets=["flux"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "object"),
        ('{"s/2_other/a.png": {}}', "is no image of"),
        ('{"s/0_real/../../x.png": {}}', "is no image of"),
        ('{"s/0_real/a.png": {"x": 1}}', "sentences or nulls"),
    ],
)
def test_a_wrong_reasoning_file_is_explained(tmp_path, content, message):
    (tmp_path / "s" / "0_real").mkdir(parents=True)
    (tmp_path / "s" / "s_reasoning.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_benchmark(tmp_path)


def test_the_synthetic_manifest_gives_groups(tmp_path):
    files = [f"evaluation_sets/gan/{name}.png" for name in ("0_real/r", "1_fake/f", "1_fake/g")]
    write_images(*(tmp_path / file for file in files))
    made = [{"strength": None, "generator": None}, {"strength": 1.0, "generator": "gan"}, {"strength": 0.3}]
    entries = [{"image": file, "split_role": "seen", **how} for file, how in zip(files, made, strict=True)]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert [dict(sample.groups) for sample in open_benchmark(tmp_path)] == [
        {"split_role": "seen"},
        {"generator": "gan", "split_role": "seen", "strength": "1"},
        {"split_role": "seen", "strength": "below 0.5"},
    ]


def test_plain_folders(tmp_path):
    names = ("real/a.png", "real/deep/b.JPG", "fake/c.png")
    write_images(*(tmp_path / "one" / name for name in names))
    (tmp_path / "one/real/notes.txt").write_text("no image")
    for path in (tmp_path, tmp_path / "one"):
        samples = open_benchmark(path)
        assert [(s.id, s.label, s.set) for s in samples] == [
            ("one/real/a.png", 0, "one"),
            ("one/real/deep/b.JPG", 0, "one"),
            ("one/fake/c.png", 1, "one"),
        ]
        assert samples[1].groups == {"folder": "deep"}


def test_manifests_of_both_kinds_say_the_same(tmp_path):
    (tmp_path / "d.csv").write_text(
        "image,label,set,reference,attributes,camera\n"
        'a.png,real,x,"all, well",High Image Quality;Semantic Rationality,old\nb.png,1,,,,\n'
    )
    rows = [
        {
            "image": "a.png",
            "label": 0,
            "set": "x",
            "reference": "all, well",
            "attributes": ["High Image Quality", "Semantic Rationality"],
            "camera": "old",
        },
        {"image": "b.png", "label": "Fake"},
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    first, second = open_benchmark(tmp_path / "d.csv"), open_benchmark(tmp_path / "d.jsonl")
    assert first == second
    assert first[0].groups == {"camera": "old"} and first[1].set == "d" and first[1].attributes is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", "image,label\na.png,maybe\n", "line 2: the label must be"),
        ("d.csv", "image,label\na.png,0,1\n", "more values than columns"),
        ("d.csv", "thing,label\na.png,0\n", "needs the column image .*it has thing, label"),
        ("d.jsonl", '{"image": "a", "label": 1}\n{"image"', "line 2: this is not JSON"),
        ("d.jsonl", "[]\n", "no object"),
        ("d.jsonl", '{"image": "a", "label": 1}\n{"image": "a", "label": 0}\n', "more than once"),
        ("d.csv", "image,label\n", "holds no image"),
        ("d.txt", "", "no data set of a known layout"),
    ],
)
def test_wrong_data_are_explained(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        open_benchmark(tmp_path / name)


def test_an_absent_path_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        open_benchmark(tmp_path / "nowhere")


@pytest.mark.parametrize("names", [("real", "fake"), ("0_real", "1_fake")])
@pytest.mark.parametrize("inside", ["", "one"])
def test_what_is_no_image_among_the_images_is_listed(tmp_path, names, inside):
    root = tmp_path / inside
    for name in names:
        (root / name / "deep").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(root / name / "a.png")
    for name in ("clip.mp4", "deep/paper.PDF", ".hidden.pdf", "Thumbs.db"):
        (root / names[1] / name).write_bytes(b"x")
    (tmp_path / "README.md").write_text("of the data set")
    assert len(open_benchmark(tmp_path)) == 2
    assert list_passed_over(tmp_path) == [root / names[1] / "clip.mp4", root / names[1] / "deep" / "paper.PDF"]
    (tmp_path / "t.csv").write_text("image,label\na.png,real\n")
    assert list_passed_over(tmp_path / "t.csv") == []
