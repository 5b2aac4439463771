"""Geometry of xyxy boxes: IoU, clipping, and the R-CNN parametrization of a box relative to an anchor.

Shape suffixes: M boxes, R anchors, 4 = (x1, y1, x2, y2) in pixels. Width is x2 - x1, without +1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.ops import box_iou, clip_boxes_to_image

__all__ = ["box_iou", "clip_boxes_to_image", "decode", "encode", "intersection_over_area"]


def intersection_over_area(boxes_M4: Tensor, anchors_R4: Tensor) -> Tensor:
    """The share of the area of each anchor that is inside each box; float (M, R) between 0 and 1."""
    top_left = torch.maximum(boxes_M4[:, None, :2], anchors_R4[None, :, :2])
    bottom_right = torch.minimum(boxes_M4[:, None, 2:], anchors_R4[None, :, 2:])
    inside_MR = (bottom_right - top_left).clamp(min=0).prod(dim=-1)
    return inside_MR / (anchors_R4[:, 2:] - anchors_R4[:, :2]).prod(dim=-1)


def encode(boxes_R4: Tensor, anchors_R4: Tensor) -> Tensor:
    """Boxes -> deltas (dx, dy, dw, dh), float (R, 4).

    dx, dy: the offset of the center, in widths and heights of the anchor. dw, dh: the logarithm of the ratio of widths
    and heights. R-CNN (Girshick et al. 2014), appendix C, with weights 1. Widths and heights must be positive.
    """
    anchor_size = anchors_R4[..., 2:] - anchors_R4[..., :2]
    anchor_center = anchors_R4[..., :2] + 0.5 * anchor_size
    size = boxes_R4[..., 2:] - boxes_R4[..., :2]
    center = boxes_R4[..., :2] + 0.5 * size
    return torch.cat([(center - anchor_center) / anchor_size, torch.log(size / anchor_size)], dim=-1)


def decode(deltas_R4: Tensor, anchors_R4: Tensor, max_ratio: float) -> Tensor:
    """Deltas -> boxes, the inverse of `encode`; float32 (R, 4).

    The width and height are at most `max_ratio` times those of the anchor, so an untrained or diverging head gives
    finite boxes.
    """
    deltas_R4 = deltas_R4.float()
    anchor_size = anchors_R4[..., 2:] - anchors_R4[..., :2]
    anchor_center = anchors_R4[..., :2] + 0.5 * anchor_size
    center = anchor_center + deltas_R4[..., :2] * anchor_size
    log_ratio = deltas_R4[..., 2:].clamp(max=math.log(max_ratio))
    half_size = 0.5 * torch.exp(log_ratio) * anchor_size
    return torch.cat([center - half_size, center + half_size], dim=-1)
