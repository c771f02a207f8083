"""bfloat16 on CPUs that multiply it natively: whether this one does, and layers laid out for it.

There a product takes so little time that what stands around it counts: weights that are laid out anew at every call,
and activations and norms that go through memory again and again. The layers here do the same with less of it. They are
for inference; their ``state_dict`` is that of the layers whose places they take.
"""

from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    eager_attention_forward,
)

from llava.model.checkpoint_files import TensorLike

_HEAD = "lm_head.weight"
_NATIVE = ("avx512_bf16", "amx_bf16", "bf16")
"""Names of the instructions on x86 (the first two) and Arm."""


@cache
def multiplies_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 natively (AVX512_BF16, AMX, Arm's BF16)."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of PyTorch cannot say it
    return any(known.get(name) for name in _NATIVE)


class PackedLinear(nn.Module):
    """A linear layer whose weight lies as the kernels want it.

    Args:
        linear: The layer whose place it takes; it keeps no weight of its own.
    """

    bias: Tensor | None
    _rows: tuple[tuple[int, ...], Tensor] | None = None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_parameter("bias", linear.bias)

    def forward(self, x: Tensor, activation: str = "none") -> Tensor:
        """Returns ``activation(x W^T + b)``, of the kernels' activations ``none``, ``swish``, ``relu``, ``gelu``."""
        exact = "none" if activation == "gelu" else ""  # not the approximation by tanh
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, activation, [], exact)
        return result

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        """Returns ``(x W^T + b) * factor``."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, factor, self.weight, self.bias, "mul")
        return result

    def rows(self, indices: tuple[int, ...]) -> Tensor:
        """Returns these rows of the weight; those of the last call are kept."""
        if self._rows is None or self._rows[0] != indices:
            self._rows = (indices, self.weight.detach().to_dense()[list(indices)])
        return self._rows[1]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight.detach().to_dense()


class PackedMLP(LlamaMLP):
    """Llama's feed-forward network with SiLU: ``down(silu(gate(x)) * up(x))``, in three kernels.

    Args:
        mlp: The network whose place it takes, its layers packed.
    """

    def __init__(self, mlp: LlamaMLP) -> None:
        with torch.device("meta"):
            super().__init__(mlp.config)
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        """Takes and returns ``[..., D]``."""
        result: Tensor = self.down_proj(self.up_proj.times(x, self.gate_proj(x, "swish")))
        return result


class LeanAttention(LlamaAttention):
    """Llama's attention with a rotary embedding that takes three passes over queries and keys, not five.

    Suffixes: B rows, L positions, D width, H heads, K a head's width.

    Args:
        attention: The attention whose place it takes.
    """

    def __init__(self, attention: LlamaAttention) -> None:
        with torch.device("meta"):
            super().__init__(attention.config, attention.layer_idx)
        self.q_proj, self.k_proj, self.v_proj = attention.q_proj, attention.k_proj, attention.v_proj
        self.o_proj = attention.o_proj

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Takes and returns ``[B, L, D]``; the second value is the attention, where the implementation gives it."""
        assert position_embeddings is not None
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q_BHLK, k_BHLK, v_BHLK = (
            layer(hidden_states).view(shape).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BHLK, k_BHLK = (_rotated(x_BHLK, *position_embeddings) for x_BHLK in (q_BHLK, k_BHLK))
        if past_key_values is not None:
            k_BHLK, v_BHLK = past_key_values.update(k_BHLK, v_BHLK, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended, weights = attend(
            self, q_BHLK, k_BHLK, v_BHLK, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return self.o_proj(attended.reshape(*shape[:2], -1)), weights


def _rotated(x_BHLK: Tensor, cos_BLK: Tensor, sin_BLK: Tensor) -> Tensor:
    """Returns ``x cos + rotate_half(x) sin``."""
    half = x_BHLK.shape[-1] // 2
    sin_B1LK = sin_BLK[:, None]
    turned = x_BHLK * cos_BLK[:, None]
    turned[..., :half].addcmul_(x_BHLK[..., half:], sin_B1LK[..., :half], value=-1)
    turned[..., half:].addcmul_(x_BHLK[..., :half], sin_B1LK[..., half:])
    return turned


class LeanRMSNorm(nn.Module):
    """Llama's norm, computed in float32 as there, with three copies fewer.

    Args:
        norm: The norm whose place it takes.
    """

    def __init__(self, norm: LlamaRMSNorm) -> None:
        super().__init__()
        self.weight = norm.weight
        self.variance_epsilon = norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Takes and returns ``[..., D]``."""
        wide = x.float()
        variance = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        return wide.mul_(variance.add_(self.variance_epsilon).rsqrt_()).to(x.dtype).mul_(self.weight)


def lay_out(model: nn.Module) -> None:
    """Replaces layers of a model by those above, one by one, where it is in bfloat16 on a CPU that multiplies it.

    A weight that another module holds too, quantised layers, and everything in another dtype stay as they are.

    Args:
        model: The model, which must not be trained afterwards.
    """
    if not _packs():
        return
    held = Counter(id(own) for module in model.modules() for own in module.parameters(recurse=False))
    # Nothing may hold the linear layers, as named_children does while it runs: each is gone before the next is packed.
    for module in [module for module in model.modules() if type(module) is not nn.Linear]:
        for name in [name for name, child in module.named_children() if type(child) is nn.Linear]:
            linear = getattr(module, name)
            if held[id(linear.weight)] == 1 and _fits(linear.weight):
                setattr(module, name, PackedLinear(linear))
            del linear
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is LlamaRMSNorm and _fits(child.weight):
                setattr(module, name, LeanRMSNorm(child))
            elif type(child) is LlamaAttention and isinstance(child.q_proj, PackedLinear):
                setattr(module, name, LeanAttention(child))
            elif type(child) is LlamaMLP and _is_packed(child):
                setattr(module, name, PackedMLP(child))


def pack_head(tensors: Mapping[str, TensorLike]) -> tuple[dict[str, TensorLike], PackedLinear | None]:
    """Packs the vocabulary's layer before the model is loaded.

    It is the largest layer: packed last, its copy would stand beside all the rest.

    Args:
        tensors: The model's, by their stored names.

    Returns:
        The tensors with one that takes no memory in its place, and the layer; None, and the tensors as they were, where
        this processor does not multiply bfloat16.
    """
    if not _packs():
        return dict(tensors), None
    weight = tensors[_HEAD][...].to(torch.bfloat16)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return {**tensors, _HEAD: weight.new_zeros(()).expand(weight.shape)}, PackedLinear(linear)


def exact_logits(head: nn.Module, states_BD: Tensor, words: tuple[int, ...]) -> Tensor | None:
    """Returns the logits of some words in float32, ``[B, W]``, where a CPU computes all of them in bfloat16.

    Rounded to 8 bits they differ by steps of 0.06 and more, which turns verdicts near a half. None for other heads.
    """
    if not _fits(states_BD):
        return None
    if isinstance(head, PackedLinear):
        rows_WD = head.rows(words)
    elif type(head) is nn.Linear:
        rows_WD = head.weight[list(words)]
    else:
        return None
    return states_BD.float() @ rows_WD.float().T


def _packs() -> bool:
    return multiplies_bfloat16() and bool(torch.backends.mkldnn.is_available())


def _fits(weight: Any) -> bool:
    return bool(weight.dtype == torch.bfloat16 and weight.device.type == "cpu")


def _is_packed(mlp: LlamaMLP) -> bool:
    layers = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return mlp.config.hidden_act == "silu" and all(isinstance(layer, PackedLinear) for layer in layers)
