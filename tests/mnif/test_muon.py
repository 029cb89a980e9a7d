import pytest
import torch
from torch import nn

from mnif.training.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(40, 8), (8, 40), (12, 12)])
def test_singular_vectors_stay_and_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    left, values, right = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    values = torch.linspace(1, 0.02, len(values), dtype=torch.float64)
    found = orthogonalised((left * values @ right).float()).double()
    inner = left.mT @ found @ right.mT
    assert (inner - torch.diag(inner.diag())).abs().max() < 1e-4
    assert inner.diag().min() > 0.65
    assert inner.diag().max() < 1.25


@pytest.mark.parametrize("shape", [(64, 16), (16, 64)])
def test_a_step_is_that_of_torch(shape: tuple[int, int]) -> None:
    """torch's works in bfloat16, which has three digits."""
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    reference = torch.optim.Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    optimizer = Muon([ours], lr=0.1, momentum=0.9)
    for step in range(4):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = gradient, gradient.clone()
        before = ours.detach().clone()
        optimizer.step()
        reference.step()
        assert (ours - before).square().mean().sqrt().item() == pytest.approx(0.02, rel=0.25)
    assert (ours - theirs).norm() < 0.03 * (ours - 1).norm()


def test_a_zero_gradient_and_none_move_nothing() -> None:
    weights = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))]
    weights[0].grad = torch.zeros(3, 2)
    Muon(weights, lr=1.0).step()
    for weight in weights:
        torch.testing.assert_close(weight.detach(), torch.ones(3, 2))
