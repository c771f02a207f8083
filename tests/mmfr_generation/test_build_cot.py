"""Training files are in the published layout, and what is written can be read."""

import json

import pytest

from llava.systems.fakereasoning.answer import ATTRIBUTES, FORM_STAGES, QUESTION, parse_answer
from mmfr_generation.build_cot import main

FAKE = {"Low Image Quality": "Soft.", "Semantic Irrationality": "Six fingers.", "Irregular Image Edges": None}
REAL = {"High Image Quality": "Sharp."}


def write(path, value):
    path.write_text(json.dumps(value))
    return str(path)


@pytest.fixture
def files(tmp_path):
    reasoning = [
        write(tmp_path / "fake.json", {"s/1.png": FAKE, "s/2.png": FAKE}),
        write(tmp_path / "real.json", {"s/3.jpg": REAL}),
    ]
    captions = write(tmp_path / "captions.json", {"s/1.png": "A cat.", "s/3.jpg": "A dog."})
    return ["--reasoning", *reasoning, "--captions", captions, "--output", str(tmp_path / "out.json")]


@pytest.mark.parametrize("form", FORM_STAGES)
def test_each_form_has_its_stages(form, files, tmp_path, capsys):
    assert main([*files, "--form", form]) == (3 if form == "cot" else 0)
    records = json.loads((tmp_path / "out.json").read_text())
    images = ["s/1.png", "s/3.jpg"] if form == "cot" else ["s/1.png", "s/2.png", "s/3.jpg"]
    assert [record["image"] for record in records] == images
    for record in records:
        assert set(record) == {"image", "conversations"}
        human, gpt = record["conversations"]
        assert human == {"from": "human", "value": f"<image>\n{QUESTION}"}
        assert set(gpt) == {"from", "value"} and gpt["from"] == "gpt"
        parsed = parse_answer(gpt["value"])
        assert tuple(parsed.stages) == FORM_STAGES[form]
        assert parsed.verdict == ("real" if record["image"].endswith("jpg") else "fake")
        if "REASONING" in FORM_STAGES[form]:
            given = REAL if parsed.verdict == "real" else FAKE
            assert parsed.attributes == {name: text for name, text in given.items() if text}
    if form == "cot":
        assert parse_answer(records[0]["conversations"][1]["value"]).stages["CAPTION"] == "A cat."
        assert "dropped: 1 images\n  s/2.png: it has no caption" in capsys.readouterr().err
        dropped = (tmp_path / "out.json.dropped.jsonl").read_text()
        assert json.loads(dropped) == {"image": "s/2.png", "reason": "it has no caption"}


def test_what_cannot_be_used_is_dropped_with_its_reason(tmp_path, capsys):
    reasoning = {
        "no sentence.png": dict.fromkeys(ATTRIBUTES["fake"]),
        "both.png": {"Low Image Quality": "a", "High Image Quality": "b"},
        "neither.png": {"zeta": "a"},
        "alien.png": {"Low Image Quality": "a", "zeta": "b"},
        "tag.png": {"Low Image Quality": "</REASONING>"},
        "good.png": {"Low Image Quality": "a"},
        "lost.png": {"Low Image Quality": "a"},
    }
    for name in reasoning.keys() - {"lost.png"}:
        (tmp_path / name).touch()
    path = write(tmp_path / "r.json", reasoning)
    out = tmp_path / "o.json"
    assert (
        main(["--reasoning", path, "--form", "reasoning", "--image_folder", str(tmp_path), "--output", str(out)]) == 3
    )
    assert [record["image"] for record in json.loads(out.read_text())] == ["good.png"]
    assert "dropped: 6 images" in capsys.readouterr().err
    verdict = ["--reasoning", path, "--form", "verdict", "--output", str(out)]
    assert main(verdict) == 3
    assert [record["image"] for record in json.loads(out.read_text())] == [
        "no sentence.png",
        "alien.png",
        "tag.png",
        "good.png",
        "lost.png",
    ]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([], "must hold one JSON object"),
        ({"a.png": "text"}, "is not an object of attribute names"),
        ({"a.png": {"Low Image Quality": 3}}, "is not an object of attribute names"),
        ("{", "is not JSON"),
    ],
)
def test_wrong_files_are_explained(value, told, tmp_path, run_script):
    (tmp_path / "r.json").write_text(value if isinstance(value, str) else json.dumps(value))
    done = run_script("build_cot", "--reasoning", "r.json", "--form=reasoning", "--output", "o.json", cwd=tmp_path)
    assert done.returncode == 1
    assert told in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "o.json").exists()


def test_conflicts_and_empty_results_are_explained(files, tmp_path, run_script):
    write(tmp_path / "other.json", {"s/1.png": {"Low Image Quality": "Else."}})
    both = run_script(
        "build_cot", "--reasoning", "fake.json", "other.json", "--form=reasoning", "--output=o", cwd=tmp_path
    )
    assert "another reasoning in an earlier file" in both.stderr
    write(tmp_path / "none.json", {})
    empty = run_script("build_cot", "--reasoning", "fake.json", "--captions", "none.json", "--output=o", cwd=tmp_path)
    assert empty.returncode == 1
    assert "no image is left" in empty.stderr
    captionless = run_script("build_cot", "--reasoning", "fake.json", "--output=o", cwd=tmp_path)
    assert captionless.returncode == 2
    assert "needs --captions" in captionless.stderr
    assert not (tmp_path / "o").exists()
