"""FakeVLM's files: every name at the published size, and the way to transformers' own class and back."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from shutil import copytree

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, LlavaForConditionalGeneration, LlavaProcessor

from llava import ForgeryDetector, load_pretrained_model
from llava.errors import CheckpointError, OptionError
from llava.merge import main as merge
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.checkpoint_layout import stored_state_dict
from llava.model.configuration import LlavaConfig
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.saving import save_published
from llava.systems import registry
from llava.systems.base import CheckpointFiles
from llava.systems.fakevlm.answer import QUESTION
from llava.systems.fakevlm.checkpoint import FORMAT, KEY_MAP
from llava.systems.fakevlm.system import fill_prompt

GOLDENS = Path(__file__).parents[1] / "data" / "goldens_fakevlm"
PUBLISHED = json.loads(gzip.decompress((GOLDENS / "published_keys.json.gz").read_bytes()))
IMAGES = [Image.open(file) for file in sorted((GOLDENS / "images").glob("*.png"))]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The small model as it is written here in the published layout."""
    target = tmp_path_factory.mktemp("written") / "model"
    words = ["--model-path", str(GOLDENS / "base"), "--system", "fakevlm", "--layout", "published"]
    assert merge([*words, "--save-model-path", str(target)]) == 0
    return target


def open_base(folder: Path = GOLDENS / "base", **options):
    return load_pretrained_model(folder, system="fakevlm", device="cpu", **options)


def shapes_of(tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_all_names_and_shapes_at_the_published_size():
    shapes = {name: tuple(shape) for name, shape in PUBLISHED["keys"].items()}
    published = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    native = KEY_MAP.to_native(published)
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "crop_size": {"height": 336, "width": 336}}
    given = {**PUBLISHED["config"], "model_type": "llava", "mm_image_processor": processor}
    config = LlavaConfig.from_dict(FORMAT.infer_config(given, native))
    with torch.device("meta"):
        model = LlavaLlamaForCausalLM(config)
    stored = stored_state_dict(model)
    assert shapes_of(native) == shapes_of(stored)
    assert shapes_of(KEY_MAP.to_published(stored)) == shapes
    assert len(shapes) == PUBLISHED["n_tensors"] == 686
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED["parameters"]["total"]
    model.get_model().freeze_towers()
    model.requires_grad_(True)
    model.get_model().freeze_behind_outputs()
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    assert frozen == PUBLISHED["parameters"]["never_reached_by_a_gradient"]


def transformers_logits(folder: Path, prompt: str) -> torch.Tensor:
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    # The image processor on torchvision resizes otherwise: its pixels differ by up to 0.02.
    images_by_pil = AutoImageProcessor.from_pretrained(folder, backend="pil")
    processor = LlavaProcessor.from_pretrained(folder)
    processor.image_processor = images_by_pil
    images = [[image.convert("RGB")] for image in IMAGES]
    batch = processor(images=images, text=[prompt] * len(IMAGES), return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits


def own_logits(loaded, prompt: str) -> torch.Tensor:
    tokenizer, model, processor, _ = loaded
    ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None].expand(len(IMAGES), -1)
    with torch.no_grad():
        return model(input_ids=ids, images=process_images(IMAGES, processor, model.config)).logits


@pytest.mark.parametrize("prompt", ["<image>Does the image looks real/fake?", "USER: <image>\nIs it? ASSISTANT:"])
def test_a_written_folder_opens_in_transformers_with_the_same_logits(written, prompt):
    theirs = transformers_logits(written, prompt)
    assert (theirs - own_logits(open_base(), prompt)).abs().max() < 1e-5


def test_a_written_folder_comes_back_and_knows_its_system(written):
    assert registry.identify(registry.read_files(written)).name == "fakevlm"
    back, first = load_pretrained_model(written, device="cpu"), open_base()
    before = first[1].state_dict()
    assert all(torch.equal(value, before[name]) for name, value in back[1].state_dict().items())
    assert back[1].config.conv_mode == "raw" and back[1].config.image_aspect_ratio == "crop"
    assert torch.equal(own_logits(back, "<image>x"), own_logits(first, "<image>x"))


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("style", ["raw", "chat", "chat_system"])
def test_image_mode_and_prompt_style_are_recorded(tmp_path, mode, style):
    _, model, _, _ = open_base(image_aspect_ratio=mode)
    model.config.conv_mode = style
    save_published(model, tmp_path / "model", model.config.to_dict(), GOLDENS / "base")
    again = load_pretrained_model(tmp_path / "model", device="cpu")[1]
    assert again.config.image_aspect_ratio == mode and again.config.conv_mode == style
    processor = LlavaProcessor.from_pretrained(tmp_path / "model")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == fill_prompt(style, "Is it?")


def test_transformers_pads_where_the_folder_says_so(tmp_path):
    loaded = open_base(image_aspect_ratio="pad")
    save_published(loaded[1], tmp_path / "model", loaded[1].config.to_dict(), GOLDENS / "base")
    prompt = "<image>Does the image looks real/fake?"
    assert (transformers_logits(tmp_path / "model", prompt) - own_logits(loaded, prompt)).abs().max() < 1e-5


_SERVED = """
import base64, json, sys
sys.modules["torchvision"] = None  # so that images are decoded and resized by Pillow, as the reference's are
from transformers import AutoProcessor, LlavaForConditionalGeneration
image, question, *folders = sys.argv[1:]
url = "data:image/png;base64," + base64.b64encode(open(image, "rb").read()).decode()
turn = [{"role": "user", "content": [{"type": "image", "url": url}, {"type": "text", "text": question}]}]
found = []
for folder in folders:
    processor = AutoProcessor.from_pretrained(folder)
    given = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(turn, **given)
    ids = LlavaForConditionalGeneration.from_pretrained(folder).generate(**inputs, max_new_tokens=8, do_sample=False)
    found.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
print(json.dumps(found))
"""


@pytest.mark.slow
def test_what_a_server_does_with_a_folder_gives_the_authors_ids(tmp_path):
    """Transformers' server asks a folder's processor, template and model in this way, in either prompt style."""
    _, model, _, _ = open_base()
    styles = ("raw", "chat")
    for style in styles:
        model.config.conv_mode = style
        save_published(model, tmp_path / style, model.config.to_dict(), GOLDENS / "base")
    facts = json.loads((GOLDENS / "goldens.json").read_text())
    words = [str(GOLDENS / facts["images"][0]["path"]), QUESTION, *(str(tmp_path / style) for style in styles)]
    served = subprocess.run([sys.executable, "-c", _SERVED, *words], capture_output=True, text=True, check=True)
    for style, ids in zip(styles, json.loads(served.stdout.splitlines()[-1]), strict=True):
        expected = facts["prompts"][style]["greedy"][0]["ids"]
        assert ids == expected[: len(ids)] and ids


def test_version_five_names_are_read(written, tmp_path):
    """A model that transformers 5 has in memory, written under those names."""
    model = LlavaForConditionalGeneration.from_pretrained(written, dtype=torch.float32)
    folder = copytree(written, tmp_path / "model")
    save_file({name: value.clone() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    again = load_pretrained_model(folder, device="cpu")
    assert torch.equal(own_logits(again, "<image>x"), own_logits(open_base(), "<image>x"))


def test_what_transformers_saves_again_comes_back(written, tmp_path):
    LlavaForConditionalGeneration.from_pretrained(written, dtype=torch.float32).save_pretrained(tmp_path / "again")
    LlavaProcessor.from_pretrained(written).save_pretrained(tmp_path / "again")
    again = load_pretrained_model(tmp_path / "again", device="cpu")
    assert again[1].config.system == "fakevlm"
    assert torch.equal(own_logits(again, "<image>x"), own_logits(open_base(), "<image>x"))


def copy_base(target: Path, *left_out: str, **changes) -> Path:
    target.mkdir()
    for file in (GOLDENS / "base").iterdir():
        if not any(file.name.startswith(name) for name in left_out):
            (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return target


WORDS = ("tokenizer", "special_tokens", "added_tokens", "preprocessor", "processor", "chat_template")


def test_a_folder_without_tokenizer_takes_the_bases_and_says_so(tmp_path, capsys):
    bare = copy_base(tmp_path / "bare", *WORDS)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        open_base(bare)
    loaded = open_base(bare, model_base=GOLDENS / "base")
    assert "has no tokenizer; it and the image processor are those of" in capsys.readouterr().err
    assert torch.equal(own_logits(loaded, "<image>x"), own_logits(open_base(), "<image>x"))
    named = copy_base(tmp_path / "named", *WORDS, _name_or_path=str(GOLDENS / "base"))
    assert open_base(named)[2] is not None
    with pytest.raises(CheckpointError, match="the base would do nothing"):
        open_base(GOLDENS / "base", model_base=GOLDENS / "base")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": {"model_type": "mistral"}}, "a LLaVA of a mistral and a clip_vision_model is not supported"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "siglip_vision_model is not supported"),
        ({"vision_feature_select_strategy": "odd"}, "vision_feature_select_strategy"),
    ],
)
def test_another_llava_is_refused(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        open_base(copy_base(tmp_path / "model", **changes))


def test_which_files_are_fakevlms():
    config = json.loads((GOLDENS / "base/config.json").read_text())
    assert registry.identify(CheckpointFiles(GOLDENS, config, "lingcco/fakeVLM")).name == "fakevlm"
    with pytest.raises(CheckpointError, match=r"plain LLaVA checkpoint.*--system"):
        registry.identify(CheckpointFiles(GOLDENS / "base", config, "llava-hf/llava-1.5-7b-hf"))


def test_the_detector_reports_a_score_and_the_text():
    detector = ForgeryDetector.from_pretrained(GOLDENS / "base", system="fakevlm", device="cpu")
    reports = list(detector.analyze_many(IMAGES, max_new_tokens=6, batch_size=2))
    forced = list(detector.analyze_many(IMAGES, score_only=True, conv_mode="chat"))
    facts = json.loads((GOLDENS / "goldens.json").read_text())["pfake"]["cases"]
    assert [report.score_source for report in reports] == ["forced"] * 3
    for case in facts:
        found = (reports if case["prompt"] == "raw" else forced)[case["image"]]
        assert found.fake_probability == pytest.approx(case["p_fake"], abs=1e-5)
    assert not any(report.off_distribution for report in [*reports, *forced])
    assert reports[0].text and reports[0].system == "FakeVLM"
    assert detector.system.describe(detector.options())["image_mode"] == "crop"
    with pytest.raises(OptionError, match="conv_mode must be one of raw, chat, chat_system"):
        detector.analyze(IMAGES[0], conv_mode="llava_v1")
    with pytest.raises(OptionError, match="unknown image_aspect_ratio"):
        open_base(image_aspect_ratio="stretch")
