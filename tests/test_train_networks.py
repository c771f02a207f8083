"""Plain networks: their data, their training, and a run that was killed."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from llava.data.labelled import LabelledImage, read_labelled
from llava.errors import DataError, MissingFileError, OptionError
from llava.labels import LABELS
from llava.systems import registry
from llava.systems.base import SystemSpec
from llava.systems.fakereasoning.answer import FORMAT
from llava.train import launcher, networks
from llava.train.network_trainer import DrawSampler, LabelledDataset, NetworkTrainer, class_metrics
from tests.training_runs import largest_gap, write_records

COLOURS = {"red": (200, 60, 60), "green": (60, 200, 60), "blue": (60, 60, 200)}


class ColourTraining:
    """A convolution with a batch norm that names colours; its settings are its width."""

    classes = tuple(COLOURS)

    def __init__(self, width: int) -> None:
        self.width = width
        self.network = nn.Sequential(
            nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Dropout(0.1), nn.Linear(width, len(COLOURS)),
        )  # fmt: skip
        self.network[0].bias.requires_grad_(False)

    @classmethod
    def open(cls, path, config):
        if path is None:
            return cls(config.get("width", 4))
        weights = load_file(Path(path) / "weights.safetensors")
        training = cls(len(weights["0.bias"]))
        training.network.load_state_dict(weights)
        return training

    def prepare(self, image, random):
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        return pixels + (0 if random is None else random.uniform(-0.1, 0.1))

    def optimizer(self, learning_rate, weight_decay):
        return torch.optim.Adam(self.network.parameters(), lr=learning_rate, weight_decay=weight_decay)

    def save(self, folder):
        save_file(self.network.state_dict(), folder / "weights.safetensors")


@pytest.fixture(autouse=True)
def colour_system(monkeypatch):
    spec = SystemSpec(
        name="colours", title="Colours", identify=lambda _: False, system="nowhere:None",
        networks={"namer": f"{__name__}:ColourTraining"},
    )  # fmt: skip
    known = {**registry.specs(), "colours": spec}
    monkeypatch.setattr(registry, "specs", lambda: known)


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    """Folders of the three classes, eight noisy images each."""
    folder, rng = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir()
        for index in range(8):
            noisy = np.array(colour) + rng.normal(0, 40, (8, 8, 3))
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder


def run(output: Path, data: Path, **changes) -> list[str]:
    values = {
        "network": "colours:namer", "data_path": data, "validation_share": 0.25, "output_dir": output, "use_cpu": True,
        "max_steps": 12, "eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4,
        "per_device_train_batch_size": 5, "learning_rate": 0.05, "logging_steps": 2, "resume": "auto", **changes,
    }  # fmt: skip
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def whole(colours, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        spec = SystemSpec(
            "colours", "Colours", lambda _: False, "x:y", networks={"namer": f"{__name__}:ColourTraining"}
        )
        known = {**registry.specs(), "colours": spec}
        patch.setattr(registry, "specs", lambda: known)
        assert networks.main(run(output, colours)) == 0
    return output


# --- training


def test_a_network_of_three_classes_learns(whole):
    log = json.loads((whole / "log.json").read_text())
    validated = [entry for entry in log if "eval_balanced_accuracy" in entry]
    assert len(validated) == 3 and "eval_auroc" not in validated[-1]
    best = json.loads((whole / "best.json").read_text())
    assert best["verdict_accuracy"] == max(entry["eval_balanced_accuracy"] for entry in validated) > 0.5
    assert all({"accuracy", "images_per_s"} <= set(entry) for entry in log if "loss" in entry)
    assert ColourTraining.open(whole / "final", {}).width == 4
    assert (whole / "best" / "weights.safetensors").is_file() and not (whole / "trial").exists()


@pytest.mark.parametrize(("owner", "name", "call"), [("training_step", None, 7), ("_save_checkpoint", "mark", 2)])
def test_a_killed_run_resumes_as_if_nothing_had_happened(colours, whole, tmp_path, owner, name, call):
    arguments = run(tmp_path / "run", colours)
    process = os.fork()
    if process == 0:
        original, calls = getattr(NetworkTrainer, owner), iter(range(1, 1000))

        def dying(self, *given, **more):
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, *given, **more)

        setattr(NetworkTrainer, owner, dying)
        try:
            networks.main(arguments)
        finally:
            os._exit(70)
    assert os.WIFSIGNALED(os.waitpid(process, 0)[1])
    assert not (tmp_path / "run" / "final").exists()
    assert networks.main(arguments) == 0
    finals = [load_file(folder / "final" / "weights.safetensors") for folder in (whole, tmp_path / "run")]
    assert largest_gap(*finals) == 0
    assert "1.running_mean" in finals[0]


def test_other_options_are_not_resumed(colours, whole, tmp_path, capsys):
    assert networks.main(run(whole, colours, learning_rate=0.01)) == 1
    assert "learning_rate was 0.05, is 0.01" in capsys.readouterr().err
    assert networks.main(run(whole, colours, resume=None)) == 1
    assert "--resume auto resumes it" in capsys.readouterr().err


def test_weights_that_are_no_numbers_are_not_written(colours, tmp_path, capsys):
    assert networks.main(run(tmp_path / "run", colours, learning_rate=1e30, max_grad_norm=0)) == 1
    assert "lower --learning_rate" in capsys.readouterr().err
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "colours:nobody"}, "there is no such network; known: baseline:cnn, colours:namer"),
        ({"network": None}, "--network is missing; known: baseline:cnn, colours:namer"),
        ({"data_path": "nowhere"}, "there is no file or folder nowhere"),
        ({"validation_share": None}, "validation needs --eval_data_path"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "validation_share": None, "eval_strategy": "no"},
            "requires an eval strategy",
        ),
        ({"model_config": "nowhere.json"}, "there is no file nowhere.json"),
        ({"validation_share": 0.001}, "leaves none"),
        ({"lora_r": 4}, "unrecognized argument --lora_r"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(colours, tmp_path, capsys, changes, message):
    assert networks.main(run(tmp_path / "run", colours, **changes)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_the_front_door_starts_a_network_by_its_recipe(capsys):
    given = ["--recipe", "m2f2det_stage1", "--data_path", "faces", "--dry-run"]
    assert launcher.main(given) == 0
    plan, line = capsys.readouterr().out.splitlines()
    assert plan == "batch: 80 per device x 1 accumulation x 1 processes = 80 global"
    assert "-m llava.train.networks --network m2f2det:detector" in line and "--data_path faces" in line
    assert "deepspeed" not in line
    assert launcher.main(["--recipe", "m2f2det_stage1", "--use_cpu"]) == 1
    assert "--data_path is needed" in capsys.readouterr().err


# --- data


def of(images: list[LabelledImage]) -> list[tuple[str, int]]:
    return [(image.images[0].name, image.label) for image in images]


def save(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(file)


def test_folders_of_classes_at_any_depth(tmp_path, colours):
    save(tmp_path / "a" / "real" / "1.png", tmp_path / "a" / "fake" / "2.png", tmp_path / "b" / "c" / "fake" / "3.png")
    assert of(read_labelled([tmp_path], LABELS, answer_format=None)) == [("2.png", 1), ("1.png", 0), ("3.png", 1)]
    save(tmp_path / "m" / "0_real" / "4.png", tmp_path / "m" / "1_fake" / "5.png")
    assert of(read_labelled([tmp_path / "m"], LABELS, answer_format=None)) == [("4.png", 0), ("5.png", 1)]
    named = read_labelled([colours], tuple(COLOURS), answer_format=None)
    assert [image.label for image in named] == [2] * 8 + [1] * 8 + [0] * 8


def test_tables_and_records(tmp_path, colours):
    save(tmp_path / "x.png", tmp_path / "y.png")
    table = tmp_path / "t.csv"
    table.write_text("image,label\nx.png,authentic\ny.png,generated\n")
    assert of(read_labelled([table], LABELS, answer_format=None)) == [("x.png", 0), ("y.png", 1)]
    table.write_text("image,label\nx.png,Green\ny.png,0\n")
    with pytest.raises(DataError, match="no image of blue"):
        read_labelled([table], tuple(COLOURS), answer_format=None)
    assert of(read_labelled([table], ("red", "green"), answer_format=None)) == [("x.png", 1), ("y.png", 0)]
    file = write_records(tmp_path, 4)
    found = read_labelled([file], LABELS, answer_format=FORMAT, image_folder=tmp_path / "images")
    assert of(found) == [("0.png", 0), ("1.png", 1), ("2.png", 0), ("3.png", 1)]
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "forgery_reasoning_cot.json").write_bytes(file.read_bytes())
    assert [image.label for image in read_labelled([tmp_path / "tree"], LABELS, answer_format=FORMAT)] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,label\nx.png,violet\n", "must be one of red, green, blue or its number"),
        ("image,label\nx.png,7\n", "or its number, not '7'"),
        ("name,label\nx.png,red\n", "needs the column image"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_labelled([tmp_path / "t.csv"], tuple(COLOURS), answer_format=None)


def test_other_data_are_named(tmp_path):
    with pytest.raises(MissingFileError):
        read_labelled([tmp_path / "nowhere"], LABELS, answer_format=None)
    with pytest.raises(DataError, match="no data set of a known layout"):
        read_labelled([tmp_path], LABELS, answer_format=None)
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match="no folder, table or file"):
        read_labelled([tmp_path / "x.png"], LABELS, answer_format=None)


def test_a_draw_is_the_same_in_every_process(colours):
    training = ColourTraining(4)
    images = read_labelled([colours], training.classes, answer_format=None)
    dataset, again = (LabelledDataset(images, training, 3) for _ in range(2))
    assert torch.equal(dataset[30].pixels, again[30].pixels)
    assert not torch.equal(dataset[30].pixels, dataset[6].pixels) and dataset[30].label == dataset[6].label
    plain = LabelledDataset(images, training, None)
    assert torch.equal(plain[30].pixels, plain[6].pixels)
    frames = LabelledImage([Path(str(n)) for n in range(9)], 0, "video")
    assert frames.choose(None) == Path("4")
    sampler = DrawSampler(5, 0)
    first = list(sampler)
    sampler.set_epoch(1)
    assert sorted(first) == [0, 1, 2, 3, 4] and sorted(sampler) == [5, 6, 7, 8, 9]


def test_an_image_that_cannot_be_read_stops_the_run(colours, tmp_path, capsys):
    data = tmp_path / "data"
    for name in COLOURS:
        (data / name).mkdir(parents=True)
        (data / name / "x.png").write_bytes(b"no image")
    assert networks.main(run(tmp_path / "run", data, validation_share=None, eval_strategy="no")) == 1
    assert "x.png" in capsys.readouterr().err


# --- metrics


def test_metrics_are_those_of_their_definitions():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 2, generator=generator).round(decimals=1)
    classes = (torch.rand(60, generator=generator) < 0.3).long()
    scores = (logits[:, 1] - logits[:, 0]).double()
    pairs = [float(p > n) + 0.5 * float(p == n) for p in scores[classes == 1] for n in scores[classes == 0]]
    found = class_metrics(logits, classes)
    assert found["auroc"] == pytest.approx(sum(pairs) / len(pairs))
    recalls = [float((logits.argmax(1)[classes == k] == k).double().mean()) for k in (0, 1)]
    assert found["balanced_accuracy"] == pytest.approx(sum(recalls) / 2) != found["accuracy"]
    assert "auroc" not in class_metrics(logits, torch.zeros(60, dtype=torch.long))


def test_records_without_words_are_refused(tmp_path):
    file = write_records(tmp_path, 2)
    with pytest.raises(DataError, match="no words for a verdict"):
        read_labelled([file], LABELS, answer_format=None)
    with pytest.raises(DataError, match="but the classes are red"):
        read_labelled([file], tuple(COLOURS), answer_format=FORMAT)
    with pytest.raises(OptionError, match="no such network"):
        networks.network_class("fakereasoning:tower")
