"""The training loss: classes over all anchors, boxes over the positive ones, both divided by the normaliser.

N images, R anchors, K classes, P positive anchors. The normaliser comes from the matching alone, so it is known before
the network runs and can count the positives of a whole global batch, over micro-batches and processes.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from retina import config as cfg
from retina.assign import Assignment
from retina.boxes import decode, encode
from retina.losses import focal_star_loss, giou_loss, l1_loss, ohem_loss, sigmoid_focal_loss, smooth_l1_loss
from retina.model.retinanet import Outputs


def count_positives(assignment: Assignment, num_classes: int) -> Tensor:
    """Positive anchors of each image; float32 (N,)."""
    labels_NR = assignment.labels_NR
    return ((labels_NR >= 0) & (labels_NR < num_classes)).sum(dim=1).float()


def normalizer(
    positives_N: Tensor, batch_positives: Tensor, batch_images: int, ema_positives: Tensor, mode: str
) -> Tensor:
    """What each image's loss is divided by, never less than 1; float32 (N,).

    `batch`: the positives of the whole global batch (`batch_positives`). `image`: the image's own, times the number of
    images of the global batch (`batch_images`), which is torchvision's mean over images. `ema`: the moving average
    (detectron2), which `update_ema_positives` updates.
    """
    if mode == "image":
        return positives_N.clamp(min=1) * batch_images
    value = ema_positives if mode == "ema" else batch_positives
    return value.clamp(min=1).expand_as(positives_N)


def update_ema_positives(ema_positives: Tensor, batch_positives: Tensor, momentum: float) -> Tensor:
    """The next value of the moving average of positives; detectron2 starts it at 100 with momentum 0.9."""
    return momentum * ema_positives + (1 - momentum) * batch_positives.clamp(min=1)


def detection_loss(
    outputs: Outputs,
    anchors: tuple[Tensor, ...],
    assignment: Assignment,
    normalizer_N: Tensor,
    config: cfg.Loss,
    max_ratio: float,
) -> dict[str, Tensor]:
    """float32 scalars `loss` = `cls_weight` loss_cls + `box_weight` loss_box, to be summed over micro-batches.

    `normalizer_N` is what `normalizer` gave: one value for all images unless `config.normalizer` is "image".
    `max_ratio` clamps decoded sides for GIoU. Source: paper, sections 3 and 4 ("Inference and Training").
    """
    weight_NR = (1 / normalizer_N)[:, None].expand_as(assignment.labels_NR)
    loss_cls = _class_loss(outputs.logits, anchors, assignment.labels_NR, normalizer_N, config)
    classes, every_anchor = outputs.logits[0].shape[-1], weight_NR.is_cuda
    loss_box = _box_loss(outputs.deltas, anchors, assignment, classes, weight_NR, config, max_ratio, every_anchor)
    loss = config.cls_weight * loss_cls + config.box_weight * loss_box
    return {"loss": loss, "loss_cls": loss_cls, "loss_box": loss_box}


@torch.no_grad()
def positive_class_loss(
    outputs: Outputs, anchors: tuple[Tensor, ...], assignment: Assignment, normalizer_N: Tensor, config: cfg.Loss
) -> Tensor:
    """The part of `loss_cls` that positive anchors have, over all their classes; what is left is the negatives'.

    A second look at the logits, for the log: a step does not need it.
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
    if config.cls in ("ohem", "ohem_1_3"):
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
    if config.cls == "focal_star":
        loss = partial(focal_star_loss, gamma=config.gamma, beta=config.beta, alpha=config.alpha)
    else:
        loss = partial(sigmoid_focal_loss, gamma=config.gamma, alpha=config.alpha)
    sizes = [len(level) for level in anchors]
    # Level by level: gluing the logits together would copy the largest tensors there are.
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
    """Weighted sum over the positive anchors. `every_anchor` computes all of them, at weight 0 where not positive: to
    pick the positives, the host would have to wait for a device to count them."""
    anchors_R4, deltas_NR4 = torch.cat(anchors), torch.cat(deltas, dim=1)
    is_positive_NR = (assignment.labels_NR >= 0) & (assignment.labels_NR < num_classes)
    if every_anchor:
        weights = weight_NR * is_positive_NR
        anchors_here = anchors_R4.expand_as(deltas_NR4)
        boxes = torch.where(is_positive_NR[..., None], assignment.boxes_NR4, anchors_here)
        given = torch.where(is_positive_NR[..., None], deltas_NR4.float(), 0)  # at weight 0, infinity would be NaN
    else:
        image_P, anchor_P = is_positive_NR.nonzero(as_tuple=True)
        weights = weight_NR[image_P, anchor_P]
        anchors_here, boxes = anchors_R4[anchor_P], assignment.boxes_NR4[image_P, anchor_P]
        given = deltas_NR4[image_P, anchor_P].float()
    if config.box == "giou":
        losses = giou_loss(decode(given, anchors_here, max_ratio), boxes)
    elif config.box == "l1":
        losses = l1_loss(given, encode(boxes, anchors_here))
    else:
        losses = smooth_l1_loss(given, encode(boxes, anchors_here), config.smooth_l1_beta)
    return (losses * weights).sum()
