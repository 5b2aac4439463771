"""Online hard example mining, the paper's rival (table 1d; Shrivastava et al., CVPR 2016, arXiv 1604.03540).

Instead of weighting all anchors by their loss, only the hardest are learnt from: anchors are sorted by their loss,
non-maximum suppression removes the neighbours of each that is taken, and the first `batch_size` of each image make the
batch. In the 1:3 variant a quarter of it is kept for positives and each positive brings three negatives.

What the paper leaves open is decided here: the batch is counted for each image, the boxes of the suppression are the
anchors, and in the 1:3 variant positives and negatives are suppressed apart, so that a hard positive does not hide the
negatives around it. N images, R anchors, K classes.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from retina.losses.arguments import Reduction, check_avg_factor, check_count, check_floats, check_number, check_tensor
from retina.losses.focal import sigmoid_focal_loss


def ohem_loss(
    logits_NRK: Tensor,
    targets_NR: Tensor,
    anchors_R4: Tensor,
    *,
    batch_size: int = 128,
    nms_iou: float = 0.5,
    negatives_per_positive: int | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    avg_factor: float | Tensor | None = None,
    ignore_index: int = -1,
) -> Tensor:
    """Binary cross entropy of the hardest anchors of each image, summed over the classes.

    Args:
        logits_NRK: float (N, R, K).
        targets_NR: class ids (N, R), any integer dtype; K is background.
        anchors_R4: float (R, 4) xyxy, or (N, R, 4): the boxes of the suppression.
        batch_size: anchors taken in an image, at most.
        nms_iou: an anchor is suppressed by a harder one whose IoU with it is above this.
        negatives_per_positive: None takes the hardest of both kinds; 3 is the 1:3 variant: at most batch_size / 4
            positives, and 3 negatives for each (for one, where there is no positive).
        weight: a factor for each anchor (N, R), which does not change which are taken.
        reduction: "none" keeps (N, R), 0 where not taken; "sum" adds up; "mean" divides by the number taken.
        avg_factor: what "mean" divides by instead.
        ignore_index: the class id that is never taken.

    Returns: float32 (float64 for float64 logits). Raises: ValueError for what does not fit. It makes batch_size passes
        over the anchors and never waits for the device.
    """
    check_count("batch_size", batch_size)
    check_number("nms_iou", nms_iou, 0, 1)
    if negatives_per_positive is not None:
        check_count("negatives_per_positive", negatives_per_positive)
        check_count("batch_size", batch_size, 1 + negatives_per_positive)
    check_avg_factor(avg_factor, reduction)
    _check_shapes(logits_NRK, targets_NR, anchors_R4)
    if weight is not None and weight.shape != targets_NR.shape:
        raise ValueError(
            f"weight: given shape {tuple(weight.shape)}, expected {tuple(targets_NR.shape)} (one an anchor)"
        )
    targets_NR, anchors_R4 = targets_NR.long(), anchors_R4.float()  # areas overflow in float16
    cross_entropy = partial(sigmoid_focal_loss, logits_NRK, alpha=None, gamma=0.0, ignore_index=ignore_index)
    with torch.no_grad():
        loss_NR = cross_entropy(targets_NR, reduction="none").sum(dim=-1)
        kept_NR = targets_NR != ignore_index
        if negatives_per_positive is None:
            taken_NR = _select_hardest(loss_NR, anchors_R4, kept_NR, batch_size, nms_iou)
        else:
            share = batch_size // (1 + negatives_per_positive)
            is_background_NR = targets_NR == logits_NRK.shape[-1]
            taken_NR = _select_hardest(loss_NR, anchors_R4, kept_NR & ~is_background_NR, share, nms_iou)
            quota_N = negatives_per_positive * taken_NR.sum(dim=1).clamp(min=1)
            negatives = negatives_per_positive * share
            taken_NR |= _select_hardest(loss_NR, anchors_R4, kept_NR & is_background_NR, negatives, nms_iou, quota_N)
    mined_NR = torch.where(taken_NR, targets_NR, ignore_index)
    if reduction == "none":
        return cross_entropy(mined_NR, weight=weight, reduction="none").sum(dim=-1)
    if reduction == "mean" and avg_factor is None:
        avg_factor = taken_NR.sum().clamp(min=1)
    return cross_entropy(mined_NR, weight=weight, reduction=reduction, avg_factor=avg_factor)


def _select_hardest(
    loss_NR: Tensor,
    boxes: Tensor,
    candidates_NR: Tensor,
    count: int,
    nms_iou: float,
    quota_N: Tensor | None = None,
) -> Tensor:
    """The first `count` (of each image at most `quota_N`) that greedy suppression by loss leaves; bool (N, R)."""
    if not loss_NR.shape[1]:
        return candidates_NR
    # The greedy order is kept by taking one after the other, so it costs `count` passes and never R x R overlaps.
    alive_NR, taken_NR = candidates_NR.clone(), torch.zeros_like(candidates_NR)
    for place in range(count):
        best_N1 = torch.where(alive_NR, loss_NR, -torch.inf).argmax(dim=1, keepdim=True)
        takes_N1 = alive_NR.gather(1, best_N1)
        if quota_N is not None:
            takes_N1 = takes_N1 & (place < quota_N[:, None])
        taken_NR.scatter_(1, best_N1, takes_N1 | taken_NR.gather(1, best_N1))
        alive_NR.scatter_(1, best_N1, False)
        alive_NR &= ~(takes_N1 & (_iou_with_one(boxes, best_N1) > nms_iou))
    return taken_NR


def _iou_with_one(boxes: Tensor, index_N1: Tensor) -> Tensor:
    """IoU of one box of each image with all boxes, (N, R)."""
    one = boxes[index_N1] if boxes.dim() == 2 else boxes.gather(1, index_N1[:, :, None].expand(-1, -1, 4))
    sides = torch.minimum(one[..., 2:], boxes[..., 2:]) - torch.maximum(one[..., :2], boxes[..., :2])
    inter = sides.clamp(min=0).prod(dim=-1)
    area, area_one = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1), (one[..., 2:] - one[..., :2]).prod(dim=-1)
    return inter / (area + area_one - inter).clamp(min=torch.finfo(inter.dtype).tiny)


def _check_shapes(logits: Tensor, targets: Tensor, anchors: Tensor) -> None:
    check_floats("logits", logits)
    check_tensor("targets", targets)
    check_tensor("anchors", anchors)
    ids = not targets.is_floating_point() and targets.dtype != torch.bool
    if logits.dim() != 3 or targets.shape != logits.shape[:2] or not ids:
        raise ValueError(
            f"expected logits (N, R, K) with integer targets (N, R); given {tuple(logits.shape)} with "
            f"{targets.dtype} {tuple(targets.shape)}"
        )
    if anchors.shape not in ((logits.shape[1], 4), (*logits.shape[:2], 4)):
        raise ValueError(
            f"anchors: given shape {tuple(anchors.shape)}, expected {(logits.shape[1], 4)} or {(*logits.shape[:2], 4)}"
        )
