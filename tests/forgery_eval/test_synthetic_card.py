"""The card's metrics, on a data set and predictions made by hand."""

import json

import pytest

from forgery_eval.demo.card import card, card_metrics, read_rows
from forgery_eval.synthetic_card import main
from llava.systems.fakereasoning.answer import write_answer, write_reasoning

TEXTURE, EDGES = "Anomalous Image Texture", "Irregular Image Edges"


def entry(name, number, label, *, role="seen", strength=None, attributes=None):
    folder = {"real": "0_real", "fake": "1_fake"}[label]
    return {
        "image": f"evaluation_sets/{name}/{folder}/{number}.png",
        "split": "evaluation",
        "set": name,
        "label": label,
        "split_role": role,
        "strength": strength,
        "attributes": attributes or {},
    }


def prediction(truth, verdict, chance, attributes=None):
    label = verdict or "real"
    named = dict.fromkeys(attributes or [{"real": "High Image Quality", "fake": TEXTURE}[label]], "It is so.")
    text = write_answer(label, caption="A thing.", reasoning=write_reasoning(label, named)) if verdict else "Hm."
    return {
        "id": truth["image"].removeprefix("evaluation_sets/"),
        "label": 0,
        "verdict": verdict,
        "text": text,
        "attributes": named if verdict else {},
        "fake_probability": chance,
    }


@pytest.fixture
def folders(tmp_path):
    """Two sets: 8 reals and 8 fakes; of the fakes of ``a`` half are called real by the text, all fake by the score."""
    truths, predictions = [], []
    for name, role in (("a", "seen"), ("b", "unseen-known-mechanism")):
        for number in range(4):
            truths.append(entry(name, number, "real", role=role))
            predictions.append(prediction(truths[-1], "real", 0.1))
            strength = 1.0 if number == 0 else 0.3
            true = {TEXTURE: "So." if number < 2 else None, EDGES: None if number < 2 else "So."}
            truths.append(entry(name, number, "fake", role=role, strength=strength, attributes=true))
            wrong = name == "a" and number >= 2
            named = [TEXTURE] if number < 2 else [EDGES]
            predictions.append(prediction(truths[-1], "real" if wrong else "fake", 0.9, None if wrong else named))
    predictions[-1] = prediction(truths[-1], None, 0.2)
    data, results = tmp_path / "data", tmp_path / "results"
    (results / "predictions").mkdir(parents=True)
    data.mkdir()
    (data / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in truths))
    (results / "predictions" / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in predictions))
    metrics = {
        "detection": {"all": {"metrics": {"ece": 0.02}}},
        "calibration": {"temperature": 2.0, "before": {"metrics": {"ece": 0.05}}},
        "answer_score": {"metrics": {"ece": 0.03}, "calibration": None},
    }
    (results / "metrics.json").write_text(json.dumps(metrics))
    return data, results


def test_accuracies_by_role_strength_and_generator(folders):
    found = card_metrics(read_rows(*folders))
    assert found["images"] == 16
    text, score = found["text"], found["score"]
    assert text["role"] == {"seen": 0.75, "unseen-known-mechanism": 0.875, "unseen-own-mechanism": None}
    assert score["role"]["seen"] == 1.0 and score["role"]["unseen-known-mechanism"] == 0.875
    assert text["strength"]["1"] == 1.0 and text["strength"]["0.2-0.4"] == 0.75
    assert text["full_strength"]["seen"] == 1.0
    assert text["generator"] == {"a": 0.75, "b": 0.875}
    assert text["reals"] == score["reals"] == 1.0
    assert found["without_verdict"] == 1 / 16
    assert found["agreement"] == 13 / 16


def test_an_attribute_is_claimed_only_where_naming_it_is_better_than_chance(folders):
    named = card_metrics(read_rows(*folders))["attributes"]["fake"]
    assert named[TEXTURE] == {"share": 0.5, "precision": 1.0, "recall": 1.0, "claimed": True}
    assert named[EDGES]["precision"] == 1.0 and named[EDGES]["recall"] == 0.25
    assert not named["Semantic Irrationality"]["claimed"]


def test_naming_an_attribute_always_is_no_skill(folders):
    data, results = folders
    file = results / "predictions" / "x.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        line["attributes"] = {TEXTURE: "So."}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    named = card_metrics(read_rows(data, results))["attributes"]["fake"][TEXTURE]
    assert named["recall"] == 1.0 and not named["claimed"]


def test_the_card_and_its_json_are_written(folders, tmp_path, capsys):
    data, results = folders
    about = tmp_path / "about.md"
    about.write_text("# A model\n")
    out = tmp_path / "card.md"
    arguments = ["--dataset_path", str(data), "--result_folder", str(results), "--about", str(about), "--out", str(out)]
    assert main([*arguments, "--sample_dataset", str(data), "--sample_results", str(results)]) == 0
    text = out.read_text()
    assert text.startswith("# A model\n") and "| generators seen in training | 75.0 | 100.0 |" in text
    assert "| P(fake) as reported | 5.0 | 2.0 |" in text and "of the own answer" not in text
    assert json.loads(out.with_suffix(".json").read_text())["sample"]["images"] == 16


def test_names_in_a_card_are_only_text_and_its_introduction_is_markdown(folders):
    found = card_metrics(read_rows(*folders))
    found["text"]["generator"]["<script>"] = found["score"]["generator"]["<script>"] = 0.5
    text = card(found, "# A *model* & <b>more</b>")
    assert text.startswith("# A *model* & <b>more</b>\n\n## Results\n")
    assert "| &lt;script&gt; | 50.0 | 50.0 |" in text and "<script>" not in text


def test_results_of_another_data_set_are_refused(folders, tmp_path, capsys):
    data, results = folders
    manifest = data / "manifest.jsonl"
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:-1]))
    assert main(["--dataset_path", str(data), "--result_folder", str(results), "--out", str(tmp_path / "c.md")]) == 1
    assert "1 images are in one only, such as b/1_fake/3.png" in capsys.readouterr().err
