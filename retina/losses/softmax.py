"""The focal loss over one softmax: a drop-in for `F.cross_entropy` and, after a LogSoftmax, for `F.nll_loss`.

With p_c the probability of class c, q_c its target (1 for the true class, or smoothed, or a distribution) and w_c its
weight,

    FL = - sum_c w_c q_c (1 - p_c)^gamma log(p_c)                                (eq. 4 of the paper, for each class)

which is the (weighted, smoothed) cross entropy at gamma = 0. The weight of a class does what alpha does for a sigmoid.
N rows, C classes; further dimensions d1, d2, ... follow the classes, as in PyTorch.

Class ids on the CPU take one pass that also computes the gradient (softmax_cpu.py). Everything else, and every
derivative after the first backward, is plain autograd: distributions, smoothed labels, class weights with a gradient,
CUDA, torch.compile, torch.func.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from retina.losses.arguments import (
    Reduction,
    can_read_values,
    check_choice,
    check_class_ids,
    check_floats,
    check_ignore_index,
    check_labels,
    check_number,
    check_tensor,
    per_class_tensor,
)
from retina.losses.focal import modulating_factor
from retina.losses.one_pass import LossAndGradient, has_tangent, one_pass_loss, takes_one_pass
from retina.losses.softmax_cpu import softmax_loss_and_gradient


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
        ignore_index: the class id that is ignored: its loss and its gradient are exactly 0.
        label_smoothing: fraction of the target, 0 to 1, that is spread evenly over the classes.
        reduction: "none" keeps the shape of the class ids, "sum" adds up, "mean" divides by the sum of the weights of
            the targets (class ids) or by the number of rows (distributions), as `F.cross_entropy` does; where
            everything is ignored it is 0, not NaN.

    Returns: float32 (float64 for float64 logits). Raises: ValueError for shapes, dtypes or values that do not fit.
    """
    check_floats("logits", logits)
    check_number("label_smoothing", label_smoothing, 0, 1)
    dim, kept = _check_targets(logits, targets, ignore_index)
    if kept is None or label_smoothing > 0:
        x = logits if logits.dtype == torch.float64 else logits.float()
        log_p = _log_softmax(_zero_ignored(x, kept, dim), dim)
        return _all_classes_loss(log_p, targets, kept, gamma, class_weight, label_smoothing, reduction)
    check_number("gamma", gamma, 0)
    check_choice("reduction", reduction, get_args(Reduction))
    ids = torch.where(kept, targets, 0).long()
    row_weight = _row_weight(logits, ids, kept, class_weight)
    has_derivative = row_weight.requires_grad or has_tangent(row_weight)
    if has_derivative or logits.shape[dim] < 2 or not takes_one_pass(logits):
        return _reduce(_plain_loss(logits, ids, row_weight, kept, gamma, dim), row_weight, reduction)

    if reduction == "mean":
        total = row_weight.sum()
        row_weight = row_weight / torch.where(total > 0, total, 1)
    scalar = reduction != "none"

    def fast(x: Tensor, with_gradient: bool) -> LossAndGradient:
        loss, gradient = _fast_loss(x, ids, row_weight, kept, gamma, dim, with_gradient)
        return loss.sum() if scalar else loss.unsqueeze(dim), gradient

    def plain(x: Tensor, ids: Tensor, row_weight: Tensor, kept: Tensor) -> Tensor:
        loss = _plain_loss(x, ids, row_weight, kept, gamma, dim)
        return loss.sum() if scalar else loss

    loss = one_pass_loss(logits, fast, plain, (ids, row_weight, kept))
    return loss if scalar else loss.squeeze(dim).clone()  # a view of it could not be changed in place


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
    ValueError, for log-probabilities above 0 too (checked on the CPU only): those are logits or probabilities.
    """
    check_floats("log_probs", log_probs)
    if can_read_values(log_probs) and log_probs.numel() and log_probs.max() > 1e-4:
        raise ValueError(f"log_probs: given up to {log_probs.max():g}, expected at most 0: the output of a LogSoftmax")
    dim, kept = _check_targets(log_probs, targets, ignore_index)
    log_p = _zero_ignored(log_probs if log_probs.dtype == torch.float64 else log_probs.float(), kept, dim)
    if kept is None:
        return _all_classes_loss(log_p, targets, kept, gamma, class_weight, 0.0, reduction)
    ids = torch.where(kept, targets, 0).long()
    log_p_y = log_p.gather(dim, ids.unsqueeze(dim)).squeeze(dim)
    check_number("gamma", gamma, 0)
    row_weight = _row_weight(log_probs, ids, kept, class_weight)
    loss = _focal_term(log_p_y, -torch.expm1(log_p_y), gamma)
    return _reduce(torch.where(kept, row_weight * loss, 0), row_weight, reduction)


def _check_targets(x: Tensor, targets: Tensor, ignore_index: int) -> tuple[int, Tensor | None]:
    """The dimension of the classes, and which rows are not ignored: None for distributions. Raises ValueError."""
    check_tensor("targets", targets)
    check_ignore_index(ignore_index)
    dim = 0 if x.dim() == 1 else 1
    rows = (*x.shape[:dim], *x.shape[dim + 1 :])
    if targets.is_floating_point() and targets.shape == x.shape:
        check_labels(targets)
        return dim, None
    if targets.is_floating_point() or targets.dtype == torch.bool or targets.shape != rows:
        hint = f"; one-hot targets: targets.float() or targets.argmax({dim})" if targets.shape == x.shape else ""
        raise ValueError(
            f"targets: given {targets.dtype} of shape {tuple(targets.shape)} for {tuple(x.shape)}; "
            f"expected class ids (integers) {rows} or probabilities (floats) {tuple(x.shape)}{hint}"
        )
    check_class_ids(targets, x.shape[dim], ignore_index, background=False)
    return dim, targets.long() != ignore_index  # as uint8, 156 would equal -100


def _zero_ignored(x: Tensor, kept: Tensor | None, dim: int) -> Tensor:
    """Zeros for the ignored rows, because their logits may be infinite, and 0 * inf is NaN."""
    return x if kept is None else torch.where(kept.unsqueeze(dim), x, 0)


def _margin(x: Tensor, ids: Tensor, dim: int) -> Tensor:
    """The logit of p_y = sigmoid(margin): x_y minus the log-sum-exp of the other classes; float64, one per row.

    So p_y and 1 - p_y are accurate near 0 and near 1, where a log_softmax rounds to 0 from 1 - p = 6e-8 on. The sum is
    taken relative to the largest of the others. Its terms have the dtype of `x`; the sum and the rest need float64.
    """
    column = ids.unsqueeze(dim)
    others = x.scatter(dim, column, -torch.inf)
    top = others.detach().amax(dim, keepdim=True)
    alone = top == -torch.inf  # one class, or all others masked: the gradient of their log-sum-exp would be NaN
    others = others.scatter(dim, column, torch.where(alone, 0, top.new_tensor(-torch.inf)))
    top = torch.where(top.isinf(), 0, top)
    rest = torch.exp(others - top).sum(dim, dtype=torch.float64).log()
    x_y = x.gather(dim, column).squeeze(dim).double()
    margin = x_y - top.squeeze(dim).double() - rest
    return torch.where(alone.squeeze(dim), x_y + torch.inf, margin)  # NaN if x_y is -inf too, as in F.cross_entropy


def _row_weight(x: Tensor, ids: Tensor, kept: Tensor, class_weight: Sequence[float] | Tensor | None) -> Tensor:
    """The weight of the true class of each row, 0 for an ignored row; in the dtype of the loss."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if class_weight is None:
        return kept.to(dtype)
    weight_C = per_class_tensor("class_weight", class_weight, x, dim=0 if x.dim() == 1 else 1).to(dtype)
    return _weight_of(ids, kept, weight_C)


def _weight_of(ids: Tensor, kept: Tensor, weight_C: Tensor) -> Tensor:
    # torch.func cannot compute weight_C[ids] for each sample.
    return torch.where(kept, weight_C.gather(0, ids.reshape(-1)).view(ids.shape), 0)


def _plain_loss(x: Tensor, ids: Tensor, row_weight: Tensor, kept: Tensor, gamma: float, dim: int) -> Tensor:
    """The loss of class ids by autograd, one value for each row."""
    x = _zero_ignored(x if x.dtype == torch.float64 else x.float(), kept, dim)
    margin = _margin(x, ids, dim)
    loss = _focal_term(F.logsigmoid(margin), torch.sigmoid(-margin), gamma).to(x.dtype)
    return torch.where(kept, row_weight * loss, 0)


def _fast_loss(
    x: Tensor, ids: Tensor, row_weight: Tensor, kept: Tensor, gamma: float, dim: int, with_gradient: bool
) -> LossAndGradient:
    """The same values and their gradient in one pass; see softmax_cpu.py."""
    last = x.movedim(dim, -1)
    one_position = x.dim() <= 2 or last.is_contiguous()  # then the further dimensions count as rows
    x_NCD = last.reshape(-1, last.shape[-1], 1) if one_position else x.flatten(2)
    rows = [value.reshape(len(x_NCD), x_NCD.shape[2]) for value in (ids, row_weight, kept)]
    plain = partial(_plain_loss, gamma=gamma, dim=1)
    loss_ND, gradient_NCD = softmax_loss_and_gradient(x_NCD, rows, gamma, plain, with_gradient)
    loss, gradient = loss_ND.view(ids.shape), None
    if gradient_NCD is not None:
        gradient = gradient_NCD.view(last.shape).movedim(-1, dim) if one_position else gradient_NCD.view(x.shape)
    return loss, gradient


def _all_classes_loss(
    log_p: Tensor,
    targets: Tensor,
    kept: Tensor | None,
    gamma: float,
    class_weight: Sequence[float] | Tensor | None,
    label_smoothing: float,
    reduction: Reduction,
) -> Tensor:
    """The sum over the classes, for distributions (`kept` None) and smoothed class ids."""
    check_number("gamma", gamma, 0)
    dim = 0 if log_p.dim() == 1 else 1
    classes = log_p.shape[dim]
    column = [-1 if d == dim else 1 for d in range(log_p.dim())]  # the shape that broadcasts (C,) against log_p
    weight_C = None
    if class_weight is not None:
        weight_C = per_class_tensor("class_weight", class_weight, log_p, dim=dim).to(log_p.dtype)
    if kept is None:
        q, row_weight = targets.to(log_p.dtype), torch.ones_like(log_p.select(dim, 0))
        q = (1 - label_smoothing) * q + label_smoothing / classes
    else:
        ids = torch.where(kept, targets, 0).long()
        row_weight = kept.to(log_p.dtype) if weight_C is None else _weight_of(ids, kept, weight_C)
        is_true = ids.unsqueeze(dim) == torch.arange(classes, device=ids.device).view(column)
        q = (1 - label_smoothing) * is_true.to(log_p.dtype) + label_smoothing / classes
        q = q * kept.unsqueeze(dim)
    log_p = torch.where(q > 0, log_p, 0)  # a class with target 0 may have probability 0
    loss = q * _focal_term(log_p, -torch.expm1(log_p), gamma)
    if weight_C is not None:
        loss = loss * weight_C.view(column)
    return _reduce(loss.sum(dim), row_weight, reduction)


def _focal_term(log_p: Tensor, one_minus_p: Tensor, gamma: float) -> Tensor:
    """FL (eq. 4) from log p and 1 - p. A target of probability 0 gives an infinite loss with a finite slope."""
    impossible = log_p == -torch.inf
    possible = torch.where(impossible, 0, log_p)
    return torch.where(impossible, -log_p, -modulating_factor(possible, one_minus_p, gamma) * possible)


def _reduce(loss: Tensor, row_weight: Tensor, reduction: Reduction) -> Tensor:
    check_choice("reduction", reduction, get_args(Reduction))
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    total = row_weight.sum()
    return loss.sum() / torch.where(total > 0, total, 1)


def _log_softmax(x: Tensor, dim: int) -> Tensor:
    """Log-probabilities of all classes, accurate also near p = 1, which only the most probable class can have."""
    top, index = x.max(dim, keepdim=True)
    below = x - top
    # What the subtraction rounded away (Knuth's two-sum); exp turns it into a relative error of exp(below).
    moved = below.detach() - x
    lost = ((x - (below - moved)) - (top + moved)).detach().nan_to_num(0, 0, 0)
    others = (torch.exp(below) * (1 + lost)).scatter(dim, index, 0).sum(dim, keepdim=True, dtype=torch.float64)
    return F.log_softmax(x, dim).scatter(dim, index, -torch.log1p(others).to(x.dtype))
