"""What is trained: LoRA on the language model, parts that are trained whole, and how the optimizer treats them."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from torch import nn

from llava.errors import OptionError
from llava.model.branches import LORA, part_of
from llava.model.checkpoint_layout import LORA_PREFIX
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.train.dropout import FastDropout


def parameter_part(name: str) -> str:
    """Returns the part that a parameter belongs to, ``lora`` for an adapter's; see ``llava.model.branches``."""
    return LORA if "lora_" in name else part_of(bare_name(name))


def bare_name(name: str) -> str:
    """Returns a parameter's name without what PEFT puts before and into it."""
    return name.removeprefix(LORA_PREFIX).replace(".base_layer.", ".")


def apply_lora(model: LlavaLlamaForCausalLM, *, rank: int, alpha: float, dropout: float = 0.0) -> PeftModel:
    """Puts LoRA on every linear layer of the language model's blocks, and on nothing else.

    The towers have layers of the same names, which is why each module is named whole.

    Args:
        model: The model; all its parameters are frozen.
        rank: r; published: 128.
        alpha: Scale of the update is ``alpha / rank``; published: 256.
        dropout: Before the low-rank path.
    """
    targets = [
        name
        for name, module in model.named_modules()
        if name.startswith("model.layers.") and isinstance(module, nn.Linear)
    ]
    settings = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias="none", task_type="CAUSAL_LM"
    )
    # PEFT would turn adapters alone into float32, which sharded training refuses beside bfloat16.
    adapted = get_peft_model(model, settings, autocast_adapter_dtype=False)
    for module in [module for module in adapted.modules() if isinstance(module, LoraLayer)]:
        for name, own in module.lora_dropout.items():
            if type(own) is nn.Dropout:
                module.lora_dropout[name] = FastDropout(own.p)
    return adapted


def prepare_quantized(model: LlavaLlamaForCausalLM, *, gradient_checkpointing: bool) -> None:
    """Makes a quantised model trainable through (QLoRA, arXiv 2305.14314)."""
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=gradient_checkpointing)


def choose_trainable(model: nn.Module, parts: "set[str] | frozenset[str]") -> None:
    """Trains these parts and nothing else.

    Raises:
        OptionError: The model does not have a part.
    """
    found = set()
    for name, parameter in model.named_parameters():
        part = parameter_part(name)
        trainable = part in parts and parameter.is_floating_point()
        parameter.requires_grad_(trainable)
        found |= {part} if trainable else set()
    if parts - found:
        raise OptionError(f"the model has no {', '.join(sorted(parts - found))} to train")


def trainable_table(model: nn.Module) -> str:
    """Returns a table of the model's parameters by part: all, and those that are trained."""
    total: dict[str, int] = defaultdict(int)
    trained: dict[str, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        part = parameter_part(name)
        # Sharded training leaves an empty tensor instead of a parameter, and its size in this attribute.
        count = getattr(parameter, "ds_numel", parameter.numel())
        total[part] += count
        trained[part] += count if parameter.requires_grad else 0
    rows = [(part, f"{total[part]:,}", f"{trained[part]:,}") for part in total]
    rows.append(("all", f"{sum(total.values()):,}", f"{sum(trained.values()):,}"))
    rows.insert(0, ("part", "parameters", "trained"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows)


def optimizer_groups(
    model: nn.Module, *, learning_rate: float, weight_decay: float, rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Sorts the trained parameters into groups of one learning rate and one weight decay, as published.

    Biases and the language model's norms are not decayed; the fusion's norms are, since the authors' own class of norm
    escapes their rule.

    Args:
        model: The model.
        learning_rate: Of everything that ``rates`` does not name.
        weight_decay: Of what is decayed.
        rates: Learning rate of parts.

    Returns:
        Groups as an optimizer takes them, empty ones left out; decayed before undecayed.
    """
    undecayed = _undecayed(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    own = {rates[part] for part in rates} | {learning_rate}
    for rate in (learning_rate, *sorted(own - {learning_rate})):
        groups[(rate, weight_decay)] = []
        groups.setdefault((rate, 0.0), [])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = rates.get(parameter_part(name), learning_rate)
            groups[(rate, 0.0 if name in undecayed else weight_decay)].append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
        if parameters
    ]


def _undecayed(model: nn.Module) -> set[str]:
    names = {name for name, _ in model.named_parameters()}
    biases = {name for name in names if name.endswith(".bias")}
    fusion_norms = {name for name in names if part_of(bare_name(name)) == "fusion" and "_norm." in name}
    norms = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
        for name, _ in module.named_parameters(recurse=False)
    }
    return (biases | norms) - fusion_norms


def trainable_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the trained parameters by their names in memory."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
