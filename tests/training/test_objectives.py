"""Objectives against hand-computed values, torch.distributions, and the laws their papers state."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from training.objectives import classification, distillation, soft_targets


def logits(seed: int, batch: int = 6, classes: int = 5) -> torch.Tensor:
    return 3 * torch.randn(batch, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_soft_targets_by_hand() -> None:
    z_t = torch.tensor([[math.log(3.0), 0.0]])  # softmax: 3/4, 1/4
    z_s = torch.tensor([[0.0, 0.0]])  # softmax: 1/2, 1/2
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert soft_targets(z_s, z_t, 1.0).item() == pytest.approx(expected, rel=1e-6)
    z_t2 = torch.tensor([[2 * math.log(3.0), 0.0]])  # the same shares at T = 2, and the factor T² = 4
    assert soft_targets(z_s, z_t2, 2.0).item() == pytest.approx(4 * expected, rel=1e-6)


@given(seed=st.integers(0, 1000), temperature=st.floats(0.5, 20))
def test_soft_targets_equal_torch_distributions(seed: int, temperature: float) -> None:
    z_s, z_t = logits(seed).requires_grad_(), logits(seed + 1)
    ours = soft_targets(z_s, z_t, temperature)
    reference = kl_divergence(Categorical(logits=z_t / temperature), Categorical(logits=z_s / temperature))
    assert ours.item() == pytest.approx(temperature**2 * reference.mean().item(), rel=1e-9, abs=1e-12)
    (gradient,) = torch.autograd.grad(ours, z_s, retain_graph=True)
    (expected,) = torch.autograd.grad(temperature**2 * reference.mean(), z_s)
    torch.testing.assert_close(gradient, expected)


def test_soft_targets_vanish_when_the_student_is_the_teacher() -> None:
    assert soft_targets(logits(0), logits(0), 4.0).item() == pytest.approx(0, abs=1e-12)


def test_the_mean_is_over_the_batch() -> None:
    z_s, z_t = logits(0), logits(1)
    twice = soft_targets(z_s.repeat(2, 1), z_t.repeat(2, 1), 4.0)
    assert twice.item() == pytest.approx(soft_targets(z_s, z_t, 4.0).item())


def test_the_gradient_tends_to_the_difference_of_centred_logits() -> None:
    """Hinton et al. 2015, eq. 4: as T grows, dC/dz_s → (z_s − z_t) / (K·B), for centred logits."""
    z_s, z_t = logits(0), logits(1)
    z_s, z_t = z_s - z_s.mean(1, keepdim=True), z_t - z_t.mean(1, keepdim=True)
    z_s.requires_grad_()
    (gradient,) = torch.autograd.grad(soft_targets(z_s, z_t, 1e4), z_s)
    torch.testing.assert_close(gradient * 5, (z_s - z_t) / 6, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_finite_at_extreme_logits(kind: torch.dtype) -> None:
    z = torch.tensor([[80.0, -80.0, 0.0]], dtype=kind)
    assert torch.isfinite(soft_targets(-z, z, 1.0)).all()


def test_distillation_weighs_its_terms() -> None:
    z_s, z_t, labels = logits(0), logits(1), torch.tensor([0, 1, 2, 3, 4, 0])
    terms = distillation(z_s, z_t, labels, temperature=4.0, alpha=0.9)
    hard, soft = F.cross_entropy(z_s, labels), soft_targets(z_s, z_t, 4.0)
    assert terms["loss"].item() == pytest.approx(0.1 * hard.item() + 0.9 * soft.item())
    assert (terms["hard"].item(), terms["soft"].item()) == pytest.approx((hard.item(), soft.item()))


def test_classification_is_cross_entropy() -> None:
    z, labels = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([0])
    assert classification(z, labels)["loss"].item() == pytest.approx(-math.log(0.75), rel=1e-6)
