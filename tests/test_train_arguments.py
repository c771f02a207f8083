"""Wrong arguments end at once with one sentence; names of older versions still act."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava.train.arguments import parse_arguments
from llava.train.train import main
from llava.train.trainer import ForgeryTrainer
from tests.conftest import GOLDENS
from tests.training_runs import LORA, environment, options, write_records

BASE = {
    "model_name_or_path": GOLDENS / "base",
    "vision_tower": GOLDENS / "clip",
    "dino_weights": GOLDENS / "dino.pth",
    "data_path": GOLDENS / "train.json",
    "image_folder": GOLDENS / "images",
    **LORA,
}
NEEDED = ["--model_name_or_path", "x", "--data_path", "x", "--output_dir", "x", "--use_cpu"]


@pytest.fixture(autouse=True)
def nothing_is_trained(monkeypatch):
    monkeypatch.setattr(ForgeryTrainer, "train", lambda *_, **__: pytest.fail("it was trained"))


def error_line(capsys, output: Path, **changes) -> str:
    """The one line that a refused run prints."""
    assert main(options(output, **{**BASE, **changes})) == 1
    message = capsys.readouterr().err
    before, error, after = message.partition("error: ")
    assert error and "error: " not in after and "Traceback" not in message, message
    assert before.split("\n")[-1].split("\r")[-1].strip() == "", message
    assert all(line.startswith("  ") for line in after.splitlines()[1:]), message
    assert not output.exists() or not list(output.glob("*"))
    return after


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rat": 1}, "--learning_rat"),
        ({"lora_enable": "maybe"}, "lora_enable"),
        ({"lora_r": "many"}, "lora_r"),
        ({"lora_r": 0}, "lora_r"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_alpha": "nan"}, "lora_alpha"),
        ({"lora_dropout": 1}, "lora_dropout"),
        ({"bits": 5}, "bits"),
        ({"bits": 4, "lora_enable": False}, "--lora_enable"),
        ({"cpm_search": "nowhere"}, "cpm_search"),
        ({"cpm_temperature": 0}, "cpm_temperature"),
        ({"cpm_temperature": "nan"}, "cpm_temperature"),
        ({"cpm_weight": -1}, "cpm_weight"),
        ({"mm_fusion_type": "glue"}, "glue"),
        ({"init": "vision_tower"}, "vision_tower"),
        ({"version": "v9"}, "v9"),
        ({"model_name_or_path": None}, "--model_name_or_path"),
        ({"model_name_or_path": "/nowhere/model"}, "/nowhere/model"),
        ({"model_name_or_path": GOLDENS / "images"}, "config.json"),
        ({"model_name_or_path": GOLDENS / "lora"}, "LoRA"),
        ({"vision_tower": "/nowhere/clip"}, "/nowhere/clip"),
        ({"dino_weights": "/nowhere/dino.pth"}, "/nowhere/dino.pth"),
        ({"dino_weights": GOLDENS / "train.json"}, "train.json"),
        ({"data_path": None}, "data_path"),
        ({"data_path": "/nowhere/train.json"}, "/nowhere/train.json"),
        ({"data_path": GOLDENS / "dino.pth"}, "dino.pth"),
        ({"eval_data_path": "/nowhere/eval.json"}, "/nowhere/eval.json"),
        ({"image_folder": "/nowhere/images"}, "/nowhere/images"),
        ({"image_folder": GOLDENS}, "img0.png"),
        ({"image_aspect_ratio": "round"}, "round"),
        ({"model_max_length": 100}, "100"),
        ({"model_max_length": 0}, "model_max_length"),
        ({"validation_share": 2}, "validation_share"),
        ({"validation_share": 0.1, "eval_strategy": "epoch"}, "leaves none of one kind"),
        ({"validation_share": 0.5}, "--eval_strategy"),
        ({"eval_data_path": GOLDENS / "train.json"}, "--eval_strategy"),
        ({"validation_share": 0.5, "eval_data_path": GOLDENS / "train.json"}, "exclude each other"),
        ({"verdict_only_share": -0.1}, "verdict_only_share"),
        ({"eval_strategy": "steps"}, "--eval_data_path"),
        ({"eval_on_start": True}, "--eval_data_path"),
        ({"alike_lengths": True}, "--group_by_length needs --group_by_modality_length"),
        ({"tune_mm_mlp_adapter": True}, "--lora_enable"),
        ({"unfreeze_towers": True, "cache_features": "x"}, "cache_features"),
        ({"unfreeze_towers": True, "save_layout": "published"}, "published"),
        ({"lora_enable": False, "save_layout": "adapter"}, "adapter"),
        ({"bits": 8, "save_layout": "merged"}, "merged"),
        ({"mm_use_im_start_end": True}, "not supported"),
        ({"lazy_preprocess": False}, "lazy_preprocess"),
        ({"overwrite_output_dir": True}, "overwrite_output_dir"),
        ({"freeze_backbone": True}, "freeze_backbone"),
        ({"load_best_model_at_end": True}, "best"),
        ({"group_by_length": True}, "group_by_modality_length"),
        ({"train_sampling_strategy": "group_by_length"}, "group_by_modality_length"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"save_only_model": True}, "save_only_model"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"learning_rate": -1}, "learning_rate"),
        ({"learning_rate": "nan"}, "learning_rate"),
        ({"mm_projector_lr": -1}, "mm_projector_lr"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"num_train_epochs": 0, "max_steps": None}, "num_train_epochs"),
        ({"max_steps": 0}, "max_steps"),
        ({"adam_beta2": 1}, "adam_beta2"),
        ({"adam_epsilon": -1}, "adam_epsilon"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers"),
        ({"warmup_ratio": "some"}, "warmup_ratio"),
        ({"warmup_ratio": 3}, "warmup_ratio"),
        ({"validation_new_tokens": 0}, "validation_new_tokens"),
        ({"lr_scheduler_type": "zigzag"}, "zigzag"),
        ({"optim": "magic"}, "magic"),
        ({"optim_args": "nothing"}, "--optim"),
        ({"optim": "lomo"}, "lomo_optim"),
        ({"report_to": "smoke"}, "--report_to smoke is unknown"),
        ({"report_to": "azure_ml"}, "--report_to azure_ml: it is not installed"),
        ({"bf16": True, "fp16": True}, "fp16"),
        ({"fp16": True}, "--fp16 needs a GPU"),
        ({"deepspeed": "/nowhere/zero.json"}, "/nowhere/zero.json"),
        ({"resume": "/nowhere/checkpoint-1"}, "/nowhere/checkpoint-1"),
        ({"resume_from_checkpoint": "/nowhere/checkpoint-1"}, "/nowhere/checkpoint-1"),
        ({"cache_features": GOLDENS / "train.json" / "x"}, "--cache_features"),
        ({"attn_implementation": "flash_attention_2"}, "flash"),
        ({"attn_implementation": "magic"}, "magic"),
        ({"mm_projector_type": "linear"}, "mm_projector_type"),
        ({"mm_vision_select_layer": -1}, "mm_vision_select_layer"),
        ({"model_config": GOLDENS / "base" / "config.json"}, "either"),
        ({"model_config": "/nowhere/config.json", "model_name_or_path": None, "tokenizer": "x"}, "/nowhere"),
        ({"model_config": GOLDENS / "base" / "config.json", "model_name_or_path": None}, "--tokenizer"),
    ],
    ids=str,
)
def test_invalid_options_are_refused_in_one_line(capsys, tmp_path, changes, named):
    assert named in error_line(capsys, tmp_path / "out", **changes)


def test_a_new_model_cannot_have_an_adapter_over_nothing(capsys, tmp_path):
    new = {"model_name_or_path": None, "model_config": GOLDENS / "base" / "config.json", "tokenizer": GOLDENS / "base"}
    assert "--model_config" in error_line(capsys, tmp_path / "out", **new)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"hidden_size": "wide"}, "hidden"),
        ({"num_attention_heads": 7}, "hidden"),
        ({"num_key_value_heads": 3}, "attention heads cannot share 3"),
    ],
    ids=str,
)
def test_a_config_that_describes_no_model_is_refused(capsys, tmp_path, wrong, why):
    config = json.loads((GOLDENS / "base" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **wrong}))
    new = {"model_name_or_path": None, "model_config": tmp_path / "config.json", "tokenizer": GOLDENS / "base"}
    message = error_line(capsys, tmp_path / "out", **new, lora_enable=False)
    assert str(tmp_path / "config.json") in message and why in message


def test_sharded_training_is_not_begun_without_a_launcher(capsys, tmp_path):
    pytest.importorskip("deepspeed")
    message = error_line(capsys, tmp_path / "out", deepspeed=Path(__file__).parents[1] / "scripts" / "zero2.json")
    assert "llava.train.launch" in message


def test_towers_that_do_not_fit_are_refused(capsys, tmp_path):
    message = error_line(capsys, tmp_path / "out", vision_tower=GOLDENS.parent / "clip_full")
    assert "mm_projector" in message and "--vision_tower" in message
    tensors = torch.load(GOLDENS / "dino.pth", weights_only=True)
    tensors["patch_embed.proj.weight"] = tensors["patch_embed.proj.weight"][..., :10, :10].clone()
    torch.save(tensors, tmp_path / "finer.pth")
    assert "25 and 49" in error_line(capsys, tmp_path / "out", dino_weights=tmp_path / "finer.pth")


def altered(folder: Path, change) -> Path:
    records = json.loads((GOLDENS / "train.json").read_text("utf-8"))
    change(records)
    file = folder / "data.json"
    file.write_text(json.dumps(records), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda records: [record.pop("image") for record in records], "data.json, row 1"),
        (lambda records: records[1].update(image="gone.png"), "data.json, row 2"),
        (lambda records: records[2]["conversations"][1].update(value="I cannot say."), "data.json, row 3"),
        (lambda records: records[0].pop("conversations"), "data.json, row 1"),
        (lambda records: records.clear(), "data.json is empty"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused(capsys, tmp_path, change, named):
    assert named in error_line(capsys, tmp_path / "out", data_path=altered(tmp_path, change))


def test_records_without_any_image_are_refused(capsys, tmp_path):
    file = write_records(tmp_path, count=4, text_only=4)
    message = error_line(capsys, tmp_path / "out", data_path=file, image_folder=tmp_path)
    assert "none of the 4 records has an image" in message


def test_invalid_records_are_dropped_if_that_is_asked_for(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(ForgeryTrainer, "train", lambda *_, **__: None)
    data = altered(tmp_path, lambda records: records[1].update(image="gone.png"))
    assert main(options(tmp_path / "out", **{**BASE, "data_path": data}, drop_invalid=True)) == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text("utf-8"))["records"] == 2


def test_a_bug_keeps_its_traceback(trained, tmp_path, monkeypatch):
    def fault(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(ForgeryTrainer, "train", fault)
    with pytest.raises(RuntimeError, match="a bug"):
        main(options(tmp_path / "out", trained, write_records(tmp_path, count=4), **LORA))


def test_an_unknown_option_is_answered_with_the_nearest(capsys, tmp_path):
    assert "did you mean --learning-rate?" in error_line(capsys, tmp_path / "out", learning_rat=1)


def test_a_process_ends_with_status_1(tmp_path):
    arguments = options(Path("out"), **{**BASE, "data_path": "/nowhere/train.json"})
    command = [sys.executable, "-m", "llava.train.train", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


# --- names of older versions


def settings(*arguments: str):
    return parse_arguments([*NEEDED, "--eval_data_path", __file__, "--eval_strategy", "steps", *arguments])


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--evaluation_strategy", "steps", "--eval_steps", "5"], "eval_strategy", "steps"),
        (["--evaluation-strategy=epoch"], "eval_strategy", "epoch"),
        (["--warmup_ratio", "0.03"], "warmup_steps", 0.03),
        (["--warmup_ratio", "0"], "warmup_steps", 0),
        (["--per_gpu_train_batch_size", "3"], "per_device_train_batch_size", 3),
        (["--no_cuda"], "use_cpu", True),
        (["--report-to", "flyte"], "report_to", ["flyte"]),
        ([], "report_to", []),
        (
            ["--gradient_checkpointing", "--gradient_checkpointing_kwargs", '{"use_reentrant": true}'],
            "gradient_checkpointing_kwargs",
            {"use_reentrant": True},
        ),
        (["--save_safetensors", "True"], "save_steps", 500),
        (["--overwrite_output_dir", "False"], "output_dir", "x"),
        (["--local_rank", "0"], "output_dir", "x"),
        (["--resume_from_checkpoint", "run/checkpoint-2"], "resume", "run/checkpoint-2"),
        (["--resume-from-checkpoint", "True"], "resume", "auto"),
        (["--resume_from_checkpoint", "False"], "resume", ""),
        (["--group_by_length", "False"], "output_dir", "x"),
    ],
    ids=str,
)
def test_options_of_training_act_under_older_names(arguments, name, value):
    assert getattr(settings(*arguments)[2], name) == value


@pytest.mark.parametrize(
    ("arguments", "group", "name", "value"),
    [
        (["--group-by-modality-length", "True"], 1, "group_by_modality_length", True),
        (["--alike_lengths", "--group_by_modality_length"], 1, "group_by_length", True),
        (["--alike-lengths=False"], 1, "group_by_length", False),
        (["--model_max_len", "77"], 1, "model_max_length", 77),
        (["--mm_vision_tower", "y"], 0, "vision_tower", "y"),
        (["--freeze_mm_mlp_adapter", "False"], 0, "tune_mm_mlp_adapter", False),
        (["--data-path", "a.json", "b.json"], 1, "data_path", ["a.json", "b.json"]),
        (["--lora_enable"], 0, "lora_enable", True),
    ],
    ids=str,
)
def test_other_options_act_under_older_names(arguments, group, name, value):
    assert getattr(settings(*arguments)[group], name) == value


def test_the_ratio_of_the_warm_up_acts():
    args = settings("--warmup_ratio", "0.03")[2]
    assert args.get_warmup_steps(1000) == 30


def test_help_lists_the_options(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--help"])
    assert ended.value.code == 0
    assert "--cpm_search" in capsys.readouterr().out


def test_a_damaged_image_is_named_without_a_traceback(capsys, trained, tmp_path, monkeypatch):
    monkeypatch.undo()
    data = write_records(tmp_path, count=4)
    (tmp_path / "images" / "2.png").write_bytes(b"no image")
    for workers in (0, 2):
        given = options(tmp_path / f"out{workers}", trained, data, **LORA, dataloader_num_workers=workers)
        assert main(given) == 1
        message = capsys.readouterr().err
        error = next(line for line in message.splitlines() if "error: " in line)
        assert error.startswith("error: "), "it stands on the progress bar's line"
        assert "train.json, row 3" in error and "2.png" in error and message.count("error: ") == 1
        assert "Traceback" not in message
