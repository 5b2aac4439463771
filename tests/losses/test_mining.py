from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import nms

from retina.losses import OHEMLoss, ohem_loss
from retina.losses.mining import _select_hardest, _select_with_kernel


def problem(images: int = 2, anchors: int = 300, classes: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(images, anchors, classes, generator=generator)
    targets = torch.randint(-1, classes + 1, (images, anchors), generator=generator)
    targets[torch.rand(images, anchors, generator=generator) < 0.8] = classes
    corner = 60 * torch.rand(anchors, 2, generator=generator)
    return logits, targets, torch.cat([corner, corner + 5 + 30 * torch.rand(anchors, 2, generator=generator)], dim=1)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    y = F.one_hot(targets.clamp(min=0), logits.shape[-1] + 1)[..., :-1].to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, y, reduction="none").sum(-1)


def selected_by_torchvision(loss_R: Tensor, anchors: Tensor, candidates_R: Tensor, iou: float, count: int) -> set[int]:
    index = candidates_R.nonzero()[:, 0]
    return set(index[nms(anchors[index], loss_R[index], iou)][:count].tolist())


@pytest.mark.parametrize("iou", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("batch", [1, 16, 1000])
def test_selection_equals_torchvision_nms(iou: float, batch: int) -> None:
    logits, targets, anchors = problem()
    none = ohem_loss(logits, targets, anchors, batch_size=batch, nms_iou=iou, reduction="none")
    losses = cross_entropy(logits, targets)
    for image in range(2):
        expected = selected_by_torchvision(losses[image], anchors, targets[image] >= 0, iou, batch)
        selected = set(none[image].nonzero()[:, 0].tolist())
        assert selected == expected and len(selected) == min(batch, len(expected))
        torch.testing.assert_close(none[image][list(selected)], losses[image][list(selected)])


def test_three_negatives_per_positive() -> None:
    logits, targets, anchors = problem()
    none = ohem_loss(logits, targets, anchors, batch_size=32, negatives_per_positive=3, reduction="none")
    losses = cross_entropy(logits, targets)
    for image in range(2):
        is_positive = (targets[image] >= 0) & (targets[image] < 3)
        positives = selected_by_torchvision(losses[image], anchors, is_positive, 0.5, 8)
        negatives = selected_by_torchvision(losses[image], anchors, targets[image] == 3, 0.5, 3 * len(positives))
        assert set(none[image].nonzero()[:, 0].tolist()) == positives | negatives and len(positives) == 8


def test_image_without_positives_selects_three_negatives() -> None:
    logits, targets, anchors = problem()
    targets[0] = 3
    none = ohem_loss(logits, targets, anchors, batch_size=32, negatives_per_positive=3, reduction="none")
    assert none[0].count_nonzero() == 3 and none[1].count_nonzero() > 3


def test_only_selected_anchors_get_gradient() -> None:
    logits, targets, anchors = problem()
    logits.requires_grad_()
    none = ohem_loss(logits, targets, anchors, batch_size=10, reduction="none")
    (gradient,) = torch.autograd.grad(ohem_loss(logits, targets, anchors, batch_size=10), logits)
    assert torch.equal(gradient.any(dim=-1), none.detach() > 0)
    torch.testing.assert_close(ohem_loss(logits, targets, anchors, batch_size=10), none.sum() / 20)


def test_weight_does_not_change_selection() -> None:
    logits, targets, anchors = problem()
    weight = torch.rand(targets.shape)
    none = ohem_loss(logits, targets, anchors, batch_size=10, reduction="none")
    weighted = ohem_loss(logits, targets, anchors, batch_size=10, weight=weight, reduction="sum")
    torch.testing.assert_close(weighted, (none * weight).sum())
    halved = ohem_loss(logits, targets, anchors, batch_size=10, weight=weight, avg_factor=2.0)
    torch.testing.assert_close(halved, weighted / 2)


def test_boxes_of_each_image_and_the_module() -> None:
    logits, targets, anchors = problem()
    moved = torch.stack([anchors, anchors.flip(0)])
    module = OHEMLoss(batch_size=12, nms_iou=0.4, negatives_per_positive=3, reduction="none")
    both = module(logits, targets, moved)
    second = module(logits[1:], targets[1:], anchors.flip(0))
    torch.testing.assert_close(both[1:], second)
    assert "batch_size=12" in repr(module)


def test_float16_and_integer_anchors() -> None:
    """400 x 400 pixels overflow float16; the IoU would be NaN and nothing suppressed."""
    anchors = torch.tensor([[0.0, 0.0, 400.0, 400.0], [1.0, 1.0, 401.0, 401.0]])
    for dtype in (torch.float16, torch.int32):
        none = ohem_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long), anchors.to(dtype), reduction="none")
        assert none.count_nonzero() == 1


def test_without_suppression_the_hardest_are_selected() -> None:
    logits, targets, anchors = problem()
    none = ohem_loss(logits, targets, anchors, batch_size=9, nms_iou=1.0, reduction="none")
    losses = torch.where(targets >= 0, cross_entropy(logits, targets), 0)
    for image in range(2):
        assert set(none[image].nonzero()[:, 0].tolist()) == set(losses[image].topk(9).indices.tolist())


def test_no_anchors() -> None:
    logits = torch.zeros(2, 0, 3, requires_grad=True)
    loss = ohem_loss(logits, torch.zeros(2, 0, dtype=torch.long), torch.zeros(0, 4))
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None


def test_everything_ignored_gives_loss_and_gradient_zero() -> None:
    logits, targets, anchors = problem()
    logits.requires_grad_()
    for ratio in (None, 3):
        loss = ohem_loss(logits, torch.full_like(targets, -1), anchors, negatives_per_positive=ratio)
        assert loss.item() == 0 and not torch.autograd.grad(loss, logits)[0].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets_NR": torch.zeros(2, 4, dtype=torch.int64)}, r"given \(2, 5, 3\) with torch.int64 \(2, 4\)"),
        ({"anchors_R4": torch.zeros(4, 4)}, r"anchors: given shape \(4, 4\), expected \(5, 4\)"),
        ({"batch_size": 0}, "batch_size: given 0"),
        ({"batch_size": 1.5}, "batch_size: given 1.5, expected an integer"),
        ({"batch_size": 3, "negatives_per_positive": 3}, "batch_size: given 3, expected an integer of at least 4"),
        ({"targets_NR": torch.zeros(2, 5, dtype=torch.bool)}, "with torch.bool"),
        ({"nms_iou": 1.5}, "nms_iou: given 1.5"),
        ({"negatives_per_positive": 0}, "negatives_per_positive: given 0"),
        ({"weight": torch.ones(2, 5, 3)}, "weight: given shape"),
        ({"weight": 2.0}, "weight: given float, expected a tensor"),
        ({"ignore_index": None}, "ignore_index: given None, expected an integer"),
        ({"targets_NR": torch.full((2, 5), 9)}, "class id 9"),
    ],
)
def test_error_messages(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "logits_NRK": torch.zeros(2, 5, 3),
        "targets_NR": torch.zeros(2, 5, dtype=torch.int64),
        "anchors_R4": torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(5, 4),
    }
    with pytest.raises(ValueError, match=message):
        ohem_loss(**(arguments | change))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed here")
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")  # of the interpreter, for boxes without area
@pytest.mark.parametrize(("count", "limit"), [(1, None), (12, None), (40, [3, 40]), (300, None)])
def test_the_kernel_selects_the_same_anchors(count: int, limit: list[int] | None) -> None:
    """The kernel runs on a GPU, or in Triton's interpreter without one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logits, targets, anchors = problem()
    anchors[:40] = anchors[:40].round() // 8  # some have no area
    losses = (4 * cross_entropy(logits, targets)).round()  # many are equal
    limit_N = None if limit is None else torch.tensor(limit)
    for boxes in (anchors, torch.stack([anchors, anchors.flip(0)])):
        arguments = (losses, boxes, targets >= 0, count, 0.5, limit_N)
        expected = _select_hardest(*arguments)
        on_device = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
        selected = _select_with_kernel(*on_device).cpu()  # type: ignore[arg-type]
        assert torch.equal(selected, expected) and expected.any(dim=1).all()
