"""Trees by generator, and what the list of data sets says."""

from pathlib import Path

import pytest
from PIL import Image

from forgery_eval.benchmarks import describe_layouts, open_benchmark
from forgery_eval.eval import parse_arguments


def write(root: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (seed, 0, 0)).save(root / name)
    return root


def rows(root: Path) -> list[tuple]:
    return [(sample.set, sample.label, dict(sample.groups), sample.image.name) for sample in open_benchmark(root)]


def test_genimage_is_read_by_generator_without_its_training_images(tmp_path):
    write(tmp_path, "sdv4/train/ai/a.png", "sdv4/train/nature/b.png", "sdv4/val/ai/c.png", "sdv4/val/nature/d.png")
    write(tmp_path, "glide/imagenet_glide/val/ai/e.png", "glide/imagenet_glide/val/nature/f.png")
    assert rows(tmp_path) == [
        ("glide", 0, {"split": "val", "category": "imagenet_glide"}, "f.png"),
        ("glide", 1, {"split": "val", "category": "imagenet_glide"}, "e.png"),
        ("sdv4", 0, {"split": "val"}, "d.png"),
        ("sdv4", 1, {"split": "val"}, "c.png"),
    ]
    assert [row[0] for row in rows(tmp_path / "sdv4")] == ["sdv4", "sdv4"]
    assert [row[2] for row in rows(tmp_path / "sdv4" / "train")] == [{}, {}]


def test_forensynths_mixes_generators_with_and_without_categories(tmp_path):
    write(tmp_path, "progan/cat/0_real/a.png", "progan/cat/1_fake/b.png", "progan/dog/1_fake/c.png")
    write(tmp_path, "crn/0_real/d.png", "crn/1_fake/e.png")
    found = rows(tmp_path)
    assert [row[:3] for row in found] == [
        ("crn", 0, {}),
        ("crn", 1, {}),
        ("progan", 0, {"category": "cat"}),
        ("progan", 1, {"category": "cat"}),
        ("progan", 1, {"category": "dog"}),
    ]
    assert len({sample.id for sample in open_benchmark(tmp_path)}) == 5


def test_training_images_alone_are_evaluated(tmp_path):
    write(tmp_path, "g/train/real/a.png", "g/train/fake/b.png")
    assert [row[:3] for row in rows(tmp_path)] == [("g", 0, {"split": "train"}), ("g", 1, {"split": "train"})]


def test_other_layouts_stay_what_they_were(tmp_path):
    plain = write(tmp_path / "plain", "a/real/x.png", "a/fake/y.png")
    assert [row[:3] for row in rows(plain)] == [("a", 0, {}), ("a", 1, {})]
    sets = write(tmp_path / "mmfr", "evaluation_sets/flux/0_real/x.png", "evaluation_sets/flux/1_fake/y.png")
    assert [row[:3] for row in rows(sets)] == [("flux", 0, {}), ("flux", 1, {})]


def test_the_list_of_data_sets_names_each_layout(capsys):
    with pytest.raises(SystemExit) as end:
        parse_arguments(["--list-benchmarks"])
    printed = capsys.readouterr().out
    assert end.value.code == 0 and printed.strip() == describe_layouts()
    assert "0_real" in printed and "nature" in printed and "data_json" in printed and len(printed.splitlines()) == 10
