"""Online hard example mining (Shrivastava et al., CVPR 2016, arXiv 1604.03540), which table 1d of the paper compares.

The loss uses only the hardest anchors: anchors are sorted by their loss, non-maximum suppression removes the neighbors
of each selected anchor, and the first `batch_size` of each image are selected. In the 1:3 variant at most a quarter of
these are positives, and there are three negatives per positive.

The paper does not specify these details, which are our choice: `batch_size` counts per image, the suppression uses the
anchor boxes, and in the 1:3 variant positives and negatives are suppressed separately, so that a hard positive does not
remove the negatives around it. N images, R anchors, K classes.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from retina.losses.arguments import Reduction, check_avg_factor, check_count, check_floats, check_number, check_tensor
from retina.losses.focal import HAS_TRITON, sigmoid_focal_loss


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
        targets_NR: class ids (N, R) of any integer dtype; K is background.
        anchors_R4: xyxy boxes (R, 4), or (N, R, 4), for the suppression.
        batch_size: the largest number of anchors selected in an image.
        nms_iou: an anchor is suppressed by a harder one whose IoU with it is above this.
        negatives_per_positive: None selects the hardest positives and negatives together; 3 is the 1:3 variant: at most
            batch_size / 4 positives, and 3 negatives per positive (3 in an image without positives).
        weight: a factor for each anchor (N, R); it does not change the selection.
        reduction: "none" returns (N, R), 0 where not selected; "sum"; "mean" divides by the number of selected anchors.
        avg_factor: the divisor of "mean" instead.
        ignore_index: the class id of anchors that are never selected.

    Returns: float32 (float64 for float64 logits): a scalar, or (N, R) for "none".

    Raises: ValueError for shapes, dtypes or values that do not fit.

    On CUDA the selection sorts the anchors, and one kernel suppresses them. Elsewhere it takes batch_size passes over
    the anchors. Both select the same, and the host never waits for the device.
    """
    check_count("batch_size", batch_size)
    check_number("nms_iou", nms_iou, 0, 1)
    if negatives_per_positive is not None:
        check_count("negatives_per_positive", negatives_per_positive)
        check_count("batch_size", batch_size, 1 + negatives_per_positive)
    check_avg_factor(avg_factor, reduction)
    _check_shapes(logits_NRK, targets_NR, anchors_R4)
    if weight is not None:
        check_tensor("weight", weight)
        if weight.shape != targets_NR.shape:
            raise ValueError(
                f"weight: given shape {tuple(weight.shape)}, expected {tuple(targets_NR.shape)} (one per anchor)"
            )
    targets_NR, anchors_R4 = targets_NR.long(), anchors_R4.float()  # areas overflow in float16
    cross_entropy = partial(sigmoid_focal_loss, logits_NRK, alpha=None, gamma=0.0, ignore_index=ignore_index)
    with torch.no_grad():
        loss_NR = cross_entropy(targets_NR, reduction="none").sum(dim=-1)
        not_ignored_NR = targets_NR != ignore_index
        if negatives_per_positive is None:
            selected_NR = _select_hardest(loss_NR, anchors_R4, not_ignored_NR, batch_size, nms_iou)
        else:
            max_positives = batch_size // (1 + negatives_per_positive)
            is_background_NR = targets_NR == logits_NRK.shape[-1]
            selected_NR = _select_hardest(
                loss_NR, anchors_R4, not_ignored_NR & ~is_background_NR, max_positives, nms_iou
            )
            limit_N = negatives_per_positive * selected_NR.sum(dim=1).clamp(min=1)
            max_negatives = negatives_per_positive * max_positives
            is_negative_NR = not_ignored_NR & is_background_NR
            selected_NR |= _select_hardest(loss_NR, anchors_R4, is_negative_NR, max_negatives, nms_iou, limit_N)
    selected_targets_NR = torch.where(selected_NR, targets_NR, ignore_index)
    if reduction == "none":
        return cross_entropy(selected_targets_NR, weight=weight, reduction="none").sum(dim=-1)
    if reduction == "mean" and avg_factor is None:
        avg_factor = selected_NR.sum().clamp(min=1)
    return cross_entropy(selected_targets_NR, weight=weight, reduction=reduction, avg_factor=avg_factor)


def _select_hardest(
    loss_NR: Tensor,
    boxes: Tensor,
    candidates_NR: Tensor,
    count: int,
    nms_iou: float,
    limit_N: Tensor | None = None,
) -> Tensor:
    """Selects the first `count` anchors of each image, at most `limit_N`, after suppression by loss; bool (N, R)."""
    if not loss_NR.shape[1]:
        return candidates_NR
    if loss_NR.is_cuda and HAS_TRITON:
        return _select_with_kernel(loss_NR, boxes, candidates_NR, count, nms_iou, limit_N)
    # One anchor of each image at a time: `count` passes over the anchors, and never a matrix of R x R IoUs.
    remaining_NR, selected_NR = candidates_NR.clone(), torch.zeros_like(candidates_NR)
    for number in range(min(count, loss_NR.shape[1])):
        hardest_N1 = torch.where(remaining_NR, loss_NR, -torch.inf).argmax(dim=1, keepdim=True)
        selects_N1 = remaining_NR.gather(1, hardest_N1)
        if limit_N is not None:
            selects_N1 = selects_N1 & (number < limit_N[:, None])
        selected_NR.scatter_(1, hardest_N1, selects_N1 | selected_NR.gather(1, hardest_N1))
        remaining_NR.scatter_(1, hardest_N1, False)
        remaining_NR &= ~(selects_N1 & (_iou_with_one(boxes, hardest_N1) > nms_iou))
    return selected_NR


def _select_with_kernel(
    loss_NR: Tensor,
    boxes: Tensor,
    candidates_NR: Tensor,
    count: int,
    nms_iou: float,
    limit_N: Tensor | None = None,
) -> Tensor:
    """As `_select_hardest`."""
    from retina.losses.nms_triton import nms  # here, because importing Triton is slow

    # Of equal losses the first anchor comes first, as argmax chooses.
    order_NR = torch.where(candidates_NR, loss_NR, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    boxes_NR4 = boxes[order_NR] if boxes.dim() == 2 else boxes.take_along_dim(order_NR[:, :, None], dim=1)
    num_candidates_N = candidates_NR.sum(dim=1, dtype=torch.int32)
    keep_NM, found_N = nms(boxes_NR4, torch.zeros_like(order_NR), num_candidates_N, nms_iou, count)
    if limit_N is not None:
        found_N = torch.minimum(found_N, limit_N)  # the hardest come first
    is_kept_NM = torch.arange(count, device=found_N.device) < found_N[:, None]
    # Added, because the places after the last kept one are all 0.
    votes_NR = torch.zeros_like(loss_NR, dtype=torch.int32)
    return votes_NR.scatter_add_(1, order_NR.gather(1, keep_NM), is_kept_NM.int()) > 0


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
