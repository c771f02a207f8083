"""Builds projectors by LLaVA's names: ``linear``, ``mlp2x_gelu``, ``mlp3x_gelu``, …, ``identity``."""

import re

from torch import nn

from llava.errors import CheckpointError


def build_vision_projector(projector_type: str, in_features: int, out_features: int) -> nn.Module:
    """Returns a projector ``[..., in_features] -> [..., out_features]``.

    Raises:
        CheckpointError: The type is unknown, or ``identity`` would have to change the width.
    """
    if projector_type == "linear":
        return nn.Linear(in_features, out_features)
    if projector_type == "identity":
        if in_features != out_features:
            raise CheckpointError(f"an identity projector cannot turn width {in_features} into {out_features}")
        return nn.Identity()
    mlp = re.fullmatch(r"mlp(\d+)x_gelu", projector_type)
    if mlp is None or int(mlp[1]) < 1:
        raise CheckpointError(
            f"unknown mm_projector_type {projector_type!r}; known: linear, mlp<depth>x_gelu, identity"
        )
    layers: list[nn.Module] = [nn.Linear(in_features, out_features)]
    for _ in range(int(mlp[1]) - 1):
        layers += [nn.GELU(), nn.Linear(out_features, out_features)]
    return nn.Sequential(*layers)
