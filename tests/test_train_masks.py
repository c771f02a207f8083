"""Networks that are trained on masks, and FakeShield's recipes: data, steps, what changes, resuming, faults."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava import ForgeryDetector, load_pretrained_model
from llava.errors import DataError, OptionError
from llava.model.checkpoint_files import read_tensors
from llava.systems.fakeshield.training import SegmenterTraining, TaggerTraining
from llava.tampered import TamperedImage
from llava.train import networks
from llava.train.mask_trainer import MaskDataset, read_changed_images
from llava.train.recipes import read_recipe
from tests.systems.test_fakeshield import GOLDENS, clip, folder
from tests.training_runs import steps, train_here

__all__ = ["clip", "folder"]
DATA = GOLDENS / "dataset_mflm" / "ps" / "CASIA2"


def run(output: Path, **changes) -> list[str]:
    values = {
        "output_dir": output, "use_cpu": True, "max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1,
        "gradient_accumulation_steps": 1, "dataloader_num_workers": 0, "warmup_steps": 0, "save_strategy": "no",
        **changes,
    }  # fmt: skip
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def settings(clip, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("settings") / "segmenter.json"
    file.write_text(json.dumps({"vision_tower": clip, "lora_r": 4}))
    return file


def segmenter_run(output: Path, folder: Path, settings: Path, **changes) -> list[str]:
    own = {"model_name_or_path": folder / "MFLM", "model_config": settings, "data_path": DATA}
    return ["--recipe", "fakeshield_mflm", *run(output, **{**own, **changes})]


@pytest.fixture(scope="module")
def trained(folder, settings, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "run"
    saves = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "save_total_limit": 9}
    assert networks.main(segmenter_run(output, folder, settings, **saves)) == 0
    return output


def test_the_segmenters_recipe_trains_what_is_published_and_nothing_else(trained, folder):
    before, after = read_tensors(folder / "MFLM"), read_tensors(trained / "final")
    changed = {
        name
        for name, tensor in before.items()
        if name in after and not torch.equal(tensor[...].float(), after[name][...])
    }
    parts = ("lm_head", "embed_tokens", "mask_decoder", "text_hidden_fcs", "q_proj", "v_proj")
    assert changed and all(any(part in name for part in parts) for name in changed)
    for part in parts:
        assert any(part in name for name in changed), part
    assert not any("vision_tower" in name or "image_encoder" in name or "mm_projector" in name for name in changed)
    assert not any("iou_prediction_head" in name for name in changed) and not any("lora" in name for name in after)


def test_every_loss_is_logged(trained):
    log = steps(trained / "final", "loss", "lm_loss", "bce_loss", "dice_loss")
    assert len(log) == 3
    for loss, words, pixels, overlap in log:
        assert float(loss) == pytest.approx(float(words) + 2 * float(pixels) + 0.5 * float(overlap), rel=1e-3)


def test_the_trained_segmenter_gives_masks(trained):
    report = ForgeryDetector.from_pretrained(trained / "final", device="cpu").analyze(DATA / "image" / "kite_07.jpg")
    with Image.open(DATA / "image" / "kite_07.jpg") as image:
        assert report.mask.shape == (image.height, image.width)


def test_a_run_resumes_where_it_was(trained, folder, settings, tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "save_total_limit": 9}
    output = tmp_path / "run"
    assert networks.main(segmenter_run(output, folder, settings, **saves)) == 0
    for name in ("checkpoint-2", "checkpoint-3", "final"):
        for file in sorted((output / name).rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        (output / name).rmdir()
    assert networks.main([*segmenter_run(output, folder, settings, **saves), "--resume", "auto"]) == 0
    again, once = read_tensors(output / "final"), read_tensors(trained / "final")
    assert all(torch.allclose(again[name][...], tensor[...], atol=1e-5) for name, tensor in once.items())


def test_validation_keeps_the_best(folder, settings, tmp_path):
    extra = {"eval_data_path": GOLDENS / "dataset_mflm" / "ps" / "CASIA1+", "eval_strategy": "steps", "eval_steps": 1}
    assert networks.main(segmenter_run(tmp_path / "run", folder, settings, **extra)) == 0
    history = json.loads((tmp_path / "run" / "log.json").read_text())
    assert sum("eval_dice_loss" in entry for entry in history) == 2
    assert read_tensors(tmp_path / "run" / "best").keys() == read_tensors(tmp_path / "run" / "final").keys()


@pytest.fixture(scope="module")
def opened(folder, settings) -> SegmenterTraining:
    return SegmenterTraining.open(str(folder / "MFLM"), json.loads(settings.read_text()))


def test_samples_are_the_same_for_one_draw(opened):
    images = read_changed_images([str(DATA)], opened)
    data = MaskDataset(images, opened, 3)
    first, again, later = data[0], data[0], [data[draw] for draw in range(len(images) * 8)]
    assert first["input_ids"] == again["input_ids"]
    assert len({tuple(sample["input_ids"]) for sample in later[:: len(images)]}) > 2, "wordings vary from draw to draw"
    assert first["masks"].shape[1:] == (Image.open(images[0].image).height, Image.open(images[0].image).width)
    fixed = MaskDataset(images, opened, None)
    assert fixed[0]["input_ids"] == fixed[len(images)]["input_ids"]


def test_descriptions_come_from_the_data_or_from_the_explainer(opened, tmp_path):
    assert [image.description is None for image in read_changed_images([str(DATA)], opened)].count(True) == 1
    answers = tmp_path / "answers.jsonl"
    line = {"image": str((DATA / "image" / "cup_03.jpg").resolve()), "text": "1. The cup has been edited."}
    answers.write_text(json.dumps(line) + "\n")
    opened.settings["descriptions"] = str(answers)
    found = {image.image.name: image.description for image in read_changed_images([str(DATA)], opened)}
    assert found["cup_03.jpg"] == line["text"] and found["kite_07.jpg"] is None
    answers.write_text(json.dumps({"image": "x.jpg", "text": "y"}) + "\n")
    with pytest.raises(DataError, match="describes none of the 3 images"):
        read_changed_images([str(DATA)], opened)
    opened.settings["descriptions"] = None


def test_what_cannot_be_trained_on_is_told(opened, tmp_path):
    image = DATA / "image" / "kite_07.jpg"
    Image.new("L", (3, 3), 255).save(tmp_path / "mask.png")
    wrong = TamperedImage("a", image, (tmp_path / "mask.png",), 1, "s")
    with pytest.raises(DataError, match="is 3x3"):
        MaskDataset([wrong], opened, 0)[0]
    right = TamperedImage("a", image, (DATA / "mask" / "kite_07.png",), 1, "s", description="long " * 900)
    with pytest.raises(DataError, match="lies beyond"):
        MaskDataset([right], opened, 0)[0]
    with pytest.raises(DataError, match="none is changed and has a mask"):
        read_changed_images([str(GOLDENS / "dataset" / "photoshop" / "FR_Au")], opened)


def test_settings_are_checked(folder, clip):
    with pytest.raises(OptionError, match="has no settings depth"):
        SegmenterTraining.open(str(folder / "MFLM"), {"vision_tower": clip, "depth": 3})
    with pytest.raises(OptionError, match="missing or unknown: sam, tokenizer"):
        SegmenterTraining.open(None, {"language_model": {}, "tower": clip})
    with pytest.raises(OptionError, match="no setting widths"):
        TaggerTraining.open(None, {"widths": 3})


def test_a_new_segmenter_is_trained_whole(clip, tmp_path):
    sam = {
        "vision": {
            "hidden_size": 16, "output_channels": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 64, "patch_size": 16, "window_size": 0, "global_attn_indexes": [0], "num_pos_feats": 8,
            "mlp_dim": 32,
        },
        "prompt": {"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 8},
        "decoder": {
            "hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
        },
    }  # fmt: skip
    language_model = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    values = {"language_model": language_model, "tower": clip, "tokenizer": str(GOLDENS / "DTE-FDM"), "sam": sam}
    file = tmp_path / "new.json"
    file.write_text(json.dumps({**values, "trained": "all"}))
    given = ["--recipe", "fakeshield_mflm", *run(tmp_path / "run", model_config=file, data_path=DATA)]
    assert networks.main(given) == 0
    opened = SegmenterTraining.open(str(tmp_path / "run" / "final"), {"trained": "all"})
    assert opened.segmenter.side == 64 and not opened.network.encodes_frozen
    assert all("vision_tower" in name or p.requires_grad for name, p in opened.segmenter.named_parameters())


def test_no_step_is_an_error(folder, settings, tmp_path, capsys):
    few = {"dataloader_drop_last": True, "per_device_train_batch_size": 9}
    assert networks.main(segmenter_run(tmp_path / "run", folder, settings, **few)) == 1
    assert "3 images fill no batch of 9" in capsys.readouterr().err


# --- the other two recipes


def test_the_tagger_is_trained_on_folders_of_domains(tmp_path):
    file = tmp_path / "small.json"
    file.write_text(json.dumps({"depths": [1, 1, 1, 1]}))
    given = run(tmp_path / "run", model_config=file, data_path=GOLDENS / "dataset", max_steps=1)
    assert networks.main(["--recipe", "fakeshield_dtg", *given]) == 0
    report = ForgeryDetector.from_pretrained(tmp_path / "run" / "final" / "DTG.pth").analyze(
        GOLDENS / "images" / "img0.png"
    )
    assert report.tag and report.label is None


def test_the_explainer_is_trained_by_its_recipe(clip, tmp_path):
    final = train_here(
        tmp_path / "run", GOLDENS / "DTE-FDM", GOLDENS / "train_dte.json", recipe="fakeshield_dte_fdm", lora_r=4,
        lora_alpha=8, vision_tower=clip, image_folder=GOLDENS, gradient_checkpointing=False, max_steps=1,
        save_strategy="no",
    )  # fmt: skip
    _, model, _, length = load_pretrained_model(final, device="cpu")
    assert model.config.system == "fakeshield" and length == 4096
    report = ForgeryDetector.from_pretrained(final, device="cpu").analyze(
        GOLDENS / "images" / "img0.png", max_new_tokens=8
    )
    assert report.fake_probability is not None


def test_recipes_hold_the_published_numbers():
    explainer, segmenter = read_recipe("fakeshield_dte_fdm"), read_recipe("fakeshield_mflm")
    assert (explainer["lora_r"], explainer["lora_alpha"], explainer["learning_rate"]) == (["128"], ["256"], ["2e-4"])
    assert (segmenter["learning_rate"], segmenter["adam_beta2"], segmenter["warmup_steps"]) == (
        ["3e-4"],
        ["0.95"],
        ["100"],
    )
