"""What makes a training step cheap, against what it stands for."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.model.vocabulary_loss import vocabulary_loss
from llava.train.dropout import FastDropout
from llava.train.lora import apply_lora
from tests.small_models import small_model


def kept(dropout: FastDropout, *shape: int) -> Tensor:
    return dropout(torch.ones(shape)) != 0


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_its_share_and_scales_the_rest(p, dtype):
    torch.manual_seed(0)
    x = torch.randn(1001, 333, dtype=dtype, requires_grad=True)
    result = FastDropout(p)(x)
    assert result.shape == x.shape and result.dtype == dtype
    stays = result != 0
    assert (~stays).float().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5)
    assert torch.allclose(result[stays].float(), x[stays].float() / (1 - p), rtol=1e-2 if dtype.itemsize == 2 else 1e-4)
    assert result.float().mean().item() == pytest.approx(x.float().mean().item(), abs=0.02)
    gradient = torch.randn_like(x)
    (own,) = torch.autograd.grad(result, x, gradient)
    assert torch.allclose(own, torch.where(stays, gradient / (1 - p), 0), rtol=1e-2)


def test_dropout_of_neighbours_is_independent():
    torch.manual_seed(0)
    keeps = kept(FastDropout(0.5), 1 << 20).float() - 0.5
    for distance in range(1, 9):
        assert abs((keeps[:-distance] * keeps[distance:]).mean()) < 5 * 0.25 / 1024
    columns = keeps.view(-1, 4).mean(dim=0).abs()
    assert columns.max() < 5 * 0.5 / 512


def test_dropout_depends_on_the_seed_alone():
    torch.manual_seed(3)
    first, second = kept(FastDropout(0.5), 50, 7), kept(FastDropout(0.5), 50, 7)
    torch.manual_seed(3)
    assert torch.equal(kept(FastDropout(0.5), 50, 7), first) and not torch.equal(first, second)


def test_dropout_at_its_ends():
    x = torch.randn(6, 5)
    assert torch.equal(FastDropout(0.3).eval()(x), x) and torch.equal(FastDropout(0.0)(x), x)
    assert not FastDropout(1.0)(x).any()
    assert FastDropout(0.5)(x.double()).dtype == torch.float64
    across = FastDropout(0.5)(x.T)
    assert torch.equal(across[across != 0], 2 * x.T[across != 0])
    with torch.autocast("cpu", torch.bfloat16):
        assert FastDropout(0.5)(x).dtype == torch.bfloat16


def test_lora_uses_it():
    adapted = apply_lora(small_model(), rank=2, alpha=4, dropout=0.25)
    found = [(module.p, name) for name, module in adapted.named_modules() if type(module) is FastDropout]
    assert len(found) == 14 and {p for p, _ in found} == {0.25} and all(".lora_dropout." in name for _, name in found)
    plain = apply_lora(small_model(), rank=2, alpha=4)
    assert not [module for module in plain.modules() if type(module) is FastDropout]


@pytest.mark.parametrize("count", [0, 3, 700])
def test_the_loss_by_chunks_is_the_whole_one(count):
    torch.manual_seed(0)
    head = nn.Linear(24, 97, bias=False).requires_grad_(False)
    states = torch.randn(count, 24, requires_grad=True)
    targets = torch.randint(97, (count,))
    whole = F.cross_entropy(head(states), targets, reduction="sum")
    own = vocabulary_loss(head, states, targets)
    assert own.item() == pytest.approx(whole.item(), rel=1e-6)
    wanted, found = (torch.autograd.grad(0.3 * loss, states)[0] for loss in (whole, own))
    assert torch.allclose(found, wanted, atol=1e-6)


def test_the_loss_by_chunks_under_autocast():
    torch.manual_seed(0)
    head = nn.Linear(24, 97, bias=False).requires_grad_(False).bfloat16()
    states, targets = torch.randn(300, 24, requires_grad=True), torch.randint(97, (300,))
    with torch.autocast("cpu", torch.bfloat16):
        whole = F.cross_entropy(head(states).float(), targets, reduction="sum")
        own = vocabulary_loss(head, states, targets)
    assert own.dtype == torch.float32 and own.item() == pytest.approx(whole.item(), rel=1e-4)
    wanted, found = (torch.autograd.grad(loss, states)[0] for loss in (whole, own))
    assert found.dtype == torch.float32 and (found - wanted).norm() < 0.01 * wanted.norm()


def test_no_logits_are_kept_for_a_frozen_head_alone():
    states, targets = torch.randn(9, 24, requires_grad=True), torch.randint(97, (9,))
    kept_shapes: list[tuple[int, ...]] = []

    def saved(tensor: Tensor) -> Tensor:
        kept_shapes.append(tuple(tensor.shape))
        return tensor

    for trained in (False, True):
        kept_shapes.clear()
        head = nn.Linear(24, 97, bias=False).requires_grad_(trained)
        with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
            loss = vocabulary_loss(head, states, targets)
        assert ((9, 97) in kept_shapes) is trained
        loss.backward()
        assert (head.weight.grad is not None) is trained
    with torch.no_grad():
        assert vocabulary_loss(head, states, targets).item() == pytest.approx(loss.item())
