"""Peak anonymous memory while a sharded checkpoint of more than 2 GB is opened."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava.model.saving import save_sharded
from tests.small_models import CLIP_CONFIG, DINO_CONFIG, published_llama_pieces, small_config

ALLOWED, ALLOWED_PACKED = 1.3, 1.05
LEAST_BYTES = 2_000_000_000
LOAD = """
import json, sys, threading, time
import torch
from llava import load_pretrained_model

def anonymous():
    for line in open("/proc/self/smaps_rollup"):
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024

before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.005)

watcher = threading.Thread(target=watch)
watcher.start()
model = load_pretrained_model(sys.argv[1], device="cpu", dtype=sys.argv[2], for_inference=len(sys.argv) > 3)[1]
for parameter in model.parameters():
    parameter.is_mkldnn or parameter.sum()
done.set()
watcher.join()
print(json.dumps({"loaded": sum(p.nbytes for p in model.parameters()), "peak": peak - before}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A model in our layout, written shard by shard from random tensors."""
    from llava.model.checkpoint_layout import stored_state_dict
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    folder = tmp_path_factory.mktemp("large")
    config = small_config(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=16,
        vision_tower_config=CLIP_CONFIG,
        dino_tower_config=DINO_CONFIG,
    )
    with torch.device("meta"):
        needed = stored_state_dict(LlavaLlamaForCausalLM(config))
    tensors = {name: torch.rand(tensor.shape) for name, tensor in needed.items()}
    assert sum(tensor.nbytes for tensor in tensors.values()) >= LEAST_BYTES
    save_sharded(tensors, folder, max_shard_size="500MB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    config.save_pretrained(folder)
    published_llama_pieces().save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's memory accounting")
@pytest.mark.parametrize(
    ("dtype", "packed", "allowed"),
    [("float32", False, ALLOWED), ("bfloat16", False, ALLOWED), ("bfloat16", True, ALLOWED_PACKED)],
)
def test_the_peak_is_little_more_than_what_is_loaded(checkpoint, dtype, packed, allowed):
    words = [sys.executable, "-c", LOAD, str(checkpoint), dtype, *(["packed"] if packed else [])]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    ratio = measured["peak"] / measured["loaded"]
    print(f"{dtype}: loaded {measured['loaded'] / 1e9:.2f} GB, peak {measured['peak'] / 1e9:.2f} GB, ratio {ratio:.2f}")
    assert ratio <= allowed
