from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from retina.assign import Assignment, assign
from retina.boxes import encode
from retina.config import Anchors, Assign, Loss
from retina.criterion import (
    _box_loss,
    count_positives,
    detection_loss,
    normalizer,
    positive_class_loss,
    update_ema_positives,
)
from retina.data.batch import Target
from retina.losses import focal_star_loss, giou_loss, l1_loss, ohem_loss, smooth_l1_loss
from retina.model.anchors import make_anchors
from retina.model.retinanet import Outputs

K = 4
ANCHORS = make_anchors(Anchors(), 64, 64, torch.device("cpu"))
BoxLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# The losses on decoded boxes: ours, and another implementation.
IOU_LOSSES: dict[str, tuple[BoxLoss, BoxLoss]] = {"giou": (giou_loss, generalized_box_iou_loss)}
each_class_loss = pytest.mark.parametrize("cls", get_args(Loss.model_fields["cls"].annotation))
each_box_loss = pytest.mark.parametrize("box", get_args(Loss.model_fields["box"].annotation))


def example() -> tuple[Outputs, Assignment]:
    generator = torch.Generator().manual_seed(3)
    logits = [torch.randn(2, len(level), K, generator=generator) for level in ANCHORS]
    deltas = [torch.randn(2, len(level), 4, generator=generator) for level in ANCHORS]
    boxes = torch.tensor([[4.0, 4.0, 40.0, 44.0], [20.0, 10.0, 60.0, 60.0]])
    targets = [
        Target(boxes, torch.tensor([1, 3]), torch.zeros(0, 4)),
        Target(boxes[:1], torch.tensor([0]), torch.zeros(0, 4)),
    ]
    return Outputs(logits, deltas), assign(ANCHORS, targets, [(64, 64)] * 2, K, Assign())


def loss(config: Loss, divisor: torch.Tensor | None = None, ratio: float = 62.5) -> dict[str, float]:
    outputs, assignment = example()
    divisor = torch.tensor([5.0, 5.0]) if divisor is None else divisor
    return {k: v.item() for k, v in detection_loss(outputs, ANCHORS, assignment, divisor, config, ratio).items()}


@pytest.mark.parametrize(
    "change",
    [{"alpha": 0.5}, {"alpha": None}, {"gamma": 1.0}, {"smooth_l1_beta": 0.5}, {"cls_weight": 2.0},
     {"box_weight": 0.5}, {"cls": "focal_star"}, {"cls": "ohem"},
     {"box": "l1"}, {"box": "giou"}],
    ids=str,
)  # fmt: skip
def test_every_setting_of_the_loss_has_an_effect(change: dict[str, object]) -> None:
    base = Loss(box="smooth_l1")
    assert loss(base.model_copy(update=change))["loss"] != pytest.approx(loss(base)["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("cls", "change"),
    [("focal_star", {"gamma": 4.0}), ("focal_star", {"beta": 0.0}), ("focal_star", {"alpha": 0.75}),
     ("ohem", {"cls": "ohem_1_3"}), ("ohem", {"ohem_batch": 4}), ("ohem", {"ohem_nms": 0.1}),
     ("ohem_1_3", {"ohem_batch": 8}), ("ohem_1_3", {"ohem_nms": 0.1})],
    ids=str,
)  # fmt: skip
def test_every_setting_of_the_other_class_losses_has_an_effect(cls: str, change: dict[str, object]) -> None:
    base = Loss(cls=cls, ohem_batch=32, ohem_nms=0.5)
    assert loss(base.model_copy(update=change))["loss"] != pytest.approx(loss(base)["loss"], rel=1e-4)


def test_other_class_losses_equal_those_of_retina_losses() -> None:
    outputs, assignment = example()
    logits, anchors = torch.cat(outputs.logits, dim=1), torch.cat(ANCHORS)
    options = {"batch_size": 16, "nms_iou": 0.6, "avg_factor": 5.0}
    for cls, ratio in (("ohem", None), ("ohem_1_3", 3)):
        expected = ohem_loss(logits, assignment.labels_NR, anchors, negatives_per_positive=ratio, **options)
        given = loss(Loss(cls=cls, ohem_batch=16, ohem_nms=0.6))["loss_cls"]
        assert given == pytest.approx(expected.item(), rel=1e-5)
    star = focal_star_loss(logits, assignment.labels_NR, gamma=4.0, beta=0.5, alpha=0.25, avg_factor=5.0)
    given = loss(Loss(cls="focal_star", gamma=4.0, beta=0.5))["loss_cls"]
    assert given == pytest.approx(star.item(), rel=1e-5)


@each_class_loss
def test_what_every_class_loss_has_to_do(cls: str) -> None:
    """Ignored anchors, label -1, count nothing; `positives_only` leaves the negatives out; a weight for each anchor."""
    outputs, assignment = example()
    labels, normalizer_N = assignment.labels_NR, torch.tensor([5.0, 5.0])
    assert set(labels.unique().tolist()) > {-1, K}
    config = Loss(cls=cls, ohem_batch=10**6, ohem_nms=1.0)  # type: ignore[arg-type]  # OHEM takes all positives

    def losses(changed: torch.Tensor | None, config: Loss = config) -> tuple[float, float]:
        level_labels = torch.split(labels, [len(level) for level in ANCHORS], dim=1)
        logits = [
            level if changed is None else torch.where(torch.isin(ids, changed)[..., None], -level, level)
            for level, ids in zip(outputs.logits, level_labels, strict=True)
        ]
        arguments = (Outputs(logits, outputs.deltas), ANCHORS, assignment, normalizer_N, config)
        return float(detection_loss(*arguments, 62.5)["loss_cls"]), float(positive_class_loss(*arguments))

    given = losses(None)
    assert losses(torch.tensor(-1)) == given, "an ignored anchor counts"
    by_negatives = losses(torch.tensor(K))
    assert by_negatives[0] != pytest.approx(given[0], rel=1e-3) and by_negatives[1] == pytest.approx(given[1], rel=1e-6)
    by_image = losses(None, config.model_copy(update={"normalizer": "image"}))
    assert by_image == pytest.approx(given, rel=1e-5)


@pytest.mark.parametrize("cls", ["focal", "focal_star", "ohem", "ohem_1_3"])
def test_class_loss_of_the_positives(cls: str) -> None:
    outputs, assignment = example()
    logits, labels = torch.cat(outputs.logits, dim=1), assignment.labels_NR.long()
    is_positive = (labels >= 0) & (labels < K)
    one_hot = torch.nn.functional.one_hot(labels.clamp(0, K), K + 1)[..., :K].float()
    if cls == "focal":
        each = sigmoid_focal_loss(logits, one_hot, alpha=0.25, gamma=2.0).sum(-1)  # torchvision's
    elif cls == "focal_star":
        each = focal_star_loss(logits, labels, gamma=2.0, beta=1.0, alpha=0.25, reduction="none").sum(-1)
    else:
        ratio = 3 if cls == "ohem_1_3" else None
        each = ohem_loss(
            logits, labels, torch.cat(ANCHORS), batch_size=16, negatives_per_positive=ratio, reduction="none"
        )
    config = Loss(cls=cls, ohem_batch=16)  # type: ignore[arg-type]
    given = positive_class_loss(outputs, ANCHORS, assignment, torch.tensor([5.0, 5.0]), config)
    assert given.item() == pytest.approx(each[is_positive].sum().item() / 5, rel=1e-5)
    assert 0 < given.item() < loss(config)["loss_cls"] * 0.9


@pytest.mark.parametrize("box", IOU_LOSSES)
def test_max_ratio_changes_losses_on_decoded_boxes(box: str) -> None:
    config = Loss(box=box)  # type: ignore[arg-type]
    assert loss(config, ratio=1.5)["loss_box"] != loss(config)["loss_box"]


def test_normalizer_divides_the_loss_of_each_image() -> None:
    with_5, with_10 = loss(Loss()), loss(Loss(), torch.tensor([10.0, 10.0]))
    assert with_10["loss"] == pytest.approx(with_5["loss"] / 2, rel=1e-5)
    per_image = Loss(normalizer="image")
    first, second = loss(per_image, torch.tensor([5.0, 1e9])), loss(per_image, torch.tensor([1e9, 5.0]))
    assert first["loss"] + second["loss"] == pytest.approx(with_5["loss"], rel=1e-4)


def test_normalizer_modes_by_hand() -> None:
    positives, total, average = torch.tensor([0.0, 6.0]), torch.tensor(6.0), torch.tensor(100.0)
    assert normalizer(positives, total, 2, average, "batch").tolist() == [6, 6]
    assert normalizer(positives, total, 2, average, "image").tolist() == [2, 12]  # torchvision: mean over images
    assert normalizer(positives, total, 2, average, "ema").tolist() == [100, 100]
    assert normalizer(positives[:1], torch.tensor(0.0), 2, average, "batch").tolist() == [1]  # never 0/0
    assert update_ema_positives(average, total, 0.9).item() == pytest.approx(90.6)  # detectron2: .9 * 100 + .1 * 6
    assert update_ema_positives(average, torch.tensor(0.0), 0.9).item() == pytest.approx(90.1)


@each_box_loss
def test_box_loss_of_every_anchor_equals_that_of_the_positives(box: str) -> None:
    """`every_anchor` is for CUDA, where selecting the positives would make the host wait. Negatives get no gradient."""
    outputs, assignment = example()
    weight = torch.tensor([0.2, 0.5])[:, None].expand_as(assignment.labels_NR)
    results = []
    for every_anchor in (False, True):
        deltas = [10 * level.clone() for level in outputs.deltas]
        deltas[0][0, 0] = torch.inf  # a background anchor: its deltas must not matter
        for level in deltas:
            level.requires_grad_()
        total = _box_loss(deltas, ANCHORS, assignment, K, weight, Loss(box=box), 62.5, every_anchor)
        results.append((total.detach(), torch.cat(torch.autograd.grad(total, deltas), dim=1)))
    torch.testing.assert_close(results[0], results[1])
    positive = (assignment.labels_NR >= 0) & (assignment.labels_NR < K)
    assert not positive[0, 0] and not results[1][1][~positive].any() and results[1][1][positive].any()


@each_box_loss
def test_box_loss_of_every_anchor_never_waits(box: str) -> None:
    """Operators that copy a value to the host make it wait for the device. The profiler shows them on the CPU too."""
    outputs, assignment = example()
    deltas = [level.clone().requires_grad_() for level in outputs.deltas]
    weight = torch.full((2, 1), 0.2).expand_as(assignment.labels_NR)
    with profile(activities=[ProfilerActivity.CPU]) as events:
        _box_loss(deltas, ANCHORS, assignment, K, weight, Loss(box=box), 62.5, every_anchor=True).backward()
    waiting = {"aten::_local_scalar_dense", "aten::nonzero", "aten::item"}
    assert not waiting & {event.key for event in events.key_averages()}


def test_a_batch_without_positives_trains_on_its_negatives() -> None:
    outputs, assignment = example()
    logits = [level.requires_grad_() for level in outputs.logits]
    empty = Assignment(torch.full_like(assignment.labels_NR, K), assignment.boxes_NR4)
    assert count_positives(empty, K).tolist() == [0, 0]
    losses = detection_loss(Outputs(logits, outputs.deltas), ANCHORS, empty, torch.ones(2), Loss(), 62.5)
    losses["loss"].backward()
    assert losses["loss_box"].item() == 0 and losses["loss_cls"].item() > 0
    assert all(level.grad is not None and (level.grad > 0).all() for level in logits)  # each step lowers every logit


@pytest.mark.parametrize(("ours", "other"), IOU_LOSSES.values(), ids=IOU_LOSSES)
def test_values_and_gradients_of_iou_losses(ours: BoxLoss, other: BoxLoss) -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [3.0, 4.0, 9.0, 20.0], [0.0, 0.0, 6.0, 5.0]], requires_grad=True)
    truth = torch.tensor([[0.0, 0.0, 10.0, 5.0], [30.0, 4.0, 39.0, 20.0], [1.0, 1.0, 5.0, 4.0]])
    given, expected = ours(boxes, truth), other(boxes, truth)
    torch.testing.assert_close(given, expected)
    gradients = (torch.autograd.grad(losses.sum(), boxes)[0] for losses in (given, expected))
    torch.testing.assert_close(*gradients)


def test_box_losses_on_deltas_by_hand() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [3.0, 4.0, 9.0, 20.0], [0.0, 0.0, 5.0, 5.0]])
    a, b = encode(boxes, boxes), torch.tensor([[0.05, 0.0, -1.0, 0.0]]).expand(3, 4)
    assert l1_loss(a, b).tolist() == pytest.approx([1.05] * 3)
    # beta 0.11: quadratic 0.5 * .05^2 / .11 below it, |d| - .055 above it
    assert smooth_l1_loss(a, b, 0.11).tolist() == pytest.approx([0.5 * 0.05**2 / 0.11 + 1 - 0.055] * 3)
