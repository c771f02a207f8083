"""Opening, saving and merging checkpoints, and what is said of broken ones."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llava import ForgeryDetector, load_pretrained_model
from llava.errors import CheckpointError
from llava.files import atomic_folder
from llava.mm_utils import process_images
from llava.model.builder import resolve_attention, resolve_dtype
from llava.model.checkpoint import open_checkpoint
from llava.model.checkpoint_layout import NON_LORA_FILE, KeyMap, stored_state_dict
from llava.model.multimodal_encoder.dino_encoder import original_rules
from llava.model.saving import save_published, save_sharded
from tests.conftest import GOLDENS
from tests.small_models import DINO_CONFIG, small_model

SCRIPT = Path(__file__).parents[1] / "scripts" / "merge_lora_weights.py"
CLIP, DINO = GOLDENS / "clip", GOLDENS / "dino.pth"


def copy_base(tmp_path: Path, **config: object) -> Path:
    """A published checkpoint that names its CLIP tower by an absolute path."""
    folder = tmp_path / "published"
    shutil.copytree(GOLDENS / "base", folder)
    values = json.loads((folder / "config.json").read_text())
    values |= {"mm_vision_tower": str(CLIP), **config}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def logits(reference, model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=reference.prompt_ids, images=reference.pixels[:1]).logits


@pytest.fixture(scope="module")
def expected(bundled):
    return logits(bundled, bundled.base[1])


def test_a_published_checkpoint_needs_only_its_own_tensors(bundled, tmp_path, expected, caplog):
    caplog.set_level(logging.INFO)
    _, model, _, context_length = load_pretrained_model(copy_base(tmp_path), device="cpu")
    assert torch.equal(logits(bundled, model), expected)
    assert context_length == 2048
    assert caplog.text.count("from the checkpoint") == 2


def test_towers_come_from_where_the_config_says_when_the_checkpoint_lacks_them(
    bundled, tmp_path, expected, monkeypatch, caplog
):
    folder = copy_base(tmp_path)
    change_tensors(folder, lambda t: [t.pop(n) for n in list(t) if "_tower." in n])
    with pytest.raises(CheckpointError, match="DINO_WEIGHT"):
        load_pretrained_model(folder, device="cpu")
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("DINO_WEIGHT", str(DINO))
    _, model, _, _ = load_pretrained_model(folder, device="cpu")
    assert torch.equal(logits(bundled, model), expected)
    assert f"from {DINO}" in caplog.text and f"from {CLIP}" in caplog.text


def test_an_incomplete_tower_in_the_checkpoint_is_not_used(tmp_path, monkeypatch):
    folder = copy_base(tmp_path)
    change_tensors(folder, lambda t: t.pop("model.dino_tower.vision_tower.blocks.1.norm1.weight"))
    with pytest.raises(CheckpointError, match="holds the tower of its branch 'dino' only in part"):
        load_pretrained_model(folder, device="cpu")


@pytest.mark.parametrize("name", ["openai/clip-vit-large-patch14-336", "/far/away/clip-vit-large-patch14-336"])
def test_an_openai_tower_is_opened_without_the_hub(tmp_path, name):
    folder = copy_base(tmp_path, mm_vision_tower=name)
    _, model, processor, _ = load_pretrained_model(folder, device="cpu")
    tower = model.get_vision_tower().vision_tower.config
    assert (tower.image_size, tower.hidden_act, tower.num_attention_heads) == (70, "quick_gelu", 1)
    assert processor.crop_size["height"] == 70


@pytest.mark.parametrize("shard_size", ["5GB", "200KB"])
def test_a_saved_folder_is_self_contained(bundled, tmp_path, expected, shard_size):
    model = bundled.base[1]
    model.save_pretrained(tmp_path / "first", max_shard_size=shard_size)
    sharded = (tmp_path / "first" / "model.safetensors.index.json").is_file()
    assert sharded == (shard_size != "5GB")
    (tmp_path / "first").rename(tmp_path / "moved")
    tokenizer, again, processor, _ = load_pretrained_model(tmp_path / "moved", device="cpu")
    assert torch.equal(logits(bundled, again), expected)
    assert again.config.cpm_search == "predictions"
    assert again.config.cpm_tokens == model.config.cpm_tokens
    assert processor.to_dict() == bundled.base[2].to_dict()
    prompt = bundled.fact("prompt_llava_v1")
    assert tokenizer(prompt).input_ids == bundled.base[0](prompt).input_ids
    again.save_pretrained(tmp_path / "second")
    assert open_checkpoint(tmp_path / "second").tensors.keys() == open_checkpoint(tmp_path / "moved").tensors.keys()


def test_bin_shards_are_opened(bundled, tmp_path, expected):
    folder = copy_base(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for index, part in enumerate((names[:100], names[100:])):
        file = f"pytorch_model-{index + 1:05}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    _, model, _, _ = load_pretrained_model(folder, device="cpu")
    assert torch.equal(logits(bundled, model), expected)


def test_a_pickle_that_is_no_tensor_file_is_never_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"pos_embed": Harmful()}, tmp_path / "dino.pth")
    with pytest.raises(CheckpointError, match=r"dino\.pth cannot be read as tensors"):
        load_pretrained_model(GOLDENS / "base", vision_tower=CLIP, dino_weights=tmp_path / "dino.pth", device="cpu")
    assert not (tmp_path / "executed").exists()


BREAKAGES = {
    "missing": (lambda t: t.pop("model.crossattention.mhatt.0.linear_q.weight"), "missing: model.fusion.q_proj.weight"),
    "unexpected": (lambda t: t.update(surplus=torch.zeros(1)), "unexpected: surplus"),
    "shape": (
        lambda t: t.update({"model.norm.weight": torch.zeros(3)}),
        r"of another shape: model.norm.weight \[3\] instead of \[64\]",
    ),
    "projector": (
        lambda t: [t.pop(n) for n in list(t) if n.startswith("model.mm_projector.2")],
        r"missing: model.mm_projector.2.bias, model.mm_projector.2.weight",
    ),
    "no head": (lambda t: t.pop("lm_head.weight"), "missing: lm_head.weight"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_keys_that_matter_are_named(tmp_path, name):
    change, message = BREAKAGES[name]
    folder = copy_base(tmp_path)
    change_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained_model(folder, device="cpu")


def test_old_buffers_do_not_matter(bundled, tmp_path, expected):
    folder = copy_base(tmp_path)
    change_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    _, model, _, _ = load_pretrained_model(folder, device="cpu")
    assert torch.equal(logits(bundled, model), expected)


def damage(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


FOLDERS = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "damaged weights": (damage, "damaged"),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "has no tokenizer"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_broken_folder_is_explained(tmp_path, name):
    change, message = FOLDERS[name]
    folder = copy_base(tmp_path)
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained_model(folder, device="cpu")


def test_a_missing_shard_is_named(bundled, tmp_path):
    bundled.base[1].save_pretrained(tmp_path / "model", max_shard_size="200KB")
    victim = sorted((tmp_path / "model").glob("*-of-*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(CheckpointError, match=victim.name):
        load_pretrained_model(tmp_path / "model", device="cpu")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nowhere/at all", "no folder /nowhere/at all"),
        ("nobody/nothing-here", "the hub did not give it"),
        (str(DINO), "is a file"),
    ],
)
def test_a_wrong_path_is_explained(path, message):
    with pytest.raises(CheckpointError, match=message):
        load_pretrained_model(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mm_use_im_start_end": True}, "start, end or patch tokens"),
        ({"mm_patch_merge_type": "spatial"}, "mm_patch_merge_type 'spatial'"),
        ({"mm_vision_tower": None}, "tower of its branch 'clip' only in part and does not name it"),
        ({"mm_vision_tower": "/nowhere"}, "Pass vision_tower="),
        ({"mm_vision_select_layer": -9}, "does not exist in a CLIP tower of 4 layers"),
        ({"mm_fusion_type": "sum"}, "unknown mm_fusion type"),
        ({"mm_projector_type": "mlp3x_gelu"}, r"missing: model.dino_mm_projector.4.bias"),
    ],
)
def test_a_config_that_cannot_be_served_is_explained(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        load_pretrained_model(copy_base(tmp_path, **config), device="cpu")


def copy_lora(tmp_path: Path) -> Path:
    folder = tmp_path / "lora"
    shutil.copytree(GOLDENS / "lora", folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": str(copy_base(tmp_path))})
    )
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"mm_vision_tower": str(CLIP)}))
    return folder


def test_a_lora_folder_finds_its_base_and_leaves_the_towers_alone(bundled, tmp_path):
    _, model, _, _ = load_pretrained_model(copy_lora(tmp_path), device="cpu", merge_lora=False)
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if "lora_" in name}
    assert len(adapted) == 7 * model.config.num_hidden_layers
    assert all(name.startswith("model.layers.") for name in adapted)
    merged = bundled.load("lora")[1]
    assert (logits(bundled, model) - logits(bundled, merged)).abs().max() < 2e-4
    assert not any("lora_" in name for name, _ in merged.named_parameters())


def test_a_given_base_goes_before_the_one_that_a_lora_folder_names(bundled, tmp_path):
    """As after a move from the machine that trained it, and without a config of its own."""
    folder = copy_lora(tmp_path)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "/far/away"}))
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="/far/away"):
        load_pretrained_model(folder, device="cpu")
    base = tmp_path / "published"
    _, model, _, _ = load_pretrained_model(folder, base, device="cpu")
    assert torch.allclose(logits(bundled, model), logits(bundled, bundled.load("lora")[1]), atol=1e-5)
    assert ForgeryDetector.from_pretrained(folder, model_base=base, device="cpu").system.name == "FakeReasoning"


def test_a_lora_folder_without_its_parts_is_explained(tmp_path):
    folder = copy_lora(tmp_path)
    with pytest.raises(CheckpointError, match="base model cannot be opened"):
        load_pretrained_model(folder, "/nowhere", device="cpu")
    (folder / NON_LORA_FILE).rename(folder / "elsewhere")
    with pytest.raises(CheckpointError, match=r"lacks non_lora_trainables\.bin"):
        load_pretrained_model(folder, device="cpu")
    (folder / "elsewhere").rename(folder / NON_LORA_FILE)
    tensors = load_file(folder / "adapter_model.safetensors")
    removed = next(name for name in tensors if "lora_B" in name)
    del tensors[removed]
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="a part without its counterpart"):
        load_pretrained_model(folder, device="cpu")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="neither adapter_model"):
        load_pretrained_model(folder, device="cpu")


def test_a_base_for_a_model_that_needs_none_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="it is no LoRA folder"):
        load_pretrained_model(copy_base(tmp_path), GOLDENS / "base", device="cpu")


def run_merge(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)


def test_merging_writes_the_published_layout_key_for_key(bundled, tmp_path):
    lora = copy_lora(tmp_path)
    done = run_merge("--model_path", lora, "--save-model-path", tmp_path / "merged", "--layout", "published")
    assert done.returncode == 0, done.stderr
    written, published = load_file(tmp_path / "merged/model.safetensors"), load_file(GOLDENS / "base/model.safetensors")
    assert written.keys() == published.keys()
    assert all(written[name].shape == published[name].shape for name in published)
    towers = [name for name in published if "_tower." in name]
    assert towers and all(torch.equal(written[name], published[name]) for name in towers)
    config = json.loads((tmp_path / "merged/config.json").read_text())
    differs = {"_name_or_path", "mm_vision_tower"}
    original = json.loads((GOLDENS / "base/config.json").read_text())
    assert {k: v for k, v in config.items() if k not in differs} == {
        k: v for k, v in original.items() if k not in differs
    }
    assert (tmp_path / "merged/tokenizer.model").is_file()
    _, model, _, _ = load_pretrained_model(tmp_path / "merged", device="cpu")
    assert (logits(bundled, model) - logits(bundled, bundled.load("lora")[1])).abs().max() < 1e-5
    again = run_merge("--model-path", lora, "--save-model-path", tmp_path / "merged")
    assert again.returncode == 1
    assert "exists and is not empty" in again.stderr and "Traceback" not in again.stderr


def test_ours_becomes_published_again(bundled, tmp_path):
    bundled.base[1].save_pretrained(tmp_path / "ours")
    done = run_merge("--model-path", tmp_path / "ours", "--save-model-path", tmp_path / "back", "--layout", "published")
    assert done.returncode == 0, done.stderr
    back, published = load_file(tmp_path / "back/model.safetensors"), load_file(GOLDENS / "base/model.safetensors")
    assert back.keys() == published.keys()
    assert all(torch.equal(back[name], published[name]) for name in published)
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert (config["rope_theta"], config["torch_dtype"]) == (10000.0, "float32")
    assert not {"vision_tower_config", "cpm_search", "rope_parameters"} & config.keys()


def test_repeated_tensors_are_written_one_for_one_in_shards(tmp_path):
    shared = torch.randn(200)
    save_sharded({"a": shared, "b": shared, "c": torch.ones(3)}, tmp_path, max_shard_size="1KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == {"a", "b", "c"}
    assert torch.equal(load_file(tmp_path / index["a"])["a"], load_file(tmp_path / index["b"])["b"])


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "model") as partial:
        (partial / "config.json").write_text("{}")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)], ids=["shared", "private"])
def test_whoever_may_read_the_folder_may_read_its_weights(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "model") as partial:
            (partial / "tokenizer").mkdir()
            for file in (partial / "model.safetensors", partial / "tokenizer" / "a.safetensors"):
                save_file({"a": torch.zeros(1)}, file)
    finally:
        os.umask(before)
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "model").rglob("*.safetensors")}
    assert modes == {mode}


def test_a_full_disk_leaves_nothing_behind_and_is_named(tmp_path):
    with pytest.raises(OSError, match=r"model cannot be written: .*No space"), atomic_folder(tmp_path / "model"):
        raise SafetensorError("I/O error: No space left on device")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16])
def test_everything_takes_the_dtype_asked_for(bundled, dtype):
    _, model, _, _ = bundled.load(dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}


def test_auto_dtype_and_attention():
    checkpoint = open_checkpoint(GOLDENS / "base")
    half = {name: tensor[...].half() for name, tensor in checkpoint.tensors.items() if "layers.0" in name}
    checkpoint.tensors.clear()
    checkpoint.tensors.update(half)
    assert resolve_dtype("auto", checkpoint, torch.device("cuda")) == torch.float16
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        resolve_dtype("int8", checkpoint, torch.device("cpu"))
    assert resolve_attention("auto", torch.device("cpu"), torch.float32) == "sdpa"
    assert resolve_attention("eager", torch.device("cuda"), torch.float16) == "eager"


def test_eager_attention_gives_the_same(bundled, expected):
    _, model, _, _ = bundled.load(attn_implementation="eager")
    assert (logits(bundled, model) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_a_device_map_is_followed(bundled, expected, device_map):
    _, model, _, _ = bundled.load(device_map=device_map)
    assert torch.equal(logits(bundled, model), expected)


def test_a_model_that_is_spread_out_answers_the_same(bundled, expected, tmp_path):
    """Parts whose weights are fetched for each use stand in for parts on another device."""
    model = bundled.load()[1]
    device_map = dict.fromkeys(("vision_tower", "dino_tower", "mm_projector", "fusion", "layers.1"), "disk")
    device_map |= dict.fromkeys(("embed_tokens", "layers.0", "layers.2", "norm", "rotary_emb"), "cpu")
    device_map = {f"model.{name}": place for name, place in {**device_map, "dino_mm_projector": "disk"}.items()}
    spread = dispatch_model(model, {**device_map, "lm_head": "cpu"}, main_device="cpu", offload_dir=tmp_path)
    assert spread.model.fusion.q_proj.weight.is_meta
    assert torch.equal(logits(bundled, spread), expected)
    ids = spread.generate(bundled.prompt_ids, images=bundled.pixels[:1], max_new_tokens=4, do_sample=False)
    assert ids[0].tolist() == bundled.tensors["generate/ids_0"][0, 1:5].tolist()


def test_towers_are_frozen_and_nothing_stays_on_the_meta_device(bundled):
    model = bundled.base[1]
    towers = [p for name, p in model.named_parameters() if "_tower." in name]
    assert towers and not any(parameter.requires_grad for parameter in towers)
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(tensor.is_meta for tensor in tensors)
    assert not model.training


def test_old_preprocessor_files_give_sizes_as_numbers(bundled, tmp_path):
    shutil.copytree(CLIP, tmp_path / "clip")
    file = tmp_path / "clip" / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    settings |= {"size": 70, "crop_size": 70, "feature_extractor_type": "CLIPFeatureExtractor"}
    file.write_text(json.dumps({name: value for name, value in settings.items() if "rescale" not in name}))
    _, model, processor, _ = load_pretrained_model(
        GOLDENS / "base", vision_tower=tmp_path / "clip", dino_weights=DINO, device="cpu"
    )
    pixels = process_images(bundled.images, processor, model.config)
    assert torch.equal(pixels, bundled.tensors["pixel_values"])
    assert model.get_model().vision_tower.shared.size == 70


@pytest.mark.parametrize("in_checkpoint", [True, False])
def test_a_published_layout_of_any_size_is_opened(bundled, tmp_path, in_checkpoint):
    """Unlike widths, grouped-query attention, an odd feed-forward ratio, 3 DINO heads and 4 fusion heads."""
    dino = {**DINO_CONFIG, "mlp_ratio": 2.5}
    model = small_model(vocab_size=800, dino_tower_config=dino, cpm_search="predictions")
    model.get_model().vision_tower.vision_tower.save_pretrained(tmp_path / "clip")
    model.image_processor.save_pretrained(tmp_path / "clip")
    original = stored_state_dict(model.get_model().dino_tower)
    rules = KeyMap(original_rules("", "vision_tower."))
    torch.save(rules.to_published(original), tmp_path / "dino.pth")
    config = {**json.loads((GOLDENS / "base/config.json").read_text()), **model.config.to_dict()}
    config["mm_vision_tower"] = str(tmp_path / "clip")
    save_published(model, tmp_path / "published", config, GOLDENS / "base")
    written = json.loads((tmp_path / "published/config.json").read_text())
    assert not {"vision_tower_config", "dino_tower_config", "mm_fusion_config"} & written.keys()
    towers = {} if in_checkpoint else {"vision_tower": tmp_path / "clip", "dino_weights": tmp_path / "dino.pth"}
    _, again, _, _ = load_pretrained_model(tmp_path / "published", device="cpu", **towers)
    assert stored_state_dict(again).keys() == stored_state_dict(model).keys()
    ids, pixels = torch.tensor([[1, -200, 5]]), torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids, images=pixels).logits, model(input_ids=ids, images=pixels).logits)


def test_an_interrupted_or_foreign_layout_is_not_written(bundled, tmp_path):
    adapted = bundled.load("lora", merge_lora=False)[1]
    with pytest.raises(ValueError, match="not merged"):
        save_published(adapted, tmp_path / "out", {}, GOLDENS / "base")
    assert not (tmp_path / "out").exists()


def test_a_hub_id_is_opened_from_the_cache_without_a_network(bundled, tmp_path, expected):
    bundled.base[1].save_pretrained(tmp_path / "model")
    repository = tmp_path / "home/hub/models--someone--small"
    shutil.copytree(tmp_path / "model", repository / "snapshots/abc")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    script = (
        "import sys, torch; from llava import load_pretrained_model; from tests.reference import Reference;"
        "from pathlib import Path; r = Reference(Path(sys.argv[1]));"
        "model = load_pretrained_model('someone/small', device='cpu')[1];"
        "ids, pixels = r.tensors['prompt_ids'], r.tensors['pixel_values'][:1];"
        "print(model(input_ids=ids, images=pixels).logits.sum().item())"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script, str(GOLDENS)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=root,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(float(expected.sum()), rel=1e-4)
