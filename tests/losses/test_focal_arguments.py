"""The arguments of the sigmoid focal loss and of FL*: targets, weights, reductions, paths and error messages."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from focal_helpers import cpu_impls
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss as torchvision_focal

from retina.losses import FocalStarLoss, SigmoidFocalLoss, focal_star_loss, ohem_loss, sigmoid_focal_loss
from retina.losses.focal import warn_triton_missing


@cpu_impls
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_class_ids_of_any_integer_dtype(impl: str, dtype: torch.dtype) -> None:
    logits = torch.randn(6, 3)
    ids = torch.tensor([0, 1, 2, 3, 3, 0])
    expected = sigmoid_focal_loss(logits, F.one_hot(ids, 4)[:, :3].float())
    torch.testing.assert_close(sigmoid_focal_loss(logits, ids.to(dtype), impl=impl), expected)


@cpu_impls
def test_uint8_255_is_not_ignored(impl: str) -> None:
    """A comparison of uint8 with -1 wraps around, so that 255 would be ignored without a message."""
    assert (torch.tensor([255], dtype=torch.uint8) == -1).all()  # wraps around
    with pytest.raises(ValueError, match="class id 255"):
        sigmoid_focal_loss(torch.zeros(1, 80), torch.tensor([255], dtype=torch.uint8))
    background = torch.tensor([255], dtype=torch.uint8)
    loss = sigmoid_focal_loss(torch.zeros(1, 255), background, reduction="sum", impl=impl)
    assert loss.item() > 0  # background of 255 classes


@cpu_impls
def test_leading_dimensions_are_rows(impl: str) -> None:
    logits, labels = torch.randn(2, 5, 7, 3), torch.randint(-1, 4, (2, 5, 7))
    flat = sigmoid_focal_loss(logits.view(-1, 3), labels.view(-1), reduction="sum", impl=impl)
    torch.testing.assert_close(sigmoid_focal_loss(logits, labels, reduction="sum", impl=impl), flat)
    torch.testing.assert_close(
        sigmoid_focal_loss(logits[0, 0, 0], torch.tensor(1)), sigmoid_focal_loss(logits[0, 0, :1], torch.tensor([1]))
    )


def test_binary_labels_have_the_shape_of_the_logits() -> None:
    logits, labels = torch.randn(20), torch.randint(0, 2, (20,))
    expected = torchvision_focal(logits, labels.float(), reduction="mean")
    for shape in ((20,), (20, 1)):
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.float32):
            given = sigmoid_focal_loss(logits.view(shape), labels.view(shape).to(dtype))
            torch.testing.assert_close(given, expected)
    # As class ids of one class, 0 is the object and 1 the background, as for every other K.
    torch.testing.assert_close(sigmoid_focal_loss(logits[:, None], 1 - labels, avg_factor=20), expected)
    unknown = labels.clone()
    unknown[::2] = -1
    none = sigmoid_focal_loss(logits, unknown, reduction="none")
    assert not none[::2].any()
    torch.testing.assert_close(none[1::2], torchvision_focal(logits, labels.float())[1::2])


def test_class_ids_of_one_class_warn_that_labels_have_another_meaning() -> None:
    """Labels (N,) with logits (N, 1) train a classifier that predicts the opposite."""
    logits, ids = torch.randn(20, 1), torch.randint(0, 2, (20,))
    text = r"0 is the object and 1 is background\. Labels, .* need logits\[\.\.\., 0\] or targets\[\.\.\., None\]"
    for loss in (sigmoid_focal_loss, focal_star_loss, SigmoidFocalLoss(), FocalStarLoss()):
        with pytest.warns(UserWarning, match=text):
            loss(logits, ids)
    with pytest.warns(UserWarning) as caught:
        sigmoid_focal_loss(logits, ids)
    assert caught[0].filename == __file__  # the caller, so each place warns once
    anchors = torch.tensor([0.0, 0.0, 9.0, 9.0]).repeat(20, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sigmoid_focal_loss(logits, ids, avg_factor=5)
        sigmoid_focal_loss(logits, ids, reduction="sum")  # a detector divides it by the positives
        sigmoid_focal_loss(logits, ids[:, None])
        sigmoid_focal_loss(logits[:, 0], ids)
        sigmoid_focal_loss(torch.randn(20, 2), ids)
        ohem_loss(logits[None], ids[None], anchors)
        for module in (SigmoidFocalLoss, FocalStarLoss):
            module()
        compiled = torch.compile(lambda x: sigmoid_focal_loss(x, ids), fullgraph=True, backend="eager")
        assert compiled(logits).isfinite()


def test_reductions_by_hand() -> None:
    logits, ids = torch.randn(5, 3), torch.tensor([0, 3, -1, 2, 1])
    none = sigmoid_focal_loss(logits, ids, reduction="none")
    assert none.shape == (5, 3) and none.dtype == torch.float32
    assert sigmoid_focal_loss(logits, ids, reduction="sum").item() == pytest.approx(none.sum().item())
    assert sigmoid_focal_loss(logits, ids).item() == pytest.approx(none.sum().item() / 15)  # ignored rows count
    for factor in (4.0, torch.tensor(4.0), torch.tensor([4])):
        assert sigmoid_focal_loss(logits, ids, avg_factor=factor).item() == pytest.approx(none.sum().item() / 4)
    element = torch.rand(5, 3)
    weighted = sigmoid_focal_loss(logits, ids, weight=element, reduction="sum").item()
    assert weighted == pytest.approx((none * element).sum().item())


def test_reference_gives_gradients_to_weight_and_avg_factor() -> None:
    logits, ids = torch.randn(4, 3), torch.tensor([0, 1, 2, 3])
    weight, factor = torch.rand(4, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    sigmoid_focal_loss(logits, ids, weight=weight, avg_factor=factor).backward()
    rows = sigmoid_focal_loss(logits, ids, reduction="none").sum(dim=1)
    torch.testing.assert_close(weight.grad, rows / 2)
    torch.testing.assert_close(factor.grad, -(rows * weight.detach()).sum() / 4)
    with pytest.raises(ValueError, match="gives no gradient to weight, alpha or avg_factor; it runs on the CPU"):
        sigmoid_focal_loss(logits, ids, weight=weight, impl="chunked")


def test_reference_gives_a_gradient_to_alpha() -> None:
    logits, ids = torch.randn(4, 3), torch.tensor([0, 1, 2, 3])
    alpha = torch.full((3,), 0.25, requires_grad=True)
    sigmoid_focal_loss(logits, ids, alpha=alpha, reduction="sum").backward()
    terms = sigmoid_focal_loss(logits, ids, alpha=None, reduction="none")
    y = F.one_hot(ids, 4)[:, :3]
    torch.testing.assert_close(alpha.grad, ((2 * y - 1) * terms).sum(0))


@pytest.mark.parametrize("loss", [sigmoid_focal_loss, focal_star_loss])
def test_alpha_in_any_form_in_function_and_module(loss: Callable[..., Tensor]) -> None:
    module = {sigmoid_focal_loss: SigmoidFocalLoss, focal_star_loss: FocalStarLoss}[loss]
    logits, labels = torch.randn(6, 3), torch.randint(0, 2, (6, 3))
    expected = loss(logits, labels, alpha=0.25)
    one = (torch.tensor(0.25), np.array(0.25), np.float32(0.25))
    for alpha in (*one, [0.25] * 3, (0.25,) * 3, np.full(3, 0.25), torch.full((3,), 0.25)):
        torch.testing.assert_close(loss(logits, labels, alpha=alpha), expected)
        torch.testing.assert_close(module(alpha=alpha)(logits, labels), expected)
    for wrong, given in (("0.25", "str"), (["a"], "list"), ({}, "dict")):
        message = f"alpha: given {given}, expected a tensor, an array or a sequence of numbers, or one number"
        for call in (lambda a: loss(logits, labels, alpha=a), lambda a: module(alpha=a)):
            with pytest.raises(ValueError, match=message):
                call(wrong)


@cpu_impls
def test_result_is_a_float32_scalar_for_weights_of_any_dtype(impl: str) -> None:
    logits, ids, weight = torch.randn(2, 3), torch.tensor([0, 3]), torch.ones(2, dtype=torch.float64)
    for factor in (torch.tensor([2.0], dtype=torch.float64), torch.tensor([[2]]), np.float32(2), np.int64(2)):
        loss = sigmoid_focal_loss(logits, ids, weight=weight, avg_factor=factor, impl=impl)
        assert loss.shape == () and loss.dtype == torch.float32
    mask = torch.tensor([True, False])
    masked = sigmoid_focal_loss(logits, ids, weight=mask, reduction="sum", impl=impl)
    assert masked.item() == pytest.approx(sigmoid_focal_loss(logits[:1], ids[:1], reduction="sum").item())


X, IDS = torch.zeros(2, 4), torch.tensor([0, 4])


@pytest.mark.parametrize(
    ("change", "message"),
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
        ({"alpha": 2.0}, r"alpha: given 2.0, expected a finite number from 0 to 1; None .* pos_weight w"),
        ({"alpha": [0.5, 0.5]}, r"alpha: given shape \(2,\), expected one value for each of 4 classes"),
        ({"alpha": [0.5, 0.5, 0.5, 1.5]}, r"alpha: given values from 0\.5 to 1\.5, expected from 0 to 1; .*pos_weight"),
        ({"weight": torch.ones(7)}, r"weight: given shape \(7,\), expected \(2,\) .* or \(2, 4\)"),
        ({"ignore_index": None}, "ignore_index: given None, expected an integer; one that no target has ignores"),
        ({"reduction": "average"}, "reduction: given 'average', expected one of 'none', 'mean', 'sum'"),
        ({"reduction": "sum", "avg_factor": 3.0}, "avg_factor is the divisor of reduction 'mean'; .* reduction 'sum'"),
        ({"avg_factor": 0.0}, r"avg_factor: given 0.0, expected a finite number above 0; .*: max\(1, positives\)"),
        ({"avg_factor": torch.tensor(0)}, "avg_factor: given 0.0"),
        ({"avg_factor": torch.ones(2)}, r"avg_factor: given shape \(2,\)"),
        ({"impl": "fast"}, "impl: given 'fast'"),
        ({"impl": "chunked", "reduction": "none"}, "impl='chunked' takes class ids, row weights and reduction 'sum'"),
        ({"impl": "triton", "reduction": "none"}, "impl='triton' takes class ids, row weights"),
        ({"impl": "triton", "logits": X.double()}, "below float64"),
    ],
)  # fmt: skip
def test_error_messages(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"logits": X, "targets": IDS} | change
    with pytest.raises(ValueError, match=message):
        sigmoid_focal_loss(**arguments)  # type: ignore[arg-type]


MASKS, ONE_CHANNEL = torch.zeros(2, 8, 6), torch.zeros(2, 1, 8, 6)


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"logits": ONE_CHANNEL, "targets": MASKS.long()}, "(2, 1, 8, 6); add a dimension: targets[:, None]"),
        ({"logits": ONE_CHANNEL, "targets": MASKS}, "add a dimension: targets[:, None]"),
        ({"logits": torch.zeros(2, 8, 6, 1), "targets": MASKS}, "add a dimension: targets[..., None]"),
        ({"logits": torch.zeros(2, 1), "targets": torch.zeros(2)}, "add a dimension: targets[:, None]"),
        ({"logits": torch.zeros(2, 4, 8, 6), "targets": MASKS.long()}, "logits.movedim(1, -1)"),
        ({"logits": ONE_CHANNEL, "targets": ONE_CHANNEL, "weight": MASKS}, "add a dimension: weight[:, None]"),
    ],
)
def test_a_wrong_shape_says_how_to_change_it(change: dict[str, Tensor], hint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(hint) + "$"):
        sigmoid_focal_loss(**change)  # type: ignore[arg-type]


def test_triton_on_the_cpu_and_missing_triton_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"impl='triton' takes class ids, .*; it runs on CUDA, below float64"):
        sigmoid_focal_loss(X, IDS, impl="triton")
    monkeypatch.setattr("retina.losses.focal.HAS_TRITON", False)
    with pytest.raises(ValueError, match=r"outside torch\.func; Triton is not installed here"):
        sigmoid_focal_loss(X, IDS, impl="triton")


def test_missing_triton_warns_once() -> None:
    warn_triton_missing.cache_clear()
    with pytest.warns(
        UserWarning, match="Triton is not installed: the focal loss, the matching and the detection are slower on CUDA"
    ):
        warn_triton_missing()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_triton_missing()


def test_errors_of_focal_star() -> None:
    with pytest.raises(ValueError, match="gamma: given 0, expected a finite number above 0"):
        focal_star_loss(X, IDS, gamma=0)
    with pytest.raises(ValueError, match="beta: given inf"):
        focal_star_loss(X, IDS, beta=math.inf)
    with pytest.raises(ValueError, match="ignore_index: given None"):
        focal_star_loss(X, IDS, ignore_index=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_float_labels_are_never_ignored(reduction: str) -> None:
    logits, labels = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 0.0, 0.0])
    for loss in (sigmoid_focal_loss, focal_star_loss):
        for ignore_index in (0, 1):
            given = loss(logits, labels, ignore_index=ignore_index, reduction=reduction)
            expected = loss(logits, labels, ignore_index=-1, reduction="none").sum()
            assert given.sum().item() == pytest.approx(expected.item(), rel=1e-6)
