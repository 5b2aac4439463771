"""Values and gradients of the sigmoid focal loss and of FL* against 50 digits, torchvision and the paper."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from focal_helpers import close, cpu_impls, exact_loss_and_gradient
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss as torchvision_focal

from retina.losses import focal_star_loss, sigmoid_focal_loss

GAMMAS = [0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]
LOGITS = [-10000.0, -700.0, -104.5, -88.0, -70.1, -40.0, -17.0, -16.6, -8.3, -3.3, -0.9, -1e-4, 0.0, 1e-6]
LOGITS += [0.7, 2.2, 5.0, 9.7, 16.7, 17.0, 33.3, 71.4, 87.2, 103.9, 200.0, 10000.0]


@cpu_impls
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_match_fifty_digits(impl: str, gamma: float, dtype: torch.dtype) -> None:
    for x in LOGITS:
        for positive in (True, False):
            logits = torch.tensor([[x]], dtype=dtype, requires_grad=True)
            loss = sigmoid_focal_loss(
                logits, torch.tensor([0 if positive else 1]), gamma=gamma, reduction="sum", impl=impl
            )
            (gradient,) = torch.autograd.grad(loss, logits)
            value, slope = exact_loss_and_gradient(logits.item(), positive, gamma)
            compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
            relative = 2e-14 if dtype == torch.float64 else 1e-6
            assert loss.dtype == compute_dtype and close(loss.item(), value, relative, compute_dtype), (x, positive)
            # A gradient in bfloat16 or float16 is rounded once, to its own precision; the smallest float16 is 6e-8.
            rounding, given = torch.finfo(dtype), gradient.item()
            step = 0.51 * rounding.eps * max(abs(slope), rounding.tiny)
            tolerance = max(relative * abs(slope), step, torch.finfo(compute_dtype).tiny)
            assert abs(given - slope) <= tolerance, (x, positive)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_soft_labels_match_fifty_digits(gamma: float) -> None:
    for x in LOGITS:
        for y in (0.0, 0.1, 0.5, 0.9, 1.0):
            logits, target = torch.tensor([x], requires_grad=True), torch.tensor([y])
            loss = sigmoid_focal_loss(logits, target, gamma=gamma, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, logits)
            positive, positive_slope = exact_loss_and_gradient(logits.item(), True, gamma)
            negative, negative_slope = exact_loss_and_gradient(logits.item(), False, gamma)
            y = target.item()
            assert close(loss.item(), y * positive + (1 - y) * negative, 1e-6, torch.float32), (x, y)
            # Two slopes of opposite sign: their rounding counts against the larger one.
            size = max(abs(y * positive_slope), abs((1 - y) * negative_slope))
            error = abs(gradient.item() - (y * positive_slope + (1 - y) * negative_slope))
            assert error <= max(1e-6 * size, torch.finfo(torch.float32).tiny), (x, y)


def test_gradient_is_the_papers_equation() -> None:
    """Eq. 10: dFL/dx = y (1 - p_t)^gamma (gamma p_t log(p_t) + p_t - 1), y in {-1, 1}, without alpha."""
    x = torch.linspace(-6, 6, 49, dtype=torch.float64, requires_grad=True)
    for y in (1, -1):
        p_t = torch.sigmoid(y * x.detach())
        for gamma in GAMMAS:
            expected = y * (1 - p_t) ** gamma * (gamma * p_t * p_t.log() + p_t - 1)
            label = torch.full_like(x, float(y == 1))
            loss = sigmoid_focal_loss(x, label, alpha=None, gamma=gamma, reduction="sum")
            torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_second_derivatives_of_the_reference(gamma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, dtype=torch.float64, generator=generator).mul_(3).requires_grad_()
    targets, weight = torch.tensor([0, 3, 2, -1]), torch.rand(4, dtype=torch.float64, generator=generator)
    soft = torch.rand(4, 3, dtype=torch.float64, generator=generator)

    def hard_loss(x: Tensor) -> Tensor:
        return sigmoid_focal_loss(x, targets, gamma=gamma, weight=weight, impl="reference")

    def soft_loss(x: Tensor) -> Tensor:
        return sigmoid_focal_loss(x, soft, gamma=gamma, reduction="none")

    for loss in (hard_loss, soft_loss):
        assert torch.autograd.gradcheck(loss, logits) and torch.autograd.gradgradcheck(loss, logits)


@pytest.mark.parametrize(("gamma", "beta"), [(2.0, 1.0), (4.0, 0.0), (0.5, -1.0)])
def test_focal_star_matches_its_definition(gamma: float, beta: float) -> None:
    """FL* = -log(sigmoid(gamma x_t + beta)) / gamma, appendix A; its argument is rounded once, which costs 4e-6."""
    for x in LOGITS:
        for y in (0, 1):
            logits = torch.tensor([x], requires_grad=True)
            loss = focal_star_loss(logits, torch.tensor([y]), gamma=gamma, beta=beta, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, logits)
            with mpmath.workdps(50):
                sign = 1 if y else -1
                z = gamma * sign * mpmath.mpf(logits.item()) + beta
                value, slope = mpmath.log1p(mpmath.exp(-z)) / gamma, -sign / (1 + mpmath.exp(z))
            assert close(loss.item(), float(value), 5e-6, torch.float32), x
            assert close(gradient.item(), float(slope), 5e-6, torch.float32), x


def test_equals_torchvision_at_its_settings() -> None:
    logits = torch.randn(50, 7, dtype=torch.float64)
    labels = torch.randint(0, 8, (50,))
    one_hot = F.one_hot(labels, 8)[:, :7]
    expected = torchvision_focal(logits, one_hot.double(), alpha=0.25, gamma=2, reduction="sum")
    for targets in (labels, one_hot, one_hot.bool(), one_hot.double()):
        torch.testing.assert_close(sigmoid_focal_loss(logits, targets, reduction="sum"), expected)


def test_alpha_weights_positives_and_may_differ_between_classes() -> None:
    logits, ids = torch.zeros(3, 2), torch.tensor([0, 1, 2])
    loss = sigmoid_focal_loss(logits, ids, alpha=0.25, gamma=0, reduction="none")
    torch.testing.assert_close(loss, torch.tensor([[0.25, 0.75], [0.75, 0.25], [0.75, 0.75]]) * math.log(2))
    loss = sigmoid_focal_loss(logits, ids, alpha=[0.25, 0.9], gamma=0, reduction="none")
    torch.testing.assert_close(loss, torch.tensor([[0.25, 0.1], [0.75, 0.9], [0.75, 0.1]]) * math.log(2))
    for impl in ("reference", "chunked"):
        total = sigmoid_focal_loss(logits, ids, alpha=torch.tensor([0.25, 0.9]), gamma=0, reduction="sum", impl=impl)
        assert total.item() == pytest.approx(2.85 * math.log(2))


def test_masked_class_with_float_labels() -> None:
    logits = torch.tensor([[1.0, -torch.inf]], requires_grad=True)
    expected = sigmoid_focal_loss(logits.detach(), torch.tensor([0]))
    for labels in (torch.tensor([[1.0, 0.0]]), torch.tensor([[0.9, 0.0]])):  # hard and soft
        loss = sigmoid_focal_loss(logits, labels)
        assert loss.isfinite() and torch.autograd.grad(loss, logits)[0].isfinite().all()
    torch.testing.assert_close(sigmoid_focal_loss(logits.detach(), torch.tensor([[1.0, 0.0]])), expected)
