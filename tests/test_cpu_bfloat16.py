"""Layers laid out for a CPU's bfloat16: the same model, nearer to float32 than without, and dtype ``auto``."""

import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from forgery_eval.benchmarks import open_benchmark
from llava import ForgeryDetector, load_pretrained_model
from llava.model import cpu_bfloat16
from llava.model.builder import resolve_dtype
from llava.model.checkpoint import open_checkpoint
from llava.model.cpu_bfloat16 import LeanAttention, LeanRMSNorm, PackedLinear, PackedMLP, lay_out
from llava.model.decoding import Sampler, decode, word_logits
from mmfr_generation.synthetic.writer import Run, write_dataset
from tests.conftest import GOLDENS
from tests.small_models import published_llama_pieces, small_model

NATIVE = cpu_bfloat16.multiplies_bfloat16() and torch.backends.mkldnn.is_available()
needs_native = pytest.mark.skipif(not NATIVE, reason="this processor does not multiply bfloat16 natively")


def kinds(model) -> set[type]:
    return {type(module) for module in model.modules()}


def logits(model, embeds: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(inputs_embeds=embeds.to(model.dtype), attention_mask=mask).logits.float()


@needs_native
def test_it_computes_the_same_and_is_no_farther_from_float32():
    exact, plain, packed = small_model(), small_model().to(torch.bfloat16), small_model().to(torch.bfloat16)
    lay_out(packed)
    assert {PackedLinear, PackedMLP, LeanAttention, LeanRMSNorm} <= kinds(packed)
    assert torch.nn.Linear not in kinds(packed)
    embeds = torch.randn(3, 9, 32)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0
    whole = logits(exact, embeds, mask)
    usual, own = ((logits(model, embeds, mask) - whole)[mask.bool()].abs() for model in (plain, packed))
    assert own.mean() < 1.2 * usual.mean() and own.mean() < 0.02 * whole.abs().mean()
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        tokens = [model.encode_images(pixels.to(model.dtype)).tokens.float() for model in (exact, plain, packed)]
    assert (tokens[2] - tokens[0]).abs().mean() < 1.2 * (tokens[1] - tokens[0]).abs().mean()


@needs_native
@pytest.mark.parametrize("part", ["activation", "rotation", "norm"])
def test_a_wrong_layer_is_seen(part, monkeypatch):
    exact, packed = small_model(), small_model().to(torch.bfloat16)
    lay_out(packed)
    if part == "activation":
        monkeypatch.setattr(PackedLinear, "times", lambda self, x, factor: self(x))
    elif part == "rotation":
        monkeypatch.setattr(cpu_bfloat16, "_rotated", lambda x, cos, sin: x * cos[:, None])
    else:
        monkeypatch.setattr(LeanRMSNorm, "forward", lambda self, x: x * self.weight)
    embeds = torch.randn(2, 9, 32)
    whole = logits(exact, embeds)
    assert (logits(packed, embeds) - whole).abs().mean() > 0.05 * whole.abs().mean()


@needs_native
def test_decoding_with_a_cache_gives_the_same_words():
    plain, packed = small_model().to(torch.bfloat16), small_model().to(torch.bfloat16)
    lay_out(packed)
    embeds = torch.randn(5, 9, 32).to(torch.bfloat16)

    def decoded(model) -> list[torch.Tensor]:
        answers, cache = decode(
            model,
            embeds,
            sampler=Sampler(0.0, None, [""] * 5),
            max_new_tokens=6,
            kept_words=(5, 6),
            is_complete=lambda ids: False,
        )
        assert cache.layers[0][0].shape == (5, 2, 9, 8)
        return [answer.kept_logits for answer in answers]

    for first, second in zip(decoded(plain), decoded(packed), strict=True):
        assert (first[0] - second[0]).abs().max() < 0.1


@needs_native
def test_it_is_saved_as_it_was(tmp_path):
    plain, packed = small_model().to(torch.bfloat16), small_model().to(torch.bfloat16)
    lay_out(packed)
    before, after = plain.state_dict(), packed.state_dict()
    assert list(before) == list(after) and all(torch.equal(after[name], before[name]) for name in before)
    assert sum(p.nbytes for p in packed.parameters()) == sum(p.nbytes for p in plain.parameters())
    for name, model in (("plain", plain), ("packed", packed)):
        model.save_pretrained(tmp_path / name)
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("plain", "packed")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_other_models_stay_as_they_are(monkeypatch):
    for model in (small_model(), small_model().half()):
        lay_out(model)
        assert not {PackedLinear, PackedMLP, LeanAttention, LeanRMSNorm} & kinds(model)
    monkeypatch.setattr(cpu_bfloat16, "multiplies_bfloat16", lambda: False)
    model = small_model().to(torch.bfloat16)
    lay_out(model)
    assert PackedLinear not in kinds(model)


@needs_native
def test_a_weight_that_two_layers_share_stays_one():
    model = small_model(tie_word_embeddings=True).to(torch.bfloat16)
    model.tie_weights()
    lay_out(model)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert PackedLinear in kinds(model)


@needs_native
@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_is_opened_packed_with_the_same_weights(tmp_path, tied):
    model = small_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    published_llama_pieces().save_pretrained(tmp_path)
    plain, packed = (
        load_pretrained_model(tmp_path, device="cpu", dtype="bfloat16", for_inference=packs)[1]
        for packs in (False, True)
    )
    assert isinstance(packed.lm_head, PackedLinear) is not tied
    assert nn.Linear not in kinds(packed) or tied
    before, after = plain.state_dict(), packed.state_dict()
    assert list(before) == list(after) and all(torch.equal(after[name], before[name]) for name in before)


@needs_native
def test_each_layer_is_gone_before_the_next_is_packed(monkeypatch):
    model = small_model().to(torch.bfloat16)
    layers = [weakref.ref(module) for module in model.modules() if type(module) is nn.Linear]
    alive = []
    pack = PackedLinear.__init__

    def watched(self, linear) -> None:
        alive.append(sum(layer() is not None for layer in layers))
        pack(self, linear)

    monkeypatch.setattr(PackedLinear, "__init__", watched)
    lay_out(model)
    assert alive == list(range(len(layers), 0, -1))


@needs_native
def test_the_verdicts_logits_are_not_rounded():
    model = small_model().to(torch.bfloat16)
    states, words = torch.randn(4, 32).to(torch.bfloat16), (7, 9)
    wanted = states.float() @ model.lm_head.weight[list(words)].float().T
    assert torch.equal(word_logits(model, states, words), wanted)
    lay_out(model)
    for asked in (words, words[::-1], words):
        found = word_logits(model, states, asked)
        assert torch.equal(found, wanted if asked == words else wanted.flip(1))
    assert not torch.equal(found, found.bfloat16().float())
    exact = small_model()
    assert torch.equal(word_logits(exact, states.float(), words), exact.lm_head(states.float())[:, list(words)])


@needs_native
@pytest.mark.slow
def test_the_embedded_model_says_the_same_as_in_float32(tmp_path):
    write_dataset(Run(train=0, eval=3, size=112, seed=77), tmp_path, 1)
    files = [sample.image for sample in open_benchmark(tmp_path)]
    exact, rounded = (
        [
            report.fake_probability
            for report in ForgeryDetector.from_pretrained(device="cpu", dtype=dtype, abstain=False).analyze_many(
                files, score_only=True
            )
        ]
        for dtype in ("float32", "auto")
    )
    first, second = np.array(exact), np.array(rounded)
    assert len(files) > 100 and not np.array_equal(first, second)
    assert np.mean((first >= 0.5) == (second >= 0.5)) >= 0.99
    assert np.abs(first - second).mean() <= 0.01


@pytest.mark.parametrize("native", [True, False])
def test_what_auto_came_to_is_among_what_an_answer_depends_on(native, monkeypatch):
    monkeypatch.setattr("llava.model.builder.multiplies_bfloat16", lambda: native)
    detector = ForgeryDetector.from_pretrained(device="cpu")
    assert detector.system.describe(detector.options())["dtype"] == ("bfloat16" if native else "float32")


@pytest.mark.parametrize(("native", "sixteen"), [(True, torch.bfloat16), (False, torch.float32)])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_auto_takes_what_the_processor_multiplies(native, sixteen, stored, monkeypatch):
    monkeypatch.setattr("llava.model.builder.multiplies_bfloat16", lambda: native)
    checkpoint = open_checkpoint(GOLDENS / "base")
    layers = {name: tensor[...].to(stored) for name, tensor in checkpoint.tensors.items() if "layers.0" in name}
    checkpoint.tensors.clear()
    checkpoint.tensors.update(layers)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert resolve_dtype("auto", checkpoint, cpu) == (torch.float32 if stored == torch.float32 else sixteen)
    assert resolve_dtype("auto", checkpoint, gpu) == stored
    assert resolve_dtype("float32", checkpoint, cpu) == torch.float32


@pytest.mark.parametrize(
    ("known", "found"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"bf16": True}, True), ({"avx2": True}, False)],
)
def test_what_a_processor_says_of_itself(known, found, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert cpu_bfloat16.multiplies_bfloat16.__wrapped__() is found
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert cpu_bfloat16.multiplies_bfloat16.__wrapped__() is False
