"""What GPUs can do at best, as their makers state it."""

from typing import NamedTuple

import torch


class Ceilings(NamedTuple):
    """Peak memory bandwidth in bytes/s, and dense 16-bit matrix throughput in FLOP/s."""

    bandwidth: float
    throughput: float


GPU_CEILINGS = {
    "B200": Ceilings(8.0e12, 2250e12),
    "H200": Ceilings(4.8e12, 989e12),
    "H100 PCIe": Ceilings(2.0e12, 756e12),
    "H100": Ceilings(3.35e12, 989e12),
    "H800": Ceilings(3.35e12, 989e12),
    "A100": Ceilings(2.0e12, 312e12),
    "A800": Ceilings(2.0e12, 312e12),
    "L40S": Ceilings(0.864e12, 362e12),
    "RTX 4090": Ceilings(1.008e12, 165e12),
}
"""By a part of the GPU's name; the first that fits counts."""


def gpu_ceilings(device: torch.device) -> Ceilings | None:
    """Returns the ceilings of a GPU; None for other devices and GPUs that are not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((ceilings for part, ceilings in GPU_CEILINGS.items() if part in name), None)
