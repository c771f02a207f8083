"""Dropout of LoRA's inputs whose random numbers cost a CPU little.

Torch's own draws one number after the other in 64 bits: on a CPU that takes longer than the products around it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_LEVELS = 1 << 16
"""Each element is kept or dropped by 16 random bits."""
_WHOLE_NUMBERS = {2: torch.int16, 4: torch.int32}
"""By the size of a float in bytes."""


class FastDropout(nn.Dropout):
    """``nn.Dropout`` that takes four elements' random bits from one number, on a CPU.

    The share that is dropped is ``p`` to within 2⁻¹⁷. Under autocast the result has autocast's dtype.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Takes and returns a tensor of any shape."""
        if not self.training or input.device.type != "cpu" or input.element_size() not in _WHOLE_NUMBERS:
            return super().forward(input)
        if torch.is_autocast_enabled("cpu"):
            input = input.to(torch.get_autocast_dtype("cpu"))
        result: Tensor = _Dropout.apply(input, self.p)
        return result


class _Dropout(torch.autograd.Function):
    """Keeps one byte an element for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        dropped = round(p * _LEVELS)
        numbers = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-(2**63), None)
        kept = numbers.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - _LEVELS // 2
        ctx.save_for_backward(kept)
        ctx.scale = _LEVELS / (_LEVELS - dropped) if dropped < _LEVELS else 0.0
        return _scaled(x, kept, ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _scaled(gradients[0], ctx.saved_tensors[0], ctx.scale), None


def _scaled(x: Tensor, kept: Tensor, scale: float) -> Tensor:
    """Returns ``x`` times ``scale`` where it is kept, else 0."""
    # A float's bits and all ones, or all zeros: several times as fast as any product with booleans.
    whole = _WHOLE_NUMBERS[x.element_size()]
    bits = kept.to(whole).neg_().bitwise_and_(x.view(whole))
    return bits.view(x.dtype).mul_(scale)
