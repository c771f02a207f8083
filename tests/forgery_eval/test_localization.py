"""Masks against true masks: definitions on hand-made pixels, rules, intervals, and the evaluation's files."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics as sk

from forgery_eval.benchmarks import open_benchmark
from forgery_eval.localize import localization
from forgery_eval.masks import scaled_map, write_mask
from forgery_eval.metrics.localization import (
    BINARY,
    FIXED,
    Localized,
    Pixels,
    authors_giou,
    curves,
    localization_metrics,
    pixel_auroc,
    pixel_metrics,
)
from forgery_eval.pages.report import _worst_masks
from forgery_eval.store import Prediction
from llava.__main__ import main
from llava.errors import DataError
from llava.tampered import read_changed, read_descriptions, read_tampered

GOLDENS = Path(__file__).parents[1] / "data" / "goldens_fakeshield"


def at_fixed(pixels: Pixels) -> dict[str, np.ndarray]:
    return {key: values[0, FIXED] for key, values in curves([pixels]).items()}


def random_mask(seed: int, shape: tuple[int, int] = (13, 17)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.random(shape) < 0.3
    grey = np.clip(rng.normal(90, 60, shape) + 60 * truth, 0, 255).astype(np.uint8)
    return grey, truth


def test_metrics_are_scikit_learns():
    for seed in range(5):
        grey, truth = random_mask(seed)
        pixels, called = Pixels.count(grey, truth), grey >= FIXED
        found = pixel_metrics(at_fixed(pixels))
        flat = truth.ravel(), called.ravel()
        for name, function in (
            ("iou", sk.jaccard_score),
            ("f1", sk.f1_score),
            ("precision", sk.precision_score),
            ("recall", sk.recall_score),
            ("mcc", sk.matthews_corrcoef),
        ):
            assert float(found[name]) == pytest.approx(function(*flat)), name
        assert pixel_auroc(pixels) == pytest.approx(sk.roc_auc_score(truth.ravel(), grey.ravel()))


def test_every_threshold_is_counted():
    grey, truth = random_mask(3)
    counts = curves([Pixels.count(grey, truth)])
    for threshold in (0, 1, 77, 255):
        called = grey >= threshold
        assert counts["tp"][0, threshold] == (called & truth).sum()
        assert counts["fp"][0, threshold] == (called & ~truth).sum()
        assert counts["fn"][0, threshold] == (~called & truth).sum()


def test_rules_of_empty_and_missing_masks():
    empty, full = np.zeros((4, 4), np.uint8), np.ones((4, 4), bool)
    nothing = pixel_metrics(at_fixed(Pixels.count(empty, None)))
    assert nothing["iou"] == nothing["f1"] == 1
    for predicted in (None, empty):
        missed = Pixels.count(predicted, full)
        assert missed.missing is (predicted is None)
        found = pixel_metrics(at_fixed(missed))
        assert [float(found[name]) for name in ("iou", "f1", "precision", "recall", "mcc")] == [0, 0, 0, 0, 0]
    assert authors_giou(at_fixed(Pixels.count(None, None))) == 1
    assert np.isnan(pixel_auroc(Pixels.count(empty, full)))


def test_another_size_is_resized_to_the_truth():
    truth = np.zeros((20, 30), bool)
    truth[:10] = True
    small = np.where(truth[::2, ::2], 255, 0).astype(np.uint8)
    assert float(pixel_metrics(at_fixed(Pixels.count(small, truth)))["iou"]) > 0.85


def images(soft: bool = True) -> list[Localized]:
    found = []
    for seed in range(8):
        grey, truth = random_mask(seed)
        predicted = grey if soft else np.where(grey >= FIXED, 255, 0).astype(np.uint8)
        found.append(Localized("ab"[seed % 2], {"domain": "x"}, 1, Pixels.count(predicted, truth)))
    return [*found, Localized("a", {}, 0, Pixels.count(None, None)), Localized("b", {}, 0, Pixels.count(grey, None))]


def test_means_sets_groups_and_intervals():
    found = localization_metrics(images(), draws=200)
    everything = found["all"]["metrics"]
    single = [float(pixel_metrics(at_fixed(image.pixels))["iou"]) for image in images() if image.label]
    assert everything["iou"] == pytest.approx(np.mean(single))
    assert (everything["images"], everything["changed"], everything["real"], everything["missing"]) == (10, 8, 2, 0)
    assert everything["real_without_mask"] == 0.5
    low, high = found["all"]["intervals"]["iou"]
    assert low < everything["iou"] < high
    assert everything["iou_best"] >= everything["iou"] and 0 < everything["iou_best_threshold"] < 1
    assert set(found["sets"]) == {"a", "b"} and found["groups"]["domain"]["x"]["metrics"]["images"] == 8
    again = localization_metrics(images(), draws=200)
    assert again == found


def test_black_and_white_masks_have_one_threshold():
    part = localization_metrics(images(soft=False)[:8], draws=20)["all"]
    assert part["metrics"]["auroc"] is None and part["undefined"]["iou_best"] == BINARY
    assert part["metrics"]["iou"] == pytest.approx(
        localization_metrics(images()[:8], draws=20)["all"]["metrics"]["iou"]
    )


def test_the_pointing_game():
    truth = np.zeros((10, 60), bool)
    truth[:, :5] = True
    grey = np.full((10, 60), 7, np.uint8)

    def pointing(*bright: tuple[int, int], shown=grey) -> tuple[float, float]:
        drawn = shown.copy()
        for place in bright:
            drawn[place] = 200
        found = Pixels.count(drawn, truth)
        assert found.hit_by_chance == 20 / 60  # columns 0 to 4, and 15 more
        return found.pointing, found.pointing_exact

    assert pointing((3, 4)) == (1, 1) and pointing((3, 19)) == (1, 0) and pointing((3, 20)) == (0, 0)
    assert pointing((3, 4), (3, 19), (3, 20), (3, 59)) == (0.5, 0.25)  # whichever of four comes first, by chance
    assert pointing() == (20 / 60, 5 / 60)  # a flat map points anywhere
    assert pointing(shown=np.zeros_like(grey)) == (0, 0)  # an empty one nowhere
    assert Pixels.count(None, truth).pointing == 0 and np.isnan(Pixels.count(grey, None).pointing)
    images = [
        Localized("s", {}, 1, Pixels.count(np.where(truth == hit, 255, 0).astype(np.uint8), truth)) for hit in (1, 0)
    ]
    part = localization_metrics([*images, Localized("s", {}, 0, Pixels.count(grey, None))], draws=50)["all"]
    assert part["metrics"]["pointing_exact"] == 0.5 and part["intervals"]["pointing_exact"] == [0, 1]
    assert part["metrics"]["pointing"] == (1 + 15 / 55) / 2 and part["metrics"]["hit_by_chance"] == 20 / 60


def test_a_set_of_real_images_alone():
    part = localization_metrics([Localized("a", {}, 0, Pixels.count(None, None))], draws=20)["all"]
    assert part["metrics"]["iou"] is None and "no image with known changed pixels" in part["undefined"]["iou"]
    assert part["metrics"]["giou"] == 1 and part["metrics"]["real_without_mask"] == 1
    assert localization([], [], None) is None


def test_a_map_of_any_scale():
    assert scaled_map(np.array([[2.0, 4.0], [3.0, 2.0]])).tolist() == [[0, 1], [0.5, 0]]
    assert scaled_map(np.full((2, 2), 7.0)).tolist() == [[0, 0], [0, 0]]


# --- data


def test_folders_of_images_and_masks():
    samples = open_benchmark(GOLDENS / "dataset")
    by_id = {sample.id: sample for sample in samples}
    fake = by_id["photoshop/CASIAv1+_Tp/image/casiav1p_tp_0.png"]
    assert (fake.set, fake.label, fake.groups) == ("CASIAv1+", 1, {"domain": "photoshop"})
    assert fake.masks[0].name == "casiav1p_tp_0.png" and fake.masks[0].parent.name == "mask"
    real = by_id["photoshop/CASIAv1+_Au/image/casiav1p_au_0.jpg"]
    assert (real.set, real.label, real.masks) == ("CASIAv1+", 0, ())
    sets = {sample.set for sample in samples}
    assert {"DeepFake_Val", "AIGC_Train", "coverage", "NIST16"} <= sets
    assert sum(sample.reference is not None for sample in samples) > 0
    only = open_benchmark(GOLDENS / "dataset" / "photoshop" / "Columbia")
    assert {sample.set for sample in only} == {"Columbia"}


def test_a_file_of_conversations():
    file = GOLDENS / "dataset" / "MMTD_Set" / "MMTD-Set-34k.json"
    samples = open_benchmark(file)
    rows = json.loads(file.read_text())
    assert [sample.id for sample in samples] == list(dict.fromkeys(row["image"] for row in rows))
    assert samples[0].reference == rows[0]["conversations"][1]["value"] and samples[0].masks
    assert {sample.label for sample in samples} == {0, 1}


def test_a_file_of_conversations_without_its_images_says_so(tmp_path):
    """The published file is text alone: its images are fetched apart."""
    entry = {"image": "photoshop/CASIAv2_Tp/image/a.jpg", "conversations": [{"from": "gpt", "value": "It was edited."}]}
    (tmp_path / "MMTD.json").write_text(json.dumps([entry]))
    with pytest.raises(DataError, match=r"names photoshop/CASIAv2_Tp/image/a\.jpg and others, but none lies in"):
        open_benchmark(tmp_path / "MMTD.json")


def test_descriptions_of_the_loaders_own_layout():
    by_explainer = {i.name: i.description for i in read_tampered(GOLDENS / "dataset_mflm")}
    annotated = {i.name: i.description for i in read_tampered(GOLDENS / "dataset_mflm", described_by="gt")}
    name = "ps/CASIA2/image/kite_07.jpg"
    assert annotated[name] == f"{by_explainer[name]} (reference)" and by_explainer["ps/CASIA2/image/cup_03.jpg"] is None
    with pytest.raises(DataError, match="descriptions are by"):
        list(read_tampered(GOLDENS / "dataset_mflm", described_by="x"))


@pytest.fixture
def pairs(tmp_path) -> Path:
    for folder in ("image", "mask"):
        (tmp_path / "set_Tp" / folder).mkdir(parents=True)
    for name in ("a", "b"):
        Image.new("RGB", (8, 6)).save(tmp_path / "set_Tp" / "image" / f"{name}.jpg")
        Image.new("L", (8, 6), 200).save(tmp_path / "set_Tp" / "mask" / f"{name}.png")
    return tmp_path


def test_pairs_must_have_one_name(pairs):
    assert [image.masks[0].stem for image in read_tampered(pairs)] == ["a", "b"]
    (pairs / "set_Tp" / "mask" / "b.png").rename(pairs / "set_Tp" / "mask" / "c.png")
    with pytest.raises(DataError, match=r"no mask for b\.jpg; no image for the mask c\.png"):
        list(read_tampered(pairs))


def test_two_images_for_one_mask_are_refused(pairs):
    Image.new("RGB", (8, 6)).save(pairs / "set_Tp" / "image" / "a.webp")
    with pytest.raises(DataError, match=r"two images of one name for one mask: a\.jpg and a\.webp"):
        list(read_tampered(pairs))


def test_what_counts_as_changed(pairs):
    mask = next(read_tampered(pairs)).masks
    assert not read_changed(mask).any() and read_changed(mask, above=127).all()
    with pytest.raises(DataError, match="cannot be read"):
        read_changed([pairs / "none.png"])
    Image.new("L", (3, 3), 255).save(pairs / "other.png")
    with pytest.raises(DataError, match="another size"):
        read_changed([*mask, pairs / "other.png"])


def test_tables_and_manifests(pairs):
    rows = [
        {"image": "set_Tp/image/a.jpg", "label": "fake", "mask": "set_Tp/mask/a.png", "description": "here"},
        {"image": "set_Tp/image/b.jpg", "label": "real"},
    ]
    table = pairs / "table.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = read_tampered(table)
    assert (first.masks[0].name, first.description, second.masks, second.label) == ("a.png", "here", (), 0)
    assert open_benchmark(table)[0].masks == first.masks
    entry = {
        "image": "set_Tp/image/a.jpg",
        "label": "fake",
        "masks": {"x": "set_Tp/mask/a.png"},
        "attributes": {"E": "e"},
    }
    (pairs / "manifest.jsonl").write_text(json.dumps(entry) + "\n")
    (found,) = read_tampered(pairs)
    assert (found.masks, found.description) == ((pairs / "set_Tp/mask/a.png",), "e")
    answers = pairs / "answers.jsonl"
    answers.write_text(json.dumps({"image": "set_Tp/image/a.jpg", "text": "there"}) + "\n")
    assert read_descriptions(answers)[str((pairs / "set_Tp/image/a.jpg").resolve())] == "there"


# --- the evaluation's files


def test_an_evaluation_compares_masks(pairs, tmp_path):
    """Predictions of any program, with masks beside them, scored by ``--rescore``."""
    for name in ("a", "b"):
        Image.fromarray(np.where(np.arange(48).reshape(6, 8) < 24, 255, 0).astype(np.uint8)).save(
            pairs / "set_Tp" / "mask" / f"{name}.png"
        )
    (pairs / "set_Au" / "image").mkdir(parents=True)
    Image.new("RGB", (8, 6)).save(pairs / "set_Au" / "image" / "r.jpg")
    folder = tmp_path / "run"
    half = np.zeros((6, 8), np.float32)
    half[:3] = 0.9
    path = write_mask(folder, "run", "set_Tp/image/a.jpg", half)
    lines = [
        {"id": "set_Tp/image/a.jpg", "verdict": "fake", "fake_probability": 0.9, "mask": path},
        {"id": "set_Tp/image/b.jpg", "verdict": "real", "fake_probability": 0.4},
        {"id": "set_Au/image/r.jpg", "verdict": "real", "fake_probability": 0.1},
    ]
    (folder / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = [
        "--dataset_path",
        str(pairs),
        "--result_folder",
        str(tmp_path / "out"),
        "--rescore",
        str(folder / "p.jsonl"),
    ]
    assert main(["eval", *given, "--answer-format", "fakeshield"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    found = metrics["localization"]["all"]["metrics"]
    assert (found["iou"], found["missing"], found["real_without_mask"]) == (0.5, 1, 1.0)
    assert found["giou"] == pytest.approx(2 / 3, abs=1e-5) and found["ciou"] == 0.5 and found["iou_best"] == 0.5
    rows = list(csv.reader((tmp_path / "out" / "metrics.csv").open()))
    assert ["localization", "set", "iou"] in [row[:3] for row in rows]
    assert metrics["localization"]["resized"] == []
    each = {image["id"][-5]: (image["iou"], image["pointing"]) for image in metrics["localization"]["images"]}
    assert each["a"] == (1, 1) and each["b"] == (0, 0) and each["r"][1] is None  # of the real one nothing is changed
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Where it was changed" in page and "resized" not in page
    assert page.count("no mask</i>") == 1 and "IoU 0.000" in page
    assert page.index("IoU 0.000") < page.index("IoU 1.000") and "predicted mask</figcaption>" in page


def test_true_masks_of_another_size_than_their_image_are_told(pairs, tmp_path):
    Image.new("L", (3, 3), 255).save(pairs / "set_Tp" / "mask" / "a.png")
    path = write_mask(tmp_path, "run", "set_Tp/image/a.jpg", np.ones((6, 8), np.float32))
    samples = open_benchmark(pairs)
    given = {"set_Tp/image/a.jpg": path}
    predictions = [Prediction(sample.id, sample.label, mask=given.get(sample.id, "")) for sample in samples]
    found = localization(samples, predictions, tmp_path)
    assert found is not None and found["resized"] == ["set_Tp/image/a.jpg"]
    assert found["truth"].endswith("resized to the size of the true ones: 1")


def test_of_the_worst_masks_a_quarter_may_be_of_marked_real_images(tmp_path):
    Image.new("L", (4, 4), 255).save(tmp_path / "mask.png")
    rows, images = [], []
    for number in range(9):
        name, iou = f"{number}", (0.1 * number if number < 6 else 0.0 if number < 8 else 1.0)
        masks = (tmp_path / "mask.png",) if number < 6 else ()
        sample = SimpleNamespace(id=name, masks=masks, image=tmp_path / "none.png")
        rows.append(SimpleNamespace(sample=sample, prediction=SimpleNamespace(mask="")))
        images.append({"id": name, "iou": iou, "f1": iou})

    def shown(most: int) -> list[str]:
        return [card["id"] for card in _worst_masks({"images": images}, rows, None, most)]

    assert shown(4) == ["0", "1", "2", "6"]
    assert shown(24) == ["0", "1", "2", "3", "4", "5", "6", "7"]  # 8 is real and unmarked


def test_predictions_without_masks_are_not_compared():
    samples = open_benchmark(GOLDENS / "dataset" / "photoshop" / "Columbia")
    assert localization(samples, [Prediction(sample.id, sample.label) for sample in samples], None) is None


def test_maps_of_another_system_are_compared(pairs, trained, tmp_path):
    for name in ("a", "b"):
        Image.effect_noise((40, 30), 60).convert("RGB").save(pairs / "set_Tp" / "image" / f"{name}.jpg")
        Image.fromarray(np.where(np.arange(1200).reshape(30, 40) < 500, 255, 0).astype(np.uint8)).save(
            pairs / "set_Tp" / "mask" / f"{name}.png"
        )
    given = ["--dataset_path", str(pairs), "--model-path", str(trained), "--device", "cpu", "--max_new_tokens", "4"]
    assert main(["eval", *given, "--score-maps", "--result_folder", str(tmp_path / "maps")]) == 0
    found = json.loads((tmp_path / "maps" / "metrics.json").read_text())["localization"]["all"]["metrics"]
    assert found["missing"] == 0 and 0 < found["auroc"] < 1 and 0 < found["iou_best_threshold"] <= 1
    assert main(["eval", *given, "--result_folder", str(tmp_path / "plain")]) == 0
    assert "localization" not in json.loads((tmp_path / "plain" / "metrics.json").read_text())
