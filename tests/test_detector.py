"""The detector on a small model that answers in the published format."""

import gc
import resource
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from llava import ForgeryDetector
from llava.abstention import AbstentionRule, KnownImages
from llava.calibration import Calibration
from llava.conversation import conv_templates
from llava.errors import CheckpointError, ImageReadError, OptionError
from llava.mm_utils import grid_over_image, process_images, tokenizer_image_token
from llava.model.decoding import PreallocatedLayer, Sampler
from llava.report import ForgeryReport
from llava.systems import registry
from llava.systems.base import AnalyzeOptions, System, resolve
from llava.systems.fakereasoning.answer import (
    FORCED_SUMMARY,
    QUESTION,
    STAGES,
    VERDICT_PREFIX,
    complete_to_verdict,
    parse_answer,
)
from llava.systems.fakereasoning.options import FakeReasoningOptions
from tests.trained import picture


@pytest.fixture(scope="module")
def detector(trained) -> ForgeryDetector:
    return ForgeryDetector.from_pretrained(trained, device="cpu")


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [picture(1000 + index, (30 + index, 40)) for index in range(50)]


def forced_probability(detector: ForgeryDetector, image: Image.Image, text: str, question: str = QUESTION) -> float:
    """P(fake) by an independent way: one plain forward over the prompt and the text before the verdict word."""
    system = detector.system
    conversation = conv_templates["llava_v1"].copy()
    conversation.append_message("USER", f"<image>\n{question}")
    conversation.append_message("ASSISTANT", None)
    before = text.partition(VERDICT_PREFIX)
    prompt = f"{conversation.get_prompt()} {before[0]}{VERDICT_PREFIX}"
    ids = tokenizer_image_token(prompt, system.tokenizer, return_tensors="pt")[None]
    pixels = process_images([image], system.image_processor, system.model.config)
    with torch.no_grad():
        logits = system.model(input_ids=ids, images=pixels).logits[0, -1]
    tokens = system.model.config.cpm_tokens
    return float((logits[[tokens["real"], tokens["fake"]]] / 10).softmax(0)[1])


def test_a_report_says_verdict_score_and_reasons(detector, pictures):
    assert isinstance(detector.system, System)
    report = detector.analyze(pictures[0])
    assert isinstance(report, ForgeryReport)
    assert tuple(report.stages) == STAGES
    assert report.label == parse_answer(report.text).verdict
    assert report.label in ("real", "fake")
    assert report.score_source == "verdict" and report.agrees
    assert (report.summary, report.conclusion) == ("I look.", f"This image is {report.label}.")
    assert report.attributes and report.caption and report.reasoning
    plain = report.to_dict()
    assert plain["fake_probability"] == report.fake_probability and plain["agrees"] is True
    assert not {"attention", "mask"} & plain.keys()


@pytest.mark.parametrize("options", [{}, {"temperature": 1.2, "seed": 3}], ids=["greedy", "sampled"])
def test_the_score_is_that_of_a_plain_forward_over_the_text(detector, pictures, options):
    reports = list(detector.analyze_many(pictures, batch_size=8, max_new_tokens=150, **options))
    assert len({report.text for report in reports}) > 5
    assert sum(report.score_source == "verdict" for report in reports) > 25
    for image, report in zip(pictures, reports, strict=True):
        text = report.text if report.score_source == "verdict" else complete_to_verdict(report.text)
        assert abs(report.fake_probability - forced_probability(detector, image, text)) < 1e-4


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.5}, {"max_new_tokens": 30}], ids=["greedy", "sampled", "cut"]
)
def test_batches_answer_as_one_by_one(detector, pictures, options):
    few = pictures[:11]
    wanted = list(detector.analyze_many(few, batch_size=1, **{"max_new_tokens": 150, **options}))
    if "max_new_tokens" not in options:
        assert len({len(report.text) for report in wanted}) > 2
    for size in (2, 3, 4, 5):
        found = list(detector.analyze_many(few, batch_size=size, **{"max_new_tokens": 150, **options}))
        assert [report.text for report in found] == [report.text for report in wanted]
        gaps = [abs(a.fake_probability - b.fake_probability) for a, b in zip(found, wanted, strict=True)]
        assert max(gaps) < 1e-4


def test_an_unfinished_answer_is_forced_to_its_verdict(detector, pictures):
    report = detector.analyze(pictures[0], max_new_tokens=20)
    assert report.score_source == "forced" and report.label is None and report.agrees is None
    text = complete_to_verdict(report.text)
    assert abs(report.fake_probability - forced_probability(detector, pictures[0], text)) < 1e-4


def test_a_forced_answer_does_not_read_its_prompt_again(detector, pictures, monkeypatch):
    wanted = detector.analyze(pictures[3], max_new_tokens=20).fake_probability
    monkeypatch.setattr(detector.system.answering, "_score_texts", None)
    reports = list(detector.analyze_many(pictures[:4], batch_size=4, max_new_tokens=20))
    assert {report.score_source for report in reports} == {"forced"}
    assert reports[3].fake_probability == pytest.approx(wanted, abs=1e-4)


def test_an_answer_cut_right_before_its_verdict_is_forced(detector, pictures):
    system = detector.system
    whole = detector.analyze(pictures[0]).text
    before = whole[: whole.index(VERDICT_PREFIX) + len(VERDICT_PREFIX)]
    tokens = len(system.tokenizer(before, add_special_tokens=False).input_ids)
    report = detector.analyze(pictures[0], max_new_tokens=tokens)
    assert report.text.endswith(VERDICT_PREFIX)
    assert (report.score_source, report.label) == ("forced", None)
    assert abs(report.fake_probability - forced_probability(detector, pictures[0], whole)) < 1e-4


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_score_without_the_answer_beside_the_answer(detector, pictures, size):
    few, options = pictures[:7], {"max_new_tokens": 150}
    wanted = list(detector.analyze_many(few, batch_size=3, score="answer", **options))
    found = list(detector.analyze_many(few, batch_size=size, score="prompt", **options))
    for image, report, answer in zip(few, found, wanted, strict=True):
        assert abs(report.fake_probability - forced_probability(detector, image, VERDICT_PREFIX)) < 1e-4
        assert report.answer_probability == pytest.approx(answer.fake_probability, abs=1e-4)
        assert (report.text, report.label, report.stages) == (answer.text, answer.label, answer.stages)
        assert report.score_source == "prompt" and report.off_distribution
        assert report.agrees == (
            None if report.label is None else (report.fake_probability >= 0.5) == (report.label == "fake")
        )
        assert answer.answer_probability is None and answer.score_source != "prompt" and not answer.off_distribution
    alone = list(detector.analyze_many(few, batch_size=size, score_only=True))
    assert [r.fake_probability for r in found] == pytest.approx([r.fake_probability for r in alone], abs=1e-4)


def test_the_config_says_which_score_is_reported(detector, pictures, monkeypatch):
    def source(**options):
        return detector.analyze(pictures[0], **options).score_source

    assert source() == source(score="answer") == "verdict"
    monkeypatch.setattr(detector.system.model.config, "default_score", "prompt")
    monkeypatch.setattr(detector.system.model.config, "verdict_only_share", 0.3)
    report = detector.analyze(pictures[0])
    assert report.score_source == "prompt" and not report.off_distribution
    assert report.to_dict()["answer_probability"] == detector.analyze(pictures[0], score="answer").fake_probability
    assert source(score="answer") in ("verdict", "forced")


@pytest.mark.parametrize(
    "options",
    [
        {"samples": 3, "temperature": 1.0},
        {"num_beams": 2},
        {"assistant_prefix": FORCED_SUMMARY},
        {"max_new_tokens": 5},
        {"question": "Real?"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_the_score_without_the_answer_does_not_depend_on_the_answer(detector, pictures, options):
    options = {"max_new_tokens": 80, **options}
    report, answer = (detector.analyze(pictures[4], score=score, **options) for score in ("prompt", "answer"))
    question = options.get("question", QUESTION)
    assert abs(report.fake_probability - forced_probability(detector, pictures[4], VERDICT_PREFIX, question)) < 1e-4
    assert report.answer_probability == pytest.approx(answer.fake_probability, abs=1e-4)
    assert report.probabilities == pytest.approx(answer.probabilities, abs=1e-4)


@pytest.mark.parametrize("prefix", [FORCED_SUMMARY, "<CONCLUSION>", VERDICT_PREFIX])
def test_an_answer_goes_on_from_a_given_beginning(detector, pictures, prefix):
    report = detector.analyze(pictures[1], assistant_prefix=prefix, max_new_tokens=200)
    assert report.text.startswith(prefix.strip())
    text = report.text if VERDICT_PREFIX in report.text else complete_to_verdict(report.text)
    assert abs(report.fake_probability - forced_probability(detector, pictures[1], text)) < 1e-4
    if prefix == VERDICT_PREFIX:
        assert report.score_source == "verdict"


def test_a_model_of_two_forms_gives_the_whole_answer_that_is_asked_for(detector, pictures, monkeypatch):
    def begins(**options):
        return detector.analyze(pictures[1], max_new_tokens=8, **options).text.startswith(FORCED_SUMMARY.strip())

    def key():
        return "answer_prefix" in detector.system.describe(FakeReasoningOptions())

    free = detector.analyze(pictures[1], max_new_tokens=8).text
    for share, whole in ((0.3, True), (0.0, False), (1.0, False)):
        monkeypatch.setattr(detector.system.model.config, "verdict_only_share", share)
        assert key() == whole
        assert detector.analyze(pictures[1], max_new_tokens=8).text == free if not whole else begins()
    monkeypatch.setattr(detector.system.model.config, "verdict_only_share", 0.3)
    assert detector.analyze(pictures[1], assistant_prefix="<CONCLUSION>", max_new_tokens=8).text.startswith(
        "<CONCLUSION>"
    )
    assert detector.analyze(pictures[1], score_only=True).text == ""


def test_the_score_alone(detector, pictures, monkeypatch):
    report = detector.analyze(pictures[2], score_only=True)
    assert abs(report.fake_probability - forced_probability(detector, pictures[2], VERDICT_PREFIX)) < 1e-4
    assert report.score_source == "prompt" and report.text == "" and report.off_distribution
    assert report.label == ("fake" if report.fake_probability >= 0.5 else "real")
    monkeypatch.setattr(detector.system.model.config, "verdict_only_share", 0.3)
    assert not detector.analyze(pictures[2], score_only=True).off_distribution


def test_another_question_changes_the_prompt(detector, pictures):
    report = detector.analyze(pictures[0], question="real?", score_only=True)
    assert abs(report.fake_probability - forced_probability(detector, pictures[0], VERDICT_PREFIX, "real?")) < 1e-4
    with pytest.raises(ValueError, match="must not hold <image>"):
        detector.analyze(pictures[0], question="<image> and?")
    with pytest.raises(ValueError, match="unknown conv_mode 'x'"):
        detector.analyze(pictures[0], conv_mode="x")
    for score_only in (False, True):
        with pytest.raises(ValueError, match="the model's context has 2048"):
            detector.analyze(pictures[0], question="why " * 2000, score_only=score_only)


def test_several_answers_share_one_look_and_their_mean_is_the_score(detector, pictures, monkeypatch):
    looks = []
    encode = type(detector.system.model).encode_images
    monkeypatch.setattr(
        type(detector.system.model), "encode_images", lambda self, x, **o: looks.append(len(x)) or encode(self, x, **o)
    )
    options = {"temperature": 1.0, "max_new_tokens": 120}
    reports = list(detector.analyze_many(pictures[:3], batch_size=3, samples=4, **options))
    assert looks == [2, 1]  # each picture once
    for report in reports:
        assert len(report.probabilities) == 4
        assert report.fake_probability == pytest.approx(sum(report.probabilities) / 4)
    single = list(detector.analyze_many(pictures[:3], batch_size=1, **options))
    assert [report.text for report in single] == [report.text for report in reports]
    assert [r.fake_probability for r in single] == pytest.approx([r.probabilities[0] for r in reports], abs=1e-4)


def test_sampling_follows_its_seed(detector, pictures):
    def texts(**options):
        reports = detector.analyze_many(pictures[:6], temperature=2.0, max_new_tokens=60, **options)
        return [report.text for report in reports]

    assert texts(seed=1) == texts(seed=1) != texts(seed=2)
    backwards = list(detector.analyze_many(pictures[5::-1], temperature=2.0, max_new_tokens=60, batch_size=4))
    assert [report.text for report in backwards][::-1] == texts()
    greedy = [report.text for report in detector.analyze_many(pictures[:6], max_new_tokens=60)]
    assert texts(top_p=1e-6) == greedy != texts()


def test_sampled_words_follow_their_probabilities():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).expand(4000, -1)
    for top_p, wanted in ((None, [0.5, 0.3, 0.15, 0.05]), (0.7, [0.625, 0.375, 0.0, 0.0])):
        sampler = Sampler(1.0, top_p, [str(row) for row in range(4000)])
        counts = torch.bincount(sampler.choose(logits, range(4000)), minlength=4) / 4000
        assert torch.allclose(counts, torch.tensor(wanted), atol=0.03)
    warm = Sampler(0.5, None, ["0"] * 1).choose(torch.tensor([[0.0, 100.0]]), [0])
    assert warm.tolist() == [1]


@pytest.mark.parametrize("top_p", [None, 0.999999])
def test_the_rounding_of_another_batch_changes_no_sampled_word(top_p):
    noise = torch.Generator().manual_seed(0)
    alike = 1e-4 * torch.randn(400, 1000, generator=noise)
    alike[:, ::3] -= 30
    rounded = alike + 1e-6 * torch.randn(400, 1000, generator=noise)
    words, again = (
        Sampler(1.0, top_p, [str(row) for row in range(400)]).choose(logits, range(400)) for logits in (alike, rounded)
    )
    assert (words != again).sum() <= 2 and len(words.unique()) > 200
    assert top_p is None or (words % 3 != 0).all()


def test_an_answer_that_speaks_of_images_is_scored(detector, pictures):
    report = detector.analyze(pictures[0], assistant_prefix="<SUMMARY> an <image> here", max_new_tokens=5)
    assert report.score_source == "forced" and 0 <= report.fake_probability <= 1


def test_beams_answer_and_are_scored_like_all_others(detector, pictures):
    reports = list(detector.analyze_many(pictures[:3], batch_size=3, num_beams=2, max_new_tokens=150))
    for image, report in zip(pictures, reports, strict=False):
        assert report.label in ("real", "fake")
        assert report.score_source == "verdict"
        assert abs(report.fake_probability - forced_probability(detector, image, report.text)) < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 3}, "need a temperature"),
        ({"num_beams": 2, "temperature": 0.2}, "exclude each other"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"temperature": -1}, "temperature must be 0 or from"),
        ({"temperature": float("nan")}, "temperature must be 0 or from"),
        ({"temperature": float("inf")}, "temperature must be 0 or from"),
        ({"temperature": 1e-40}, "temperature must be 0 or from"),
        ({"score_only": True, "assistant_prefix": "x"}, "no meaning"),
        ({"score_only": True, "score": "answer"}, "no meaning"),
        ({"score": "both"}, "score must be one of auto, answer, prompt, not 'both'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused_at_once(detector, options, message):
    with pytest.raises(ValueError, match=message):
        detector.analyze_many([], **options)


def test_images_are_opened_only_as_they_are_needed(detector):
    opened = []

    def paths():
        for index in range(10_000):
            opened.append(index)
            yield picture(index, (8, 8))

    reports = detector.analyze_many(paths(), batch_size=4, score_only=True)
    assert opened == []
    for number, _ in zip(range(20), reports, strict=False):
        assert len(opened) < number + 3 * 4
    reports.close()


@pytest.mark.slow
def test_memory_stays_flat_over_ten_thousand_images(detector, tmp_path):
    picture(0, (300, 200)).save(tmp_path / "a.png")
    reports = detector.analyze_many((tmp_path / "a.png" for _ in range(10_000)), batch_size=16, score_only=True)
    for number, report in enumerate(reports):
        assert report.error == ""
        if number == 1_000:
            gc.collect()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"peak memory grew by {grown / 1024:.1f} MiB over 9,000 images")
    assert grown < 30 * 1024


def test_bad_images_are_reported_in_their_place(detector, tmp_path):
    picture(1).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    images = [tmp_path / "good.png", tmp_path / "bad.png", tmp_path / "absent.png", picture(2), tmp_path / "bad.png"]
    reports = list(detector.analyze_many(images, batch_size=2, score_only=True))
    assert [bool(report.error) for report in reports] == [False, True, True, False, True]
    assert "bad.png: no image in a known format" in reports[1].error
    assert "absent.png: there is no such file" in reports[2].error
    assert reports[1].label is None and reports[1].fake_probability is None
    with pytest.raises(ImageReadError, match=r"bad\.png"):
        detector.analyze(tmp_path / "bad.png")


class CountingSystem:
    """A system that takes two images at a time, and cannot prepare pictures that are 13 wide."""

    name = "counting"
    notice = ""
    options = AnalyzeOptions

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.threads: set[int] = set()

    def prepare(self, image):
        self.threads.add(threading.get_ident())
        if image.width == 13:
            raise KeyError("a mistake in the code")
        return image.width

    def batch_size(self, options):
        return 5

    def analyze_batch(self, prepared, options):
        if len(prepared) > 2:
            raise torch.OutOfMemoryError("too many")
        self.batches.append(len(prepared))
        return [ForgeryReport(None, width / 100, "detector") for width in prepared]


def test_a_batch_that_does_not_fit_is_halved():
    system = CountingSystem()
    reports = list(ForgeryDetector(system).analyze_many(picture(0, (w, 5)) for w in range(1, 8)))
    assert [report.fake_probability for report in reports] == [width / 100 for width in range(1, 8)]
    assert max(system.batches) == 2 and sum(system.batches) == 7
    assert threading.get_ident() not in system.threads


def test_a_mistake_in_the_code_is_not_taken_for_a_bad_image():
    with pytest.raises(KeyError, match="a mistake"):
        list(ForgeryDetector(CountingSystem()).analyze_many(picture(0, (w, 5)) for w in range(1, 20)))


def test_a_rule_looks_at_an_image_once(detector, pictures, monkeypatch):
    """What says whether an image is known comes from the pass that answers; it is the same as when asked alone."""
    looks = []
    tower = detector.system.model.get_model().tower("clip")
    hook = tower.register_forward_hook(lambda module, given, output: looks.append(len(given[0])))
    (alone,) = detector.features_many(pictures[:1])
    known = KnownImages(np.zeros(len(alone)), np.ones(len(alone)), np.eye(len(alone))[:1], np.zeros((1, 2)), np.inf)
    monkeypatch.setattr(detector, "rule", AbstentionRule(1.0, 0.0, 0.1, 0.9, None, known))
    looks.clear()
    report = detector.analyze(pictures[0], score_only=True)
    hook.remove()
    assert looks == [1] and np.allclose(report.features, alone, atol=1e-5) and "features" not in report.to_dict()


def test_attention_lies_over_the_picture(detector, pictures, monkeypatch):
    report = detector.analyze(pictures[0], attention=True, max_new_tokens=5)
    assert report.attention.shape == (pictures[0].height, pictures[0].width)
    assert report.attention.min() >= 0
    model = type(detector.system.model)
    encode = model.encode_images

    def looks_at_one_patch(self, images, return_attention=False):
        seen = encode(self, images, return_attention=return_attention)
        attention = torch.zeros_like(seen.attention)
        attention[..., 3] = 1.0  # the lower right of a 2x2 grid
        return replace(seen, attention=attention)

    monkeypatch.setattr(model, "encode_images", looks_at_one_patch)
    oblong = picture(5, (120, 40))
    heat = detector.analyze(oblong, attention=True, score_only=True).attention
    assert heat.shape == (40, 120)
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    assert column >= 60 and row >= 20


@pytest.mark.parametrize(("width", "height"), [(300, 100), (100, 300), (120, 119)])
def test_one_patch_lights_its_own_place_of_the_picture(width, height):
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    for row in range(6):
        for column in range(6):
            grid = np.zeros((6, 6))
            grid[row, column] = 1
            heat = grid_over_image(grid, (width, height), "pad")
            assert heat.shape == (height, width)
            x, y = (column + 0.5) * side / 6 - left, (row + 0.5) * side / 6 - top
            if 0 <= x < width and 0 <= y < height:
                assert heat[int(y), int(x)] > 0.9
                far = np.hypot(*np.meshgrid(np.arange(width) - x, np.arange(height) - y)) > side / 3
                assert heat[far].max(initial=0) < 0.01


def test_a_cropping_model_sees_only_the_middle():
    heat = grid_over_image(np.ones((4, 4)), (90, 30), "square")
    assert heat[:, 30:60].min() == 1 and heat[:, :30].max() == 0 and heat[:, 60:].max() == 0


def test_a_fusion_without_attention_says_so(detector, pictures, monkeypatch):
    monkeypatch.setattr(detector.system.model.config, "mm_fusion_type", "interleave")
    with pytest.raises(ValueError, match="'interleave' has no attention"):
        detector.analyze(pictures[0], attention=True)


@pytest.mark.parametrize(
    ("answer", "completed"),
    [
        ("", VERDICT_PREFIX),
        ("<SUMMARY> a", f"<SUMMARY> a </SUMMARY>\n\n{VERDICT_PREFIX}"),
        ("<SUMMARY> a </SUMMARY>", f"<SUMMARY> a </SUMMARY>\n\n{VERDICT_PREFIX}"),
        ("words", f"words\n\n{VERDICT_PREFIX}"),
        ("<REASONING> r <CONCLUSION> I say fake.", f"<REASONING> r {VERDICT_PREFIX}"),
        (f"x {VERDICT_PREFIX}", f"x {VERDICT_PREFIX}"),
        (f"<CONCLUSION> no. {VERDICT_PREFIX} fake. </CONCLUSION>", f"<CONCLUSION> no. {VERDICT_PREFIX}"),
    ],
)
def test_answers_are_brought_to_their_verdict(answer, completed):
    assert complete_to_verdict(answer) == completed


def test_a_cache_with_room_is_a_cache():
    torch.manual_seed(0)
    preallocated, plain = PreallocatedLayer(), PreallocatedLayer.__mro__[1]()
    for step in range(40):
        keys, values = torch.randn(3, 2, 1 + 9 * (step % 3), 4), torch.randn(3, 2, 1 + 9 * (step % 3), 4)
        if step == 20:
            for layer in (preallocated, plain):
                layer.batch_repeat_interleave(2)
        if step > 20:
            keys, values = keys.repeat(2, 1, 1, 1), values.repeat(2, 1, 1, 1)
        if step == 30:
            for layer in (preallocated, plain):
                layer.batch_select_indices(torch.tensor([0, 4, 5]))
        if step >= 30:
            keys, values = keys[:3], values[:3]
        if step == 20:
            keys, values = keys.repeat(2, 1, 1, 1), values.repeat(2, 1, 1, 1)
        for one, other in zip(preallocated.update(keys, values), plain.update(keys, values), strict=True):
            assert torch.equal(one, other)


def test_a_detector_needs_a_checkpoint_of_a_known_system(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match=r"no checkpoint of a known system .* 'bert'"):
        ForgeryDetector.from_pretrained(tmp_path)


def test_libraries_say_nothing_while_a_model_is_opened():
    import logging

    from transformers.utils import logging as libraries

    from llava.cli import quiet_libraries

    before = logging.root.manager.disable
    with quiet_libraries():
        assert not logging.getLogger("some_library").isEnabledFor(logging.WARNING)
        assert logging.getLogger("some_library").isEnabledFor(logging.ERROR)
        assert not libraries.is_progress_bar_enabled()
    assert logging.root.manager.disable == before
    assert libraries.is_progress_bar_enabled()


@pytest.mark.parametrize("question", ["", " ", "\n\t"])
@pytest.mark.parametrize("name", ["fakereasoning", "m2f2det"])
def test_an_empty_question_is_refused(name, question):
    """It is not the system's own question in silence."""
    with pytest.raises(OptionError, match="question must not be empty"):
        resolve(registry.spec(name).options)(question=question)


def test_scores_are_calibrated_by_the_models_own_file(trained, detector, pictures, tmp_path):
    calibration = Calibration(2.0, 0.5, "answer")
    for file in trained.iterdir():
        (tmp_path / file.name).symlink_to(file)
    calibration.save(tmp_path / "calibration.json")
    calibrated = ForgeryDetector.from_pretrained(tmp_path, device="cpu")
    report = calibrated.analyze(pictures[0])
    assert report.fake_probability == pytest.approx(detector.analyze(pictures[0]).fake_probability)
    assert calibrated.calibrated(report) == pytest.approx(float(calibration(np.array([report.fake_probability]))[0]))
    assert calibrated.calibrated(calibrated.analyze(pictures[0], score_only=True)) is None
    assert detector.calibrated(report) is None
    (tmp_path / "calibration.json").write_text("{}")
    assert ForgeryDetector.from_pretrained(tmp_path, device="cpu").calibration is None
