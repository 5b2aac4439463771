"""Box regression losses, one value per box: smooth L1, L1, GIoU.

Inputs are float32 of shape (R, 4), or (..., 4) with any leading dimensions. Smooth L1 and L1 take deltas to anchors;
GIoU takes xyxy boxes in pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def smooth_l1_loss(deltas_R4: Tensor, targets_R4: Tensor, beta: float) -> Tensor:
    """Smooth L1 of Fast R-CNN (Girshick 2015, eq. 3), linear from `beta` on, summed over the coordinates; (R,)."""
    return F.smooth_l1_loss(deltas_R4, targets_R4, beta=beta, reduction="none").sum(dim=-1)


def l1_loss(deltas_R4: Tensor, targets_R4: Tensor) -> Tensor:
    """Absolute difference, summed over the four coordinates; (R,)."""
    return (deltas_R4 - targets_R4).abs().sum(dim=-1)


def giou_loss(boxes_R4: Tensor, targets_R4: Tensor, eps: float = 1e-7) -> Tensor:
    """1 - GIoU of xyxy boxes (Rezatofighi et al. 2019, algorithm 1); (R,), between 0 and 2."""
    area = _area(boxes_R4[..., 2:] - boxes_R4[..., :2])
    target_area = _area(targets_R4[..., 2:] - targets_R4[..., :2])
    inter_low = torch.maximum(boxes_R4[..., :2], targets_R4[..., :2])
    inter_high = torch.minimum(boxes_R4[..., 2:], targets_R4[..., 2:])
    inter = _area((inter_high - inter_low).clamp(min=0))
    union = area + target_area - inter
    hull_low = torch.minimum(boxes_R4[..., :2], targets_R4[..., :2])
    hull_high = torch.maximum(boxes_R4[..., 2:], targets_R4[..., 2:])
    hull = _area(hull_high - hull_low)
    return 1 - inter / (union + eps) + (hull - union) / (hull + eps)


def _area(sides_R2: Tensor) -> Tensor:
    # Not .prod(dim=-1): its backward counts zeros on the host, which then waits for the device.
    return sides_R2[..., 0] * sides_R2[..., 1]
