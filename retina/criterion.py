"""The training loss: class loss over all anchors, box loss over the positive ones, both divided by the normalizer.

N images, R anchors, K classes, P positive anchors. The normalizer depends on the matching alone. So it is known before
the network runs and can count the positives of the whole global batch, over micro-batches and processes.

The loss functions themselves are in losses/. `_class_loss` chooses one by `Loss.cls`, `_box_loss` by `Loss.box`, both
fields of config.py.
"""

from __future__ import annotations

from functools import partial
from typing import assert_never

import torch
from torch import Tensor

from retina import config as cfg
from retina.assign import Assignment
from retina.boxes import decode, encode
from retina.losses import focal_star_loss, giou_loss, l1_loss, ohem_loss, sigmoid_focal_loss, smooth_l1_loss
from retina.model.retinanet import Outputs


def count_positives(assignment: Assignment, num_classes: int) -> Tensor:
    """The number of positive anchors of each image; float32 (N,)."""
    labels_NR = assignment.labels_NR
    return ((labels_NR >= 0) & (labels_NR < num_classes)).sum(dim=1).float()


def normalizer(
    positives_N: Tensor, batch_positives: Tensor, batch_images: int, ema_positives: Tensor, mode: str
) -> Tensor:
    """What the loss of each image is divided by, at least 1; float32 (N,).

    Args:
        positives_N: the positive anchors of each image.
        batch_positives: those of the global batch; scalar.
        batch_images: the number of images of the global batch.
        ema_positives: the moving average of `batch_positives`, with these, see `update_ema_positives`; scalar.
        mode: "batch" returns `batch_positives`. "image" returns the image's own positives times `batch_images`, which
            is torchvision's mean over images. "ema" returns `ema_positives` (detectron2).
    """
    if mode == "image":
        return positives_N.clamp(min=1) * batch_images
    value = ema_positives if mode == "ema" else batch_positives
    return value.clamp(min=1).expand_as(positives_N)


def update_ema_positives(ema_positives: Tensor, batch_positives: Tensor, momentum: float) -> Tensor:
    """The next value of the moving average of the positives; detectron2 starts at 100 with momentum 0.9."""
    return momentum * ema_positives + (1 - momentum) * batch_positives.clamp(min=1)


def detection_loss(
    outputs: Outputs,
    anchors: tuple[Tensor, ...],
    assignment: Assignment,
    normalizer_N: Tensor,
    config: cfg.Loss,
    max_ratio: float,
) -> dict[str, Tensor]:
    """The loss of one micro-batch; summed over the micro-batches it is the loss of the step.

    Source: paper, sections 3 and 4 ("Inference and Training").

    Args:
        outputs: of the network.
        anchors: of each level, float32 (R_level, 4).
        assignment: of these anchors to the ground truth.
        normalizer_N: from `normalizer`; one value for all images unless `config.normalizer` is "image".
        config: the loss functions and their numbers.
        max_ratio: `detect.max_ratio`; limits the sides of the boxes that a loss on decoded boxes uses.

    Returns: float32 scalars: loss_cls, loss_box and loss = `cls_weight` * loss_cls + `box_weight` * loss_box.
    """
    weight_NR = (1 / normalizer_N)[:, None].expand_as(assignment.labels_NR)
    loss_cls = _class_loss(outputs.logits, anchors, assignment.labels_NR, normalizer_N, config)
    num_classes, every_anchor = outputs.logits[0].shape[-1], weight_NR.is_cuda
    loss_box = _box_loss(outputs.deltas, anchors, assignment, num_classes, weight_NR, config, max_ratio, every_anchor)
    loss = config.cls_weight * loss_cls + config.box_weight * loss_box
    return {"loss": loss, "loss_cls": loss_cls, "loss_box": loss_box}


@torch.no_grad()
def positive_class_loss(
    outputs: Outputs, anchors: tuple[Tensor, ...], assignment: Assignment, normalizer_N: Tensor, config: cfg.Loss
) -> Tensor:
    """The part of `loss_cls` that comes from the positive anchors, over all their classes; a float32 scalar.

    The rest of `loss_cls` comes from the negatives. This is a second pass over the logits, for the log only.
    """
    return _class_loss(outputs.logits, anchors, assignment.labels_NR, normalizer_N, config, positives_only=True)


def _class_loss(
    logits: list[Tensor],
    anchors: tuple[Tensor, ...],
    labels_NR: Tensor,
    normalizer_N: Tensor,
    config: cfg.Loss,
    positives_only: bool = False,
) -> Tensor:
    weight_NR = (1 / normalizer_N)[:, None].expand_as(labels_NR)
    if config.cls == "ohem" or config.cls == "ohem_1_3":  # mypy does not narrow the type by `in`
        loss_NR = ohem_loss(
            torch.cat(logits, dim=1),
            labels_NR,
            torch.cat(anchors),
            batch_size=config.ohem_batch,
            nms_iou=config.ohem_nms,
            negatives_per_positive=3 if config.cls == "ohem_1_3" else None,
            weight=weight_NR,
            reduction="none",
        )
        is_positive_NR = (labels_NR >= 0) & (labels_NR < logits[0].shape[-1])
        return (loss_NR * is_positive_NR if positives_only else loss_NR).sum()
    if positives_only:
        labels_NR = torch.where(labels_NR < logits[0].shape[-1], labels_NR, -1)
    if config.cls == "focal":
        loss = partial(sigmoid_focal_loss, gamma=config.gamma, alpha=config.alpha)
    elif config.cls == "focal_star":
        loss = partial(focal_star_loss, gamma=config.gamma, beta=config.beta, alpha=config.alpha)
    else:
        assert_never(config.cls)
    sizes = [len(level) for level in anchors]
    # Level by level: to concatenate the logits would copy the largest tensors of the step.
    levels = list(zip(logits, torch.split(labels_NR, sizes, dim=1), torch.split(weight_NR, sizes, dim=1), strict=True))
    if config.normalizer == "image":
        losses = [loss(x, labels, weight=weight, reduction="sum") for x, labels, weight in levels]
    else:  # one divisor for all images is cheaper than a weight for every anchor
        losses = [loss(x, labels, avg_factor=normalizer_N[0]) for x, labels, _ in levels]
    return torch.stack(losses).sum()


def _box_loss(
    deltas: list[Tensor],
    anchors: tuple[Tensor, ...],
    assignment: Assignment,
    num_classes: int,
    weight_NR: Tensor,
    config: cfg.Loss,
    max_ratio: float,
    every_anchor: bool,
) -> Tensor:
    """The weighted sum of the box losses of the positive anchors; a float32 scalar.

    `every_anchor` (on CUDA) computes the loss of all anchors, with weight 0 where not positive. To select the
    positives, the host would have to wait until the device has counted them.

    `predicted` are the network's deltas, `boxes` the matched ground truth in pixels. CONTRIBUTING.md says how to add a
    box loss.
    """
    anchors_R4, deltas_NR4 = torch.cat(anchors), torch.cat(deltas, dim=1)
    is_positive_NR = (assignment.labels_NR >= 0) & (assignment.labels_NR < num_classes)
    if every_anchor:
        weights = weight_NR * is_positive_NR
        box_anchors = anchors_R4.expand_as(deltas_NR4)
        boxes = torch.where(is_positive_NR[..., None], assignment.boxes_NR4, box_anchors)
        predicted = torch.where(is_positive_NR[..., None], deltas_NR4.float(), 0)  # infinity * weight 0 would be NaN
    else:
        image_P, anchor_P = is_positive_NR.nonzero(as_tuple=True)
        weights = weight_NR[image_P, anchor_P]
        box_anchors, boxes = anchors_R4[anchor_P], assignment.boxes_NR4[image_P, anchor_P]
        predicted = deltas_NR4[image_P, anchor_P].float()
    if config.box == "giou":
        losses = giou_loss(decode(predicted, box_anchors, max_ratio), boxes)
    elif config.box == "l1":
        losses = l1_loss(predicted, encode(boxes, box_anchors))
    elif config.box == "smooth_l1":
        losses = smooth_l1_loss(predicted, encode(boxes, box_anchors), config.smooth_l1_beta)
    else:
        assert_never(config.box)
    return (losses * weights).sum()
