"""M2F2-Det as a user meets it: its words, its reports, its trainings one after the other, and its files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from llava import ForgeryDetector
from llava.__main__ import main
from llava.data.labelled import read_labelled
from llava.errors import CheckpointError, OptionError
from llava.labels import LABELS
from llava.model.builder import load_pretrained_model
from llava.systems.m2f2det.answer import FORMAT, arrange, complete_to_verdict, fill_prompt, parse_answer, write_answer
from llava.systems.m2f2det.checkpoint import infer_config, open_detector, read_detector_tensors
from llava.systems.m2f2det.layout import KEY_MAP
from llava.systems.m2f2det.token import NAME
from llava.systems.m2f2det.training import DetectorTraining
from llava.train import networks
from llava.train.train import main as train
from tests.parity.m2f2det_reference import BASE, Reference
from tests.test_export import client, engine
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
    assert detector.has_attention
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


def test_the_tokens_value_can_be_swapped_to_see_what_answers_make_of_it(merged, stage1):
    detector = ForgeryDetector.from_pretrained(merged)
    images = [GOLDENS / "images" / f"img{number}.png" for number in range(2)]
    own, swapped = (
        list(detector.analyze_many(images, detector_token=token, max_new_tokens=3)) for token in ("own", "swapped")
    )
    for before, after in zip(own, swapped, strict=True):
        assert after.fake_probability == before.fake_probability and after.label == before.label
        assert after.answer_probability != pytest.approx(before.answer_probability, abs=1e-4)
        assert "exchanged" in after.notice and "exchanged" not in before.notice
    with pytest.raises(OptionError, match="must be one of own, swapped"):
        detector.analyze(images[0], detector_token="none")
    with pytest.raises(OptionError, match="puts no token into a prompt"):
        ForgeryDetector.from_pretrained(stage1).analyze(images[0], detector_token="swapped")


def test_its_language_model_can_be_served_elsewhere(merged, tmp_path):
    target, images = tmp_path / "served", [GOLDENS / "images" / f"img{number}.png" for number in range(2)]
    assert main(["export", "--model-path", str(merged), "--save-model-path", str(target), "--dtype", "float32"]) == 0
    whole = ForgeryDetector.from_pretrained(merged, device="cpu", dtype="float32")
    with engine(target / "language_model", []) as url:
        served = client(target, tmp_path / "client", url)
        for token in ("own", "swapped"):
            reports = [
                list(each.analyze_many(images, max_new_tokens=6, detector_token=token)) for each in (whole, served)
            ]
            for own, other in zip(*reports, strict=True):
                assert not other.error and (other.text, other.label) == (own.text, own.label)
                assert other.fake_probability == pytest.approx(own.fake_probability, abs=1e-6)
                assert other.answer_probability == pytest.approx(own.answer_probability, abs=1e-5)


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


def test_a_delta_without_its_projectors_is_told(reference, merged, tmp_path, capsys):
    delta = tmp_path / "lora"
    shutil.copytree(reference.model_folder("llava-m2f2-stage3-lora"), delta)
    stored = torch.load(delta / "non_lora_trainables.bin", weights_only=True)
    kept = {name: value for name, value in stored.items() if "deepfake_projector" not in name}
    assert 0 < len(kept) < len(stored)
    torch.save(kept, delta / "non_lora_trainables.bin")
    load_pretrained_model(delta, merged, device="cpu")
    assert f"{delta} brings no deepfake_mm_projector: beside the adapter" in capsys.readouterr().err
    (delta / "non_lora_trainables.bin").unlink()
    with pytest.raises(CheckpointError, match=r"lacks non_lora_trainables\.bin, which holds what was trained whole"):
        load_pretrained_model(delta, merged, device="cpu")
    # An adapter of another trainer's, which says nothing of what it trained, is opened, and told of.
    (delta / "config.json").unlink()
    load_pretrained_model(delta, merged, device="cpu")
    assert f"{delta} brings no deepfake_mm_projector and no mm_projector" in capsys.readouterr().err


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
    torch.save({"vision_tower.embedding": torch.ones(2, 2)}, tmp_path / "tower.pth")
    with pytest.raises(
        CheckpointError, match=r"tower\.pth is no detector of M2F2-Det, or is incomplete: it lacks output\.weight$"
    ):
        load_pretrained_model(merged, device="cpu", detector=tmp_path / "tower.pth")
    _, model, _, _ = load_pretrained_model(merged, device="cpu")
    with pytest.raises(ValueError, match="no images were given"):
        model(input_ids=torch.tensor([[1, 5, -300]]))


@pytest.mark.parametrize("damage", ["missing", "of another rank", "empty"])
def test_a_damaged_detector_is_told_whatever_is_damaged(stage1, tmp_path, damage):
    whole = load_file(stage1 / "model.safetensors")
    for name in (name for name in whole if name.endswith(("weight", "alpha", "prompt_tokens"))):
        bad = {"missing": {}, "of another rank": {name: torch.ones(())}, "empty": {name: torch.ones(2, 0)}}[damage]
        if name in bad and bad[name].shape == whole[name].shape:
            continue
        save_file({**{key: value for key, value in whole.items() if key != name}, **bad}, tmp_path / "it.safetensors")
        with pytest.raises(CheckpointError, match=r"it\.safetensors"):
            open_detector(tmp_path / "it.safetensors")


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


# --- the paper's prompt


def paper(fusion: str, tower: Path, **fields) -> DetectorTraining:
    """A new detector with the paper's prompt."""
    torch.manual_seed(0)
    own = {"prompt": "paper", "prompt_image_tokens": 2, "prompt_words": 2, "prompt_layer_tokens": 1}
    detector = {"fusion": fusion, "width": 24, "prompt_length": 3, "cnn": CNN, "vision": VISION, "text": TEXT, **own}
    if fusion == "bridge":
        detector |= {"clip_taps": [0, 1, 2], "bridge_dim": 8, "bridge_out": 8, "bridge_inner": 8}
        detector |= {"bridge_scalar_norm": "none", "clip_tap_slice": "drop_cls", "prompt_in_loss": "map"}
    values = {"clip": None, "detector": detector | fields} | (
        {"vision_tower": str(tower)} if fusion == "cosine" else {}
    )
    return DetectorTraining.open(None, values)


def test_every_part_of_the_papers_prompt_is_read_and_only_what_learns_is_trained(tower):
    network = paper("cosine", tower).network.eval()
    encoder, cls = network.detector.clip_text_encoder, torch.randn(2, VISION["hidden_size"])
    with torch.no_grad():
        before = encoder(cls)
        assert before.shape == (2, TEXT["hidden_size"])
        assert not torch.allclose(before[0], before[1]) and torch.allclose(encoder(cls[:1]), before[:1], atol=1e-6)
        parts = {
            "universal": encoder.prompt_tokens,
            "image": encoder.image_prompt[2].bias,
            "words": encoder.word_tokens,
            "layers": encoder.layer_tokens,
        }
        for name, part in parts.items():
            kept = part.clone()
            part.add_(5 * torch.randn_like(part))
            assert not torch.allclose(encoder(cls), before, atol=1e-4), name
            part.copy_(kept)
    network(torch.randn(2, 3, 84, 84)).sum().backward()
    learns = {name for name, value in encoder.named_parameters() if value.grad is not None and value.grad.any()}
    assert learns == {
        "prompt_tokens",
        "layer_tokens",
        *(f"image_prompt.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")),
    }


def test_a_bridges_map_weighs_its_patches_as_the_paper_says(tower):
    head = paper("bridge", tower).network.detector.map_head
    tokens, scores = torch.randn(2, 36, 8), torch.rand(2, 36)
    with torch.no_grad():
        head.conv.weight.zero_()[torch.arange(8), torch.arange(8), 1, 1] = 1
        head.conv.bias.zero_()
        assert torch.allclose(head(tokens, scores), (tokens * scores[..., None]).mean(1), atol=1e-6)
        # A place in the map is a place in the image: what is at its edge has fewer neighbours.
        head.conv.weight.fill_(1)
        one = torch.zeros(2, 1, 36)
        one[0, 0, 0], one[1, 0, 7] = 1, 1
        corner, inside = head(torch.ones(2, 36, 8), one[:, 0])[:, 0].tolist()
    assert inside / corner == pytest.approx(9 / 4)


@pytest.mark.parametrize("fusion", ["cosine", "bridge"])
def test_the_papers_prompt_is_trained_saved_and_opened(fusion, tower, photos, merged, tmp_path):
    new = paper(fusion, tower)
    (tmp_path / "detector.json").write_text(json.dumps(new.settings))
    options = {"recipe": "m2f2det_stage1", "model_config": tmp_path / "detector.json", "data_path": photos}
    steps = {"max_steps": 2, "lr_scheduler_type": "constant", "per_device_train_batch_size": 4}
    final = run(networks.main, tmp_path / "run", **options, **steps, eval_strategy="no", learning_rate=1e-2)
    config = json.loads((final / "config.json").read_text())["detector"]
    assert config["prompt"] == "paper" and (config["prompt_in_loss"] == "map") == (fusion == "bridge")
    found = infer_config(read_detector_tensors(final / "model.safetensors"), {}, "x").to_dict()
    told = ("prompt", "prompt_length", "prompt_image_tokens", "prompt_words", "prompt_layer_tokens", "prompt_in_loss")
    assert {name: found[name] for name in told} == {name: config[name] for name in told}
    reports = ForgeryDetector.from_pretrained(final).analyze_many([photos / "real/0.png", photos / "fake/0.png"])
    first, second = (np.array(report.details["forgery_map"]) for report in reports)
    assert np.abs(first - second).max() > 0 and not any(report.notice for report in reports)
    _, model, _, _ = load_pretrained_model(merged, device="cpu", detector=final)
    source = model.get_model().token_sources[NAME]
    own, stored = source.tower.state_dict(), load_file(final / "model.safetensors")
    assert set(own) == set(stored) and all(torch.equal(own[name], stored[name]) for name in own)


def test_prompts_that_nothing_would_train_are_refused(tower):
    for fusion, fields, message in (
        ("bridge", {"prompt_in_loss": "off"}, "nothing would train the prompt 'paper' of a bridge"),
        ("bridge", {"clip_tap_slice": "drop_last"}, "needs a bridge at work"),
        ("cosine", {"prompt_in_loss": "map"}, "a cosine detector has the map in its head anyway"),
        ("cosine", {"prompt_words": 0}, "at least 1"),
        ("cosine", {"prompt_words": 9}, "a prompt of 14 tokens does not fit the 8 places"),
        ("cosine", {"prompt": "universal"}, "has no tokens of images, words or layers"),
    ):
        with pytest.raises(CheckpointError, match=message):
            paper(fusion, tower, **fields)
    with pytest.raises(CheckpointError, match="words need the prompt 'paper' and a clip model"):
        DetectorTraining.open(None, {"clip": None, "words": "forged face"})


def test_the_words_of_a_prompt_are_those_of_clips_tokenizer(merged, tmp_path):
    clip, words = tmp_path / "clip", AutoTokenizer.from_pretrained(merged)
    CLIPModel(
        CLIPConfig(text_config={**TEXT, "vocab_size": len(words), "max_position_embeddings": 32}, vision_config=VISION)
    ).save_pretrained(clip)
    words.save_pretrained(clip)
    text = {"prompt": "paper", "prompt_length": 2, "prompt_image_tokens": 1, "prompt_layer_tokens": 1, "cnn": CNN}
    values = {"clip": str(clip), "vision_tower": str(clip), "detector": {"fusion": "cosine", **text}}
    encoder = DetectorTraining.open(None, values).network.detector.clip_text_encoder
    ids = AutoTokenizer.from_pretrained(clip)("forged face", add_special_tokens=False).input_ids
    known = encoder.model["text_model"].embeddings.token_embedding.weight
    assert torch.equal(encoder.word_tokens[0], known[ids])
    other = DetectorTraining.open(None, {**values, "words": "real"}).network.detector.clip_text_encoder
    assert other.word_tokens.shape[1] < len(ids) or not torch.equal(other.word_tokens, encoder.word_tokens)


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
