"""Matching: anchors x ground-truth boxes -> a class id, background or "ignored" for every anchor.

This file runs on the CPU and is the reference. On CUDA, assign_triton.py computes equal labels and boxes, and the host
does not wait for the device.

N images, R anchors (all levels), M boxes of an image, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from retina import config as cfg
from retina.boxes import box_iou, intersection_over_area
from retina.data.batch import Target
from retina.losses.arguments import can_read_values
from retina.losses.focal import HAS_TRITON, warn_triton_missing


class Assignment(NamedTuple):
    """labels_NR: int16; 0..K-1 a class, K background, -1 ignored. boxes_NR4: float32 xyxy; zeros where not positive."""

    labels_NR: Tensor
    boxes_NR4: Tensor


@torch.no_grad()
def assign(
    anchors: tuple[Tensor, ...],
    targets: list[Target],
    sizes: list[tuple[int, int]],
    num_classes: int,
    config: cfg.Assign,
) -> Assignment:
    """Match each anchor to the box of highest IoU: positive from `positive_iou` on, background below `negative_iou`.

    Anchors between the two thresholds are ignored. `low_quality` decides about the best anchors of a box, those with
    its highest IoU, where that is above 0: "keep" makes them positive for the box that they overlap most (Detectron,
    torchvision), "overwrite" makes them positive for the box whose best anchors they are (mmdetection), "none" treats
    them as all others. So a box may get no anchor, without a message: with "keep" one that is equal to another or
    inside of it, with "overwrite" one whose best anchors are also those of a later box, with "none" every box below
    `positive_iou`, and always one that overlaps no anchor. Anchors with at least half of their area
    inside an `ignore` box are ignored unless positive. With `padding: ignore` (mmdetection), anchors whose center is
    outside of the image's own size, rounded up to a multiple of 32, are ignored and are nobody's best anchor.

    Args:
        anchors: xyxy boxes of each level, float32 (R_level, 4).
        targets: ground truth of each image, at least one.
        sizes: (height, width) of each image without its padding.
        num_classes: K.
        config: the thresholds and choices.

    Raises:
        ValueError: K does not fit into int16; no images; another number of sizes; a target of wrong shapes, with labels
            that are no integers or, checked on the CPU only, with one that is not in 0..K-1.
        TypeError: a target is no `Target` of tensors.
    """
    if num_classes > torch.iinfo(torch.int16).max:
        raise ValueError(f"num_classes: given {num_classes}, expected at most {torch.iinfo(torch.int16).max}")
    if not len(targets) or len(targets) != len(sizes):
        raise ValueError(
            f"given {len(targets)} targets and {len(sizes)} sizes, expected one of each for every image, "
            "and at least one image"
        )
    anchors_R4 = torch.cat(anchors)
    targets = [_checked(f"targets[{i}]", target, num_classes, anchors_R4.dtype) for i, target in enumerate(targets)]
    if config.padding == "ignore":
        sizes = [(-(-height // 32) * 32, -(-width // 32) * 32) for height, width in sizes]
    if anchors_R4.is_cuda and not HAS_TRITON:
        warn_triton_missing()
    elif anchors_R4.is_cuda:
        from retina.assign_triton import match  # here, because importing Triton is slow

        return Assignment(*match(anchors_R4, targets, sizes, num_classes, config))
    per_image = [
        _assign_image(anchors_R4, target, size, num_classes, config)
        for target, size in zip(targets, sizes, strict=True)
    ]
    return Assignment(torch.stack([labels for labels, _ in per_image]), torch.stack([boxes for _, boxes in per_image]))


def _checked(name: str, target: Target, num_classes: int, dtype: torch.dtype) -> Target:
    """The target with boxes of `dtype` and int64 labels. Raises for one that does not fit; see `assign`."""
    is_triple = isinstance(target, tuple) and len(target) == 3
    if not is_triple or not all(isinstance(part, Tensor) for part in target):
        given = [type(part).__name__ for part in target] if is_triple else type(target).__name__
        raise TypeError(f"{name}: given {given}, expected retina.data.batch.Target(boxes, labels, ignore) of tensors")
    # Of no objects: torch.tensor([]) is float32 and has one dimension.
    boxes, ignore = (part if part.numel() else part.reshape(0, 4) for part in (target[0], target[2]))
    labels = target[1] if target[1].numel() else target[1].reshape(0).long()
    is_id = not labels.is_floating_point() and labels.dtype != torch.bool
    if not is_id or labels.dim() != 1 or boxes.shape != (len(labels), 4) or ignore.shape[1:] != (4,):
        raise ValueError(
            f"{name}: given boxes {tuple(boxes.shape)}, labels {tuple(labels.shape)} of {labels.dtype} and "
            f"ignore {tuple(ignore.shape)}; expected boxes (M, 4), labels (M,) of integers and ignore (I, 4)"
        )
    labels = labels.long()  # uint8 would wrap in a comparison with a larger K
    if can_read_values(labels):
        if not torch.cat([boxes, ignore]).isfinite().all():  # a NaN would take the anchors of all other boxes
            raise ValueError(f"{name}: a box or a region to ignore is not finite")
        wrong = ((labels < 0) | (labels >= num_classes)).nonzero()[:, 0].tolist()
        if wrong:
            raise ValueError(
                f"{name}: class id {int(labels[wrong[0]])} of box {wrong[0]}, expected 0..{num_classes - 1}; "
                "subtract 1 if your ids begin at 1, and put boxes to ignore into `ignore`"
            )
    return Target(boxes.to(dtype), labels, ignore.to(dtype))


def _assign_image(
    anchors_R4: Tensor, target: Target, size: tuple[int, int], num_classes: int, config: cfg.Assign
) -> tuple[Tensor, Tensor]:
    labels_R = anchors_R4.new_full((len(anchors_R4),), num_classes, dtype=torch.int16)
    boxes_R4 = torch.zeros_like(anchors_R4)
    if len(target.ignore):
        labels_R[intersection_over_area(target.ignore, anchors_R4).amax(dim=0) >= 0.5] = -1
    outside_R = torch.zeros_like(labels_R, dtype=torch.bool)
    if config.padding == "ignore":
        height, width = size
        center_x, center_y = ((anchors_R4[:, :2] + anchors_R4[:, 2:]) / 2).unbind(1)
        outside_R = (center_x >= width) | (center_y >= height)
    if len(target.boxes):
        iou_MR = box_iou(target.boxes, anchors_R4)
        iou_MR[:, outside_R] = 0
        max_iou_R, match_R = iou_MR.max(dim=0)
        positive_R = (max_iou_R >= config.positive_iou) & ~outside_R
        between_R = (max_iou_R >= config.negative_iou) & ~positive_R
        if config.low_quality != "none":
            max_iou_M = iou_MR.amax(dim=1)
            # A box that overlaps no anchor has IoU 0 with all of them: that is no match.
            is_best_MR = (iou_MR == max_iou_M[:, None]) & (max_iou_M[:, None] > 0)
            is_best_R = is_best_MR.any(dim=0)
            positive_R |= is_best_R
            if config.low_quality == "overwrite":
                order_M1 = torch.arange(1, len(target.boxes) + 1, device=iou_MR.device)[:, None]
                last_R = (is_best_MR * order_M1).amax(dim=0) - 1  # the later box wins, as in mmdetection
                match_R = torch.where(is_best_R, last_R, match_R)
        labels_R = torch.where(between_R, -1, labels_R)
        labels_R = torch.where(positive_R, target.labels[match_R].to(labels_R.dtype), labels_R)
        boxes_R4 = torch.where(positive_R[:, None], target.boxes[match_R], boxes_R4)
    labels_R[outside_R] = -1
    return labels_R, boxes_R4
