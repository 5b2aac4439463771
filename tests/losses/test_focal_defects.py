"""Defects of published focal losses: each is shown for the naive formula, and then shown to be absent here."""

from __future__ import annotations

import pytest
import torch
from focal_helpers import cpu_impls
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss as torchvision_focal

from retina.losses import class_weights, sigmoid_focal_loss, softmax_focal_loss


def gradient_of(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits)[0]


@cpu_impls
@pytest.mark.parametrize("gamma", [0.1, 0.2, 0.5])
def test_nan_gradient_below_gamma_one(impl: str, gamma: float) -> None:
    """The slope of (1 - p_t)^gamma is infinite at p_t = 1, where the cross entropy is 0."""
    for x in (17.0, 104.0, 200.0, 1e4):
        naive = torch.full((1, 1), x, requires_grad=True)
        assert gradient_of(torchvision_focal(naive, torch.ones(1, 1), gamma=gamma, reduction="sum"), naive).isnan()
        for sign, label in ((1, 0), (1, 1), (-1, 0), (-1, 1)):
            logits = torch.full((1, 1), sign * x, requires_grad=True)
            loss = sigmoid_focal_loss(logits, torch.tensor([label]), gamma=gamma, reduction="sum", impl=impl)
            assert loss.isfinite() and gradient_of(loss, logits).isfinite()


def test_nan_gradient_below_gamma_one_over_a_softmax() -> None:
    logits = torch.tensor([[30.0, -30.0, 0.0]], requires_grad=True)
    p = F.softmax(logits, dim=1)[0, 0]
    assert gradient_of((1 - p) ** 0.5 * -p.log(), logits).isnan().any()
    gradient = gradient_of(softmax_focal_loss(logits, torch.tensor([0]), gamma=0.5), logits)
    assert gradient.isfinite().all() and gradient[0, 0] < 0  # it raises the logit, and is not rounded to 0


def test_alpha_on_both_sides() -> None:
    """alpha * everything instead of alpha_t: the balance between positives and negatives never changes."""
    logits, labels = torch.tensor([0.3, 0.3]), torch.tensor([1.0, 0.0])

    def naive(alpha: float) -> Tensor:
        p_t = torch.where(labels == 1, logits.sigmoid(), 1 - logits.sigmoid())
        return alpha * (1 - p_t) ** 2 * -p_t.log()

    def share_of_positives(loss: Tensor) -> float:
        return (loss[0] / loss.sum()).item()

    assert share_of_positives(naive(0.25)) == pytest.approx(share_of_positives(naive(0.75)))
    low = share_of_positives(sigmoid_focal_loss(logits, labels, alpha=0.25, reduction="none"))
    high = share_of_positives(sigmoid_focal_loss(logits, labels, alpha=0.75, reduction="none"))
    assert low < 0.25 < high


def test_focus_from_the_averaged_cross_entropy() -> None:
    """(1 - exp(-mean CE))^gamma * mean CE: one weight for a whole batch, so an easy example is not weakened at all."""
    logits, labels = torch.tensor([[6.0, 0.0], [0.0, 1.0]], requires_grad=True), torch.tensor([0, 0])
    mean = F.cross_entropy(logits, labels)
    naive = gradient_of((1 - torch.exp(-mean)) ** 2 * mean, logits)
    plain = gradient_of(F.cross_entropy(logits, labels), logits)
    right = gradient_of(softmax_focal_loss(logits, labels), logits)

    def easy_share(gradient: Tensor) -> float:
        return (gradient[0, 0] / gradient[1, 0]).item()

    assert easy_share(naive) == pytest.approx(easy_share(plain))  # no focus between examples
    assert easy_share(right) < 1e-3 * easy_share(plain)


@cpu_impls
def test_detached_p_t(impl: str) -> None:
    """With (1 - p_t)^gamma as a constant the gradient is off by a third and more; the loss looks the same."""
    logits = torch.tensor([[0.0]], requires_grad=True)
    p = logits.sigmoid()
    naive = gradient_of(0.25 * (1 - p.detach()) ** 2 * -p.log(), logits)
    right = gradient_of(sigmoid_focal_loss(logits, torch.tensor([0]), reduction="sum", impl=impl), logits)
    # by hand at p = 1/2: -alpha / 4 (1/2 + gamma / 2 ln 2) against -alpha / 4 * 1/2
    assert right.item() == pytest.approx(-0.0625 * (0.5 + 0.6931472), rel=1e-6)
    assert naive.item() == pytest.approx(-0.0625 * 0.5, rel=1e-6)


def test_log_of_softmax() -> None:
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    naive = -(F.softmax(logits, dim=1).log()[0, 1])
    assert naive.isinf() and gradient_of(naive, logits).isnan().any()
    loss = softmax_focal_loss(logits, torch.tensor([1]))
    assert loss.item() == pytest.approx(200) and gradient_of(loss, logits).tolist() == [[1, -1]]


def test_mean_over_rows_and_classes() -> None:
    """.mean() over (N, C) after a one-hot: C times smaller than F.cross_entropy."""
    logits, labels = torch.randn(8, 5), torch.randint(0, 5, (8,))
    one_hot = F.one_hot(labels, 5)
    expected = F.cross_entropy(logits, labels)
    assert (one_hot * -F.log_softmax(logits, dim=1)).mean().item() == pytest.approx(expected.item() / 5)
    torch.testing.assert_close(softmax_focal_loss(logits, labels, gamma=0), expected)


def test_weighted_mean_divided_by_n() -> None:
    logits, labels, weight = torch.randn(8, 3), torch.tensor([0, 0, 0, 0, 0, 0, 1, 2]), torch.tensor([0.1, 5.0, 9.0])
    expected = F.cross_entropy(logits, labels, weight=weight)
    by_n = F.cross_entropy(logits, labels, weight=weight, reduction="none").mean()
    assert by_n.item() != pytest.approx(expected.item(), rel=0.05)
    torch.testing.assert_close(softmax_focal_loss(logits, labels, gamma=0, class_weight=weight), expected)


@cpu_impls
def test_everything_ignored_by_the_sigmoid(impl: str) -> None:
    logits, labels = torch.randn(3, 4, requires_grad=True), torch.full((3,), -1)
    kept = labels != -1
    assert F.binary_cross_entropy_with_logits(logits[kept], torch.zeros(0, 4)).isnan()
    loss = sigmoid_focal_loss(logits, labels, impl=impl)
    assert loss.item() == 0 and not gradient_of(loss, logits).any()


def test_everything_ignored_by_the_softmax() -> None:
    logits, labels = torch.randn(3, 4, requires_grad=True), torch.full((3,), -100)
    assert F.cross_entropy(logits, labels).isnan()
    for smoothing in (0.0, 0.1):
        loss = softmax_focal_loss(logits, labels, label_smoothing=smoothing)
        assert loss.item() == 0 and not gradient_of(loss, logits).any()


@cpu_impls
def test_loss_underflows_in_float16(impl: str) -> None:
    """Computed in float16 the loss is 0 from a logit of 12 on."""
    logits = torch.tensor([[-12.0]], dtype=torch.float16, requires_grad=True)
    p = logits.sigmoid()
    assert (0.75 * p**2 * -(1 - p).log()).item() == 0
    loss = sigmoid_focal_loss(logits, torch.tensor([1]), reduction="sum", impl=impl)
    assert loss.item() == pytest.approx(0.75 * 6.144175e-6**3, rel=1e-3)


def test_weights_of_a_class_without_examples() -> None:
    counts = torch.tensor([90.0, 10.0, 0.0])
    assert (1 / counts).isinf().any()
    with pytest.raises(ValueError, match="no examples of class 2"):
        class_weights(counts)
    for zero in ("ignore", "smooth"):
        assert class_weights(counts, zero=zero).isfinite().all()
