"""How many floating-point operations a training step takes.

Torch's own counter counts the forward and backward of the model's parts on meta tensors, which have shapes and no
numbers: matrix multiplications and convolutions, a multiplication with its addition as two. It tells what has no
gradient (a frozen weight, a frozen tower). Two things it cannot tell are added here: causal attention counts the half
of its square that is needed, and a checkpointed layer that has a backward runs forward once more.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any, cast

import torch
from peft import PeftModel, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_layers import GradientCheckpointingLayer

from llava.model.branches import projector_name
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.llava_arch import LlavaMetaModel
from llava.model.multimodal_encoder.base import PixelFormat

_TOKENS = 8
"""Length of the rows that are counted; a second row of twice the length tells what grows with the square."""


@dataclass(frozen=True)
class BatchSize:
    """What a batch's cost grows with; sizes add up over micro-batches.

    Attributes:
        images: Number of images.
        tokens: Positions of the language model, image tokens among them.
        squares: Sum of the squared lengths of the rows.
        scored: Positions whose logits enter a loss.
        searched: Positions whose logits are only looked through for the verdict, without gradient.
    """

    images: int = 0
    tokens: int = 0
    squares: int = 0
    scored: int = 0
    searched: int = 0

    @classmethod
    def of(cls, lengths: Sequence[int], images: int, scored: int, searched: int = 0) -> "BatchSize":
        """Returns the size of a batch whose rows have these lengths.

        Args:
            lengths: Lengths after the splice: as they are for what is needed, or the padded length for each row for
                what the device computes.
            images: Number of images.
            scored: Positions whose logits enter a loss.
            searched: Positions whose logits are only looked through.
        """
        return cls(images, sum(lengths), sum(length**2 for length in lengths), scored, searched)

    def __add__(self, other: "BatchSize") -> "BatchSize":
        return BatchSize(*(one + more for one, more in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Passes:
    """FLOPs of the forward, of the backward, and of the forward that checkpointing repeats."""

    forward: int = 0
    backward: int = 0
    repeated: int = 0

    @property
    def total(self) -> int:
        """FLOPs of all passes."""
        return self.forward + self.backward + self.repeated

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(*(one + more for one, more in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: "Passes") -> "Passes":
        return self + other * -1

    def __mul__(self, times: int) -> "Passes":
        return Passes(*(value * times for value in astuple(self)))


GROWS_WITH = {
    "towers": "images",
    "projectors": "images",
    "fusion": "images",
    "layers": "tokens",
    "attention": "squares",
    "vocabulary": "scored",
    "search": "searched",
}
"""The field of ``BatchSize`` that each part's cost is proportional to."""


class TrainingFlops:
    """FLOPs of a model's training step, for batches of any size.

    What is trained and which layers are checkpointed is read from the model once, so build this after both are set.

    Args:
        model: A LLaVA model, also within the wrappers of LoRA and of distributed training.

    Attributes:
        costs: For each part in ``GROWS_WITH``, the passes of one unit.
        language_weights: Weights of the language model's own matrices: decoder layers and vocabulary, without embedding
            and adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        shapes, checkpointed = _without_numbers(model)
        row = torch.zeros(1, shapes.config.hidden_size, device="meta", requires_grad=True)
        vocabulary = _count(shapes.lm_head, row)
        self.costs = {
            **_vision_costs(shapes.model, checkpointed),
            **_layer_costs(shapes, checkpointed),
            "vocabulary": vocabulary,
            "search": Passes(vocabulary.forward),
        }
        named = [*cast(nn.Module, shapes.model.layers).named_parameters(), *shapes.lm_head.named_parameters()]
        self.language_weights = sum(
            weight.numel() for name, weight in named if weight.ndim == 2 and "lora_" not in name
        )

    def by_part(self, size: BatchSize) -> dict[str, Passes]:
        """Returns the passes of each part for a batch."""
        return {part: cost * getattr(size, GROWS_WITH[part]) for part, cost in self.costs.items()}

    def needed(self, size: BatchSize) -> int:
        """Returns what forward and backward take, without what checkpointing repeats."""
        total = _sum(self.by_part(size).values())
        return total.forward + total.backward

    def computed(self, size: BatchSize) -> int:
        """Returns what the device computes: forward, backward, and what checkpointing repeats."""
        return _sum(self.by_part(size).values()).total

    def conventional(self, size: BatchSize) -> int:
        """Returns 6 N T: six FLOPs for each weight of the language model and each token, whatever is trained."""
        return 6 * self.language_weights * size.tokens


def _without_numbers(model: nn.Module) -> tuple[LlavaLlamaForCausalLM, list[nn.Module]]:
    """Returns the same model on the meta device, and those of its layers that are checkpointed.

    It is built again from its config, since sharded and quantised weights have other shapes than their layers.
    """
    core = next(module for module in model.modules() if isinstance(module, LlavaLlamaForCausalLM))
    adapters: dict[str, Any] = next(
        (module.peft_config for module in model.modules() if isinstance(module, PeftModel)), {}
    )
    config = deepcopy(core.config)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        shapes = LlavaLlamaForCausalLM(config)
        for name, settings in adapters.items():
            inject_adapter_in_model(settings, shapes, name)
    trained = {name for name, parameter in core.named_parameters() if parameter.requires_grad}
    for name, parameter in shapes.named_parameters():
        parameter.requires_grad_(name in trained)
    layers = {n: layer for n, layer in core.named_modules() if isinstance(layer, GradientCheckpointingLayer)}
    return shapes.train(), [
        shapes.get_submodule(name) for name, layer in layers.items() if layer.gradient_checkpointing
    ]


def _layer_costs(model: LlavaLlamaForCausalLM, checkpointed: Sequence[nn.Module]) -> dict[str, Passes]:
    """The passes of one position, and of one pair of positions in causal attention, in all decoder layers."""
    rotary = cast(nn.Module, model.model.rotary_emb)
    # Layers of the same shapes cost the same, so one of each kind is counted.
    kinds: dict[Any, list[nn.Module]] = defaultdict(list)
    for layer in cast(nn.ModuleList, model.model.layers):
        shapes = ((name, weight.shape, weight.requires_grad) for name, weight in layer.named_parameters())
        kinds[(layer in checkpointed, *shapes)].append(layer)
    counts = []
    for length in (1, 2):
        hidden = torch.zeros(1, length, model.config.hidden_size, device="meta", requires_grad=True)
        angles = rotary(hidden.detach(), torch.arange(length, device="meta")[None])
        runs = ((partial(alike[0], position_embeddings=angles), len(alike)) for alike in kinds.values())
        counts.append(_sum(_count(run, hidden, repeated=checkpointed) * times for run, times in runs))
    # Of one position a layer takes a + b FLOPs, of two 2a + 4b, where b is that of a pair in attention.
    one, two = (astuple(count) for count in counts)
    linear = Passes(*(first * 2 - second // 2 for first, second in zip(one, two, strict=True)))
    pair = counts[0] - linear
    return {"layers": linear, "attention": Passes(*(value // 2 for value in astuple(pair)))}


def _vision_costs(model: LlavaMetaModel, checkpointed: Sequence[nn.Module]) -> dict[str, Passes]:
    """The passes of one image in towers, projectors and fusion."""
    if model.vision_tower is None:
        return {part: Passes() for part in ("towers", "projectors", "fusion")}
    pixels = torch.zeros(1, *PixelFormat(**model.config.pixel_format()).shape, device="meta")
    towers = _count(model.run_towers, pixels, repeated=checkpointed)
    outputs = {
        name: part.detach().requires_grad_(part.requires_grad) for name, part in model.run_towers(pixels).items()
    }
    named = {projector_name(branch): outputs[branch] for branch in model.fusion.branches}
    projectors = _sum(_count(getattr(model, name), part) for name, part in named.items())
    fused = _count(lambda: model.fuse(outputs).tokens)
    return {"towers": towers, "projectors": projectors, "fusion": fused - projectors}


def _count(run: Callable[..., Any], *inputs: Tensor, repeated: Sequence[nn.Module] = ()) -> Passes:
    """Counts a function's forward, its backward, and the forwards of the modules that the backward repeats."""
    starts: list[int] = []
    again: list[int] = []

    def enter(*_: Any) -> None:
        starts.append(counter.get_total_flops())

    def leave(module: nn.Module, given: Any, output: Any) -> None:
        flops = counter.get_total_flops() - starts.pop()
        again.extend([flops] if _with_gradient(output) else [])

    hooks = [module.register_forward_pre_hook(enter) for module in repeated]
    hooks += [module.register_forward_hook(leave) for module in repeated]
    # Fused attention is opaque to the counter, so its plain products are counted.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        outputs = _with_gradient(run(*inputs))
        forward = counter.get_total_flops()
        if outputs:
            torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])
        backward = counter.get_total_flops() - forward
    for hook in hooks:
        hook.remove()
    return Passes(forward, backward, sum(again))


def _with_gradient(output: Any) -> list[Tensor]:
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else (output,)
    return [value for value in values if isinstance(value, Tensor) and value.requires_grad]


def _sum(costs: Iterable[Passes]) -> Passes:
    return sum(costs, Passes())
