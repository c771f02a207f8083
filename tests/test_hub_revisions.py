"""Which revision of a hub's model is meant, opened, and known by what is on disk."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from forgery_eval.fingerprints import model_fingerprint, weight_locations, weights_digest
from llava import load_pretrained_model
from llava.errors import CheckpointError
from llava.model.checkpoint import open_checkpoint
from tests.conftest import GOLDENS

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A hub's cache with the reference's base in two revisions, which differ in one weight."""
    root = tmp_path / "hub" / "models--owner--base"
    for name, commit in COMMITS.items():
        shutil.copytree(GOLDENS / "base", root / "snapshots" / commit)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / name).write_text(commit)
    file = root / "snapshots" / COMMITS["v1"] / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] += 1
    save_file(tensors, file, {"format": "pt"})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return root


@pytest.fixture
def lora(tmp_path) -> Path:
    return shutil.copytree(GOLDENS / "lora", tmp_path / "lora")


def change(folder: Path, **fields: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def norm(folder: Path, base: object = None) -> torch.Tensor:
    return open_checkpoint(folder, base).tensors["model.norm.weight"][...]


@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize("revision", ["v1", COMMITS["v1"]])
def test_the_revision_that_an_adapter_names_is_opened(hub, lora, revision, has_config):
    if not has_config:
        (lora / "config.json").unlink()
    change(lora, base_model_name_or_path="owner/base", revision=None)
    first = norm(lora)
    change(lora, revision=revision)
    assert torch.equal(norm(lora), first + 1)
    assert torch.equal(norm(lora, "owner/base"), first + 1)
    assert torch.equal(norm(lora, GOLDENS / "base"), first)  # another base has no such revision


@pytest.mark.parametrize(("revision", "word"), [("v9", "owner/base in revision v9"), (7, "revision must be a text")])
def test_a_revision_that_is_not_there_is_one_sentence(hub, lora, revision, word):
    change(lora, base_model_name_or_path="owner/base", revision=revision)
    with pytest.raises(CheckpointError, match=word):
        load_pretrained_model(lora, device="cpu")


def test_a_local_base_needs_no_revision(lora):
    change(lora, base_model_name_or_path=str(GOLDENS / "base"), revision="v9")
    assert torch.equal(norm(lora), norm(lora, GOLDENS / "base"))


@pytest.mark.parametrize("known_by", [model_fingerprint, weights_digest])
def test_another_revision_is_another_model(hub, lora, known_by):
    change(lora, base_model_name_or_path="owner/base")
    found = [known_by(weight_locations(lora))]
    (hub / "refs" / "main").write_text(COMMITS["v1"])
    found.append(known_by(weight_locations(lora)))
    change(lora, base_model_name_or_path="owner/absent")
    found.append(known_by(weight_locations(lora)))
    assert all(found.count(each) == 1 for each in found)
    assert known_by(weight_locations(lora)) == found[-1]


@pytest.mark.parametrize("known_by", [model_fingerprint, weights_digest])
def test_a_base_beside_an_adapter_is_part_of_the_model(lora, tmp_path, known_by):
    base = shutil.copytree(GOLDENS / "base", tmp_path / "beside")
    change(lora, base_model_name_or_path="../beside")
    first = known_by(weight_locations(lora))
    assert known_by(weight_locations(lora)) == first
    (base / "model.safetensors").write_bytes(b"another")
    assert known_by(weight_locations(lora)) != first
