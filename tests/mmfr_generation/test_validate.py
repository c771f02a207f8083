"""Each fault is found, and sound data has none."""

import json
import shutil

import pytest
from PIL import Image

from llava.systems.fakereasoning.answer import QUESTION, write_answer
from mmfr_generation.build_cot import training_record
from mmfr_generation.images import hamming_distances, perceptual_hash
from mmfr_generation.validate import main
from tests.mmfr_generation.annotation_helpers import noise_image


def record(image, label="fake", **more):
    names = {"fake": "Low Image Quality", "real": "High Image Quality"}
    return {**training_record(image, label, reasoning={names[label]: "It is so."}, form="reasoning"), **more}


def talk(*turns):
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(turns)]


ASKED = f"<image>\n{QUESTION}"


@pytest.fixture
def check(tmp_path, capsys):
    def run(records, *more, expect):
        path = tmp_path / "train.json"
        path.write_text(json.dumps(records))
        status = main(
            [str(path), "--image_folder", str(tmp_path / "photos"), "--report", str(tmp_path / "r.json"), *more]
        )
        found = json.loads((tmp_path / "r.json").read_text())
        assert status == (1 if found["faults"] else 0)
        assert {name: len(places) for name, places in found["found"].items()} == expect, found
        return capsys.readouterr().out

    return run


def test_sound_data_has_no_fault(check, make_images):
    make_images(["a.png", "real/b.png", "1_fake/c.png", "laion/0/d.jpg"])
    records = [record("a.png"), record("real/b.png", "real"), record("1_fake/c.png"), record("laion/0/d.jpg", "real")]
    assert "faults: 0" in check(records, expect={})


FAULTS = [
    ("text", {"schema": 1}),
    ({"image": 3, "conversations": talk(ASKED, "x")}, {"schema": 1}),
    ({"image": "a.png"}, {"schema": 1}),
    ({"image": "a.png", "conversations": []}, {"schema": 1}),
    ({"image": "a.png", "conversations": talk(ASKED)}, {"schema": 1}),
    ({"image": "a.png", "conversations": list(reversed(talk(ASKED, "x")))}, {"schema": 1}),
    ({"image": "a.png", "conversations": talk(ASKED, " ")}, {"schema": 1}),
    ({"image": "a.png", "conversations": talk(QUESTION, write_answer("fake", form="verdict"))}, {"image mark": 1}),
    (
        {"image": "a.png", "conversations": talk(ASKED + "<image>", write_answer("fake", form="verdict"))},
        {"image mark": 1},
    ),
    (
        {"image": "a.png", "conversations": talk(ASKED, write_answer("fake", form="verdict"), "<image>", "y")},
        {"image mark": 1},
    ),
    ({"image": "a.png", "conversations": talk(ASKED, "This image is fake.")}, {"verdict": 1}),
    ({"conversations": talk("Hello", "Hello")}, {"no image": 1, "verdict": 1}),
    ({"conversations": talk("Hello", write_answer("real", form="verdict"))}, {"no image": 1}),
    ({"conversations": talk("<image>", "Hello")}, {"image mark": 1}),
    (record("../lost.png"), {"missing image": 1}),
    (record("lost.png"), {"missing image": 1}),
    (record("torn.png"), {"unreadable image": 1}),
    (record("0_real/b.png"), {"folder": 1}),
    (record("diffusiondb/c.png", "real"), {"folder": 1}),
]


@pytest.mark.parametrize(("entry", "expect"), FAULTS)
def test_each_fault_is_found(entry, expect, check, make_images):
    root = make_images(["a.png", "0_real/b.png", "diffusiondb/c.png", "torn.png"])
    (root / "torn.png").write_bytes((root / "torn.png").read_bytes()[:-60])
    check([entry], expect=expect)


def test_attributes_of_the_other_class_are_found(check, make_images):
    make_images(["a.png"])
    answer = write_answer("real", reasoning="Low Image Quality: It is soft.", form="reasoning")
    check([{"image": "a.png", "conversations": talk(ASKED, answer)}], expect={"attributes": 1})


def test_duplicates_by_path_bytes_and_looks(check, make_images):
    root = make_images(["a.png", "b.png"])
    shutil.copy(root / "a.png", root / "same bytes.png")
    noise_image(1).resize((128, 96)).save(root / "b larger.jpg", quality=60)
    names = ["a.png", "a.png", "same bytes.png", "b.png", "b larger.jpg"]
    told = check([record(name) for name in names], expect={"duplicate": 2, "similar": 1})
    assert "same bytes.png has the same bytes as a.png" in told


def evaluation_set(root, real, fake, reasoning=None):
    for folder, seeds, suffix in (("0_real", real, "jpg"), ("1_fake", fake, "png")):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for seed in seeds:
            noise_image(seed).save(root / folder / f"{seed}.{suffix}")
    (root / f"{root.name}_reasoning.json").write_text(json.dumps(reasoning or {}))
    return root


def test_leakage_by_bytes_and_by_looks(check, make_images, tmp_path):
    root = make_images([f"{number}.png" for number in range(6)])
    evaluation = evaluation_set(tmp_path / "sets" / "gen", real=[100, 2], fake=[3, 101])
    noise_image(4).convert("L").resize((200, 150)).save(evaluation / "1_fake" / "grey.webp", quality=50)
    records = [record(f"{number}.png") for number in range(6)]
    told = check(records, "--against", str(tmp_path / "sets"), expect={"leakage": 3})
    assert "2.png looks like gen/0_real/2.jpg" in told
    assert "3.png is gen/1_fake/3.png" in told
    assert "4.png looks like gen/1_fake/grey.webp" in told
    assert root.exists()


def test_an_evaluation_set(tmp_path, capsys):
    names = {
        "gen/0_real/1.jpg": {"High Image Quality": "It is sharp."},
        "gen/1_fake/2.png": {"Low Image Quality": None},
    }
    folder = evaluation_set(tmp_path / "gen", [1], [2], names)
    assert main([str(folder)]) == 0
    assert "file type: 1" in capsys.readouterr().out
    bad = {
        "gen/0_real/1.jpg": {"Low Image Quality": "It is soft."},
        "gen/1_fake/lost.png": {"Low Image Quality": "It is soft."},
        "gen/1_fake/2.png": {"Low Image Quality": 5},
        "x": {"Low Image Quality": "It is soft.", "Funny": "It is odd."},
    }
    evaluation_set(tmp_path / "gen", [1, 3], [2], bad)
    report = tmp_path / "r.json"
    assert main([str(tmp_path), "--report", str(report)]) == 1
    found = json.loads(report.read_text())["found"]
    assert {name: len(places) for name, places in found.items()} == {
        "folder": 1,
        "missing image": 2,
        "schema": 1,
        "attributes": 1,
        "file type": 1,
        "balance": 1,
        "no reasoning": 1,
    }
    shutil.rmtree(tmp_path / "gen" / "1_fake")
    (tmp_path / "gen" / "gen_reasoning.json").write_text("[]")
    assert main([str(folder)]) == 1
    told = capsys.readouterr().out
    assert "has no fake image" in told
    assert "is not an object" in told


def test_a_reasoning_file(tmp_path, capsys, make_images):
    root = make_images(["1_fake/a.png"])
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"1_fake/a.png": {"Low Image Quality": "It is soft."}}))
    assert main([str(path), "--image-folder", str(root)]) == 0
    assert main([str(path)]) == 1
    assert "1 images that are not there" in capsys.readouterr().out


def test_wrong_use_is_explained(tmp_path, run_script):
    (tmp_path / "text.json").write_text('"x"')
    for arguments in (["lost.json"], ["text.json"], ["."], ["text.json", "--image-folder", "lost"]):
        done = run_script("validate", *arguments, cwd=tmp_path)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.stderr


def test_the_hash_knows_copies_and_tells_others_apart():
    hashes = []
    for seed in range(60):
        image = noise_image(seed, (256, 192))
        hashes.append(perceptual_hash(image))
        copies = [image.resize((100, 80)), image.resize((500, 400)), image.convert("L"), image.convert("P")]
        copies = [perceptual_hash(copy) for copy in copies]
        import numpy as np

        assert hamming_distances(hashes[-1], np.array(copies, dtype=np.uint64)).max() <= 6
        others = np.array(hashes[:-1], dtype=np.uint64)
        assert not len(others) or hamming_distances(hashes[-1], others).min() > 6
        assert [bin(hashes[-1] ^ int(other)).count("1") for other in others] == list(
            hamming_distances(hashes[-1], others)
        )
    assert perceptual_hash(Image.new("RGB", (50, 50), (9, 9, 9))) is None
