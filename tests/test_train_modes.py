"""Each way to train: what changes, what stays, and that the result opens."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.data import build_tokenizer
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint_layout import stored_state_dict
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.llava_arch import LlavaMetaModel
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_encoder.dino_encoder import DinoVisionTower
from llava.train.flops import TrainingFlops
from llava.train.lora import part_of
from llava.train.train import main
from llava.train.trainer import ForgeryTrainer
from tests.conftest import GOLDENS
from tests.small_models import small_config
from tests.test_train_export import logits
from tests.training_runs import LORA, options, steps, train_here, write_records

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_records(tmp_path_factory.mktemp("data"), count=12, text_only=2)


def opened(folder: Path) -> LlavaLlamaForCausalLM:
    return load_pretrained_model(folder, device="cpu")[1]


def changed_parts(before: Path, after: Path) -> set[str]:
    """Parts of which some tensor differs between two folders."""
    first, second = opened(before).state_dict(), opened(after).state_dict()
    assert set(first) == set(second)
    return {part_of(name) for name in first if not torch.equal(first[name], second[name])}


def without(folder: Path, source: Path, *parts: str) -> Path:
    """A copy of a checkpoint that lacks parts."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(parts)}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        (LORA, {"language_model", "fusion", "mm_projector", "dino_mm_projector"}),
        ({}, {"language_model", "fusion", "mm_projector", "dino_mm_projector"}),
        ({"tune_mm_mlp_adapter": True}, {"mm_projector", "dino_mm_projector"}),
        (
            {"tune_mm_mlp_adapter": True, "unfreeze_towers": True, "tower_lr": 1e-4},
            {"mm_projector", "dino_mm_projector", "vision_tower", "dino_tower"},
        ),
        (
            {**LORA, "unfreeze_towers": True},
            {"language_model", "fusion", "mm_projector", "dino_mm_projector", "vision_tower", "dino_tower"},
        ),
        (
            {"unfreeze_towers": True, "gradient_checkpointing": True},
            {"language_model", "fusion", "mm_projector", "dino_mm_projector", "vision_tower", "dino_tower"},
        ),
        ({**LORA, "mm_projector_lr": 0}, {"language_model", "fusion"}),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),
)
def test_exactly_the_named_parts_change(trained, data, tmp_path, given, changed):
    final = train_here(tmp_path / "run", trained, data, **given)
    assert changed_parts(trained, final) == changed
    assert len(steps(final, "loss")) == 3


@pytest.mark.parametrize("given", [LORA, {}, {"unfreeze_towers": True}], ids=str)
def test_gradient_checkpointing_changes_no_loss(trained, data, tmp_path, given):
    plain = train_here(tmp_path / "plain", trained, data, **given)
    saving = train_here(tmp_path / "saving", trained, data, **given, gradient_checkpointing=True)
    assert np.allclose(steps(plain, "loss"), steps(saving, "loss"), atol=1e-5)


def test_frozen_towers_run_once_a_micro_batch(trained, data, tmp_path, monkeypatch):
    def is_shape(module: torch.nn.Module) -> bool:
        """Whether it has no numbers, as where operations are counted."""
        return next(module.parameters()).is_meta

    calls = []
    for tower in (CLIPVisionTower, DinoVisionTower):
        original = tower.forward

        def counted(self, *arguments, original=original, **named):
            if not is_shape(self):
                calls.append((type(self).__name__, torch._C._current_graph_task_id() != -1))
            return original(self, *arguments, **named)

        monkeypatch.setattr(tower, "forward", counted)
    layers = []
    original_layers = torch.nn.Module.__call__

    def counted_layer(self, *arguments, **named):
        if type(self).__name__ in ("CLIPEncoderLayer", "Dinov2Layer") and not is_shape(self):
            layers.append(self)
        return original_layers(self, *arguments, **named)

    monkeypatch.setattr(torch.nn.Module, "__call__", counted_layer)
    train_here(
        tmp_path / "run",
        trained,
        data,
        **LORA,
        gradient_checkpointing=True,
        gradient_accumulation_steps=2,
        max_steps=2,
    )
    assert len(calls) == 4 * 2 and {name for name, _ in calls} == {"CLIPVisionTower", "DinoVisionTower"}
    assert not any(in_backward for _, in_backward in calls)
    assert len(layers) == 4 * len(set(layers))


@pytest.mark.parametrize("fusion", ["cross_attention", "interleave", "clip", "dino"])
def test_another_fusion_is_trained_from_scratch(trained, data, tmp_path, capsys, fusion):
    start = trained
    if fusion in ("clip", "dino"):
        start = without(tmp_path / "start", trained, *(["model.dino"] if fusion == "clip" else ["model.mm_projector"]))
    needs_new = fusion == "cross_attention"
    start = without(tmp_path / "start2", start, "model.fusion.")
    given = {**LORA, "mm_fusion_type": fusion}
    if needs_new:
        assert main(options(tmp_path / "refused", start, data, **given)) == 1
        assert "--init" in capsys.readouterr().err
    final = train_here(tmp_path / "run", start, data, **given, init="fusion" if needs_new else None)
    model = opened(final)
    assert model.config.mm_fusion_type == fusion
    assert logits(model).isfinite().all()


def test_a_fusion_is_not_exchanged_for_one_with_fewer_parts(trained, data, tmp_path, capsys):
    assert main(options(tmp_path / "run", trained, data, **LORA, mm_fusion_type="interleave")) == 1
    assert "the fusion 'interleave' has no such parts" in capsys.readouterr().err


def test_missing_parts_are_new_only_if_named(data, tmp_path, capsys):
    start = without(tmp_path / "start", GOLDENS / "base", "model.crossattention.", "model.dino_mm_projector.")
    given = {
        "vision_tower": GOLDENS / "clip",
        "dino_weights": GOLDENS / "dino.pth",
        "data_path": GOLDENS / "train.json",
        "image_folder": GOLDENS / "images",
        "mm_fusion_type": "forgery_aware",
        **LORA,
    }
    for init in (None, "fusion", "dino_mm_projector"):
        assert main(options(tmp_path / "refused", start, **given, init=init)) == 1
        message = capsys.readouterr().err
        assert "--init" in message and "missing" in message and "Traceback" not in message
    final = train_here(tmp_path / "run", start, **given, init="fusion,dino_mm_projector")
    assert logits(opened(final)).isfinite().all()
    assert steps(final, "loss")[0] == pytest.approx(9.9, abs=1.5)


def test_a_new_part_is_the_same_in_every_process(trained, data, tmp_path):
    finals = [train_here(tmp_path / str(run), trained, data, **LORA, init="fusion") for run in range(2)]
    assert steps(finals[0], "loss") == steps(finals[1], "loss")
    assert steps(finals[0], "loss") != steps(train_here(tmp_path / "own", trained, data, **LORA), "loss")


def new_model(folder: Path, data: Path) -> dict[str, Path]:
    """Config and tokenizer of a small new model."""
    arguments = [str(data), "--output_dir", str(folder / "tokenizer"), "--vocab_size", "400"]
    build_tokenizer.run(build_tokenizer.build_parser().parse_args(arguments))
    config = small_config().to_dict()
    for name in ("cpm_tokens", "vocab_size"):
        config.pop(name)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return {"model_config": folder / "config.json", "tokenizer": folder / "tokenizer"}


def test_a_new_model_is_trained_from_its_config(data, tmp_path):
    given = new_model(tmp_path, data)
    final = train_here(tmp_path / "run", None, data, **given, max_steps=60, unfreeze_towers=True)
    losses = steps(final, "loss")
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    model = opened(final)
    assert model.config.conv_mode == "v1" and model.config.vocab_size == len(model.tokenizer)
    again = train_here(tmp_path / "again", None, data, **given, max_steps=60, unfreeze_towers=True)
    assert steps(again, "loss") == losses


def test_stages_follow_each_other(data, tmp_path):
    """Towers with attribute heads would come first; then they are frozen and cached, and the rest is trained."""
    first = train_here(tmp_path / "first", None, data, **new_model(tmp_path, data), unfreeze_towers=True)
    second = train_here(tmp_path / "second", first, data, cache_features=tmp_path / "cache")
    assert changed_parts(first, second) == {"language_model", "fusion", "mm_projector", "dino_mm_projector"}


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=str)
def test_a_quantised_language_model_trains(trained, data, tmp_path, monkeypatch, bits, precision):
    reached = []
    original = ForgeryTrainer.training_step

    def counted(self, model, *arguments):
        loss = original(self, model, *arguments)
        ups = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
        reached.append(all(up.grad is not None and bool(up.grad.any()) for up in ups))
        return loss

    monkeypatch.setattr(ForgeryTrainer, "training_step", counted)
    validating = {"validation_share": 0.25, "eval_strategy": "steps", "eval_steps": 2, "validation_verdict": "score"}
    run = {**LORA, **precision, **validating, "bits": bits, "max_steps": 6, "lr_scheduler_type": "constant"}
    final = train_here(tmp_path / "run", trained, data, **run)
    assert reached == [True] * 6
    adapter = load_file(final / "adapter_model.safetensors")
    assert all(tensor.any() for tensor in adapter.values())
    exact = train_here(tmp_path / "exact", trained, data, **{**run, "bits": 16})
    assert np.allclose(steps(final, "lm_loss")[0], steps(exact, "lm_loss")[0], atol=0.5)
    _, model, _, _ = load_pretrained_model(final, device="cpu", **{f"load_{bits}bit": True})
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("given", [{}, {"bf16": True}], ids=str)
def test_kept_features_train_like_images(trained, data, tmp_path, monkeypatch, given):
    run = {**LORA, **given, "group_by_modality_length": True, "verdict_only_share": 0.4}
    exact = train_here(tmp_path / "exact", trained, data, **run)
    cached = train_here(tmp_path / "cached", trained, data, **run, cache_features=tmp_path / "cache")
    assert np.allclose(steps(exact, "loss"), steps(cached, "loss"), atol=5e-2 if given else 2e-3)
    original, runs = LlavaMetaModel.run_towers, []

    def counted(self, images):
        if not images.is_meta:  # where operations are counted
            runs.append(len(images))
        return original(self, images)

    monkeypatch.setattr(LlavaMetaModel, "run_towers", counted)
    again = train_here(tmp_path / "again", trained, data, **run, cache_features=tmp_path / "cache")
    assert steps(again, "loss") == steps(cached, "loss")
    assert sum(runs) <= 1  # the shapes
    done = np.load(tmp_path / "cache" / "done.npy")
    assert done.all() and len(done) == 10
    done[4:7] = False
    np.save(tmp_path / "cache" / "done.npy", done)
    runs.clear()
    interrupted = train_here(tmp_path / "interrupted", trained, data, **run, cache_features=tmp_path / "cache")
    assert steps(interrupted, "loss") == steps(cached, "loss") and sum(runs) == 3 + 1


@pytest.mark.parametrize("cut", ["state.json", "clip.npy", "done.npy"])
@pytest.mark.parametrize("kept_bytes", [0, 30])
def test_damaged_features_are_made_again(trained, data, tmp_path, cut, kept_bytes):
    # Copies of one image are called real and fake.
    run = {**LORA, "cache_features": tmp_path / "cache", "allow_contradictions": True}
    first = train_here(tmp_path / "first", trained, data, **run)
    os.truncate(tmp_path / "cache" / cut, kept_bytes)
    second = train_here(tmp_path / "second", trained, data, **run)
    assert steps(second, "loss") == steps(first, "loss")


def test_features_of_other_images_are_not_taken(trained, data, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(data.parent, own)
    # Copies of one image are called real and fake.
    run = {**LORA, "cache_features": tmp_path / "cache", "allow_contradictions": True}
    first = train_here(tmp_path / "first", trained, own / "train.json", **run)
    (own / "images" / "0.png").write_bytes((own / "images" / "1.png").read_bytes())
    for number in range(2, 10):
        (own / "images" / f"{number}.png").write_bytes((own / "images" / "1.png").read_bytes())
    second = train_here(tmp_path / "second", trained, own / "train.json", **run)
    exact = train_here(tmp_path / "exact", trained, own / "train.json", **LORA, allow_contradictions=True)
    assert not np.allclose(steps(first, "loss"), steps(second, "loss"), atol=1e-4)
    assert np.allclose(steps(exact, "loss"), steps(second, "loss"), atol=2e-3)


def test_records_without_images_train_beside_others(trained, tmp_path):
    given = {"data_path": GOLDENS / "train_mixed.json", "image_folder": GOLDENS / "images", "drop_invalid": True}
    given["allow_contradictions"] = True
    for grouped in (True, False):
        final = train_here(
            tmp_path / str(grouped), trained, **given, **LORA, group_by_modality_length=grouped, max_steps=6
        )
        assert np.isfinite(steps(final, "loss")).all() and len(steps(final, "loss")) == 6


def test_a_batch_of_text_alone_reaches_every_trained_part(trained, tmp_path):
    """Sharded training waits for a part that one process leaves out."""
    model = opened(trained)
    size = model.image_processor.crop_size["height"]
    ids = torch.tensor([[1, 20, 30, 40], [1, 50, 60, 70]])
    model.fusion = None
    output = model(
        input_ids=ids,
        images=torch.zeros(2, 3, size, size),
        labels=ids,
        forgery_labels=torch.tensor([-100, -100]),
        loss_only=True,
    )
    output.loss.backward()
    for name, parameter in model.named_parameters():
        if part_of(name) in ("fusion", "mm_projector", "dino_mm_projector"):
            assert parameter.grad is not None and not parameter.grad.any(), name


def test_answers_that_are_only_the_verdict_are_mixed_in(trained, data, tmp_path):
    whole = train_here(tmp_path / "whole", trained, data, **LORA, max_steps=1)
    short = train_here(tmp_path / "short", trained, data, **LORA, max_steps=1, verdict_only_share=1.0)
    assert opened(short).config.verdict_only_share == 1.0 and opened(whole).config.verdict_only_share == 0.0
    assert steps(short, "loss") != steps(whole, "loss")


@pytest.mark.parametrize("strategy", [{"eval_strategy": "epoch"}, {"eval_strategy": "steps", "eval_steps": 2}], ids=str)
def test_validation_comes_when_it_is_asked_for(trained, data, tmp_path, strategy):
    given = {**strategy, "validation_share": 0.34, "max_steps": None, "num_train_epochs": 2, "verdict_only_share": 0.5}
    final = train_here(tmp_path / "run", trained, data, **LORA, **given)
    found = steps(final, "step", "eval_loss", "eval_verdict_accuracy")
    assert [step for step, _, _ in found] == ([4, 8] if strategy["eval_strategy"] == "epoch" else [2, 4, 6, 8])
    assert all(0 <= accuracy <= 1 and np.isfinite(loss) for _, loss, accuracy in found)
    assert (tmp_path / "run" / "best" / "adapter_config.json").is_file()


def test_workers_read_the_same_samples(trained, data, tmp_path):
    alone = train_here(tmp_path / "alone", trained, data, **LORA)
    helped = train_here(tmp_path / "helped", trained, data, **LORA, dataloader_num_workers=2)
    assert steps(alone, "loss") == steps(helped, "loss")


def test_towers_alone_are_stored_with_an_adapter(trained, data, tmp_path):
    final = train_here(tmp_path / "run", trained, data, **LORA, unfreeze_towers=True)
    beside = torch.load(final / "non_lora_trainables.bin", weights_only=True)
    assert any("vision_tower" in name for name in beside) and any("dino_tower" in name for name in beside)
    assert set(stored_state_dict(opened(final))) == set(stored_state_dict(opened(trained)))


@pytest.mark.parametrize("repeated", [False, True])
def test_the_log_counts_what_is_computed(trained, data, tmp_path, repeated):
    given = {**LORA, "max_steps": 2, "gradient_checkpointing": repeated, "gradient_accumulation_steps": 2}
    final = train_here(tmp_path / "run", trained, data, **given)
    weights = TrainingFlops(opened(trained)).language_weights
    metrics = steps(final, "mfu_tflops", "hfu_tflops", "tokens_per_s")
    assert len(metrics) == 2
    for conventional, computed, rate in metrics:
        assert conventional * 1e12 == pytest.approx(6 * weights * rate, rel=1e-3)
        # LoRA leaves out gradients of frozen weights, checkpointing repeats a forward; towers and fusion come on top.
        assert computed > 0.5 * conventional


def test_repeated_forwards_count_as_computed(trained, data, tmp_path):
    ratios = []
    for repeated in (False, True):
        final = train_here(tmp_path / str(repeated), trained, data, **LORA, gradient_checkpointing=repeated)
        ratios.append([hfu / mfu for mfu, hfu in steps(final, "mfu_tflops", "hfu_tflops")])
    assert all(more > 1.2 * less for less, more in zip(*ratios, strict=True)), ratios
