"""Cross-entropy over the vocabulary without all logits at once.

Shapes: N positions, D width, V words.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_CHUNK = 256
"""Positions whose logits are held at a time."""


def vocabulary_loss(head: nn.Module, states_ND: Tensor, targets_N: Tensor) -> Tensor:
    """Returns the sum of cross-entropies ``[]`` in float32.

    Where the head is frozen, the gradient to the states is computed with the loss, so that no logit outlives its chunk.

    Args:
        head: From states to logits.
        states_ND: Where the words are predicted.
        targets_N: The words.
    """
    if not (torch.is_grad_enabled() and _is_plain_and_frozen(head)):
        return F.cross_entropy(head(states_ND).float(), targets_N, reduction="sum")
    total: Tensor = _FrozenHeadLoss.apply(states_ND, head.weight, targets_N)
    return total


def _is_plain_and_frozen(head: nn.Module) -> bool:
    """Whether the weight says all; sharded training leaves an empty one until the head is called."""
    if type(head) is not nn.Linear or head.bias is not None:
        return False
    return not head.weight.requires_grad and head.weight.numel() > 0


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        total = states_ND.new_zeros((), dtype=torch.float32)
        gradient_ND = torch.empty_like(states_ND)
        parts = (part.split(_CHUNK) for part in (states_ND, targets_N, gradient_ND))
        for states_CD, targets_C, gradient_CD in zip(*parts, strict=True):
            logits_CV = F.linear(states_CD, weight_VD).float()
            rows_C = torch.arange(len(targets_C), device=targets_C.device)
            spread_C = logits_CV.logsumexp(dim=-1)
            total += (spread_C - logits_CV[rows_C, targets_C]).sum()
            # The gradient of the logits, in their place: softmax minus one-hot.
            logits_CV.sub_(spread_C[:, None]).exp_()
            logits_CV[rows_C, targets_C] -= 1
            gradient_CD.copy_(logits_CV.to(weight_VD.dtype) @ weight_VD)
        ctx.save_for_backward(gradient_ND)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].to(ctx.saved_tensors[0].dtype) * ctx.saved_tensors[0], None, None
