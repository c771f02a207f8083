"""Measures inference of a random model; the last line printed is one JSON object.

Sizes: tiny (for trying this script), mid (language model 512 wide, 8 layers; towers 384 wide, 8 layers; 336 pixels),
13b (the published size). On a GPU the shares of its ceilings are given too: decoding against memory bandwidth (weights
and cache read once a step), prefill against matrix throughput.
"""

import argparse
import json
import platform
import resource
import sys
import time
from collections.abc import Callable
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


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = OptionParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="tiny", help="default: tiny")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="default: 1 2 4 8 16")
    parser.add_argument("--images", type=int, default=16, help="images a measurement (at least the batch; default: 16)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens an answer (default: 64)")
    parser.add_argument("--device", default="auto", help="auto (default), cuda, cpu")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--memory", action="store_true", help="only add up what weights and cache take; run nothing")
    return parser.parse_args(arguments)


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
    from llava.model.decoding import Sampler, decode

    model, device = system.model, system.model.device
    options = system.options(max_new_tokens=new_tokens)
    many = (images * (1 + size // len(images)))[: max(len(images), size)]
    prepared = [system.prepare(image) for image in many[:size]]
    pixels = torch.stack([item.pixels for item in prepared]).to(device, model.dtype)
    ids = system.tokenizer(system.prompt(options).replace("<image>", "")).input_ids
    words = (model.verdict_tokens.real, model.verdict_tokens.fake)

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
        answer(embeds, 2)
        vision = seconds(lambda: system.answering.encode_images(pixels), device)
        prefill = min(seconds(lambda: answer(embeds, 1), device) for _ in range(2))
        decoding = seconds(lambda: answer(embeds, new_tokens), device) - prefill
    detector = ForgeryDetector(system)
    answered = seconds(lambda: list(detector.analyze_many(many, batch_size=size, max_new_tokens=new_tokens)), device)
    scored = seconds(lambda: list(detector.analyze_many(many, batch_size=size, score_only=True)), device)
    step = decoding / max(1, new_tokens - 1)
    measured = {
        "vision_s": vision,
        "prefill_s": prefill,
        "prompt_tokens": embeds.shape[1],
        "decode_tokens_per_s": size / step,
        "images_per_s": len(many) / answered,
        "score_only_images_per_s": len(many) / scored,
    }
    return {**measured, **shares_of_ceilings(model, size, embeds.shape[1], new_tokens, prefill, step)}


def shares_of_ceilings(
    model: Any, size: int, prompt: int, new_tokens: int, prefill: float, step: float
) -> dict[str, float]:
    """Returns the shares of the GPU's bandwidth (decoding) and throughput (prefill); nothing on other devices."""
    from llava.gpu_ceilings import gpu_ceilings

    ceilings = gpu_ceilings(model.device)
    if ceilings is None:
        return {}
    layers = [p for n, p in model.named_parameters() if n.startswith(("model.layers.", "lm_head", "model.norm"))]
    weights, config = sum(p.numel() for p in layers), model.config
    width = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers * model.dtype.itemsize
    read = weights * model.dtype.itemsize + size * width * (prompt + new_tokens / 2)
    attention = 4 * config.num_hidden_layers * config.hidden_size * prompt / 2
    computed = size * prompt * (2 * (weights - model.lm_head.weight.numel()) + attention)
    return {
        "bandwidth_share": read / step / ceilings.bandwidth,
        "compute_share": computed / prefill / ceilings.throughput,
    }


def needed_bytes(size: str) -> dict[str, Any]:
    """Returns the bytes of a model's weights by how its language model's layers are held, and of a position's cache.

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
    }


def bench(arguments: argparse.Namespace) -> None:
    """Measures and prints."""
    if arguments.memory:
        print(json.dumps({"size": arguments.size, **needed_bytes(arguments.size)}))
        return
    import numpy as np
    import torch
    from PIL import Image
    from tqdm import tqdm

    from llava.errors import OptionError
    from llava.model.builder import resolve_device
    from llava.model.cpu_bfloat16 import lay_out

    if min(arguments.batch_sizes) < 1 or arguments.images < 1 or arguments.new_tokens < 2:
        raise OptionError("batch sizes and images must be at least 1, new tokens at least 2")
    device = resolve_device(arguments.device)
    wanted = ("bfloat16" if device.type == "cuda" else "float32") if arguments.dtype == "auto" else arguments.dtype
    torch.manual_seed(0)
    start = time.perf_counter()
    system = build_system(SIZES[arguments.size], device, getattr(torch, wanted))
    lay_out(system.model)
    loaded = time.perf_counter() - start
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (480, 640, 3), dtype=np.uint8) for _ in range(arguments.images)]
    images = [Image.fromarray(values) for values in noise]
    preprocess = seconds(lambda: [system.prepare(image) for image in images], device) / len(images)
    batches = {}
    for size in tqdm(arguments.batch_sizes, unit=" batch sizes"):
        batches[size] = measure_batch(system, images, size, arguments.new_tokens)
    rates = {size: values["images_per_s"] for size, values in batches.items()}
    best = max(rates, key=lambda size: rates[size])
    gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {
        "size": arguments.size,
        "machine": torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": wanted,
        "parameters": sum(p.numel() for p in system.model.parameters()),
        "new_tokens": arguments.new_tokens,
        "load_s": loaded,
        "preprocess_s_per_image": preprocess,
        "batch": batches,
        "best_batch": best,
        "best_over_batch_1": rates[best] / rates[1] if 1 in rates else None,
        "peak_bytes": peak,
    }
    print(json.dumps(rounded(result)))


def rounded(value: Any) -> Any:
    """Returns a result with four significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(run_cli(lambda: bench(parse_arguments())))
