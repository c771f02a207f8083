"""Training the towers by themselves, from a records file to folders that open."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.demo import towers
from llava.demo.outliers import make_outliers
from llava.demo.residual_encoder import ResidualVisionTower
from llava.demo.tower_data import read_examples
from llava.demo.tower_targets import TargetNames
from llava.mm_utils import process_images
from llava.model.multimodal_encoder.base import PixelFormat, VisionTower
from llava.model.multimodal_encoder.builder import build_vision_tower, read_vision_tower
from llava.native_crops import NativeCrops
from llava.systems.fakereasoning import answer as words
from tests.small_models import CLIP_CONFIG, small_config
from tests.test_residual_encoder import RESIDUAL_CONFIG
from tests.trained import picture

CROPS = {"size": 48, "per_side": 2}
SHARED = PixelFormat(64, (0.5,) * 3, (0.5,) * 3, NativeCrops(**CROPS))
ROOT = Path(__file__).parents[1]
WEIGHTS = "vision_tower/model.safetensors", "dino_tower/model.safetensors", towers.HEADS


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Records of 40 images, the fakes' darker and called so, and a model's config."""
    folder = tmp_path_factory.mktemp("world")
    rows = []
    for index in range(40):
        label = words.LABELS[index % 2]
        image = picture(index, (64, 64))
        (image.point(lambda level: level // 3) if label == "fake" else image).save(folder / f"{index}.png")
        attribute = words.ATTRIBUTES[label][index % 5]
        caption = "A dark street." if label == "fake" else "A bright house."
        reasoning = words.write_reasoning(label, {attribute: f"It is {'night' if label == 'fake' else 'day'}."})
        answer = words.write_answer(label, caption=caption, reasoning=reasoning)
        turns = [{"from": "human", "value": f"<image>\n{words.QUESTION}"}, {"from": "gpt", "value": answer}]
        rows.append({"image": f"{index}.png", "conversations": turns})
    (folder / towers.RECORDS_FILE).write_text(json.dumps(rows))
    config = small_config(
        vision_tower_config={**CLIP_CONFIG, "image_size": 64, "patch_size": 16},
        dino_tower_config=RESIDUAL_CONFIG,
        mm_native_crops=CROPS,
        mm_vision_select_layer=-1,
    )
    processor = {**config.mm_image_processor, "size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    config.mm_image_processor = processor
    config.save_pretrained(folder)
    return folder


@pytest.fixture
def summary(world, tmp_path) -> list[str]:
    """Options of a run whose second tower has a summary, which is first trained by itself."""
    config = json.loads((world / "config.json").read_text())
    config["dino_tower_config"]["summary"] = {"hidden_size": 16, "dropout": 0.2}
    (tmp_path / "summary.json").write_text(json.dumps(config))
    return ["--config", str(tmp_path / "summary.json"), "--summary_epochs", "40"]


def arguments(world: Path, out: Path, *more: str) -> list[str]:
    given = ["--data", world, "--config", world / "config.json", "--output_dir", out]
    sizes = ["--batch_size", 8, "--epochs", 4, "--validation_share", 0.2, "--device", "cpu"]
    return [str(value) for value in (*given, *sizes)] + list(more)


def train(world: Path, out: Path, *more: str) -> dict:
    return towers.train(towers.build_parser().parse_args(arguments(world, out, *more)))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for name in WEIGHTS:
        with safe_open(folder / name, "pt") as file:
            found |= {f"{name}/{key}": file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    return found


@contextmanager
def killed_at_step(number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, a run is interrupted before its step of this number."""
    step = towers.Training._train_step

    def dies(self, index):
        if self.step == number:
            raise KeyboardInterrupt
        return step(self, index)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(towers.Training, "_train_step", dies)
        yield


def test_the_towers_learn_and_open_through_the_registry(world, tmp_path):
    metrics = train(
        world, tmp_path, "--epochs", "20", "--learning_rate", "0.003", "--vision_tower_loss", "verdict=1,caption=1"
    )
    assert metrics["held_out"] == 8 and metrics["examples"] == 32 and metrics["steps"] == 80
    assert metrics["towers"]["dino_tower"]["verdict"]["balanced_accuracy"] == 1.0
    assert metrics["towers"]["vision_tower"]["caption"]["balanced_accuracy"] > 0.75
    assert "caption" not in metrics["towers"]["dino_tower"]
    assert json.loads((tmp_path / towers.METRICS).read_text()) == metrics
    clip, residual = (read_vision_tower(str(tmp_path / name)) for name in towers.TOWERS)
    assert (clip.config["type"], residual.config["type"]) == ("clip", "residual")
    assert clip.image_processor["crop_size"]["height"] == 64
    tower = build_vision_tower(residual.config, SHARED)
    tower.load_state_dict({name: tensor[...] for name, tensor in residual.tensors.items()})
    with safe_open(tmp_path / towers.HEADS, "pt") as file:
        names = json.loads(file.metadata()["targets"])
        assert names["verdict"] == ["fake"] and "street" in names["caption"] and "night" in names["reasoning"]
        assert len(file.get_tensor("dino_tower.bias")) == sum(map(len, names.values()))


@pytest.mark.parametrize("more", [[], ["--strangers", "0.5"]])
def test_a_resumed_run_equals_an_uninterrupted_one(world, tmp_path, monkeypatch, more):
    train(world, tmp_path / "whole", *more)
    with killed_at_step(9, monkeypatch):
        train(world, tmp_path / "parts", "--save_minutes", "0", *more)
    assert not (tmp_path / "parts" / "dino_tower").exists()
    assert train(world, tmp_path / "parts", *more)["steps"] == 16
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_summary_learns_by_itself_and_the_blocks_come_after(world, summary, tmp_path, monkeypatch):
    losses = ["--vision_tower_loss", "none", "--dino_tower_loss", "verdict=1"]
    metrics = train(world, tmp_path / "alone", *summary, *losses, "--max_steps", "1", "--learning_rate", "0.01")
    assert metrics["towers"]["dino_tower"]["verdict"]["balanced_accuracy"] == 1.0
    train(world, tmp_path / "whole", *summary, *losses)
    with safe_open(tmp_path / "whole" / "dino_tower" / "model.safetensors", "pt") as file:
        assert file.get_tensor("gate").abs().max() > 0
    # A run that is stopped among the blocks' steps does not train the summary again.
    with killed_at_step(9, monkeypatch):
        train(world, tmp_path / "parts", *summary, *losses)
    train(world, tmp_path / "parts", *summary, *losses)
    whole, parts = (
        safe_open(tmp_path / name / "dino_tower" / "model.safetensors", "pt") for name in ("whole", "parts")
    )
    assert all(torch.equal(whole.get_tensor(name), parts.get_tensor(name)) for name in whole.keys())  # noqa: SIM118


def test_summary_epochs_need_a_summary(world, summary, tmp_path, capsys):
    assert towers.main(arguments(world, tmp_path, "--summary_epochs", "2")) == 1
    assert (
        "--summary_epochs is for a second tower of type residual whose config has a summary" in capsys.readouterr().err
    )
    assert towers.main(arguments(world, tmp_path, *summary, "--dino_tower_loss", "none")) == 1
    assert "--summary_epochs is for a second tower" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_run_resumes(world, tmp_path):
    train(world, tmp_path / "whole", "--epochs", "30", "--bf16")
    command = [sys.executable, "-m", "llava.train.towers"]
    command += arguments(world, tmp_path / "parts", "--epochs", "30", "--bf16", "--save_minutes", "0")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    checkpoint = tmp_path / "parts" / towers.CHECKPOINT
    while process.poll() is None:
        if checkpoint.is_file() and torch.load(checkpoint, weights_only=True)["step"] > 20:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    train(world, tmp_path / "parts", "--epochs", "30", "--bf16")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.allclose(whole[name].float(), parts[name].float(), atol=1e-5) for name in whole)


def test_another_run_is_not_resumed_unless_started_again(world, tmp_path):
    train(world, tmp_path, "--max_steps", "2")
    with pytest.raises(ValueError, match=r"another run \(seed 0, not 1.*new --output_dir"):
        train(world, tmp_path, "--max_steps", "2", "--seed", "1")
    assert train(world, tmp_path, "--max_steps", "2", "--seed", "1", "--resume", "never")["steps"] == 2


def test_a_tower_that_cannot_be_saved_stops_before_an_image_is_read(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ResidualVisionTower, "save_pretrained", VisionTower.save_pretrained)
    monkeypatch.setattr(ResidualVisionTower, "vision_tower", None, raising=False)
    assert towers.main(arguments(world, tmp_path)) == 1
    error = capsys.readouterr().err
    assert "'residual' cannot be saved by itself" in error and "reading" not in error
    assert list(tmp_path.iterdir()) == []


def test_one_tower_alone_and_without_validation(world, tmp_path):
    metrics = train(world, tmp_path, "--max-steps", "1", "--vision-tower-loss", "none", "--validation_share", "0")
    assert metrics["towers"] == {"dino_tower": {}} and metrics["examples"] == 40
    assert not (tmp_path / "vision_tower").exists() and (tmp_path / "dino_tower").is_dir()


def test_targets_are_what_the_answers_say():
    def answer(label, caption, attribute):
        reasoning = words.write_reasoning(label, {attribute: "it is rare."})
        return words.parse_answer(words.write_answer(label, caption=caption, reasoning=reasoning))

    answers = [
        answer("fake", "A red ball, a ball.", "Low Image Quality"),
        answer("real", "A red cube.", "High Image Quality"),
        answer("real", "A ball here.", "High Image Quality"),
    ]
    names = TargetNames.of_answers(answers, max_words=3, min_share=0.5)
    assert names.caption == ["ball", "red"] and "rare" not in names.reasoning
    said = names.targets(answers[0]).tolist()
    assert said[:6] == [True, False, False, False, True, False] and said[6:8] == [True, True]
    assert names.targets(answers[1]).tolist()[:8] == [False] * 7 + [True]
    weight = names.weights({"caption": 3.0, "verdict": 2.0})
    assert weight[0] == 2 and weight[1:6].sum() == 0 and weight[6:8].tolist() == [1.5, 1.5] and weight[8:].sum() == 0


TURNS = [
    {"from": "human", "value": f"<image>\n{words.QUESTION}"},
    {"from": "gpt", "value": "<CONCLUSION> This image is real."},
]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "records.json: the list breaks off"),
        ("[]", "records.json is empty"),
        (json.dumps([{"conversations": [{"from": "human", "value": "Hi"}, TURNS[1]]}]), "row 1: there is no image"),
        (json.dumps([{"image": "0.png", "conversations": TURNS}]), "row 1: <CONCLUSION> is not closed"),
    ],
)
def test_records_that_do_not_fit_are_named(tmp_path, content, message):
    (tmp_path / "records.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_examples([tmp_path / "records.json"], None)


def test_an_image_that_cannot_be_read_is_named(world, tmp_path, capsys):
    rows = json.loads((world / towers.RECORDS_FILE).read_text())[:3]
    for row in rows:
        (tmp_path / row["image"]).write_bytes((world / row["image"]).read_bytes())
    (tmp_path / rows[1]["image"]).write_bytes(b"no image")
    (tmp_path / towers.RECORDS_FILE).write_text(json.dumps(rows))
    given = ["--data", tmp_path, "--config", world / "config.json", "--output_dir", tmp_path / "out", "--device", "cpu"]
    assert towers.main([str(value) for value in given]) == 1
    assert f"{tmp_path / rows[1]['image']}: no image in a known format" in capsys.readouterr().err


def test_outliers_change_the_second_tower_alone_and_are_called_fake(world, tmp_path):
    plain, wary = tmp_path / "plain", tmp_path / "wary"
    given = ("--epochs", "10", "--learning_rate", "0.003")
    train(world, plain, *given)
    train(world, wary, *given, "--outliers", "0.5")
    first, second = weights(plain), weights(wary)
    same = {name: torch.equal(first[name], second[name]) for name in first if not name.endswith("num_batches_tracked")}
    assert all(value for name, value in same.items() if name.startswith("vision_tower/"))
    assert not all(value for name, value in same.items() if name.startswith("dino_tower/"))
    assert fake_probability_of_outliers(wary) > fake_probability_of_outliers(plain) + 0.1


def fake_probability_of_outliers(trained: Path) -> float:
    """What a trained tower's head says of outliers, on average."""
    source = read_vision_tower(str(trained / "dino_tower"))
    tower = build_vision_tower(source.config, SHARED)
    tower.load_state_dict({name: tensor[...] for name, tensor in source.tensors.items()})
    with safe_open(trained / towers.HEADS, "pt") as file:
        weight, bias = (file.get_tensor(f"dino_tower.{name}")[0] for name in ("weight", "bias"))
    processor = CLIPImageProcessorPil(crop_size=64, size=64, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    pictures = [picture(index, (64, 64)) for index in range(0, 40, 2)]
    measures = tower.measure(process_images(pictures, processor, small_config(mm_native_crops=CROPS)))
    everyone = torch.ones(len(pictures), dtype=torch.bool)
    torch.manual_seed(0)
    with torch.no_grad():
        features = tower.encode_measures(make_outliers(measures, everyone, everyone)).features.mean(1)
    return (features @ weight + bias).sigmoid().mean().item()


@pytest.mark.parametrize("text", ["verdict", "verdict=x", "truth=1", "verdict=-1", "verdict=inf"])
def test_wrong_loss_weights_are_explained(world, tmp_path, capsys, text):
    with pytest.raises(SystemExit):
        towers.main(arguments(world, tmp_path, f"--dino_tower_loss={text}"))
    assert "--dino_tower_loss" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--data", "nowhere.json"], "no data file nowhere.json"),
        (["--config", "nowhere.json"], "no nowhere.json"),
        (["--image_folder", "nowhere"], "nowhere/"),
        (["--epochs", "0"], "--epochs must be more than 0"),
        (["--validation_share", "0.999"], "holds out all 40"),
        (["--vision_tower_loss", "none", "--dino_tower_loss", "none"], "nothing to train"),
        (["--device", "abacus"], "--device abacus"),
        (["--outliers", "1"], "--outliers must be from 0 up to but not including 1"),
        (["--outliers", "0.1", "--dino_tower_loss", "attributes=1"], "--outliers is for a second tower"),
        (["--outliers", "0.1", "--dino_tower_loss", "none"], "--outliers is for a second tower"),
    ],
)
def test_wrong_arguments_are_explained(world, tmp_path, capsys, changes, message):
    assert towers.main(arguments(world, tmp_path / "out", *changes)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(message, error)


def test_a_config_that_describes_no_model_is_named(world, tmp_path, capsys):
    (tmp_path / "wrong.json").write_text(json.dumps({"hidden_size": "wide"}))
    assert towers.main(arguments(world, tmp_path / "out", "--config", str(tmp_path / "wrong.json"))) == 1
    assert re.search("error: .*wrong.json describes no model: .*hidden_size", capsys.readouterr().err)
