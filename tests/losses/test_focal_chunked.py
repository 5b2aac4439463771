"""The chunked path of the sigmoid focal loss, compared with the plain formula and with the reference path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from focal_helpers import cpu_impls, exact_loss_and_gradient
from torch.nn import functional as F

from retina.losses import sigmoid_focal_loss


@cpu_impls
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 1.3, 2.0, 4.5])
def test_many_chunks_with_weights_per_class_alpha_and_ignored_rows(impl: str, dtype: torch.dtype, gamma: float) -> None:
    rows, classes = 40_001, 11  # three chunks, the last one incomplete, the first and last without a hard negative
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator) - 4
    logits[15_000:25_000] = 3 * torch.randn(10_000, classes, generator=generator)
    logits = logits.to(dtype).requires_grad_()
    labels = torch.randint(-1, classes + 1, (rows,), generator=generator)
    weight = torch.rand(rows, generator=generator)
    alpha = torch.rand(classes, generator=generator)
    options = {"alpha": alpha, "weight": weight, "gamma": gamma, "avg_factor": 7.0}
    loss = 3 * sigmoid_focal_loss(logits, labels, impl=impl, **options)
    (gradient,) = torch.autograd.grad(loss, logits)

    exact = logits.detach().double().requires_grad_()
    y = F.one_hot(labels.clamp(min=0), classes + 1)[:, :classes].double()
    p = torch.sigmoid(exact)
    p_t, alpha_t = p * y + (1 - p) * (1 - y), alpha.double() * y + (1 - alpha.double()) * (1 - y)
    terms = alpha_t * (1 - p_t) ** gamma * F.binary_cross_entropy_with_logits(exact, y, reduction="none")
    expected = 3 * (terms * (weight * (labels >= 0)).double()[:, None]).sum() / 7
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    relative = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    # atol: float16 gradients are subnormal below 6e-5, with steps of 6e-8
    torch.testing.assert_close(
        gradient.double(), expected_gradient, rtol=relative, atol=1e-7 if dtype == torch.float16 else 1e-12
    )
    assert not gradient[labels == -1].any()


@cpu_impls
def test_logits_in_any_memory_order(impl: str) -> None:
    rows = torch.randn(6, 50)
    labels = torch.randint(0, 7, (50,))
    plain, transposed = rows.T.contiguous().requires_grad_(), rows.clone().requires_grad_()
    sigmoid_focal_loss(plain, labels, reduction="sum", impl=impl).backward()
    sigmoid_focal_loss(transposed.T, labels, reduction="sum", impl=impl).backward()
    assert plain.grad is not None and transposed.grad is not None
    torch.testing.assert_close(transposed.grad.T, plain.grad)


@cpu_impls
def test_logits_of_ignored_rows_may_be_infinite(impl: str) -> None:
    logits = torch.tensor([[1.0, -2.0], [torch.inf, -torch.inf], [torch.nan, 0.0]], requires_grad=True)
    for gamma in (0.3, 0.8, 2.0):  # with a remainder of either sign in the chunked power
        loss = sigmoid_focal_loss(logits, torch.tensor([1, -1, -1]), gamma=gamma, reduction="sum", impl=impl)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite() and gradient[0].all() and not gradient[1:].any()


@cpu_impls
def test_weight_of_ignored_rows_may_be_nan(impl: str) -> None:
    """For example a weight of 1 / count, where the ignored rows are a class of their own."""
    logits, weight = torch.randn(3, 2, requires_grad=True), torch.tensor([1.0, torch.nan, torch.inf])
    loss = sigmoid_focal_loss(logits, torch.tensor([0, -1, -1]), weight=weight, impl=impl)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite() and gradient[0].all() and not gradient[1:].any()


@cpu_impls
def test_alpha_near_one_keeps_its_precision(impl: str) -> None:
    logits, ids = torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 3])
    expected = sigmoid_focal_loss(logits, ids, alpha=0.999999, impl=impl)
    for alpha in ([0.999999] * 3, torch.tensor(0.999999, dtype=torch.float64), np.float64(0.999999)):
        torch.testing.assert_close(sigmoid_focal_loss(logits, ids, alpha=alpha, impl=impl), expected, rtol=1e-7, atol=0)


def test_no_gradient_is_computed_without_grad_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation of a loss must not cost a second tensor of the logits' size."""
    logits = torch.randn(4, 3, requires_grad=True)
    monkeypatch.setattr("retina.losses.focal_cpu.torch.empty_like", lambda *_, **__: pytest.fail("gradient made"))
    with torch.no_grad():
        assert sigmoid_focal_loss(logits, torch.tensor([0, 1, 2, 3])) > 0


def test_further_derivatives_are_those_of_the_reference() -> None:
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    ids, weight = torch.tensor([0, 1, -1, 3]), torch.rand(4, dtype=torch.float64)
    for gamma in (0.0, 0.7, 2.0):
        found = []
        for impl in ("chunked", "reference"):
            loss = 3 * sigmoid_focal_loss(logits, ids, weight=weight, gamma=gamma, avg_factor=7, impl=impl)
            first, again = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
            (slope,) = torch.autograd.grad(loss, logits, create_graph=True)
            second = torch.autograd.grad(slope.square().sum(), logits)[0] if gamma else slope.detach()
            found.append((first, again, slope.detach(), second))
        for chunked, reference in zip(*found, strict=True):
            torch.testing.assert_close(chunked, reference, rtol=1e-12, atol=1e-300)
    loss = sigmoid_focal_loss(logits, ids)
    loss.backward()
    with pytest.raises(RuntimeError, match="retain_graph=True"):  # torch's own error
        loss.backward()


def test_float16_gradient_survives_a_loss_scale() -> None:
    """2^-16 of a gradient of 1e-6 is below float16, so the scale of a GradScaler must be applied first."""
    logits = torch.full((1, 1), -4.0, dtype=torch.float16, requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.tensor([1]), avg_factor=1000.0, impl="chunked")
    (gradient,) = torch.autograd.grad(loss * 65536, logits)
    expected = exact_loss_and_gradient(-4.0, False, 2.0)[1] * 65.536
    assert expected / 65536 < 6e-8 and gradient.item() == pytest.approx(expected, rel=1e-3)
