"""FakeShield as a user meets it: the folder and its parts, masks, gates, batches, options and faults."""

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from llava import ForgeryDetector, load_pretrained_model
from llava.__main__ import main
from llava.data.collator import Sample
from llava.errors import CheckpointError, OptionError
from llava.mm_utils import process_images
from llava.model.answering import Answering
from llava.model.checkpoint_files import read_tensors
from llava.systems import registry
from llava.systems.fakeshield import answer, checkpoint, tagger
from llava.systems.fakeshield.options import FakeShieldOptions
from llava.systems.fakeshield.system import SegmenterPart
from llava.train.validation import verdict_predictor
from tests.goldens import lay_out

GOLDENS = Path(__file__).parents[1] / "data" / "goldens_fakeshield"
IMAGES = [GOLDENS / "images" / f"img{index}.png" for index in range(3)]
TEXTS = {Path(r["image"]).name: r["outputs"] for r in map(json.loads, (GOLDENS / "DTE-FDM_output.jsonl").open())}


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    for name in ("config.json", "preprocessor_config.json"):
        (folder / name).write_bytes((GOLDENS / "clip" / name).read_bytes())
    prefix = "model.vision_tower.vision_tower."
    own = {n.removeprefix(prefix): t[...] for n, t in read_tensors(GOLDENS / "DTE-FDM").items() if n.startswith(prefix)}
    save_file(own, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The published folder with a tagger whose head alone decides: its tags follow the images' goldens."""
    root = tmp_path_factory.mktemp("fakeshield")
    torch.manual_seed(0)
    net = tagger.Tagger().eval()
    crops = tagger.normalize([tagger.crop_image(Image.open(image)) for image in IMAGES])
    with torch.no_grad():
        features = net.net.resnet(crops).pooler_output.flatten(1)
        head = net.net.classifier[1]
        head.weight.copy_(torch.linalg.pinv(features).T * 4)
        head.bias.zero_()
    tagger.save_tagger(net, root / "DTG.pth")
    (root / "DTE-FDM").symlink_to(GOLDENS / "DTE-FDM")
    lay_out(GOLDENS / "MFLM", root / "MFLM")
    (root / "MFLM" / "config.json").unlink()
    heads = json.loads((GOLDENS / "sizes.json").read_text())["sam"]["dec_heads"]
    config = json.loads((GOLDENS / "MFLM" / "config.json").read_text())
    (root / "MFLM" / "config.json").write_text(
        json.dumps({**config, "sam": {"decoder": {"num_attention_heads": heads}}})
    )
    return root


@pytest.fixture(scope="module")
def detector(folder, clip) -> ForgeryDetector:
    return ForgeryDetector.from_pretrained(folder, device="cpu", vision_tower=clip)


def golden_mask(index: int) -> np.ndarray:
    with Image.open(GOLDENS / "masks" / f"img{index}.png") as mask:
        return np.asarray(mask) > 127


def test_a_batch_goes_through_all_three_parts(detector):
    reports = list(detector.analyze_many(IMAGES, batch_size=3))
    assert [report.text for report in reports] == [TEXTS[image.name] for image in IMAGES]
    assert [report.label for report in reports] == ["fake", "real", "fake"]
    assert [report.tag for report in reports] == list(answer.DOMAIN_TITLES)
    assert all((report.fake_probability > 0.5) == (report.label == "fake") for report in reports)
    assert {report.score_source for report in reports} == {"verdict"}
    assert reports[1].mask is None and "no mask was asked for" in reports[1].details["mask"]
    assert "edges" in reports[0].stages["BASIS"]
    # The published tool asks the i-th image in the i-th wording, and this one always in the first.
    assert (reports[0].mask == golden_mask(0)).mean() > 0.999
    assert reports[0].details["mask_area"] == pytest.approx(golden_mask(0).mean(), abs=1e-4)
    assert 0.5 < reports[0].details["mask_confidence"] < 1 and reports[0].details["segments"] == 1


def test_a_batch_is_its_images(detector):
    together = list(detector.analyze_many(IMAGES, batch_size=3))
    for image, report in zip(IMAGES, together, strict=True):
        alone = detector.analyze(image)
        assert (alone.text, alone.tag, alone.label) == (report.text, report.tag, report.label)
        assert alone.fake_probability == pytest.approx(report.fake_probability, abs=1e-5)
        assert (alone.mask is None) == (report.mask is None)
        assert alone.mask is None or (alone.mask != report.mask).mean() < 1e-3


def test_another_wording_gives_the_authors_mask(detector):
    """Their third image is asked in their third wording."""
    report = detector.analyze(IMAGES[2], mask_question=3)
    assert (report.mask == golden_mask(2)).all()


def test_options_of_masks(detector):
    none = detector.analyze(IMAGES[0], mask=False)
    assert none.mask is None and "segments" not in none.details
    soft, hard = detector.analyze(IMAGES[0], soft_mask=True), detector.analyze(IMAGES[0])
    assert soft.mask.dtype == np.float32 and soft.mask.min() > 0 and soft.mask.max() < 1
    assert ((soft.mask > 0.5) == hard.mask).all()
    score = detector.analyze(IMAGES[0], score_only=True)
    assert score.mask is None and score.score_source == "prompt" and score.tag == "AIGC inpainting"
    published = detector.analyze(IMAGES[1], gate="published")
    assert published.mask is None, "the answer holds the published phrase"
    other = detector.analyze(IMAGES[0], description="Nothing but the sky was changed.")
    assert other.text == TEXTS["img0.png"] and other.details["segmenter"]


def test_tags_change_the_question(detector):
    system = detector.system
    given, own, none = (system.tagged_prompt(FakeShieldOptions(), domain) for domain in (2, 0, None))
    assert "by Photoshop. Was this photo" in given and "AIGC" in own and "suspected" not in none
    assert detector.analyze(IMAGES[0], tag="photoshop").tag == "Photoshop"
    assert detector.analyze(IMAGES[0], tag="none").tag == ""


def test_no_segment_gives_an_empty_mask_that_says_so(detector, monkeypatch):
    monkeypatch.setattr(detector.system.segmenter.answering, "seg_id", -1)
    report = detector.analyze(IMAGES[0])
    assert report.mask.shape == (Image.open(IMAGES[0]).height, Image.open(IMAGES[0]).width)
    assert not report.mask.any() and report.details["segments"] == 0 and "found nothing" in report.details["mask"]


def test_a_long_explanation_is_cut_for_the_segmenter(detector):
    answering = detector.system.segmenter.answering
    request, is_cut = answering.request("the sky was changed at the left " * 400, 0)
    assert is_cut and request.endswith(answer.MASK_QUESTIONS[0]) and request.count("the sky") < 400
    assert answering.request("short", 1) == (answer.mask_request("short", 1), False)
    assert len(answering.segment([detector.system.prepare(Image.open(IMAGES[0])).segmenter], [request])) == 1


def test_an_image_that_the_segmenter_cannot_take_gets_no_mask(detector):
    thin = Image.new("RGB", (900, 3), (90, 120, 150))
    report = detector.analyze(thin, gate="published")
    assert report.error == "" and report.text and report.mask is None and "too oblong" in report.details["mask"]


def test_both_language_models_share_one_tower(detector):
    segmenter = detector.system.segmenter.answering.segmenter
    assert segmenter.language_model.model.vision_tower is detector.system.model.model.vision_tower


def test_half_precision(folder, clip):
    detector = ForgeryDetector.from_pretrained(folder, device="cpu", vision_tower=clip, dtype="bfloat16")
    report = detector.analyze(IMAGES[0])
    assert report.label == "fake" and (report.mask == golden_mask(0)).mean() > 0.9
    segmenter = detector.system.segmenter.answering.segmenter
    assert segmenter.sam.dtype == segmenter.language_model.dtype == torch.bfloat16


def test_a_tower_of_another_dtype_is_not_shared(folder, clip, detector):
    """The published explainer is stored in float16 and the segmenter in bfloat16."""
    part = detector.system.segmenter
    other = SegmenterPart(part.files, {"device": "cpu", "dtype": "bfloat16"}, detector.system.model)
    tower = other.answering.segmenter.language_model.model.vision_tower
    assert tower is not detector.system.model.model.vision_tower
    found = other.answering.segment([other.prepare(Image.open(IMAGES[0]))], [other.answering.request("the sky", 0)[0]])
    assert found[0].logits is not None


def test_every_part_works_alone(folder, clip):
    explainer = ForgeryDetector.from_pretrained(folder / "DTE-FDM", "fakeshield", device="cpu", vision_tower=clip)
    report = explainer.analyze(IMAGES[0])
    assert report.fake_probability is not None and report.mask is None and report.tag == ""
    with pytest.raises(OptionError, match="no segmenter"):
        explainer.analyze(IMAGES[0], description="the sky")
    segmenter = ForgeryDetector.from_pretrained(folder / "MFLM", device="cpu", vision_tower=clip)
    described = segmenter.analyze(IMAGES[0], description=TEXTS["img0.png"])
    assert described.label is None and (described.mask == golden_mask(0)).mean() > 0.999
    assert segmenter.analyze(IMAGES[0]).mask is not None
    with pytest.raises(OptionError, match="nothing to do"):
        segmenter.analyze(IMAGES[0], mask=False)
    with pytest.raises(OptionError, match="question would do nothing"):
        segmenter.analyze(IMAGES[0], question="Why?")
    tags = ForgeryDetector.from_pretrained(folder / "DTG.pth", device="cpu")
    assert [report.tag for report in tags.analyze_many(IMAGES)] == list(answer.DOMAIN_TITLES)


def test_the_command_writes_masks(folder, clip, tmp_path):
    out = tmp_path / "out.jsonl"
    given = ["--model-path", str(folder), "--vision-tower", clip, "--img_path", str(GOLDENS / "images")]
    assert main(["detect", *given, "--json", str(out), "--quiet"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["mask"] is not None for row in rows] == [True, False, True]
    with Image.open(tmp_path / rows[0]["mask"]) as mask:
        assert mask.mode == "L" and set(np.unique(np.asarray(mask))) == {0, 255}
        assert ((np.asarray(mask) > 127) == golden_mask(0)).mean() > 0.999
    assert main(["detect", *given, "--no-mask", "--tag", "none", "--json", str(tmp_path / "no.jsonl"), "--quiet"]) == 0
    assert '"mask": null' in (tmp_path / "no.jsonl").read_text().splitlines()[0]


@pytest.mark.parametrize(("option", "kind"), [("load_8bit", "Linear8bitLt"), ("load_4bit", "Linear4bit")])
def test_eight_and_four_bits(folder, clip, option, kind):
    """In 4 bits small layers stay whole: bitsandbytes packs blocks of 32 x 64 weights on some CPUs."""
    pytest.importorskip("bitsandbytes")
    detector = ForgeryDetector.from_pretrained(folder, device="cpu", vision_tower=clip, **{option: True})
    report = detector.analyze(IMAGES[0], max_new_tokens=8, gate="published")
    assert report.fake_probability is not None and report.mask is not None
    layers = detector.system.segmenter.answering.segmenter.language_model.model.layers
    for layer in (layers[0].self_attn.q_proj, layers[0].mlp.down_proj):
        fills_blocks = layer.out_features % 32 == 0 and layer.in_features % 64 == 0
        assert type(layer).__name__ == (kind if fills_blocks or option == "load_8bit" else "Linear")


def test_what_is_written_opens_again(folder, clip, tmp_path):
    files = checkpoint.read_segmenter(folder / "MFLM", vision_tower=clip)
    tokenizer, segmenter = checkpoint.load_segmenter(files, device="cpu")
    (tmp_path / "own").mkdir()
    checkpoint.write_segmenter(segmenter, tokenizer, tmp_path / "own", unused=files.unused)
    written = read_tensors(tmp_path / "own")
    published = {name for name in read_tensors(folder / "MFLM") if "inv_freq" not in name}
    assert published <= set(written) and all(
        name.startswith("model.vision_tower.") for name in set(written) - published
    )
    again = ForgeryDetector.from_pretrained(tmp_path / "own", device="cpu")
    before = ForgeryDetector.from_pretrained(folder / "MFLM", device="cpu", vision_tower=clip)
    wanted, found = (one.analyze(IMAGES[2], description="the sky") for one in (before, again))
    assert (wanted.mask == found.mask).all()
    net = tagger.open_tagger(folder / "DTG.pth")
    tagger.save_tagger(net, tmp_path / "DTG.pth")
    assert load_state(tmp_path / "DTG.pth").keys() == load_state(folder / "DTG.pth").keys()


def test_the_whole_folder_is_written_and_opens(detector, clip, tmp_path):
    detector.system.save(tmp_path / "out")
    assert sorted(item.name for item in (tmp_path / "out").iterdir()) == ["DTE-FDM", "DTG.pth", "MFLM"]
    again = ForgeryDetector.from_pretrained(tmp_path / "out", device="cpu", vision_tower=clip)
    before, after = detector.analyze(IMAGES[0]), again.analyze(IMAGES[0])
    assert (before.text, before.tag) == (after.text, after.tag)
    # Equal weights lie elsewhere in memory, and on some processors a sum's rounding hangs on that.
    assert after.fake_probability == pytest.approx(before.fake_probability, abs=1e-6)
    assert (before.mask == after.mask).all()
    written, published = (read_tensors(root / "DTE-FDM") for root in (tmp_path / "out", GOLDENS))
    assert written.keys() == published.keys()


def load_state(file: Path) -> dict:
    return torch.load(file, weights_only=True)


def test_files_are_known_by_what_they_hold(folder, tmp_path):
    for path in (folder, folder / "MFLM", folder / "DTG.pth"):
        assert registry.identify(registry.read_files(path)).name == "fakeshield"
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint of a known system"):
        registry.identify(registry.read_files(tmp_path / "empty"))
    with pytest.raises(CheckpointError, match="holds no part of FakeShield"):
        ForgeryDetector.from_pretrained(tmp_path / "empty", "fakeshield")


def test_faults_are_told_in_one_sentence(folder, clip, tmp_path):
    with pytest.raises(CheckpointError, match=r"Pass vision_tower="):
        ForgeryDetector.from_pretrained(folder / "MFLM", device="cpu")
    with pytest.raises(OptionError, match="dino_weights would do nothing"):
        ForgeryDetector.from_pretrained(folder, device="cpu", dino_weights="x.pth")
    broken = tmp_path / "MFLM"
    broken.mkdir()
    for file in (folder / "MFLM").iterdir():
        if not file.name.startswith("pytorch_model"):
            (broken / file.name).write_bytes(file.read_bytes())
    tensors = {name: tensor[...].clone() for name, tensor in read_tensors(folder / "MFLM").items()}
    del tensors["model.grounding_encoder.mask_decoder.iou_token.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    detector = ForgeryDetector.from_pretrained(broken, device="cpu", vision_tower=clip)
    with pytest.raises(CheckpointError, match=r"sam\.mask_decoder\.iou_token\.weight"):
        detector.analyze(IMAGES[0])
    torch.save({"fc.weight": torch.ones(3, 2), "layer4.0.conv3.weight": torch.ones(1)}, tmp_path / "DTG.pth")
    with pytest.raises(CheckpointError, match="no tagger of 3 domains"):
        ForgeryDetector.from_pretrained(tmp_path / "DTG.pth").analyze(IMAGES[0])


@pytest.mark.parametrize(
    "values",
    [{"tag": "x"}, {"gate": "x"}, {"mask_question": 4}, {"description": " "}, {"description": "a", "mask": False}],
)
def test_wrong_options_are_refused(values):
    with pytest.raises(OptionError):
        FakeShieldOptions(**values)


# --- words


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("It was edited with care.", "fake"),
        ("The photo does not look edited.", "real"),
        ("There are no signs of tampering in it.", "real"),
        ("I cannot say whether it has been tampered with.", None),
        ("The image is not authentic.", "fake"),
        ("It isn't a manipulated picture.", "real"),
        ("The sky has been carefully retouched, and the rest is untouched.", "fake"),
    ],
)
def test_verdicts_in_other_words(text, verdict):
    assert answer.parse_answer(text).verdict == verdict


def test_tolerant_reading_takes_more():
    for text, verdict in (
        ("This is a fake photo.", "fake"),
        ("It is likely edited.", "fake"),
        ("It looks real.", "real"),
    ):
        assert answer.parse_answer(text).verdict is None
        assert answer.parse_answer(text, tolerant=True).verdict == verdict


def test_answers_are_written_and_read_back():
    for label in ("real", "fake"):
        written = answer.write_training(label, "the edges are too sharp")
        parsed = answer.parse_answer(written)
        assert parsed.verdict == label and parsed.stages["BASIS"] == "the edges are too sharp"
        assert answer.parse_training([written]).verdict == label
        assert answer.parse_answer(answer.shorten(written)).verdict == label
        assert answer.complete_to_verdict(written).endswith("The picture has")
    assert answer.parse_training(["The picture has been edited.", "It is untouched."]).problem == "its answers disagree"


# --- validation in training


def asked_in_validation(clip, questions: list[str], monkeypatch, **given) -> list[tuple[str, int]]:
    """What a validation with these first questions asks, and of how many images at a time."""
    _, model, processor, length = load_pretrained_model(
        GOLDENS / "DTE-FDM", system="fakeshield", device="cpu", dtype="float32", vision_tower=clip
    )
    asked, scores = [], Answering.prompt_scores

    def listen(own, prompt, embeddings, number):
        asked.append((prompt.split("<image>\n")[1].removesuffix(" ASSISTANT:"), number))
        return scores(own, prompt, embeddings, number)

    monkeypatch.setattr(Answering, "prompt_scores", listen)
    predict = verdict_predictor(
        model, context_length=length, score_only=True, max_new_tokens=4, precision=nullcontext, **given
    )
    pixels = process_images([Image.open(IMAGES[0])], processor, model.config)[0]
    nothing = torch.zeros(1, dtype=torch.long)
    verdicts = predict([Sample(nothing, nothing, pixels, 0, question=question) for question in questions])
    assert len(verdicts) == len(questions) and set(verdicts) <= {0, 1}
    return asked


def test_a_validation_asks_with_the_domains_sentences_of_its_records(clip, monkeypatch):
    first, last = (answer.tag_sentence(domain) + answer.QUESTION for domain in (0, 2))
    asked = asked_in_validation(clip, [first, "Is it real?", last, first], monkeypatch)
    assert asked == [(first, 2), (answer.QUESTION, 1), (last, 1)]


def test_in_step_each_image_is_asked_about_alone_only_where_questions_differ(clip, monkeypatch):
    first, other = (answer.tag_sentence(domain) + answer.QUESTION for domain in (0, 1))
    alike = asked_in_validation(clip, [first, first], monkeypatch, in_step=[first, first])
    assert alike == [(first, 2)]
    monkeypatch.undo()
    assert asked_in_validation(clip, [first, first], monkeypatch, in_step=[first, other]) == [(first, 1)] * 2
