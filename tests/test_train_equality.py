"""The same samples in an optimizer step give the same losses, however they are divided; broken runs are continued."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from llava.data.sampler import ModalityLengthSampler
from llava.train.trainer import ForgeryTrainer
from tests.conftest import GOLDENS
from tests.training_runs import (
    LORA,
    ROOT,
    adapter_weights,
    errors_of,
    largest_gap,
    start_on_two,
    steps,
    train_here,
    train_on_two,
    write_records,
)

VALIDATED = ("eval_loss", "eval_lm_loss", "eval_mapper_loss", "eval_verdict_accuracy")
METRICS = ("loss", "lm_loss", "mapper_loss", "mapper_rows_share", "grad_norm")


def without_dropout(source: Path, folder: Path) -> Path:
    """A copy of a checkpoint whose fusion has no dropout."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["mm_fusion_config"]["dropout"] = 0.0
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def uneven_records(folder: Path) -> Path:
    """Records with answers of unlike length; of some, the trained model predicts the verdict's place, of others not."""
    file = write_records(folder, count=10, text_only=2)
    records = json.loads(file.read_text("utf-8"))
    others = json.loads((GOLDENS / "train.json").read_text("utf-8"))
    for record in others:
        shutil.copy(GOLDENS / "images" / record["image"], folder / "images" / f"other_{record['image']}")
        record["image"] = f"other_{record['image']}"
    file.write_text(json.dumps([*records, *others]), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def start(trained, tmp_path_factory) -> Path:
    return without_dropout(trained, tmp_path_factory.mktemp("start") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return uneven_records(tmp_path_factory.mktemp("data"))


def close(first: list, second: list, tolerance: float = 1e-4) -> bool:
    assert len(first) == len(second) > 0
    return torch.allclose(torch.tensor(first), torch.tensor(second), atol=tolerance, rtol=0)


@pytest.mark.parametrize("search", ["labels", "predictions"])
def test_accumulation_divides_a_step_without_changing_it(start, data, tmp_path, search):
    shared = {**LORA, "cpm_search": search, "max_steps": 6}  # 13 records: a step at the end of an epoch is smaller
    whole = train_here(tmp_path / "whole", start, data, **shared, per_device_train_batch_size=4)
    halves = train_here(tmp_path / "halves", start, data, **shared, gradient_accumulation_steps=2)
    quarters = train_here(
        tmp_path / "quarters",
        start,
        data,
        **shared,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )
    expected = steps(whole, *METRICS)
    print(expected)
    shares = [metrics[3] for metrics in expected]
    assert shares == [1.0] * 6 if search == "labels" else 0 < sum(shares) < 6
    for other in (halves, quarters):
        assert close(steps(other, *METRICS), expected)
        assert largest_gap(adapter_weights(whole), adapter_weights(other)) < 2e-4
    theirs = train_here(
        tmp_path / "theirs", start, data, **shared, gradient_accumulation_steps=2, loss_average="micro_batch"
    )
    assert not close(steps(theirs, "loss", "grad_norm"), steps(whole, "loss", "grad_norm"), 1e-3)


ZERO = {stage: ROOT / "scripts" / f"zero{stage}.json" for stage in (2, 3)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("search", "micro_batch", "accumulation", "stage"),
    [
        ("labels", 2, 1, None),
        ("predictions", 1, 2, None),
        ("predictions", 2, 1, 2),
        ("labels", 1, 2, 2),
        ("predictions", 1, 2, 3),
        ("labels", 2, 1, 3),
    ],
)
def test_two_processes_have_the_losses_of_one(start, data, tmp_path, search, micro_batch, accumulation, stage):
    if stage:
        pytest.importorskip("deepspeed")
    validating = {"eval_data_path": data, "eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 2}
    validating["validation_verdict"] = "score" if stage == 3 else "generate"
    shared = {**LORA, **validating, "cpm_search": search, "max_steps": 3, "validation_new_tokens": 120}
    one = train_here(tmp_path / "one", start, data, **shared, per_device_train_batch_size=4)
    two = train_on_two(
        tmp_path / "two",
        start,
        data,
        **shared,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        deepspeed=ZERO.get(stage),
    )
    assert close(steps(two, *METRICS), steps(one, *METRICS))
    assert largest_gap(adapter_weights(one), adapter_weights(two)) < 2e-4
    assert close(steps(two, *VALIDATED), steps(one, *VALIDATED))


@pytest.mark.slow
def test_whichever_process_fails_reports_why(trained, data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data.parent, folder)
    records = json.loads(data.read_text("utf-8"))
    words = [sum(len(turn["value"].split()) for turn in record["conversations"]) for record in records]
    lengths = [count if "image" in record else -count for count, record in zip(words, records, strict=True)]
    order = list(ModalityLengthSampler(lengths, 1, 2, 42))
    second = next(index for index in order[1::2] if "image" in records[index])
    (folder / "images" / records[second]["image"]).write_bytes(b"no image")
    given = {**LORA, "max_steps": 6, "per_device_train_batch_size": 1, "group_by_modality_length": True, "seed": 42}
    process = start_on_two(tmp_path / "run", trained, folder / "train.json", **given)
    message = errors_of(process)
    assert process.returncode != 0
    error = next(line for line in message.splitlines() if "error: " in line)
    assert error.startswith("error: ") and f"train.json, row {second + 1}" in error
    assert "no image in a known format" in error


def test_matching_rows_are_counted_with_the_dropout_of_the_step_itself(trained, data, tmp_path, monkeypatch):
    counted: dict[int, set[float]] = {}
    matched: dict[int, int] = {}
    add = ForgeryTrainer._add_to_sums

    def noted(self, inputs, output):
        step = self.state.global_step
        counted.setdefault(step, set()).add(self._step_items["mapper"])
        matched[step] = matched.get(step, 0) + int(output.terms["mapper"].items)
        return add(self, inputs, output)

    monkeypatch.setattr(ForgeryTrainer, "_add_to_sums", noted)
    settings = {**LORA, "lora_dropout": 0.5, "cpm_search": "predictions", "learning_rate": 3e-2}
    train_here(tmp_path / "run", trained, data, **settings, max_steps=8, gradient_accumulation_steps=4)
    assert len(set(matched.values())) > 1
    assert counted == {step: {max(1.0, rows)} for step, rows in matched.items()}
