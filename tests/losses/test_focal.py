"""Values and gradients of the sigmoid focal loss and FL* against 50 digits, and what the arguments mean."""

from __future__ import annotations

import math
import warnings
from functools import cache

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss as torchvision_focal

from retina.losses import focal_star_loss, sigmoid_focal_loss
from retina.losses.focal import warn_triton_missing

GAMMAS = [0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]
LOGITS = [-10000.0, -700.0, -104.5, -88.0, -70.1, -40.0, -17.0, -16.6, -8.3, -3.3, -0.9, -1e-4, 0.0, 1e-6]
LOGITS += [0.7, 2.2, 5.0, 9.7, 16.7, 17.0, 33.3, 71.4, 87.2, 103.9, 200.0, 10000.0]
both = pytest.mark.parametrize("impl", ["reference", "chunked"])


@cache
def oracle(x: float, positive: bool, gamma: float, alpha: float = 0.25) -> tuple[float, float]:
    """FL and dFL/dx with 50 digits, straight from eq. 5 and the derivative of appendix B."""
    with mpmath.workdps(50):
        x_t = mpmath.mpf(x if positive else -x)
        alpha_t = mpmath.mpf(alpha if positive else 1 - alpha)
        p_t, miss = 1 / (1 + mpmath.exp(-x_t)), 1 / (1 + mpmath.exp(x_t))
        log_p_t = mpmath.log1p(-miss) if miss < 0.5 else mpmath.log(p_t)
        power = miss ** mpmath.mpf(gamma)
        slope = alpha_t * power * (gamma * p_t * log_p_t - miss)
        return float(-alpha_t * power * log_p_t), float(slope if positive else -slope)


def close(given: float, expected: float, relative: float, dtype: torch.dtype) -> bool:
    """Within `relative`, or within the smallest normal number; never NaN, and 0 only where the truth is that small."""
    return abs(given - expected) <= max(relative * abs(expected), torch.finfo(dtype).tiny)


@both
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_match_fifty_digits(impl: str, gamma: float, dtype: torch.dtype) -> None:
    for wanted in LOGITS:
        for positive in (True, False):
            logits = torch.tensor([[wanted]], dtype=dtype, requires_grad=True)
            loss = sigmoid_focal_loss(
                logits, torch.tensor([0 if positive else 1]), gamma=gamma, reduction="sum", impl=impl
            )
            (gradient,) = torch.autograd.grad(loss, logits)
            value, slope = oracle(logits.item(), positive, gamma)
            inside = torch.float64 if dtype == torch.float64 else torch.float32
            relative = 2e-14 if dtype == torch.float64 else 1e-6
            assert loss.dtype == inside and close(loss.item(), value, relative, inside), (wanted, positive)
            # A gradient in bfloat16 or float16 is rounded once, to its own precision; float16 ends at 6e-8.
            own, given = torch.finfo(dtype), gradient.item()
            step = max(relative * abs(slope), 0.51 * own.eps * max(abs(slope), own.tiny), torch.finfo(inside).tiny)
            assert abs(given - slope) <= step, (wanted, positive)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_soft_labels_match_fifty_digits(gamma: float) -> None:
    for x in LOGITS:
        for y in (0.0, 0.1, 0.5, 0.9, 1.0):
            logits, target = torch.tensor([x], requires_grad=True), torch.tensor([y])
            loss = sigmoid_focal_loss(logits, target, gamma=gamma, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, logits)
            (up, up_slope), (down, down_slope) = oracle(logits.item(), True, gamma), oracle(logits.item(), False, gamma)
            y = target.item()
            assert close(loss.item(), y * up + (1 - y) * down, 1e-6, torch.float32), (x, y)
            # Two slopes of opposite sign: their rounding counts against the larger one.
            size = max(abs(y * up_slope), abs((1 - y) * down_slope))
            error = abs(gradient.item() - (y * up_slope + (1 - y) * down_slope))
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


@both
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_class_ids_of_any_integer_dtype(impl: str, dtype: torch.dtype) -> None:
    logits = torch.randn(6, 3)
    ids = torch.tensor([0, 1, 2, 3, 3, 0])
    expected = sigmoid_focal_loss(logits, F.one_hot(ids, 4)[:, :3].float())
    torch.testing.assert_close(sigmoid_focal_loss(logits, ids.to(dtype), impl=impl), expected)


@both
def test_uint8_has_no_minus_one(impl: str) -> None:
    """A comparison of uint8 with -1 wraps around: 255 would silently be left out."""
    assert (torch.tensor([255], dtype=torch.uint8) == -1).all()  # the trap
    with pytest.raises(ValueError, match="class id 255"):
        sigmoid_focal_loss(torch.zeros(1, 80), torch.tensor([255], dtype=torch.uint8))
    background = torch.tensor([255], dtype=torch.uint8)
    kept = sigmoid_focal_loss(torch.zeros(1, 255), background, reduction="sum", impl=impl)
    assert kept.item() > 0  # background of 255 classes


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 1.3, 2.0, 4.5])
def test_many_pieces_with_weights_per_class_alpha_and_ignored_rows(impl: str, dtype: torch.dtype, gamma: float) -> None:
    rows, classes = 40_001, 11  # three pieces, the last not whole, the first and last without a hard negative
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


@both
def test_logits_in_any_memory_order(impl: str) -> None:
    rows = torch.randn(6, 50)
    labels = torch.randint(0, 7, (50,))
    plain, turned = rows.T.contiguous().requires_grad_(), rows.clone().requires_grad_()
    sigmoid_focal_loss(plain, labels, reduction="sum", impl=impl).backward()
    sigmoid_focal_loss(turned.T, labels, reduction="sum", impl=impl).backward()
    assert plain.grad is not None and turned.grad is not None
    torch.testing.assert_close(turned.grad.T, plain.grad)


@both
def test_leading_dimensions_are_rows(impl: str) -> None:
    logits, labels = torch.randn(2, 5, 7, 3), torch.randint(-1, 4, (2, 5, 7))
    flat = sigmoid_focal_loss(logits.view(-1, 3), labels.view(-1), reduction="sum", impl=impl)
    torch.testing.assert_close(sigmoid_focal_loss(logits, labels, reduction="sum", impl=impl), flat)
    torch.testing.assert_close(
        sigmoid_focal_loss(logits[0, 0, 0], torch.tensor(1)), sigmoid_focal_loss(logits[0, 0, :1], torch.tensor([1]))
    )


def test_binary_labels_have_the_logits_shape() -> None:
    logits, labels = torch.randn(20), torch.randint(0, 2, (20,))
    expected = torchvision_focal(logits, labels.float(), reduction="mean")
    for shape in ((20,), (20, 1)):
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.float32):
            given = sigmoid_focal_loss(logits.view(shape), labels.view(shape).to(dtype))
            torch.testing.assert_close(given, expected)
    # As class ids of one class, 0 is the object and 1 the background, as for every other K.
    torch.testing.assert_close(sigmoid_focal_loss(logits[:, None], 1 - labels), expected)
    unknown = labels.clone()
    unknown[::2] = -1
    none = sigmoid_focal_loss(logits, unknown, reduction="none")
    assert not none[::2].any()
    torch.testing.assert_close(none[1::2], torchvision_focal(logits, labels.float())[1::2])


def test_alpha_belongs_to_the_positives_and_each_class_has_its_own() -> None:
    logits, ids = torch.zeros(3, 2), torch.tensor([0, 1, 2])
    loss = sigmoid_focal_loss(logits, ids, alpha=0.25, gamma=0, reduction="none")
    torch.testing.assert_close(loss, torch.tensor([[0.25, 0.75], [0.75, 0.25], [0.75, 0.75]]) * math.log(2))
    loss = sigmoid_focal_loss(logits, ids, alpha=[0.25, 0.9], gamma=0, reduction="none")
    torch.testing.assert_close(loss, torch.tensor([[0.25, 0.1], [0.75, 0.9], [0.75, 0.1]]) * math.log(2))
    for impl in ("reference", "chunked"):
        total = sigmoid_focal_loss(logits, ids, alpha=torch.tensor([0.25, 0.9]), gamma=0, reduction="sum", impl=impl)
        assert total.item() == pytest.approx(2.85 * math.log(2))


def test_reductions_by_hand() -> None:
    logits, ids = torch.randn(5, 3), torch.tensor([0, 3, -1, 2, 1])
    none = sigmoid_focal_loss(logits, ids, reduction="none")
    assert none.shape == (5, 3) and none.dtype == torch.float32
    assert sigmoid_focal_loss(logits, ids, reduction="sum").item() == pytest.approx(none.sum().item())
    assert sigmoid_focal_loss(logits, ids).item() == pytest.approx(none.sum().item() / 15)  # rows left out count
    for factor in (4.0, torch.tensor(4.0), torch.tensor([4])):
        assert sigmoid_focal_loss(logits, ids, avg_factor=factor).item() == pytest.approx(none.sum().item() / 4)
    element = torch.rand(5, 3)
    weighted = sigmoid_focal_loss(logits, ids, weight=element, reduction="sum").item()
    assert weighted == pytest.approx((none * element).sum().item())


@both
def test_infinite_logits_may_be_left_out(impl: str) -> None:
    logits = torch.tensor([[1.0, -2.0], [torch.inf, -torch.inf], [torch.nan, 0.0]], requires_grad=True)
    for gamma in (0.3, 0.8, 2.0):  # with a remainder of either sign in the chunked power
        loss = sigmoid_focal_loss(logits, torch.tensor([1, -1, -1]), gamma=gamma, reduction="sum", impl=impl)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite() and gradient[0].all() and not gradient[1:].any()


def test_gradient_reaches_weight_and_normaliser_by_the_reference() -> None:
    logits, ids = torch.randn(4, 3), torch.tensor([0, 1, 2, 3])
    weight, factor = torch.rand(4, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    sigmoid_focal_loss(logits, ids, weight=weight, avg_factor=factor).backward()
    rows = sigmoid_focal_loss(logits, ids, reduction="none").sum(dim=1)
    torch.testing.assert_close(weight.grad, rows / 2)
    torch.testing.assert_close(factor.grad, -(rows * weight.detach()).sum() / 4)
    with pytest.raises(ValueError, match="no gradient to weight"):
        sigmoid_focal_loss(logits, ids, weight=weight, impl="chunked")


def test_learnt_alpha_gets_its_gradient() -> None:
    logits, ids = torch.randn(4, 3), torch.tensor([0, 1, 2, 3])
    alpha = torch.full((3,), 0.25, requires_grad=True)
    sigmoid_focal_loss(logits, ids, alpha=alpha, reduction="sum").backward()
    terms = sigmoid_focal_loss(logits, ids, alpha=None, reduction="none")
    y = F.one_hot(ids, 4)[:, :3]
    torch.testing.assert_close(alpha.grad, ((2 * y - 1) * terms).sum(0))


@both
def test_rows_left_out_may_weigh_nan(impl: str) -> None:
    """A weight of 1 / count for the class of ignored rows, say."""
    logits, weight = torch.randn(3, 2, requires_grad=True), torch.tensor([1.0, torch.nan, torch.inf])
    loss = sigmoid_focal_loss(logits, torch.tensor([0, -1, -1]), weight=weight, impl=impl)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite() and gradient[0].all() and not gradient[1:].any()


@both
def test_result_is_a_float32_scalar_whatever_the_weights_are(impl: str) -> None:
    logits, ids, weight = torch.randn(2, 3), torch.tensor([0, 3]), torch.ones(2, dtype=torch.float64)
    for factor in (torch.tensor([2.0], dtype=torch.float64), torch.tensor([[2]]), np.float32(2), np.int64(2)):
        loss = sigmoid_focal_loss(logits, ids, weight=weight, avg_factor=factor, impl=impl)
        assert loss.shape == () and loss.dtype == torch.float32
    mask = torch.tensor([True, False])
    masked = sigmoid_focal_loss(logits, ids, weight=mask, reduction="sum", impl=impl)
    assert masked.item() == pytest.approx(sigmoid_focal_loss(logits[:1], ids[:1], reduction="sum").item())


@both
def test_alpha_for_each_class_keeps_the_digits_of_one_minus_alpha(impl: str) -> None:
    logits, ids = torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 3])
    expected = sigmoid_focal_loss(logits, ids, alpha=0.999999, impl=impl)
    for alpha in ([0.999999] * 3, torch.tensor(0.999999, dtype=torch.float64), np.float64(0.999999)):
        torch.testing.assert_close(sigmoid_focal_loss(logits, ids, alpha=alpha, impl=impl), expected, rtol=1e-7, atol=0)


def test_masked_class_with_float_labels() -> None:
    logits = torch.tensor([[1.0, -torch.inf]], requires_grad=True)
    expected = sigmoid_focal_loss(logits.detach(), torch.tensor([0]))
    for labels in (torch.tensor([[1.0, 0.0]]), torch.tensor([[0.9, 0.0]])):  # hard and soft
        loss = sigmoid_focal_loss(logits, labels)
        assert loss.isfinite() and torch.autograd.grad(loss, logits)[0].isfinite().all()
    torch.testing.assert_close(sigmoid_focal_loss(logits.detach(), torch.tensor([[1.0, 0.0]])), expected)


def test_no_gradient_is_made_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation of a loss must not cost a second tensor of the logits' size."""
    logits = torch.randn(4, 3, requires_grad=True)
    monkeypatch.setattr("retina.losses.focal_cpu.torch.empty_like", lambda *_, **__: pytest.fail("gradient made"))
    with torch.no_grad():
        assert sigmoid_focal_loss(logits, torch.tensor([0, 1, 2, 3])) > 0


def test_chunked_gradient_is_handed_out_once() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.tensor([0, 1, 2, 3]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward use impl='reference'"):
        loss.backward()
    loss = sigmoid_focal_loss(logits, torch.tensor([0, 1, 2, 3]))
    with pytest.raises(RuntimeError, match=r"second derivative .* use impl='reference'"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_float16_gradient_survives_a_loss_scale() -> None:
    """2^-16 of a gradient of 1e-6 is below float16; the scale of a GradScaler has to come first."""
    logits = torch.full((1, 1), -4.0, dtype=torch.float16, requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.tensor([1]), avg_factor=1000.0, impl="chunked")
    (gradient,) = torch.autograd.grad(loss * 65536, logits)
    expected = oracle(-4.0, False, 2.0)[1] * 65.536
    assert expected / 65536 < 6e-8 and gradient.item() == pytest.approx(expected, rel=1e-3)


X, IDS = torch.zeros(2, 4), torch.tensor([0, 4])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"logits": IDS}, r"logits: given torch.int64 of shape \(2,\), expected floats"),
        ({"logits": torch.tensor(1.0)}, r"logits: given torch.float32 of shape \(\)"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets: given torch.int64 of shape \(3,\) .* \(2, 4\)"),
        ({"targets": torch.zeros(2, 5)}, r"targets: given torch.float32 of shape \(2, 5\)"),
        ({"targets": torch.zeros(2)}, r"targets: given torch.float32 of shape \(2,\) .* class ids \(integers\)"),
        ({"targets": torch.tensor([0, 5])}, r"class id 5 at \(1,\), expected 0\.\.3, 4 for background or -1"),
        ({"targets": torch.tensor([-2, 0])}, r"class id -2 at \(0,\)"),
        ({"targets": torch.full((2, 4), 1.5)}, "labels from 1.5 to 1.5, expected 0 to 1"),
        ({"targets": torch.full((2, 4), torch.nan)}, "labels from nan"),
        ({"targets": torch.full((2, 4), 2)}, r"label 2 at \(0, 0\), expected 0, 1 or -1"),
        ({"gamma": -1.0}, "gamma: given -1.0, expected a finite number of at least 0"),
        ({"gamma": math.nan}, "gamma: given nan"),
        ({"gamma": "2"}, "gamma: given '2'"),
        ({"gamma": math.inf}, "gamma: given inf, expected a finite number"),
        ({"targets": [0, 4]}, "targets: given list, expected a tensor"),
        ({"weight": [1.0, 1.0]}, "weight: given list, expected a tensor"),
        ({"alpha": 2.0}, "alpha: given 2.0, expected a finite number from 0 to 1"),
        ({"alpha": [0.5, 0.5]}, r"alpha: given shape \(2,\), expected one value for each of 4 classes"),
        ({"alpha": [0.5, 0.5, 0.5, 1.5]}, r"alpha: given values from 0\.5 to 1\.5, expected from 0 to 1"),
        ({"weight": torch.ones(7)}, r"weight: given shape \(7,\), expected \(2,\) .* or \(2, 4\)"),
        ({"reduction": "average"}, "reduction: given 'average', expected one of 'none', 'mean', 'sum'"),
        ({"reduction": "sum", "avg_factor": 3.0}, "avg_factor is the divisor of reduction 'mean'; .* reduction 'sum'"),
        ({"avg_factor": 0.0}, "avg_factor: given 0.0, expected a finite number above 0"),
        ({"avg_factor": torch.tensor(0)}, "avg_factor: given 0.0"),
        ({"avg_factor": torch.ones(2)}, r"avg_factor: given shape \(2,\)"),
        ({"impl": "fast"}, "impl: given 'fast'"),
        ({"impl": "chunked", "reduction": "none"}, "impl='chunked' takes"),
        ({"impl": "triton", "reduction": "none"}, "impl='triton' takes class ids, row weights"),
        ({"impl": "triton", "logits": X.double()}, "below float64"),
    ],
)  # fmt: skip
def test_errors_say_what_was_given(change: dict[str, object], says: str) -> None:
    arguments: dict[str, object] = {"logits": X, "targets": IDS} | change
    with pytest.raises(ValueError, match=says):
        sigmoid_focal_loss(**arguments)  # type: ignore[arg-type]


def test_triton_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"impl='triton' .* runs on CUDA"):
        sigmoid_focal_loss(X, IDS, impl="triton")
    monkeypatch.setattr("retina.losses.focal.HAS_TRITON", False)
    with pytest.raises(ValueError, match="Triton is not installed here"):
        sigmoid_focal_loss(X, IDS, impl="triton")


def test_missing_triton_is_said_once() -> None:
    warn_triton_missing.cache_clear()
    with pytest.warns(UserWarning, match="no Triton here: focal loss and matching"):
        warn_triton_missing()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_triton_missing()


def test_errors_of_focal_star() -> None:
    with pytest.raises(ValueError, match="gamma: given 0, expected a finite number above 0"):
        focal_star_loss(X, IDS, gamma=0)
    with pytest.raises(ValueError, match="beta: given inf"):
        focal_star_loss(X, IDS, beta=math.inf)
