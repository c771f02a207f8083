"""M2F2-Det as a user meets it: its words, its reports, its trainings one after the other, and its files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava import ForgeryDetector
from llava.__main__ import main
from llava.data.labelled import read_labelled
from llava.errors import CheckpointError, OptionError
from llava.labels import LABELS
from llava.model.builder import load_pretrained_model
from llava.systems.m2f2det.answer import FORMAT, arrange, complete_to_verdict, fill_prompt, parse_answer, write_answer
from llava.systems.m2f2det.layout import KEY_MAP
from llava.systems.m2f2det.token import NAME
from llava.systems.m2f2det.training import DetectorTraining
from llava.train import networks
from llava.train.train import main as train
from tests.parity.m2f2det_reference import BASE, Reference
from tests.trained import picture
from tests.training_runs import QUICK

GOLDENS = Path(__file__).parents[1] / "data" / "goldens_m2f2det"
CNN = {"type": "densenet", "growth": 4, "blocks": [1, 1, 1, 1], "stem": 8, "bottleneck": 2}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 8,
    "max_position_embeddings": 8,
}
VISION = {
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 84,
    "patch_size": 14,
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Reference:
    return Reference(GOLDENS, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def merged(reference) -> Path:
    return reference.model_folder(BASE)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Real pictures, and fakes with a square that none of the others has."""
    folder = tmp_path_factory.mktemp("photos")
    for label in LABELS:
        (folder / label).mkdir()
        for index in range(6):
            image = picture(index + 10 * (label == "fake"), (96, 84))
            if label == "fake":
                image.paste((255, 0, 0), (20, 20, 60, 60))
            image.save(folder / label / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tower") / "clip"
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(folder)
    return folder


def settings(folder: Path, fusion: str, tower: Path) -> Path:
    detector = {"fusion": fusion, "width": 24, "prompt_length": 3, "cnn": CNN, "vision": VISION, "text": TEXT}
    if fusion == "bridge":
        detector |= {"clip_taps": [0, 1, 2], "bridge_dim": 8, "bridge_out": 8, "bridge_inner": 8}
        detector |= {"bridge_scalar_norm": "none", "clip_tap_slice": "drop_cls"}
    values = {"clip": None, "detector": detector} | ({"vision_tower": str(tower)} if fusion == "cosine" else {})
    (folder / "detector.json").write_text(json.dumps(values))
    return folder / "detector.json"


def run(command, output: Path, **options) -> Path:
    """Runs a training; returns its final folder."""
    values = {"output_dir": output, **QUICK, **options}
    words = [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]
    assert command(words) == 0, words
    return output / "final"


@pytest.fixture(scope="module", params=["cosine", "bridge"])
def stage1(request, photos, tower, tmp_path_factory) -> Path:
    """A detector after some steps of stage 1."""
    folder = tmp_path_factory.mktemp(f"stage1_{request.param}")
    config = settings(folder, request.param, tower)
    options = {"recipe": "m2f2det_stage1", "model_config": config, "data_path": photos, "validation_share": 0.25}
    steps = {"max_steps": 3, "eval_steps": 3, "lr_scheduler_type": "constant", "per_device_train_batch_size": 4}
    return run(networks.main, folder / "run", **options, **steps)


@pytest.fixture(scope="module")
def records(photos, tmp_path_factory) -> Path:
    """Training records in the form of DD-VQA, one that lacks the detector's word."""
    rows = []
    for label in LABELS:
        for index in range(6):
            mark = "<image>\n" if index == 0 else "<image>\n<deepfake>\n"
            turns = [
                {"from": "human", "value": f"{mark}Is this portrait genuine or generated?"},
                {"from": "gpt", "value": f"The image looks {label}. It is so."},
            ]
            rows.append({"image": f"{label}/{index}.png", "conversations": turns})
    file = tmp_path_factory.mktemp("records") / "train.json"
    file.write_text(json.dumps(rows))
    return file


# --- words


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("The image looks fake. The lips are blurred.", "fake"),
        ("The image looks real.", "real"),
        ("It is not real.", "fake"),
        ("This isn't a fake image.", "real"),
        ("The skin is unrealistic and really smooth.", None),
        ("Is it real? It looks computer-generated.", "fake"),
        ("It could be real or fake.", None),
        ("", None),
    ],
)
def test_a_verdict_is_read_from_whole_words_and_their_negation(text, verdict):
    assert parse_answer(text).verdict == verdict


def test_an_answer_is_cut_where_its_verdict_stands():
    assert complete_to_verdict("The image looks fake. So.") == "The image looks"
    assert complete_to_verdict("I think it is fake") == "I think it is"
    for other in ("It is not real.", "FAKE!", "nothing"):
        assert complete_to_verdict(other) == FORMAT.verdict_prefix
    assert parse_answer(write_answer("fake", "Why not.")).stages == {
        "VERDICT": "The image looks fake.",
        "EXPLANATION": "Why not.",
    }
    assert FORMAT.parse_training(["It is real.", "It is fake."]).verdict is None


def test_prompts_have_names_and_refuse_what_they_cannot_ask():
    assert fill_prompt("training", None).count("\n") == 4
    assert arrange("<image>\nIs it?") == "<image>\n<deepfake>\n\n\nIs it?"
    for name, question, message in (
        ("judge", "Why?", "the prompt judge has its own question"),
        ("explain", "What of <deepfake>?", "must not hold <deepfake>"),
        ("poem", None, "known: judge, explain, training"),
    ):
        with pytest.raises(OptionError, match=message):
            fill_prompt(name, question)


# --- the published model


def test_a_report_has_the_detectors_score_and_the_answers_beside_it(merged, reference):
    detector = ForgeryDetector.from_pretrained(merged)
    image = GOLDENS / "images" / "img0.png"
    wanted = reference.tensors("goldens_llava")["det_probs"][0, 0, 1].item()
    report = detector.analyze(image, attention=True, max_new_tokens=4)
    assert report.fake_probability == pytest.approx(wanted, abs=1e-6) and report.score_source == "detector"
    assert (report.label == "fake") == (wanted >= 0.5)
    assert 0 < report.answer_probability < 1 and report.answer_probability != report.fake_probability
    assert report.agrees is None and report.answer_label == ""  # a random model's answer says nothing
    with Image.open(image) as opened:
        assert report.attention.shape == (opened.height, opened.width)
    assert np.shape(report.details["forgery_map"]) == (6, 6)
    asked = detector.analyze(image, question="Describe the mouth.", max_new_tokens=4)
    assert asked.text != report.text and asked.fake_probability == pytest.approx(wanted, abs=1e-6)
    assert detector.analyze(image, score_only=True).text == ""


def test_the_answer_follows_the_detectors_token(merged):
    """A test of use: with the probabilities exchanged the logits are others."""
    _, model, _, _ = load_pretrained_model(merged, device="cpu")
    source = model.get_model().token_sources[NAME]
    right = type(source).detect

    def logits_when_detected(*logits: float) -> torch.Tensor:
        def detect(context):
            output = right(source, context)
            return type(output)(**{**vars(output), "logits": torch.tensor([logits])})

        source.detect = detect
        with torch.no_grad():
            ids = torch.tensor([[1, 5, -200, 6, -300, 7]])
            return model(input_ids=ids, images=torch.zeros(1, 3, 84, 84)).logits[:, -1]

    assert (logits_when_detected(3.0, -3.0) - logits_when_detected(-3.0, 3.0)).abs().max() > 0.1


def test_the_published_files_come_back(merged, tmp_path):
    out = tmp_path / "published"
    given = ["--model-path", str(merged), "--save-model-path", str(out), "--layout", "published"]
    assert main(["merge", *given]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (merged, out))
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


# --- deltas


@pytest.mark.parametrize("name", ["llava-m2f2-stage2-proj", "llava-m2f2-stage3-lora"])
def test_a_delta_is_merged_by_the_command_whatever_its_name(reference, merged, tmp_path, name):
    delta = tmp_path / "any"
    shutil.copytree(reference.model_folder(name), delta)
    given = ["--model-path", str(delta), "--model-base", str(merged), "--save-model-path", str(tmp_path / "out")]
    assert main(["merge", *given, "--dtype", "float32"]) == 0
    _, apart, _, _ = load_pretrained_model(delta, merged, device="cpu")
    _, joined, _, _ = load_pretrained_model(tmp_path / "out", device="cpu")
    ids, pixels = torch.tensor([[1, -200, -300, 7]]), torch.randn(1, 3, 84, 84)
    with torch.no_grad():
        assert torch.allclose(
            apart(input_ids=ids, images=pixels).logits, joined(input_ids=ids, images=pixels).logits, atol=1e-5
        )


def test_a_merge_that_would_change_nothing_is_refused(reference, merged, tmp_path):
    delta = tmp_path / "same"
    shutil.copytree(reference.model_folder("llava-m2f2-stage2-proj"), delta)
    stored = load_file(merged / "model.safetensors")
    same = {name: value for name, value in stored.items() if name.startswith("deepfake_projector.")}
    torch.save(same, delta / "mm_projector.bin")
    with pytest.raises(CheckpointError, match="changes nothing"):
        load_pretrained_model(delta, merged, device="cpu")
    torch.save({"module.nothing.weight": torch.ones(1)}, delta / "mm_projector.bin")
    with pytest.raises(CheckpointError, match=r"something else than projectors: module\.nothing\.weight"):
        load_pretrained_model(delta, merged, device="cpu")
    with pytest.raises(CheckpointError, match="name their base"):
        load_pretrained_model(delta, device="cpu")


def changed(merged: Path, folder: Path, **fields) -> Path:
    shutil.copytree(merged, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def test_bad_files_are_told_in_one_sentence(merged, tmp_path, stage1):
    other = changed(merged, tmp_path / "patch", mm_vision_select_feature="patch")
    with pytest.raises(CheckpointError, match="must be 'cls_patch'"):
        load_pretrained_model(other, device="cpu")
    with pytest.raises(CheckpointError, match="there is no detector nowhere"):
        load_pretrained_model(merged, device="cpu", detector="nowhere.pth")
    torch.save({"deepfake_encoder.conv0.weight": torch.ones(1)}, tmp_path / "half.pth")
    with pytest.raises(CheckpointError, match="is incomplete: it lacks"):
        load_pretrained_model(merged, device="cpu", detector=tmp_path / "half.pth")
    _, model, _, _ = load_pretrained_model(merged, device="cpu")
    with pytest.raises(ValueError, match="no images were given"):
        model(input_ids=torch.tensor([[1, 5, -300]]))


# --- the three trainings


def test_stage_1_gives_scores_and_a_map(stage1, photos, tmp_path):
    out = tmp_path / "scores.jsonl"
    assert main(["detect", str(photos), "--model-path", str(stage1), "--json", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 12 and all(0 < row["fake_probability"] < 1 and not row["text"] for row in rows)
    assert {row["score_source"] for row in rows} == {"detector"}
    again = DetectorTraining.open(str(stage1), {})
    assert torch.isfinite(again.network(torch.zeros(1, 3, 84, 84))).all()


def test_a_stage_1_detector_feeds_stages_2_and_3(stage1, merged, records, photos, tmp_path):
    common = {"data_path": records, "image_folder": photos, "version": "v1", "bf16": False, "tf32": False}
    stage2 = run(train, tmp_path / "2", recipe="m2f2det_stage2", model_name_or_path=merged, detector=stage1, **common)
    with_detector = load_file(stage1 / "model.safetensors")
    stored = load_file(stage2 / "model.safetensors")
    prefix = f"model.token_sources.{NAME}."
    published = KEY_MAP.to_published({name: value for name, value in stored.items() if f"{prefix}tower." in name})
    kept = {name.removeprefix("deepfake_encoder."): value for name, value in published.items()}
    # Frozen is frozen, a batch norm's statistics too.
    assert set(kept) == set(with_detector)
    assert all(torch.equal(kept[name], with_detector[name]) for name in kept)
    base = load_file(merged / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], base["lm_head.weight"])
    assert not torch.equal(stored[f"{prefix}mm_projector.0.weight"], base["deepfake_projector.0.weight"])
    stage3 = run(train, tmp_path / "3", recipe="m2f2det_stage3", model_name_or_path=stage2, lora_r=2, **common)
    detector = ForgeryDetector.from_pretrained(stage3)
    alone = ForgeryDetector.from_pretrained(stage1)
    for report, own in zip(
        detector.analyze_many([photos / "real" / "0.png", photos / "fake" / "0.png"], max_new_tokens=3),
        alone.analyze_many([photos / "real" / "0.png", photos / "fake" / "0.png"]),
        strict=True,
    ):
        bridge = alone.system.detector.config.fusion == "bridge"
        if bridge:  # a cosine detector takes the features of the language model's own tower
            assert report.fake_probability == pytest.approx(own.fake_probability, abs=1e-5)
        assert report.score_source == "detector" and report.system == "M2F2-Det"
    assert detector.system.prompt(detector.options()).startswith("A chat between a curious user")


def test_what_a_training_cannot_use_is_said(merged, records, photos, tmp_path, capsys):
    common = {"data_path": records, "image_folder": photos, "model_name_or_path": merged}
    for options, message in (
        ({"detector": "nowhere.pth"}, "there is no detector nowhere.pth"),
        ({"cache_features": tmp_path / "features"}, "keeps no pixels"),
        ({"trained_parts": "wings"}, "has no wings to train"),
        ({"trained_parts": "mm_projector", "tune_mm_mlp_adapter": True}, "says all that is trained"),
    ):
        values = {"output_dir": tmp_path / "run", **QUICK, **common, **options}
        words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
        assert train(words) == 1
        assert message in capsys.readouterr().err.splitlines()[-1]


# --- frames of videos


def write_packs(folder: Path) -> None:
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    for kind, keys in (("original", ["001", "002"]), ("Deepfakes", ["001_002", "002_001"])):
        with h5py.File(folder / f"FF++_{kind}_c23.h5", "w") as pack:
            for key in keys:
                pack[key] = rng.integers(0, 255, (5, 30, 20, 3), dtype=np.uint8)


def test_packs_of_faceforensics_are_data_and_benchmark(stage1, tmp_path):
    packs = tmp_path / "packs"
    packs.mkdir()
    write_packs(packs)
    (packs / "train.json").write_text('[["001", "002"]]')
    found = read_labelled([packs], LABELS, answer_format=None)
    assert [(len(image.images), image.label) for image in found] == [(4, 0), (4, 0), (4, 1), (4, 1)]
    results = tmp_path / "results"
    given = ["--model-path", str(stage1), "--dataset_path", str(packs), "--result_folder", str(results)]
    assert main(["eval", *given, "--paper-protocol"]) == 0
    metrics = json.loads((results / "metrics.json").read_text())
    assert metrics["videos"]["metrics"]["images"] == 4 and metrics["videos"]["metrics"]["frames"] == 20
    assert set(metrics["detection"]["groups"]["manipulation"]) == {"original", "Deepfakes"}
    assert metrics["paper"]["ffpp_c23"]["videos"] == 4
    frame = packs / "FF++_original_c23.h5" / "001" / "4"
    assert ForgeryDetector.from_pretrained(stage1).analyze(frame).label in LABELS
    with pytest.raises(OSError, match="there is no such frame"):
        ForgeryDetector.from_pretrained(stage1).analyze(frame.with_name("5"))
    (packs / "test.json").write_text('[["001", "009"]]')
    assert main(["eval", *given]) == 1
