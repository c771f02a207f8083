"""How many floating-point operations a training step takes.

A multiplication with its addition counts as two. Counted are matrix multiplications and convolutions, as usual. Causal
attention counts the half of its square that is needed. A weight that is not trained has no gradient, so its layer's
backward costs as much as its forward, not twice as much; frozen towers have no backward at all; a checkpointed layer
runs forward once more.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import cast

from torch import nn

from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.llava_arch import LlavaMetaModel
from llava.model.multimodal_encoder.base import VisionTower
from llava.model.multimodal_fusion.cross_attention import CrossAttentionFusion

Matrix = nn.Linear | nn.Conv2d


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
        llava = next(module for module in model.modules() if isinstance(module, LlavaLlamaForCausalLM))
        layers = cast(nn.ModuleList, llava.model.layers)
        width = llava.config.num_attention_heads * llava.config.head_dim
        self.costs = {
            **_vision_costs(llava.model),
            "layers": _sum(_with_repetition(_matrices(layer), layer) for layer in layers),
            "attention": _sum(_with_repetition(_product(2 * width), layer) for layer in layers),
            "vocabulary": _matrices(llava.lm_head),
            "search": Passes(_matrices(llava.lm_head).forward),
        }
        own = [module for name, module in layers.named_modules() if isinstance(module, Matrix) and "lora_" not in name]
        self.language_weights = sum(_num_weights(matrix) for matrix in [*own, *_inner(llava.lm_head)])

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


def _vision_costs(model: LlavaMetaModel) -> dict[str, Passes]:
    """The passes of one image in towers, projectors and fusion."""
    costs = {part: Passes() for part in ("towers", "projectors", "fusion")}
    branches: list[tuple[int, bool]] = []
    for tower, name in ((model.vision_tower, "mm_projector"), (model.dino_tower, "dino_mm_projector")):
        # A tower whose branch the fusion leaves out only makes the pixels.
        if tower is None or not hasattr(model, name):
            continue
        costs["towers"] += _tower(tower)
        projector, trained = _chain(getattr(model, name), _is_trained(tower))
        costs["projectors"] += projector * tower.num_patches
        branches.append((tower.num_patches, trained))
    fusion = getattr(model, "fusion", None)
    if isinstance(fusion, CrossAttentionFusion):
        (clip_patches, clip_trained), (dino_patches, dino_trained) = branches
        bias, bias_trained = _chain(getattr(fusion, "attention_mlp", nn.Identity()), _is_trained(model.dino_tower))
        trained = clip_trained or dino_trained or bias_trained or _is_trained(fusion)
        clip_side = _matrix(fusion.q_proj, clip_trained) + _matrix(fusion.out_proj, trained)
        clip_side += _chain(fusion.ffn, trained)[0]
        dino_side = _matrix(fusion.k_proj, dino_trained) + _matrix(fusion.v_proj, dino_trained)
        pair = bias + _product(4 * fusion.q_proj.in_features, trained=trained)
        costs["fusion"] = clip_side * clip_patches + dino_side * dino_patches + pair * (clip_patches * dino_patches)
    return costs


def _tower(tower: VisionTower) -> Passes:
    rows, columns = tower.grid
    tokens = rows * columns + tower.num_prefix_tokens
    trained = _is_trained(tower)
    embedding = (module for module in tower.modules() if isinstance(module, nn.Conv2d))
    cost = _sum(_matrix(module, input_is_trained=False) for module in embedding) * (rows * columns)
    for block in tower.blocks_run:
        attention = _product(4 * tokens**2 * tower.hidden_size, trained=trained)
        cost += _with_repetition(_matrices(block, trained) * tokens + attention, block)
    return cost


def _chain(module: nn.Module, trained: bool) -> tuple[Passes, bool]:
    """The passes of matrices one after the other, and whether their output has a gradient if their input's is so."""
    cost = Passes()
    for matrix in _inner(module):
        cost += _matrix(matrix, trained)
        trained = trained or matrix.weight.requires_grad
    return cost, trained


def _matrices(module: nn.Module, input_is_trained: bool = True) -> Passes:
    """The passes of all matrices within a module, for one row of their input."""
    return _sum(_matrix(matrix, input_is_trained) for matrix in _inner(module))


def _matrix(matrix: Matrix, input_is_trained: bool = True) -> Passes:
    """The passes of a linear layer for one row, or of a convolution for one place."""
    forward = 2 * _num_weights(matrix)
    return Passes(forward, forward * (input_is_trained + matrix.weight.requires_grad))


def _product(forward: int, *, trained: bool = True) -> Passes:
    """The passes of a product of two activations."""
    return Passes(forward, 2 * forward * trained)


def _with_repetition(cost: Passes, block: nn.Module) -> Passes:
    """Adds the forward that a checkpointed block with a backward repeats."""
    repeats = bool(getattr(block, "gradient_checkpointing", False)) and cost.backward > 0
    return cost + Passes(repeated=cost.forward * repeats)


def _inner(module: nn.Module) -> Iterator[Matrix]:
    """The linear layers and convolutions within a module, or it itself."""
    return (inner for inner in module.modules() if isinstance(inner, Matrix))


def _num_weights(matrix: Matrix) -> int:
    # Read from the layer's description, since sharded and quantised weights do not have this many entries.
    if isinstance(matrix, nn.Conv2d):
        return matrix.in_channels * matrix.out_channels * matrix.kernel_size[0] * matrix.kernel_size[1]
    return matrix.in_features * matrix.out_features


def _is_trained(module: nn.Module | None) -> bool:
    return module is not None and any(parameter.requires_grad for parameter in module.parameters())


def _sum(costs: Iterable[Passes]) -> Passes:
    return sum(costs, Passes())
