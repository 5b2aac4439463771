"""The focal loss over one softmax: a drop-in for `F.cross_entropy` and, after a LogSoftmax, for `F.nll_loss`.

With p_c the probability of class c, q_c its target (1 for the true class, or smoothed, or a distribution) and w_c its
weight,

    FL = - sum_c w_c q_c (1 - p_c)^gamma log(p_c)                                (eq. 4 of the paper, for each class)

which is the (weighted, smoothed) cross entropy at gamma = 0. The weight of a class does what alpha does for a sigmoid.
N rows, C classes; further dimensions d1, d2, ... follow the classes, as in PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from retina.losses.arguments import (
    Reduction,
    check_choice,
    check_class_ids,
    check_floats,
    check_labels,
    check_number,
    per_class,
    readable,
)
from retina.losses.focal import modulating_factor


def softmax_focal_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    gamma: float = 2.0,
    class_weight: Sequence[float] | Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Focal loss over a softmax, with the arguments of `F.cross_entropy`.

    Args:
        logits: float (N, C), (N, C, d1, ...) or (C,).
        targets: integer class ids of the same shape without C, 0..C-1 or `ignore_index`; or floats of `logits.shape`,
            a distribution over the classes.
        gamma: focusing parameter, at least 0; 0 is `F.cross_entropy`.
        class_weight: (C,), at least 0; see `class_weights`.
        ignore_index: the class id that is left out: its loss and its gradient are exactly 0.
        label_smoothing: share of the target, 0 to 1, that is spread evenly over the classes.
        reduction: "none" keeps the shape of the class ids, "sum" adds up, "mean" divides by the sum of the weights of
            the targets (class ids) or by the number of rows (distributions), as `F.cross_entropy` does; where
            everything is left out it is 0, not NaN.

    Returns: float32 (float64 for float64 logits). Raises: ValueError for shapes, dtypes or values that do not fit.
    """
    check_floats("logits", logits)
    check_number("label_smoothing", label_smoothing, 0, 1)
    x = logits if logits.dtype == torch.float64 else logits.float()
    x = _clear_ignored(x, targets, ignore_index)
    return _focal_nll(_log_softmax(x), targets, gamma, class_weight, ignore_index, label_smoothing, reduction)


def focal_nll_loss(
    log_probs: Tensor,
    targets: Tensor,
    *,
    gamma: float = 2.0,
    class_weight: Sequence[float] | Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """Focal loss for a model that ends in LogSoftmax; at gamma 0 it is `F.nll_loss`.

    `log_probs`: float (N, C), (N, C, d1, ...) or (C,), at most 0. All else as in `softmax_focal_loss`. Raises
    ValueError, for log-probabilities above 0 too (looked at on the CPU): those are logits or probabilities.
    """
    check_floats("log_probs", log_probs)
    if readable(log_probs) and log_probs.numel() and log_probs.max() > 1e-4:
        raise ValueError(f"log_probs: given up to {log_probs.max():g}, expected at most 0: the output of a LogSoftmax")
    log_p = log_probs if log_probs.dtype == torch.float64 else log_probs.float()
    log_p = _clear_ignored(log_p, targets, ignore_index)
    return _focal_nll(log_p, targets, gamma, class_weight, ignore_index, 0.0, reduction)


def _focal_nll(
    log_p: Tensor,
    targets: Tensor,
    gamma: float,
    class_weight: Sequence[float] | Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: Reduction,
) -> Tensor:
    check_number("gamma", gamma, 0)
    check_choice("reduction", reduction, get_args(Reduction))
    dim, classes = _class_dim(log_p), log_p.shape[_class_dim(log_p)]
    weight_C = None if class_weight is None else per_class("class_weight", class_weight, log_p, dim=dim)
    column = [-1 if d == dim else 1 for d in range(log_p.dim())]  # (C,) beside log_p

    if targets.is_floating_point():
        check_labels(targets)
        q, row_weight = targets.to(log_p.dtype), torch.ones_like(log_p.select(dim, 0))
    else:
        check_class_ids(targets, classes, ignore_index, background=False)
        kept = targets.long() != ignore_index
        ids = torch.where(kept, targets, 0).long()
        row_weight = kept.to(log_p.dtype) if weight_C is None else weight_C[ids] * kept
        if label_smoothing == 0:
            log_p_y = log_p.gather(dim, ids.unsqueeze(dim)).squeeze(dim)
            return _reduce(row_weight * _focal(log_p_y, gamma), row_weight, reduction)
        q = (ids.unsqueeze(dim) == torch.arange(classes, device=ids.device).view(column)).to(log_p.dtype)
        q = q * kept.unsqueeze(dim)
    if label_smoothing > 0:
        q = (1 - label_smoothing) * q + label_smoothing / classes * (row_weight != 0).unsqueeze(dim)
    loss = q * _focal(torch.where(q > 0, log_p, 0), gamma)  # a class without a share may have probability 0
    if weight_C is not None:
        loss = loss * weight_C.view(column)
    return _reduce(loss.sum(dim), row_weight, reduction)


def _focal(log_p: Tensor, gamma: float) -> Tensor:
    return -modulating_factor(log_p, -torch.expm1(log_p), gamma) * log_p


def _reduce(loss: Tensor, row_weight: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    total = row_weight.sum()
    return loss.sum() / torch.where(total > 0, total, 1)


def _class_dim(x: Tensor) -> int:
    return 0 if x.dim() == 1 else 1


def _clear_ignored(x: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Zeros for the rows that are left out, whatever stood there: 0 * inf is NaN. Raises ValueError for shapes."""
    dim = _class_dim(x)
    rows = (*x.shape[:dim], *x.shape[dim + 1 :])
    if targets.is_floating_point() and targets.shape == x.shape:
        return x
    if targets.is_floating_point() or targets.dtype == torch.bool or targets.shape != rows:
        raise ValueError(
            f"targets: given {targets.dtype} of shape {tuple(targets.shape)} for {tuple(x.shape)}; "
            f"expected class ids (integers) {rows} or probabilities (floats) {tuple(x.shape)}"
        )
    return torch.where((targets.long() != ignore_index).unsqueeze(dim), x, 0)


def _log_softmax(x: Tensor) -> Tensor:
    """Log-probabilities with their digits near p = 1, where F.log_softmax rounds to 0 (from 1 - p = 6e-8 on)."""
    dim = _class_dim(x)
    top, index = x.max(dim, keepdim=True)
    below = x - top
    # What the subtraction rounded away (Knuth's two-sum); exp turns it into a relative error of exp(below).
    moved = below.detach() - x
    lost = ((x - (below - moved)) - (top + moved)).detach().nan_to_num(0, 0, 0)
    others = (torch.exp(below) * (1 + lost)).scatter(dim, index, 0).sum(dim, keepdim=True)
    return F.log_softmax(x, dim).scatter(dim, index, -torch.log1p(others))
