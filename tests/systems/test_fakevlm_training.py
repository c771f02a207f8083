"""FakeVLM trained by its recipes on a CPU, and evaluated on its data sets: what is written, and that it opens."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from forgery_eval.eval import run as evaluate
from llava import ForgeryDetector, load_pretrained_model
from llava.merge import main as merge
from llava.systems.fakevlm.answer import QUESTION
from llava.systems.language_model import fill_conversation
from llava.train.launcher import main as launch
from llava.train.train import main as train
from tests.training_runs import LORA, QUICK, steps, write_records

GOLDENS = Path(__file__).parents[1] / "data" / "goldens_fakevlm"
BASE, CLUE = GOLDENS / "base", GOLDENS / "fakeclue"
CLUE_TRAIN = {"data_path": CLUE / "data_json" / "train.json", "image_folder": CLUE / "train"}


def options(**given) -> list[str]:
    values = {"model_name_or_path": BASE, **CLUE_TRAIN, **QUICK, "model_max_length": 160, "save_dtype": "float32"}
    words = []
    for name, value in {**values, **given}.items():
        words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Three steps of the recipe over the small base."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert train([*options(output_dir=output, learning_rate=1e-3), "--recipe", "fakevlm"]) == 0
    return output / "final"


def test_the_recipe_trains_tower_projector_and_language_model(whole):
    before = {k: v for file in BASE.glob("*.safetensors") for k, v in load_file(file).items()}
    after = load_file(whole / "model.safetensors")
    assert after.keys() == before.keys()
    still = {name for name, value in after.items() if torch.equal(value, before[name])}
    layers = json.loads((BASE / "config.json").read_text())["vision_config"]["num_hidden_layers"]
    frozen = ("post_layernorm", f"vision_model.encoder.layers.{layers - 1}.")
    assert still == {name for name in after if any(part in name for part in frozen)}
    losses = steps(whole, "lm_loss")
    assert losses[-1] < losses[0]


def test_what_is_written_opens_here_and_in_transformers(whole):
    tokenizer, model, _, length = load_pretrained_model(whole, device="cpu")
    assert model.config.system == "fakevlm" and length == 160
    assert tokenizer.convert_tokens_to_ids("<image>") < model.config.vocab_size
    theirs = LlavaForConditionalGeneration.from_pretrained(whole, dtype=torch.float32)
    processor = LlavaProcessor.from_pretrained(whole).image_processor
    assert processor.crop_size["height"] == model.image_processor.crop_size["height"]
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        assert (theirs(input_ids=ids).logits - model(input_ids=ids).logits).abs().max() < 1e-5


@pytest.mark.parametrize("style", ["chat", "v1"])
def test_a_model_is_asked_as_it_was_trained(whole, tmp_path, style):
    """The base is asked ``raw``; the recipe trains in ``chat``, and another template is one that may be named."""
    final = whole
    if style != "chat":
        final = tmp_path / "run" / "final"
        words = options(output_dir=tmp_path / "run", max_steps=1, version=style)
        assert train([*words, "--recipe", "fakevlm"]) == 0
    detector = ForgeryDetector.from_pretrained(final, device="cpu")
    assert detector.system.prompt(detector.options()) == fill_conversation(style, QUESTION)
    assert detector.system.prompt(detector.options(conv_mode="raw")) == f"<image>{QUESTION}"
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    processor = LlavaProcessor.from_pretrained(final)
    assert processor.apply_chat_template(turn, add_generation_prompt=True) == fill_conversation(style, QUESTION)


def write_tower_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """Writes the authors' adapter with updates of the tower, which theirs leaves at 0; returns the tower with them."""
    shutil.copytree(GOLDENS / "lora", folder)
    settings = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(BASE)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors = load_file(folder / "adapter_model.safetensors")
    base = {k: v for file in BASE.glob("*.safetensors") for k, v in load_file(file).items()}
    expected, generator = {}, torch.Generator().manual_seed(0)
    for name in [name for name in tensors if "vision_tower" in name and "lora_B" in name]:
        tensors[name] = 0.05 * torch.randn(tensors[name].shape, generator=generator)
        update = tensors[name] @ tensors[name.replace("lora_B", "lora_A")].float()
        own = name.removeprefix("base_model.model.").replace(".lora_B", "")
        expected[own] = base[own].float() + settings["lora_alpha"] / settings["r"] * update
    save_file(tensors, folder / "adapter_model.safetensors")
    assert expected and all((value - base[name]).abs().max() > 1e-3 for name, value in expected.items())
    return expected


def test_a_lora_folder_with_tower_modules_is_merged_and_trained_further(tmp_path):
    """A run starts from the base with the whole update in it, the tower's too."""
    adapter, merged, output = tmp_path / "adapter", tmp_path / "merged", tmp_path / "run"
    expected = write_tower_adapter(adapter)
    words = ["--model-path", str(adapter), "--model-base", str(BASE), "--system", "fakevlm", "--layout", "published"]
    assert merge([*words, "--save-model-path", str(merged), "--dtype", "float32"]) == 0
    given = options(output_dir=output, model_name_or_path=adapter, max_steps=1, learning_rate=1e-6)
    assert train([*given, "--recipe", "fakevlm"]) == 0
    for folder in (merged, output / "final"):
        found = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
        assert all((found[name] - value).abs().max() < 1e-5 for name, value in expected.items())
    model = load_pretrained_model(adapter, model_base=BASE, system="fakevlm", device="cpu", merge_lora=False)[1]
    whole = load_pretrained_model(merged, device="cpu")[1]
    pixels = torch.rand(1, 3, *[whole.get_vision_tower().vision_tower.config.image_size] * 2)
    with torch.no_grad():
        features = [one.get_vision_tower()(pixels).features for one in (model, whole)]
    assert (features[0] - features[1]).abs().max() < 1e-4


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_qlora_of_the_recipe_trains_in_four_bits(tmp_path):
    output = tmp_path / "run"
    given = options(output_dir=output, **LORA, max_steps=2)
    assert train([*given, "--recipe", "fakevlm_qlora"]) == 0
    adapter = load_file(output / "final" / "adapter_model.safetensors")
    assert all(value.any() for name, value in adapter.items() if "lora_B" in name)
    assert json.loads((output / "run.json").read_text())
    model = load_pretrained_model(output / "final", device="cpu", load_4bit=True)[1]
    assert model.config.system == "fakevlm" and model.config.conv_mode == "chat"


def test_lora_of_the_recipe_is_merged_into_transformers_layout(tmp_path):
    output = tmp_path / "run"
    assert train([*options(output_dir=output, **LORA), "--recipe", "fakevlm_lora"]) == 0
    final = output / "final"
    assert (final / "adapter_model.safetensors").is_file()
    target = tmp_path / "merged"
    words = ["--model-path", str(final), "--save-model-path", str(target), "--dtype", "float32"]
    assert merge([*words, "--layout", "published"]) == 0
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        found = [load_pretrained_model(path, device="cpu")[1](input_ids=ids).logits for path in (final, target)]
        found.append(LlavaForConditionalGeneration.from_pretrained(target, dtype=torch.float32)(input_ids=ids).logits)
    assert all((one - found[0]).abs().max() < 1e-5 for one in found)


def test_layouts_that_cannot_be_written_are_refused_at_once(tmp_path, capsys):
    words = [*options(output_dir=tmp_path / "run", **LORA, save_layout="published"), "--recipe", "fakevlm_lora"]
    assert train(words) == 1
    assert "published files are a whole model" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rewrite", [True, False])
def test_data_of_two_systems_are_mixed(tmp_path, rewrite):
    tagged = write_records(tmp_path, count=4)
    mixed = {"data_path": (CLUE_TRAIN["data_path"], tagged), "image_folder": (CLUE / "train", tmp_path / "images")}
    given = options(output_dir=tmp_path / "run", **mixed, rewrite_answers=rewrite, max_steps=1, model_max_length=1500)
    assert train([*given, "--recipe", "fakevlm"]) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["records"] == 7


def test_a_label_against_its_answer_stops_the_training(tmp_path, capsys):
    shutil.copytree(CLUE, tmp_path / "clue")
    file = tmp_path / "clue/data_json/train.json"
    rows = json.loads(file.read_text())
    rows[0]["label"] = 1
    file.write_text(json.dumps(rows))
    assert train([*options(output_dir=tmp_path / "run", data_path=file), "--recipe", "fakevlm"]) == 1
    assert "row 1: its answer says fake, but its label real" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["fakevlm", "fakevlm_lora", "fakevlm_qlora"])
def test_the_published_batch_is_divided(name, capsys, monkeypatch):
    for gpus, wanted in (("8", "8 per device x 4 accumulation x 8"), ("2", "8 per device x 16 accumulation x 2")):
        monkeypatch.setenv("NUM_GPUS", gpus)
        assert launch(["--recipe", name, "--dry-run"]) == 0
        printed = capsys.readouterr().out
        assert f"batch: {wanted} processes = 256 global" in printed and "--global_batch" not in printed
        assert "zero3" in printed and "--system fakevlm" in printed and "--learning_rate" in printed


def test_it_is_evaluated_on_its_data_sets_by_the_papers_protocol(whole, tmp_path):
    for name in ("fakeclue", "loki", "ddvqa"):
        result = tmp_path / name
        words = ["--model-path", whole, "--dataset_path", GOLDENS / name, "--result_folder", result]
        given = [*map(str, words), "--paper-protocol", "--max_new_tokens", "4", "--device", "cpu"]
        assert evaluate(given) == 0
        metrics = json.loads((result / "metrics.json").read_text())
        paper = metrics["paper"][name]
        counts = [paper[f"{kind}_{label}"] for kind in ("right", "wrong") for label in ("real", "fake")]
        assert sum(counts) == metrics["detection"]["all"]["metrics"]["images"]
        assert metrics["settings"]["image_mode"] == "crop"
        page = (result / "report.html").read_text()
        assert "published acc" in page and "published f1" in page


def test_choices_between_images_of_loki_are_answered_by_their_scores(whole, tmp_path):
    shutil.copytree(GOLDENS / "loki", tmp_path / "loki")
    paths = ["x/FakeImage_dataset/doc/real/paper/en/d_02.png", "x/FakeImage_dataset/animal/fake/a_01.png"]
    asked = {"question_type": "image_fake_from_real_doc", "choices": ["The first one.", "The second one."]}
    question = {**asked, "image_path": paths, "answer": "B"}
    (tmp_path / "loki" / "data" / "image" / "image_mc.json").write_text(json.dumps([question]))
    words = ["--model-path", whole, "--dataset_path", tmp_path / "loki", "--result_folder", tmp_path / "results"]
    assert evaluate([*map(str, words), "--max_new_tokens", "4", "--device", "cpu"]) == 0
    metrics = json.loads((tmp_path / "results" / "metrics.json").read_text())
    assert metrics["detection"]["all"]["metrics"]["images"] == 2
    auroc = metrics["detection"]["all"]["metrics"]["auroc"]  # of one image of each class: whether the fake one is above
    assert metrics["choices"]["metrics"] == {"choices": 1, "accuracy": auroc}
    assert "detection,choices between images,accuracy" in (tmp_path / "results" / "metrics.csv").read_text()
