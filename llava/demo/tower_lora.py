"""LoRA for the tower stage: a tower that was trained elsewhere is moved by matrices of low rank alone."""

from torch import nn

from llava.model.multimodal_encoder.base import VisionTower

TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
"""Linear layers of CLIP's blocks, by the last part of their names."""


def add_lora(tower: VisionTower, rank: int) -> bool:
    """Freezes a tower, and puts LoRA (alpha = 2 · rank, no dropout) on the linear layers of its blocks, in place.

    Returns:
        False, and leaves the tower as it is, if it has no such layers.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = [name for name, module in tower.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in linear if name.rpartition(".")[2] in TARGETS]
    if not targets:
        return False
    tower.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), tower)
    return True


def merge_lora(tower: VisionTower) -> None:
    """Adds each update to its weight, and puts the plain layers back under their names."""
    from peft.tuners.lora import LoraLayer

    adapted = [(name, module) for name, module in tower.named_modules() if isinstance(module, LoraLayer)]
    for name, module in adapted:
        module.merge()
        tower.set_submodule(name, module.get_base_layer())
