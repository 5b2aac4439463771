"""The losses that compute their gradient in the forward, used with autograd in unusual ways, beside losses of F."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from retina.losses import SigmoidFocalLoss, SoftmaxFocalLoss, focal_nll_loss, sigmoid_focal_loss, softmax_focal_loss

# Each is a known loss at gamma 0: of class ids with a background, of labels, and of class ids with a softmax.
LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[[], Tensor]]] = {
    "ids": (
        partial(sigmoid_focal_loss, alpha=None, gamma=0.0, reduction="sum"),
        lambda x, ids: F.binary_cross_entropy_with_logits(x, F.one_hot(ids, 4)[:, :3].to(x), reduction="sum"),
        lambda: torch.tensor([0, 3, 2, 1, 3]),
    ),
    "labels": (
        partial(sigmoid_focal_loss, alpha=None, gamma=0.0, reduction="sum"),
        partial(F.binary_cross_entropy_with_logits, reduction="sum"),
        lambda: torch.rand(5, 3, dtype=torch.float64),
    ),
    "softmax": (
        partial(softmax_focal_loss, gamma=0.0, reduction="sum"),
        partial(F.cross_entropy, reduction="sum"),
        lambda: torch.tensor([0, 1, 2, 1, 0]),
    ),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def logits() -> Tensor:
    return torch.randn(5, 3, dtype=torch.float64, requires_grad=True)


@each_loss
def test_targets_that_change_before_a_recomputation_are_noticed(name: str) -> None:
    loss_of, _, make_targets = LOSSES[name]
    x, targets = logits(), make_targets()
    loss = loss_of(x, targets)
    targets.zero_()  # a buffer that is filled for the next batch
    torch.autograd.grad(loss, x, retain_graph=True)  # was computed in the forward
    if name != "softmax":  # it keeps a copy without the ignored ids
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, x, create_graph=True)


@each_loss
def test_targets_and_weights_are_freed_after_the_backward(name: str) -> None:
    loss_of, _, make_targets = LOSSES[name]
    x, targets = logits(), make_targets()
    options = {} if name == "softmax" else {"weight": torch.rand(5)}
    kept = [weakref.ref(tensor) for tensor in (targets, *options.values())]
    loss = loss_of(x, targets, **options)
    loss.backward()
    del targets, options
    assert [reference() for reference in kept] == [None] * len(kept), "the loss may be kept, for a running mean"


@each_loss
def test_batched_gradients(name: str) -> None:
    loss_of, known, make_targets = LOSSES[name]
    x, targets = logits(), make_targets()
    upstream = torch.tensor([1.0, -2.0], dtype=torch.float64)
    (found,) = torch.autograd.grad(loss_of(x, targets), x, upstream, is_grads_batched=True)
    (expected,) = torch.autograd.grad(known(x, targets), x)
    torch.testing.assert_close(found, upstream[:, None, None] * expected)
    found = torch.autograd.functional.jacobian(lambda x: loss_of(x, targets) * 3, x.detach(), vectorize=True)
    torch.testing.assert_close(found, 3 * expected)


@each_loss
def test_targets_of_the_inference_mode(name: str) -> None:
    loss_of, known, make_targets = LOSSES[name]
    with torch.inference_mode():
        targets = make_targets()
    x = logits()
    (found,) = torch.autograd.grad(loss_of(x, targets), x)
    torch.testing.assert_close(found, torch.autograd.grad(known(x, targets.clone()), x)[0])


@each_loss
def test_another_default_device(name: str) -> None:
    loss_of, known, make_targets = LOSSES[name]
    x, targets = logits(), make_targets()
    with torch.device("meta"):  # tensors that are made without a device are there, as with "cuda"
        loss = loss_of(x, targets)
        (found,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(found, torch.autograd.grad(known(x, targets), x)[0])


@pytest.mark.parametrize("shape", [(5,), (5, 2, 2)])
def test_losses_of_the_rows_may_be_changed_in_place(shape: tuple[int, ...]) -> None:
    x = torch.randn(5, 3, *shape[1:], dtype=torch.float64, requires_grad=True)
    ids, gradients = torch.randint(3, shape), []
    for loss_of in (partial(softmax_focal_loss, gamma=0.0), F.cross_entropy):
        loss = loss_of(x, ids, reduction="none")
        loss[ids == 0] = 0
        loss *= 2
        gradients += torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradients_of_each_sample_with_class_weights(smoothing: float) -> None:
    model, weight = nn.Linear(4, 3).double(), torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    inputs, ids = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1, 0])

    def gradients(loss_of: Callable[..., Tensor]) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return loss_of(functional_call(model, parameters, (x,)), y)

        found: dict[str, Tensor] = vmap(grad(loss), (None, 0, 0))(dict(model.named_parameters()), inputs, ids)
        return found

    ours = gradients(partial(softmax_focal_loss, gamma=0, class_weight=weight, label_smoothing=smoothing))
    torch.testing.assert_close(ours, gradients(partial(F.cross_entropy, weight=weight, label_smoothing=smoothing)))
    if not smoothing:
        ours = gradients(lambda x, y: focal_nll_loss(x.log_softmax(-1), y, gamma=0, class_weight=weight))
        torch.testing.assert_close(ours, gradients(partial(F.cross_entropy, weight=weight)))


def test_forward_mode_derivatives_of_the_weights() -> None:
    x, weight = torch.randn(5, 3), torch.rand(5)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weight, torch.ones(5))
        tangent = forward_ad.unpack_dual(sigmoid_focal_loss(x, torch.tensor([0, 1, 2, 3, 0]), weight=dual)).tangent
    expected = sigmoid_focal_loss(x, torch.tensor([0, 1, 2, 3, 0]), weight=torch.ones(5))
    torch.testing.assert_close(tangent, expected)  # the loss is linear in the weights


def test_modules_keep_their_values_in_half_precision() -> None:
    """1 - 0.9995 is 0 in bfloat16: the negatives would have no weight."""
    x, labels = torch.randn(4, 2), torch.rand(4, 2)
    loss = nn.Sequential(SigmoidFocalLoss(alpha=[0.9995, 0.998], gamma=0.0))[0]
    expected = loss(x, labels)
    for half in (loss.float, loss.half, loss.bfloat16):
        half()
        assert loss.alpha.dtype == torch.float64 and torch.equal(loss(x, labels), expected)
    assert SoftmaxFocalLoss(class_weight=[1, 1e-8]).half().class_weight[1] > 0
    assert loss.to("meta").alpha.device.type == "meta"


def test_a_module_does_not_learn_its_values() -> None:
    with pytest.raises(ValueError, match="alpha: given a tensor with a gradient, which a module keeps constant"):
        SigmoidFocalLoss(alpha=nn.Parameter(torch.tensor([0.5, 0.5])))
