from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch.nn import functional as F

from retina.losses import class_counts, class_weights, focal_nll_loss, softmax_focal_loss

GAMMAS = [0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]


def exact_loss_and_gradient(row: list[float], target: int, gamma: float) -> tuple[float, list[float]]:
    """FL over a softmax and its gradient with 50 digits: the chain rule on (1 - p)^gamma log p."""
    with mpmath.workdps(50):
        exp = [mpmath.exp(mpmath.mpf(x) - max(row)) for x in row]
        p = [e / sum(exp) for e in exp]
        miss = sum(p[:target] + p[target + 1 :])  # 1 - p_t without cancellation
        log_p = mpmath.log1p(-miss) if miss < 0.5 else mpmath.log(p[target])
        power = miss ** mpmath.mpf(gamma)
        factor = power - (gamma * miss ** mpmath.mpf(gamma - 1) * p[target] * log_p if gamma and miss else 0)
        slopes = [factor * (p[j] if j != target else -miss) for j in range(len(row))]
        return float(-power * log_p), [float(slope) for slope in slopes]


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_match_fifty_digits(gamma: float, dtype: torch.dtype) -> None:
    rows = [[0.3, -0.2, 1.0], [9.0, -8.5, 3.0], [40.0, 0.0, 1.0], [-33.0, 17.0, 16.5], [1e4, -1e4, 0.0], [5.0] * 3]
    tiny = torch.finfo(torch.float32).tiny
    for row in rows:
        for target in range(3):
            logits = torch.tensor([row], dtype=dtype, requires_grad=True)
            loss = softmax_focal_loss(logits, torch.tensor([target]), gamma=gamma)
            (gradient,) = torch.autograd.grad(loss, logits)
            value, slopes = exact_loss_and_gradient(logits[0].tolist(), target, gamma)
            relative = 2e-14 if dtype == torch.float64 else 4e-7
            assert abs(loss.item() - value) <= max(relative * value, tiny), (row, target)
            # Against the largest slope of the row: exp of a rounded difference has a relative error of its own.
            size = max(abs(slope) for slope in slopes)
            rounding = torch.finfo(dtype)
            tolerance = max(relative * size, 0.51 * rounding.eps * max(size, rounding.tiny), tiny)
            for given, slope in zip(gradient[0].tolist(), slopes, strict=True):
                assert abs(given - slope) <= tolerance, (row, target)


@pytest.mark.parametrize("shape", [(20, 5), (4, 5, 6), (2, 5, 3, 4), (5,)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gamma_zero_is_cross_entropy(shape: tuple[int, ...], reduction: str, weighted: bool, smoothing: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
    ids = torch.randint(0, 5, (*shape[:1], *shape[2:]) if len(shape) > 1 else (), generator=generator)
    if ids.numel() > 3:
        ids.view(-1)[::4] = -100
    dim = 1 if len(shape) > 1 else 0
    distribution = torch.rand(shape, dtype=torch.float64, generator=generator).softmax(dim)
    weight = torch.rand(5, dtype=torch.float64, generator=generator) if weighted else None
    if weight is not None and len(shape) > 1:
        weight[1] = 0  # a row of a class with weight 0 is not an ignored row
    for targets in (ids, distribution):
        options = {"label_smoothing": smoothing, "reduction": reduction}
        expected = F.cross_entropy(logits, targets, weight=weight, **options)
        loss = softmax_focal_loss(logits, targets, gamma=0, class_weight=weight, **options)
        torch.testing.assert_close(loss, expected)
        gradients = [torch.autograd.grad(each.sum(), logits)[0] for each in (loss, expected)]
        torch.testing.assert_close(*gradients)
    if smoothing == 0:
        log_probs = F.log_softmax(logits, dim)
        expected = F.nll_loss(log_probs, ids, weight=weight, reduction=reduction)
        torch.testing.assert_close(
            focal_nll_loss(log_probs, ids, gamma=0, class_weight=weight, reduction=reduction), expected
        )


@pytest.mark.parametrize("gamma", GAMMAS)
def test_distribution_and_smoothing_are_the_sum_over_classes(gamma: float) -> None:
    """By the definition: each class is weighted by its target, with its own modulating factor."""
    logits = torch.randn(6, 4, dtype=torch.float64)
    p = logits.softmax(1)
    terms = (1 - p) ** gamma * -p.log()
    q = torch.rand(6, 4, dtype=torch.float64).softmax(1)
    weight = torch.rand(4, dtype=torch.float64)
    none = softmax_focal_loss(logits, q, gamma=gamma, class_weight=weight, reduction="none")
    torch.testing.assert_close(none, (q * weight * terms).sum(1))
    ids = torch.tensor([0, 1, 2, 3, 0, -100])
    smooth = 0.8 * F.one_hot(ids.clamp(min=0), 4) + 0.2 / 4
    none = softmax_focal_loss(logits, ids, gamma=gamma, label_smoothing=0.2, reduction="none")
    torch.testing.assert_close(none, (smooth * terms).sum(1) * (ids >= 0))


def test_focal_nll_equals_softmax_focal_after_log_softmax() -> None:
    logits, ids = torch.randn(30, 4, dtype=torch.float64), torch.randint(0, 4, (30,))
    weight = class_weights(class_counts(ids, 4))
    expected = softmax_focal_loss(logits, ids, class_weight=weight)
    torch.testing.assert_close(focal_nll_loss(logits.log_softmax(1), ids, class_weight=weight), expected)


def test_log_probability_zero_gives_no_nan() -> None:
    log_probs = torch.tensor([[0.0, -torch.inf], [0.0, -200.0]], requires_grad=True)
    for gamma in (0.1, 0.5, 1.0, 2.0):
        loss = focal_nll_loss(log_probs, torch.tensor([0, 0]), gamma=gamma)
        (gradient,) = torch.autograd.grad(loss, log_probs)
        assert loss.item() == 0 and gradient.isfinite().all()


def test_class_with_zero_probability_with_target_zero() -> None:
    """A masked class (logit -inf) with target 0 gives 0 * inf in the plain formula."""
    logits, q = torch.tensor([[0.5, -torch.inf, 1.0]], requires_grad=True), torch.tensor([[0.3, 0.0, 0.7]])
    assert F.cross_entropy(logits, q).isnan()
    loss = softmax_focal_loss(logits, q)
    assert loss.isfinite() and torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_true_class_with_zero_probability_has_an_infinite_loss_and_a_finite_gradient() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0]], requires_grad=True)
    for gamma in (0.0, 0.5, 2.0):
        for loss in (
            softmax_focal_loss(logits, torch.tensor([1]), gamma=gamma),
            focal_nll_loss(logits.log_softmax(1), torch.tensor([1]), gamma=gamma),
        ):
            assert loss.item() == math.inf and torch.autograd.grad(loss, logits)[0].isfinite().all()


@pytest.mark.parametrize("classes", [1, 3])
def test_a_row_without_a_finite_logit_is_nan_as_in_cross_entropy(classes: int) -> None:
    logits = torch.full((2, classes), -torch.inf, requires_grad=True)
    ids = torch.zeros(2, dtype=torch.long)
    assert F.cross_entropy(logits, ids).isnan()
    for gamma in (0.0, 0.5, 2.0):
        for targets in (ids, F.one_hot(ids, 3).float()) if classes == 3 else (ids,):
            loss = softmax_focal_loss(logits, targets, gamma=gamma)
            assert loss.isnan() and torch.autograd.grad(loss, logits)[0][:, 0].isnan().all()
        assert softmax_focal_loss(logits, ids - 1, gamma=gamma, ignore_index=-1) == 0


def test_a_single_class_has_loss_zero() -> None:
    logits = torch.randn(3, 1, requires_grad=True)
    for gamma in (0.0, 0.5, 2.0):
        loss = softmax_focal_loss(logits, torch.zeros(3, dtype=torch.long), gamma=gamma)
        assert loss.item() == 0 and not torch.autograd.grad(loss, logits)[0].any()


def test_classes_with_equal_logits() -> None:
    logits = torch.full((1, 4), 7.0, dtype=torch.float64, requires_grad=True)
    loss = softmax_focal_loss(logits, torch.tensor([2]))
    assert loss.item() == pytest.approx(0.75**2 * math.log(4))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.sum().item() == pytest.approx(0, abs=1e-12) and gradient[0, 2] < 0


@pytest.mark.parametrize("gamma", GAMMAS)
def test_smoothed_and_soft_targets_match_fifty_digits(gamma: float) -> None:
    row = [9.0, -8.5, 3.0]
    with mpmath.workdps(50):
        exp = [mpmath.exp(x) for x in row]
        misses = [sum(exp[:c] + exp[c + 1 :]) / sum(exp) for c in range(3)]
        terms = [miss ** mpmath.mpf(gamma) * -mpmath.log(e / sum(exp)) for miss, e in zip(misses, exp, strict=True)]
        q, weight = [0.999, 0.0005, 0.0005], [2.0, 0.5, 1.0]
        soft = float(sum(a * b * c for a, b, c in zip(q, weight, terms, strict=True)))
        smooth = float(sum(a * t for a, t in zip([0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3], terms, strict=True)))
    given = softmax_focal_loss(torch.tensor([row]), torch.tensor([q]), gamma=gamma, class_weight=weight)
    assert given.item() == pytest.approx(soft, rel=2e-6)
    given = softmax_focal_loss(torch.tensor([row]), torch.tensor([0]), gamma=gamma, label_smoothing=0.1)
    assert given.item() == pytest.approx(smooth, rel=2e-6)


def test_ignored_rows_have_zero_gradient_for_any_logits() -> None:
    logits = torch.tensor([[1.0, 2.0], [torch.nan, 0.0], [torch.inf, 3.0]], requires_grad=True)
    loss = softmax_focal_loss(logits, torch.tensor([0, -100, -100]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite() and gradient[0].all() and not gradient[1:].any()


X, IDS = torch.zeros(2, 3), torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.tensor([0, 3])}, r"class id 3 at \(1,\), expected 0\.\.2 or -100"),
        ({"targets": F.one_hot(IDS, 3)}, r"given torch.int64 .* targets\.float\(\) or targets\.argmax\(1\)"),
        ({"class_weight": "1"}, "class_weight: given str, expected a tensor, an array or a sequence of numbers"),
        ({"targets": torch.zeros(2)}, r"targets: given torch.float32 of shape \(2,\) .* class ids \(integers\) \(2,\)"),
        ({"targets": torch.full((2, 3), -0.1)}, "labels from -0.1"),
        ({"gamma": -1}, "gamma: given -1"),
        ({"class_weight": torch.ones(4)}, r"class_weight: given shape \(4,\), .* 3 classes"),
        ({"class_weight": [1.0, -1.0, 1.0]}, "class_weight: given .* at least 0"),
        ({"class_weight": [1.0, math.inf, 1.0]}, "class_weight: given .* finite"),
        ({"label_smoothing": 1.5}, "label_smoothing: given 1.5"),
        ({"ignore_index": None}, "ignore_index: given None, expected an integer"),
        ({"reduction": "batchmean"}, "reduction: given 'batchmean'"),
    ],
)  # fmt: skip
def test_error_messages(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"logits": X, "targets": IDS} | change
    with pytest.raises(ValueError, match=message):
        softmax_focal_loss(**arguments)  # type: ignore[arg-type]


def test_probabilities_are_not_log_probabilities() -> None:
    with pytest.raises(ValueError, match=r"log_probs: given up to 0\.5, expected at most 0"):
        focal_nll_loss(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
    with pytest.raises(ValueError, match="ignore_index: given None"):
        focal_nll_loss(X.log_softmax(1), IDS, ignore_index=None)  # type: ignore[arg-type]


def test_label_smoothing_has_the_precision_of_the_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 7, dtype=torch.float64, generator=generator)
    ids = torch.randint(7, (20,), generator=generator)
    given = softmax_focal_loss(logits, ids, gamma=0, label_smoothing=0.1)
    assert given.item() == pytest.approx(F.cross_entropy(logits, ids, label_smoothing=0.1).item(), rel=1e-14)
