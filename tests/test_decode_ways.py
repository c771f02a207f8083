"""Ways to decode: a fixed cache, compiled steps, checked guesses, prompts in parts. All give the same answers."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.cache_utils import StaticLayer

from llava import ForgeryDetector
from llava.errors import OptionError
from llava.model import decoding, static_steps
from llava.model.answering import Answering
from llava.model.builder import resolve_attention
from llava.model.checkpoint_files import read_tensors
from llava.model.decoding import Decoded, PromptCache, Sampler, decode, prefill_rows, set_decoding
from llava.model.prompt_lookup import Guesses, Lookup
from llava.model.static_steps import StaticCache, StepRunner, round_rows, whole_rows
from llava.systems.base import AnalyzeOptions
from llava.systems.language_model import on_device
from tests.goldens import lay_out
from tests.parity.m2f2det_reference import BASE, Reference
from tests.small_models import small_model
from tests.trained import picture

DATA = Path(__file__).parent / "data"
PICTURES = [picture(1000 + index, (48, 40)) for index in range(5)]
SYSTEMS = ("fakereasoning", "fakevlm", "m2f2det", "fakeshield", "segmenter")


@pytest.fixture(scope="module")
def folders(trained, tmp_path_factory) -> dict[str, tuple[Path, dict]]:
    """A small model of every system with a language model, and how it is opened."""
    root = tmp_path_factory.mktemp("systems")
    shield, clip = DATA / "goldens_fakeshield", root / "clip"
    clip.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (clip / name).write_bytes((shield / "clip" / name).read_bytes())
    prefix = "model.vision_tower.vision_tower."
    tensors = read_tensors(shield / "DTE-FDM")
    tower = {name.removeprefix(prefix): part[...] for name, part in tensors.items() if name.startswith(prefix)}
    save_file(tower, clip / "model.safetensors", {"format": "pt"})
    lay_out(shield / "MFLM", root / "MFLM")
    (root / "MFLM" / "config.json").unlink()
    heads = json.loads((shield / "sizes.json").read_text())["sam"]["dec_heads"]
    config = {**json.loads((shield / "MFLM" / "config.json").read_text())}
    (root / "MFLM" / "config.json").write_text(
        json.dumps({**config, "sam": {"decoder": {"num_attention_heads": heads}}})
    )
    return {
        "fakereasoning": (trained, {}),
        "fakevlm": (DATA / "goldens_fakevlm" / "base", {"system": "fakevlm"}),
        "m2f2det": (Reference(DATA / "goldens_m2f2det", root).model_folder(BASE), {}),
        "fakeshield": (shield / "DTE-FDM", {"system": "fakeshield", "vision_tower": str(clip)}),
        "segmenter": (root / "MFLM", {"vision_tower": str(clip)}),
    }


def counted(monkeypatch) -> list[tuple[str, tuple[int, ...]]]:
    """Remembers which steps are run, with the shapes of their ids."""
    seen: list[tuple[str, tuple[int, ...]]] = []
    for kind in (decoding._GrowingSteps, static_steps.StaticSteps):

        def run(self, ids_BN, inner=kind.run, name=kind.__name__):
            seen.append((name, tuple(ids_BN.shape)))
            return inner(self, ids_BN)

        monkeypatch.setattr(kind, "run", run)
    return seen


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("way", [{"decode": "static"}, {"prompt_lookup": 5}, {"decode": "static", "prompt_lookup": 5}])
def test_every_systems_answers_are_the_same(folders, system, way, monkeypatch):
    path, options = folders[system]
    if system == "segmenter" and "prompt_lookup" in way:
        pytest.skip("the segmenter's few words are not guessed")
    opened = {"device": "cpu", "dtype": "float32", **options}
    plain, other = (ForgeryDetector.from_pretrained(path, **opened, **more) for more in ({}, way))
    for size in (1, 5):
        wanted = list(plain.analyze_many(PICTURES, batch_size=size, max_new_tokens=60))
        seen = counted(monkeypatch)
        found = list(other.analyze_many(PICTURES, batch_size=size, max_new_tokens=60))
        kinds = {name for name, _ in seen}
        assert kinds == {"StaticSteps" if way.get("decode") else "_GrowingSteps"}
        assert [report.text for report in found] == [report.text for report in wanted]
        for one, same in zip(found, wanted, strict=True):
            assert one.error == same.error == ""
            assert (one.fake_probability or 0) == pytest.approx(same.fake_probability or 0, abs=1e-5)
            assert (one.mask is None and same.mask is None) or np.array_equal(one.mask, same.mask)


def run(model, mode: str, number: int = 5, **settings) -> tuple[list[Decoded], PromptCache]:
    """Decodes random prompts, padded on the left if ``padded``, with guesses if ``guesses``."""
    if model.step_runner.mode != mode:
        set_decoding(model, mode)
    samples, guessed = settings.get("samples", 1), settings.get("guesses", 0)
    temperature = settings.get("temperature", 0.0)
    embeds = torch.randn(number, 9, 32, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(number, 9, dtype=torch.bool)
    if settings.get("padded"):
        mask = torch.arange(9) >= torch.arange(number)[:, None]
    streams = [str(row) for row in range(number * samples)]
    return decode(
        model,
        embeds,
        sampler=Sampler(temperature, None, streams),
        max_new_tokens=settings.get("length", 40),
        kept_words=(5, 6),
        is_complete=lambda ids: ids[-1] in (3, 12, 40),
        samples=samples,
        attention_mask=mask,
        states_of=7,
        guesses=Guesses(settings.get("lookup") or Lookup(), guessed, [1, 2, 3], len(streams)) if guessed else None,
    )


def check_same(found: tuple[list[Decoded], PromptCache], wanted: tuple[list[Decoded], PromptCache]) -> None:
    assert [one.ids for one in found[0]] == [one.ids for one in wanted[0]]
    for one, same in zip(found[0], wanted[0], strict=True):
        assert torch.allclose(one.kept_logits, same.kept_logits, atol=1e-5)
        assert torch.allclose(one.states, same.states, atol=1e-5)
    for one, same in zip(found[1].layers, wanted[1].layers, strict=True):
        assert all(torch.allclose(*parts, atol=1e-5) for parts in zip(one, same, strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"number": 1},
        {"padded": True},
        {"samples": 3, "temperature": 1.0},
        {"padded": True, "samples": 2, "temperature": 0.7},
        {"length": 1},
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_fixed_cache_and_guesses_change_nothing(settings, seed):
    model = small_model(seed)
    wanted = run(model, "eager", **settings)
    assert len({len(one.ids) for one in wanted[0]}) > 1 or settings.get("length") == 1 or len(wanted[0]) == 1
    check_same(run(model, "static", **settings), wanted)
    for guesses in (1, 4):
        check_same(run(model, "eager", guesses=guesses, **settings), wanted)
        check_same(run(model, "static", guesses=guesses, **settings), wanted)


def test_the_cache_stays_for_smaller_batches_and_is_replaced_for_larger_ones():
    model = small_model()
    set_decoding(model, "static")
    caches = []
    for number, length in ((5, 40), (3, 20), (6, 40), (9, 40), (2, 300), (1, 40)):
        wanted = run(small_model(), "eager", number, length=length)
        check_same(run(model, "static", number, length=length), wanted)
        caches.append(model.step_runner._cache)
    assert [(cache.rows, cache.length) for cache in caches] == [(8, 128)] * 3 + [(16, 128), (16, 384), (16, 384)]
    assert caches[0] is caches[1] is caches[2] is not caches[3] and caches[4] is caches[5]
    keys_and_values, layers, heads, width = 2, 2, 2, 8
    assert model.step_runner.kept_bytes == keys_and_values * layers * 16 * heads * 384 * width * 4


def test_a_cache_that_does_not_fit_is_given_back_and_the_batch_halved(folders, monkeypatch):
    path, _ = folders["fakereasoning"]
    plain, fixed = (ForgeryDetector.from_pretrained(path, device="cpu", decode=way) for way in ("eager", "static"))
    wanted = list(plain.analyze_many(PICTURES, batch_size=5, max_new_tokens=60))
    inner, sizes = StaticLayer.lazy_initialization, []

    def lazy_initialization(self, keys, values):
        sizes.append(len(keys))
        if len(keys) > 2:
            raise torch.OutOfMemoryError("full")
        inner(self, keys, values)

    monkeypatch.setattr(StaticLayer, "lazy_initialization", lazy_initialization)
    found = list(fixed.analyze_many(PICTURES, batch_size=5, max_new_tokens=60))
    assert [report.text for report in found] == [report.text for report in wanted]
    assert sizes[0] == 8 and 2 in sizes


def test_rows_of_a_cache():
    assert [round_rows(rows) for rows in (1, 2, 3, 5, 8, 9, 17, 64)] == [1, 2, 4, 8, 8, 16, 24, 64]
    assert [whole_rows(rows) for rows in (0, 1, 3, 7, 8, 9, 37, 64)] == [1, 1, 2, 4, 8, 8, 32, 64]
    assert all(round_rows(whole_rows(rows)) == whole_rows(rows) for rows in range(1, 65))


def test_a_wrong_position_of_the_fixed_cache_is_seen(monkeypatch):
    """The comparison would tell a cache that is not set back to the prompts' length."""
    model = small_model()
    wanted = run(model, "eager", 5)
    run(model, "static", 5)
    monkeypatch.setattr(StaticCache, "seek", lambda self, position: None)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        check_same(run(model, "static", 5), wanted)


def test_guesses_that_were_not_checked_are_seen(monkeypatch):
    model = small_model()
    wanted = run(model, "eager", 2)
    monkeypatch.setattr(decoding._Answers, "count_right", lambda self, guessed, logits: guessed.shape[1] - 1)
    with pytest.raises(AssertionError):
        check_same(run(model, "eager", 2, guesses=4), wanted)


def test_what_was_seen_takes_fewer_steps(monkeypatch):
    model, lookup = small_model(), Lookup()
    wanted = run(model, "eager", 3)
    length = max(len(one.ids) for one in wanted[0])
    seen = counted(monkeypatch)
    check_same(run(model, "eager", 3), wanted)
    plain = len(seen)
    assert plain == length - 1
    run(model, "eager", 3, guesses=8, lookup=lookup)
    seen.clear()
    check_same(run(model, "eager", 3, guesses=8, lookup=lookup), wanted)
    assert len(seen) < plain / 2 and max(shape[1] for _, shape in seen) == 9


def test_lookup_finds_the_latest_place():
    lookup = Lookup()
    lookup.learn([1, 2, 3, 4, 5, 6])
    assert lookup.following([9, 1, 2, 3], 2) == [4, 5] and lookup.following([3, 4, 5], 4) == [6]
    assert lookup.following([4, 5, 6], 4) == lookup.following([2, 3], 4) == []
    lookup.learn([7, 1, 2, 3, 8])
    assert lookup.following([1, 2, 3], 4) == [8]
    guesses = Guesses(lookup, 3, [0, 1, 2], 2)
    guesses.add(0, 3)
    assert guesses.of_rows([0, 1], 9) == [[8], [3]], "the second answer may go on as the first one did"
    assert guesses.of_rows([1], 9) == [[3]] and guesses.of_rows([0, 1], 0) == []
    guesses.add(1, 5)
    assert guesses.of_rows([1], 9) == guesses.of_rows([0, 1], 9) == [], "all rows have a guess, or none is checked"


def test_lookup_forgets_the_oldest(monkeypatch):
    monkeypatch.setattr("llava.model.prompt_lookup._MOST_KEYS", 2)
    lookup = Lookup()
    lookup.learn([1, 2, 3, 4, 5, 6])
    assert lookup.following([1, 2, 3], 1) == [] and lookup.following([3, 4, 5], 1) == [6]


def test_the_constant_summary_is_guessed_from_the_first_answer_on(folders, monkeypatch):
    path, _ = folders["fakereasoning"]
    detector = ForgeryDetector.from_pretrained(path, device="cpu", dtype="float32", prompt_lookup=8)
    lengths: list[int] = []
    inner = Lookup.following

    def following(self, ids, number):
        found = inner(self, ids, number)
        lengths.append(len(found))
        return found

    monkeypatch.setattr(Lookup, "following", following)
    detector.analyze(PICTURES[0], max_new_tokens=20)
    assert 8 in lengths[:10]


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("mode", ["eager", "static"])
def test_prompts_in_parts_are_the_same(rows, mode, monkeypatch):
    model = small_model()
    wanted = run(model, "eager", 5, padded=True, samples=2)
    parts = []
    inner = decoding._run

    def recorded(model, cache, padding, **inputs):
        parts.append(len(next(iter(inputs.values()))))
        return inner(model, cache, padding, **inputs)

    monkeypatch.setattr(decoding, "_run", recorded)
    monkeypatch.setattr(decoding, "_PREFILL_BATCH_CPU", {torch.float32: rows})
    check_same(run(model, mode, 5, padded=True, samples=2), wanted)
    assert parts[: -(-5 // rows)] == {1: [1] * 5, 2: [2, 2, 1], 5: [5]}[rows]


def test_a_gpu_prefills_a_bounded_number_of_positions():
    def prompts(length: int) -> torch.Tensor:
        return torch.empty(64, length, 8, device="meta")

    assert prefill_rows(prompts(656)) == 12 and prefill_rows(prompts(4096)) == 2
    assert prefill_rows(prompts(40_000)) == 1


def test_what_cannot_be_compiled_goes_on_eagerly_and_says_so_once(monkeypatch, capsys):
    model = small_model()
    wanted = run(model, "eager", 3)

    def broken(step, **options):
        def compiled(model, cache, *inputs):
            cache.layers[0].cumulative_length.add_(1)  # it fails in the middle of a step
            raise RuntimeError("no compiler here\nand a long report")

        return compiled

    monkeypatch.setattr(torch, "compile", broken)
    set_decoding(model, "compile")
    runner = model.step_runner
    check_same(run(model, "compile", 3), wanted)
    assert runner.mode == "eager" and runner.kept_bytes == 0
    check_same(run(model, "eager", 3), wanted)
    said = capsys.readouterr().err
    assert said.count("RuntimeError: no compiler here") == 1 and "eagerly" in said and "long report" not in said


def test_too_little_memory_is_no_failure_to_compile(monkeypatch):
    def full(step, **options):
        def compiled(*inputs):
            raise torch.OutOfMemoryError("full")

        return compiled

    monkeypatch.setattr(torch, "compile", full)
    model = small_model()
    with pytest.raises(torch.OutOfMemoryError):
        run(model, "compile", 3)
    assert model.step_runner.mode == "compile"


@pytest.mark.slow
def test_compiled_steps_give_the_same_answers():
    model = small_model(num_hidden_layers=1)
    wanted = run(model, "eager", 3), run(model, "eager", 2, padded=True, guesses=3)
    set_decoding(model, "compile")
    check_same(run(model, "compile", 3), wanted[0])
    check_same(run(model, "compile", 2, padded=True, guesses=3), wanted[1])
    assert model.step_runner.mode == "compile", "it fell back"


def test_auto_is_eager_on_a_cpu_and_waits_on_a_gpu(monkeypatch):
    model = small_model()
    auto = StepRunner("auto")
    assert all(auto.cache_for(model, 1, 9) is None for _ in range(5)) and not auto.may_compile(model)
    monkeypatch.setattr(static_steps, "_is_on_one_gpu", lambda model: True)
    fresh = StepRunner("auto")
    assert [fresh.cache_for(model, 1, 9) is None for _ in range(4)] == [True, True, False, False]
    assert fresh.may_compile(model) and not StepRunner("static").may_compile(model)


def test_wrong_ways_are_refused():
    model = small_model()
    with pytest.raises(OptionError, match=r"unknown decode 'fast'.*auto, eager, static, compile"):
        set_decoding(model, "fast")
    with pytest.raises(OptionError, match="prompt_lookup must not be negative"):
        set_decoding(model, "auto", -1)
    model.config._attn_implementation = "eager"
    with pytest.raises(OptionError, match="decode static needs the attention sdpa, not eager"):
        set_decoding(model, "static")
    set_decoding(model, "auto")


def test_flash_attention_is_not_chosen_where_the_cache_is_fixed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    cuda = torch.device("cuda")
    assert resolve_attention("auto", cuda, torch.bfloat16) == "flash_attention_2"
    assert resolve_attention("auto", cuda, torch.bfloat16, "compile") == "sdpa"


def batch_size(free: int, compiles: bool, **options) -> int:
    """Of a model with 40 layers of 5120 in 16 bits on a GPU with so much free memory."""
    config = SimpleNamespace(num_key_value_heads=40, head_dim=128, num_hidden_layers=40)
    runner = SimpleNamespace(may_compile=lambda model: compiles)
    core = SimpleNamespace(placeholder_tokens=lambda: {-200: 576})
    model = SimpleNamespace(
        device=torch.device("cuda"), config=config, dtype=torch.bfloat16, step_runner=runner, get_model=lambda: core
    )
    asked = SimpleNamespace(model=model, context_length=2048, _free_bytes=lambda: free)
    return Answering.batch_size(asked, AnalyzeOptions(**options))


def test_batches_fit_into_a_gpus_memory():
    row = 2 * 40 * 5120 * 2 * (576 + 192 + 512)
    assert batch_size(int(20.5 * row / 0.6), False) == 20 and batch_size(int(20.5 * row / 0.6), True) == 16
    assert batch_size(int(7.5 * row / 0.6), True) == 4 and batch_size(0, True) == batch_size(0, False) == 1
    assert batch_size(10**13, True) == 64 and batch_size(10**13, True, samples=4, temperature=1.0) == 16
    assert batch_size(int(20.5 * row / 0.6), True, score_only=True) == 34  # nothing is decoded, so any size will do


def test_a_gpu_gets_its_pixels_from_pinned_memory():
    class Values:
        calls: tuple = ()

        def pin_memory(self):
            self.calls += ("pinned",)
            return self

        def to(self, device, non_blocking=False):
            self.calls += (device.type, non_blocking)
            return self

    assert on_device(Values(), torch.device("cuda")).calls == ("pinned", "cuda", True)
    assert on_device(Values(), torch.device("cpu")).calls == ("cpu", False)
