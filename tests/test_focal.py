from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss as torchvision_focal

from retina.losses import sigmoid_focal_loss

GAMMAS = [0.0, 0.1, 0.5, 1.0, 2.0, 5.0]


def oracle(x: float, positive: bool, alpha: float, gamma: float) -> tuple[float, float]:
    """FL and dFL/dx with 50 digits, straight from eq. 5."""
    with mpmath.workdps(50):

        def loss(value: mpmath.mpf) -> mpmath.mpf:
            miss = 1 / (1 + mpmath.exp(value if positive else -value))
            alpha_t = alpha if positive else 1 - mpmath.mpf(alpha)
            return alpha_t * miss**gamma * -mpmath.log1p(-miss)

        p = 1 / (1 + mpmath.exp(-mpmath.mpf(x)))
        p_t, sign = (p, 1) if positive else (1 - p, -1)
        alpha_t = mpmath.mpf(alpha) if positive else 1 - mpmath.mpf(alpha)
        miss = 1 / (1 + mpmath.exp(mpmath.mpf(x) * sign))
        slope = sign * alpha_t * miss**gamma * (gamma * p_t * mpmath.log1p(-miss) - miss)
        return float(loss(mpmath.mpf(x))), float(slope)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_match_fifty_digits(impl: str, gamma: float, dtype: torch.dtype) -> None:
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    for x in (-80.0, -17.0, -3.3, -0.1, 0.0, 0.7, 5.0, 17.0, 40.0):
        for positive in (True, False):
            logits = torch.tensor([[x]], dtype=dtype, requires_grad=True)
            target = torch.tensor([0 if positive else 1])
            loss = sigmoid_focal_loss(logits, target, gamma=gamma, reduction="sum", impl=impl)
            (gradient,) = torch.autograd.grad(loss, logits)
            value, slope = oracle(logits.item(), positive, 0.25, gamma)
            floor = torch.finfo(dtype).tiny
            assert loss.item() == pytest.approx(value, rel=tolerance, abs=floor)
            assert gradient.item() == pytest.approx(slope, rel=tolerance, abs=floor)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_no_nan_where_the_public_formulas_have_one(impl: str) -> None:
    logits = torch.tensor([[17.0, 200.0, -200.0, 1e4, -1e4]], requires_grad=True)
    naive = torch.tensor([[17.0]], requires_grad=True)
    torchvision_focal(naive, torch.ones(1, 1), gamma=0.5, reduction="sum").backward()
    assert naive.grad is not None and naive.grad.isnan().all()  # the defect that this test is about
    for target in (torch.tensor([0]), torch.tensor([5])):
        (gradient,) = torch.autograd.grad(
            sigmoid_focal_loss(logits, target, gamma=0.5, reduction="sum", impl=impl), logits
        )
        assert gradient.isfinite().all()


def test_equals_torchvision_at_its_settings() -> None:
    logits = torch.randn(50, 7, dtype=torch.float64)
    labels = torch.randint(0, 8, (50,))
    one_hot = F.one_hot(labels, 8)[:, :7].double()
    expected = torchvision_focal(logits, one_hot, alpha=0.25, gamma=2, reduction="sum")
    for targets in (labels, one_hot):
        torch.testing.assert_close(sigmoid_focal_loss(logits, targets, reduction="sum"), expected)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_gamma_zero_is_binary_cross_entropy(impl: str) -> None:
    logits, labels = torch.randn(40, 5, dtype=torch.float64), torch.randint(0, 6, (40,))
    loss = sigmoid_focal_loss(logits, labels, alpha=None, gamma=0, impl=impl)
    expected = F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, 6)[:, :5].double())
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_equals_one_piece_with_weights_and_ignored_rows(impl: str, dtype: torch.dtype) -> None:
    rows, classes = 40_001, 11  # several chunks, and a rest
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(-1, classes + 1, (rows,), generator=generator)
    weight = torch.rand(rows, generator=generator)
    loss = 3 * sigmoid_focal_loss(logits, labels, weight=weight, reduction="sum", impl=impl)
    (gradient,) = torch.autograd.grad(loss, logits)
    exact = logits.detach().double().requires_grad_()
    one_hot = F.one_hot(labels.clamp(min=0), classes + 1)[:, :classes].double()
    kept = (weight * (labels >= 0)).double()[:, None]
    expected = 3 * (torchvision_focal(exact, one_hot) * kept).sum()
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    precise = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=precise, atol=precise / 100)
    assert not gradient[labels == -1].any()


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_logits_in_any_memory_order(impl: str) -> None:
    rows = torch.randn(6, 50)
    labels = torch.randint(0, 7, (50,))
    plain, turned = rows.T.contiguous().requires_grad_(), rows.clone().requires_grad_()
    sigmoid_focal_loss(plain, labels, reduction="sum", impl=impl).backward()
    sigmoid_focal_loss(turned.T, labels, reduction="sum", impl=impl).backward()
    assert plain.grad is not None and turned.grad is not None
    torch.testing.assert_close(turned.grad.T, plain.grad)


def test_alpha_belongs_to_the_positives() -> None:
    logits = torch.zeros(2, 1)
    loss = sigmoid_focal_loss(logits, torch.tensor([0, 1]), alpha=0.25, gamma=0, reduction="none", impl="reference")
    torch.testing.assert_close(loss, torch.tensor([[0.25], [0.75]]) * math.log(2))


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_nothing_to_learn_gives_zero_with_a_graph(impl: str) -> None:
    for rows, label in ((0, 0), (3, -1)):
        logits = torch.randn(rows, 4, requires_grad=True)
        loss = sigmoid_focal_loss(logits, torch.full((rows,), label), avg_factor=1, impl=impl)
        loss.backward()
        assert loss.item() == 0 and logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "do not fit logits"),
        ({"targets": torch.zeros(2, 5)}, "do not fit logits"),
        ({"gamma": -1.0}, "gamma: given -1"),
        ({"alpha": 2.0}, "alpha: given 2"),
        ({"weight": torch.ones(7)}, "weight: given shape"),
        ({"reduction": "average"}, "reduction: given 'average'"),
        ({"reduction": "sum", "avg_factor": 3.0}, "avg_factor"),
        ({"impl": "fast"}, "impl: given 'fast'"),
    ],
)
def test_errors_say_what_was_given(change: dict[str, object], says: str) -> None:
    arguments: dict[str, object] = {"logits": torch.zeros(2, 4), "targets": torch.zeros(2, dtype=torch.int64)} | change
    with pytest.raises(ValueError, match=says):
        sigmoid_focal_loss(**arguments)  # type: ignore[arg-type]
