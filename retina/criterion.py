"""The training loss: focal loss over all anchors, box loss over the positive ones, both divided by the normaliser.

N images, R anchors, K classes. The normaliser comes from the matching alone, so it is known before the network runs and
can count the positives of a whole global batch, over micro-batches and processes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retina import config as cfg
from retina.assign import Assignment
from retina.boxes import decode, encode
from retina.losses import giou_loss, l1_loss, sigmoid_focal_loss, smooth_l1_loss
from retina.model.retinanet import Outputs


def count_positives(assignment: Assignment, num_classes: int) -> Tensor:
    """Positive anchors of each image; float32 (N,)."""
    labels_NR = assignment.labels_NR
    return ((labels_NR >= 0) & (labels_NR < num_classes)).sum(dim=1).float()


def normalizer(positives_N: Tensor, batch_positives: Tensor, batch_images: int, average: Tensor, mode: str) -> Tensor:
    """What each image's loss is divided by, never less than 1; float32 (N,).

    `batch`: the positives of the whole global batch (`batch_positives`). `image`: the image's own, times the number of
    images of the global batch (`batch_images`), which is torchvision's mean over images. `ema`: the moving average
    (detectron2), advanced by `advance_average`.
    """
    if mode == "image":
        return positives_N.clamp(min=1) * batch_images
    value = average if mode == "ema" else batch_positives
    return value.clamp(min=1).expand_as(positives_N)


def advance_average(average: Tensor, batch_positives: Tensor, momentum: float) -> Tensor:
    """The next value of the moving average of positives; detectron2 starts it at 100 with momentum 0.9."""
    return momentum * average + (1 - momentum) * batch_positives.clamp(min=1)


def detection_loss(
    outputs: Outputs,
    anchors: tuple[Tensor, ...],
    assignment: Assignment,
    normalizer_N: Tensor,
    config: cfg.Loss,
    max_ratio: float,
) -> dict[str, Tensor]:
    """float32 scalars `loss` = `cls_weight` loss_cls + `box_weight` loss_box, to be summed over micro-batches.

    `max_ratio` clamps decoded sides for GIoU. Source: paper, sections 3 and 4 ("Inference and Training").
    """
    weight_N1 = (1 / normalizer_N)[:, None]
    sizes = [len(level) for level in anchors]
    loss_cls = torch.zeros((), device=weight_N1.device)
    loss_box = torch.zeros((), device=weight_N1.device)
    for logits, deltas, anchors_R4, labels_NR, boxes_NR4 in zip(
        outputs.logits,
        outputs.deltas,
        anchors,
        torch.split(assignment.labels_NR, sizes, dim=1),
        torch.split(assignment.boxes_NR4, sizes, dim=1),
        strict=True,
    ):
        weight_NR = weight_N1.expand_as(labels_NR)
        loss_cls = loss_cls + sigmoid_focal_loss(
            logits, labels_NR, alpha=config.alpha, gamma=config.gamma, weight=weight_NR, reduction="sum"
        )
        positive_NR = (labels_NR >= 0) & (labels_NR < logits.shape[-1])
        image, anchor = positive_NR.nonzero(as_tuple=True)
        losses = _box_loss(
            deltas[image, anchor].float(), boxes_NR4[image, anchor], anchors_R4[anchor], config, max_ratio
        )
        loss_box = loss_box + (losses * weight_NR[image, anchor]).sum()
    loss = config.cls_weight * loss_cls + config.box_weight * loss_box
    return {"loss": loss, "loss_cls": loss_cls, "loss_box": loss_box}


def _box_loss(deltas: Tensor, boxes: Tensor, anchors: Tensor, config: cfg.Loss, max_ratio: float) -> Tensor:
    if config.box == "giou":
        return giou_loss(decode(deltas, anchors, max_ratio), boxes)
    targets = encode(boxes, anchors)
    return l1_loss(deltas, targets) if config.box == "l1" else smooth_l1_loss(deltas, targets, config.smooth_l1_beta)
