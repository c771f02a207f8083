"""Measures inference of a random model; the last line printed is one JSON object.

Sizes: tiny (for trying this script), mid (language model 512 wide, 8 layers; towers 384 wide, 8 layers; 336 pixels),
13b (the published size, on one GPU with 78 GB). The model is made where it computes, without a file. What a step of
decoding must read (weights and cache, once) and what a prefill must compute is given per second, and on a GPU as shares
of its ceilings: `bandwidth_share` and `compute_share` (MFU). `one_at_a_time` is the authors' loop with the same
weights: an image is prepared and answered by transformers' `generate`, then the next.
"""

import argparse
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava.cli import OptionParser, run_cli

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden": 64, "layers": 2, "heads": 4, "inner": 128, "tower": 48, "tower_layers": 2, "pixels": 56},
    "mid": {"hidden": 512, "layers": 8, "heads": 8, "inner": 1376, "tower": 384, "tower_layers": 8, "pixels": 336},
    "13b": {
        "hidden": 5120,
        "layers": 40,
        "heads": 40,
        "inner": 13824,
        "tower": 1024,
        "tower_layers": 24,
        "pixels": 336,
    },
}
BATCH_SIZES: dict[str, list[int | str]] = {"13b": [1, 16, "auto"]}
PROMPT_POSITIONS = 656
"""Of the published question with its image, about; for what is added up without running anything."""
LOOP_IMAGES = 4
"""Images of the loop of one at a time, which are enough: nothing in it depends on how many there are."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = OptionParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="tiny", help="default: tiny")
    sizes = "auto is what fits (default: 1 2 4 8 16; of 13b: 1 16 auto)"
    parser.add_argument("--batch-sizes", type=_batch_size, nargs="+", metavar="N", help=sizes)
    parser.add_argument("--images", type=int, default=16, help="images a measurement (at least the batch; default: 16)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens an answer (default: 64)")
    parser.add_argument("--device", default="auto", help="auto (default), cuda, cpu")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="default: bfloat16 on a GPU, float32 on a CPU")
    decode = "eager, static, or compile; default: compile on a GPU, eager on a CPU"
    parser.add_argument("--decode", choices=("auto", "eager", "static", "compile"), default="auto", help=decode)
    parser.add_argument("--memory", action="store_true", help="only add up bytes and operations; run nothing")
    return parser.parse_args(arguments)


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else int(text)


def build_tokenizer() -> Any:
    """Returns a tokenizer made from the systems' own texts; without an end token all answers are equally long."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from llava.conversation import conv_templates
    from llava.systems.fakereasoning import answer

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    corpus = [answer.QUESTION, answer.write_answer("real", caption="c", reasoning="r"), "This image is fake."]
    corpus += [template.system for template in conv_templates.values()]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", "<image>"], initial_alphabet=alphabet)
    raw.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", pad_token="<unk>")


def random_model(size: dict[str, int], device: Any, dtype: Any, **fields: Any) -> Any:
    """Returns a random model of a size with its tokenizer; ``fields`` are those of its config."""
    import torch
    from transformers import GenerationConfig

    from llava.model.configuration import LlavaConfig
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
    from llava.model.multimodal_encoder.clip_encoder import image_processor_settings

    config = LlavaConfig(
        vocab_size=32000,
        hidden_size=size["hidden"],
        intermediate_size=size["inner"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        vision_tower_config={
            "type": "clip",
            "intermediate_size": 4 * size["tower"],
            "image_size": size["pixels"],
            **_tower(size),
        },
        mm_image_processor=image_processor_settings(size["pixels"]),
        eos_token_id=None,
        **fields,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = LlavaLlamaForCausalLM(config).eval()
    torch.set_default_dtype(default)
    model.generation_config = GenerationConfig(pad_token_id=0)
    model.set_tokenizer(build_tokenizer())
    return model


def _tower(size: dict[str, int]) -> dict[str, int]:
    heads = max(1, size["tower"] // 64)
    layers, width = size["tower_layers"], size["tower"]
    return {"num_hidden_layers": layers, "hidden_size": width, "patch_size": 14, "num_attention_heads": heads}


def build_system(size: dict[str, int], device: Any, dtype: Any) -> Any:
    """Returns a random FakeReasoning of a size."""
    from llava.systems.fakereasoning.system import FakeReasoning

    dino = {"type": "dinov2", "native_image_size": 518, **_tower(size)}
    model = random_model(size, device, dtype, system="fakereasoning", dino_tower_config=dino)
    return FakeReasoning(model.tokenizer, model, model.image_processor, 2048)


def clip_only_model(size: dict[str, int]) -> Any:
    """Returns a random model with a CLIP tower alone, as FakeVLM's, in bfloat16 on the CPU."""
    import torch

    return random_model(
        size,
        "cpu",
        torch.bfloat16,
        system="fakevlm",
        mm_fusion_type="clip",
        mm_vision_select_layer=-2,
        conv_mode="raw",
        image_aspect_ratio="crop",
        tokenizer_model_max_length=2048,
    )


def seconds(work: Callable[[], Any], device: Any) -> float:
    """Returns how long something takes, its work on the device included."""
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def measure_batch(system: Any, images: list[Any], size: int, new_tokens: int) -> dict[str, float]:
    """Measures the stages of one batch size, and images/s over all images end to end."""
    import torch

    from llava.detector import ForgeryDetector
    from llava.gpu_ceilings import gpu_ceilings
    from llava.model.decoding import Sampler, decode

    model, device = system.model, system.model.device
    options = system.options(max_new_tokens=new_tokens)
    many = (images * (1 + size // len(images)))[: max(len(images), size)]
    prepared = [system.prepare(image) for image in many[:size]]
    pixels = torch.stack([item.pixels for item in prepared]).to(device, model.dtype)
    ids = system.tokenizer(system.prompt(options).replace("<image>", "")).input_ids
    words = (model.verdict_tokens.real, model.verdict_tokens.fake)
    compiles = model.step_runner.may_compile(model)

    def answer(embeds: Any, length: int) -> None:
        decode(
            model,
            embeds,
            sampler=Sampler(0.0, None, [""] * size),
            max_new_tokens=length,
            kept_words=words,
            is_complete=lambda ids: False,
        )

    with torch.no_grad():
        tokens = system.answering.encode_images(pixels).tokens
        text = model.get_input_embeddings()(torch.tensor([ids] * size, device=device))
        embeds = torch.cat((text, tokens), dim=1)
        answer(embeds, new_tokens if compiles else 2)
        vision = seconds(lambda: system.answering.encode_images(pixels), device)
        prefill = min(seconds(lambda: answer(embeds, 1), device) for _ in range(2))
        decoding = seconds(lambda: answer(embeds, new_tokens), device) - prefill
    detector = ForgeryDetector(system)
    if compiles:  # the prompt may be some tokens longer here, and take a cache of another size
        list(detector.analyze_many(many[:size], batch_size=size, max_new_tokens=new_tokens))
    answered = seconds(lambda: list(detector.analyze_many(many, batch_size=size, max_new_tokens=new_tokens)), device)
    scored = seconds(lambda: list(detector.analyze_many(many, batch_size=size, score_only=True)), device)
    step = decoding / max(1, new_tokens - 1)
    needed = language_work(model, size, embeds.shape[1], new_tokens)
    measured = {
        "vision_s": vision,
        "prefill_s": prefill,
        "prompt_tokens": embeds.shape[1],
        "decode_tokens_per_s": size / step,
        "images_per_s": len(many) / answered,
        "score_only_images_per_s": len(many) / scored,
        "read_bytes_per_s": needed["step_bytes"] / step,
        "prefill_flops_per_s": needed["prefill_flops"] / prefill,
    }
    ceilings = gpu_ceilings(device)
    if ceilings is None:
        return measured
    return {
        **measured,
        "bandwidth_share": measured["read_bytes_per_s"] / ceilings.bandwidth,
        "compute_share": measured["prefill_flops_per_s"] / ceilings.throughput,
    }


def one_at_a_time(system: Any, images: list[Any], new_tokens: int) -> float:
    """Returns images/s of the loop that prepares an image and lets transformers' ``generate`` answer about it."""
    import torch

    from llava.mm_utils import tokenizer_image_token

    model = system.model
    ids = torch.tensor([tokenizer_image_token(system.prompt(system.options()), system.tokenizer)], device=model.device)
    lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}

    def answer(image: Any) -> None:
        pixels = system.prepare(image).pixels[None].to(model.device, model.dtype)
        new = model.generate(ids, images=pixels, do_sample=False, **lengths)
        system.tokenizer.decode(new[0])

    def loop() -> None:
        for image in images:
            answer(image)

    answer(images[0])  # the first call of a kernel is slow
    return len(images) / seconds(loop, model.device)


def language_work(model: Any, rows: int, prompt: int, new_tokens: int) -> dict[str, float]:
    """Returns what the language model must do for a batch; weights and shapes are enough, also on the meta device.

    Args:
        model: The model.
        rows: Prompts.
        prompt: Positions of each.
        new_tokens: Of each answer.

    Returns:
        ``step_bytes``, which a step of decoding reads in the mean: weights, and the cache half-way; ``prefill_flops``,
        a multiplication with its addition as two, causal attention as half of its square, without the vocabulary.
    """
    named = model.named_parameters()
    layers = [p for n, p in named if n.startswith(("model.layers.", "lm_head", "model.norm"))]
    config, matrices = model.config, sum(p.numel() for p in layers if p.ndim == 2) - model.lm_head.weight.numel()
    position = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers * model.dtype.itemsize
    queries = config.num_attention_heads * config.head_dim
    attention = 4 * config.num_hidden_layers * queries * prompt / 2
    return {
        "step_bytes": sum(p.nbytes for p in layers) + rows * position * (prompt + new_tokens / 2),
        "prefill_flops": rows * prompt * (2 * matrices + attention),
    }


def needed_bytes(size: str) -> dict[str, Any]:
    """Returns the bytes of a model's weights by how its language model's layers are held, and of a position's cache.

    ``step_bytes_in_bfloat16`` and ``prefill_flops`` are of one image, see ``language_work``.
    In 4 bits a block of 64 numbers has a scale of one byte, and 256 such scales one of four.
    """
    import torch

    model = build_system(SIZES[size], "meta", torch.bfloat16).model
    total = sum(parameter.numel() for parameter in model.parameters())
    layers = sum(p.numel() for name, p in model.named_parameters() if name.startswith("model.layers.") and p.ndim == 2)
    rest, config = 2 * (total - layers), model.config
    return {
        "parameters": total,
        "weights": {
            "float32": 4 * total,
            "bfloat16": 2 * total,
            "8 bits": rest + layers,
            "4 bits": rest + round(layers * (1 / 2 + 1 / 64 + 4 / 64 / 256)),
        },
        "cache_of_a_position_in_16_bits": 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim,
        "step_bytes_in_bfloat16": language_work(model, 1, PROMPT_POSITIONS, 0)["step_bytes"],
        "prefill_flops": language_work(model, 1, PROMPT_POSITIONS, 0)["prefill_flops"],
    }


def bench_device(arguments: argparse.Namespace) -> Any:
    """Returns the device to measure on.

    Raises:
        OptionError: It is not here, or the size is for a GPU, and the machine has none.
    """
    from llava.errors import OptionError
    from llava.model.builder import resolve_device

    device = resolve_device(arguments.device)
    if arguments.size == "13b" and arguments.device == "auto" and device.type != "cuda":
        raise OptionError("size 13b is for a GPU, and there is none here; --device cpu tries it without one")
    return device


def check_memory(device: Any, needed: float, what: str) -> None:
    """Checks that something fits.

    Raises:
        OptionError: It does not.
    """
    import torch

    from llava.errors import OptionError

    if device.type == "cuda":
        present = torch.cuda.mem_get_info(device)[0]
    else:
        present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > present:
        has = "has free" if device.type == "cuda" else "has"
        raise OptionError(f"{what} takes at least {needed / 1e9:.1f} GB, and the {device} {has} {present / 1e9:.1f} GB")


def measure_batches(system: Any, images: list[Any], sizes: list[int], new_tokens: int) -> dict[int, dict[str, float]]:
    """Measures batch sizes from the smallest on, up to the first that does not fit.

    Raises:
        UserError: None fits.
    """
    import torch
    from tqdm import tqdm

    from llava.cli import note
    from llava.errors import UserError

    measured: dict[int, dict[str, float]] = {}
    for size in tqdm(sizes, unit=" batch sizes"):
        try:
            measured[size] = measure_batch(system, images, size, new_tokens)
        except torch.OutOfMemoryError:
            if not measured:
                raise UserError(f"a batch of {size} does not fit into the memory that the weights leave") from None
            note(f"batches of {size} do not fit into memory, so no larger ones are measured")
            break
    return measured


def bench(arguments: argparse.Namespace) -> None:
    """Measures and prints.

    Raises:
        OptionError: A number is too small, or the size does not fit on this machine.
        UserError: No batch fits into memory.
    """
    if arguments.memory:
        print(json.dumps({"size": arguments.size, **needed_bytes(arguments.size)}))
        return
    import numpy as np
    import torch
    from PIL import Image

    from llava.errors import OptionError
    from llava.model.cpu_bfloat16 import lay_out
    from llava.model.decoding import set_decoding

    asked = arguments.batch_sizes or BATCH_SIZES.get(arguments.size, [1, 2, 4, 8, 16])
    if min(size for size in (1, *asked) if size != "auto") < 1 or arguments.images < 1 or arguments.new_tokens < 2:
        raise OptionError("batch sizes and images must be at least 1, new tokens at least 2")
    device = bench_device(arguments)
    gpu = device.type == "cuda"
    wanted = ("bfloat16" if gpu else "float32") if arguments.dtype == "auto" else arguments.dtype
    dtype = getattr(torch, wanted)
    check_memory(device, needed_bytes(arguments.size)["parameters"] * dtype.itemsize, f"size {arguments.size}")
    torch.manual_seed(0)
    start = time.perf_counter()
    system = build_system(SIZES[arguments.size], device, dtype)
    lay_out(system.model)
    loaded = time.perf_counter() - start
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (480, 640, 3), dtype=np.uint8) for _ in range(arguments.images)]
    images = [Image.fromarray(values) for values in noise]
    preprocess = seconds(lambda: [system.prepare(image) for image in images], device) / len(images)
    loop = one_at_a_time(system, images[:LOOP_IMAGES], arguments.new_tokens)
    mode = ("compile" if gpu else "eager") if arguments.decode == "auto" else arguments.decode
    set_decoding(system.model, mode)
    fits = system.batch_size(system.options(max_new_tokens=arguments.new_tokens))
    sizes = sorted({fits if size == "auto" else int(size) for size in asked})
    batches = measure_batches(system, images, sizes, arguments.new_tokens)
    result = {
        "size": arguments.size,
        "machine": torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": wanted,
        "parameters": sum(p.numel() for p in system.model.parameters()),
        "new_tokens": arguments.new_tokens,
        "decode": system.model.step_runner.mode,
        "load_s": loaded,
        "preprocess_s_per_image": preprocess,
        **summary(batches, loop),
        "peak_bytes": peak_bytes(device),
    }
    print(json.dumps(rounded(result)))


def summary(batches: dict[int, dict[str, float]], loop: float) -> dict[str, Any]:
    """Returns the batches' measurements, which of them is best, and how it compares.

    Args:
        batches: By size.
        loop: Images/s one at a time.
    """
    rates = {size: values["images_per_s"] for size, values in batches.items()}
    best = max(rates, key=lambda size: rates[size])
    return {
        "batch": batches,
        "best_batch": best,
        "best_over_batch_1": rates[best] / rates[1] if 1 in rates else None,
        "one_at_a_time_images_per_s": loop,
        "best_over_one_at_a_time": rates[best] / loop,
        **{name: batches[best].get(name) for name in ("bandwidth_share", "compute_share")},
    }


def peak_bytes(device: Any) -> int:
    """Returns the most memory that was held, of the GPU or of this process."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss also counts what held this process's place before its program began: its parent
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rounded(value: Any) -> Any:
    """Returns a result with four significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(run_cli(lambda: bench(parse_arguments())))
