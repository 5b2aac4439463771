"""The sigmoid focal loss (Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv 1708.02002).

Why
===
A one-stage detector looks at about 100,000 anchors in an image, of which a few dozen lie on an object. Each of the
others is an easy negative whose cross entropy is small, and 100,000 small numbers drown a few dozen large ones: at
p = 0.01 the negatives of one image add up to about 1,000, its thirty positives at p = 0.01 to about 140. So training
attends to background that it already knows.

The mathematics
===============
For a logit x with target y in {0, 1}: x_t = x if y = 1 else -x, and p_t = sigmoid(x_t) is the probability given to the
truth. With alpha_t = alpha if y = 1 else 1 - alpha,

    FL(p_t) = -alpha_t (1 - p_t)^gamma log(p_t)                                            (eq. 5)
    dFL/dx  = y' alpha_t (1 - p_t)^gamma (gamma p_t log(p_t) + p_t - 1),  y' = 2y - 1      (appendix B, with alpha_t)

(1 - p_t)^gamma is the modulating factor: with gamma = 2 a negative at p = 0.01 counts 10,000 times less than its cross
entropy, one at p = 0.9 nearly whole. alpha = 0.25 belongs to the *rare* positive class: gamma has already taken the
easy negatives away, so that what is left of the positives would outweigh the negatives without it.

Numbers that stay right
=======================
Differentiating (1 - p)^gamma at p = 1 gives infinity times zero for gamma < 1; log(sigmoid(x)) is -inf at x = -104 in
float32. Here every factor is an exponential of a softplus: 1 - p_t = exp(-softplus(x_t)), log p_t = -softplus(-x_t),
in float32 at least, whatever the dtype of the logits.

Which path runs
===============
`impl="auto"` takes "chunked" for integer targets that need a reduction and no second derivative (one fused forward that
also leaves the gradient behind, in cache-sized pieces, no one-hot: focal_cpu.py), else "reference" (plain autograd).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from retina.losses.focal_cpu import chunked_focal_loss


def sigmoid_focal_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    reduction: Literal["none", "mean", "sum"] = "mean",
    avg_factor: float | Tensor | None = None,
    ignore_index: int = -1,
    impl: Literal["auto", "reference", "chunked"] = "auto",
) -> Tensor:
    """Focal loss over independent sigmoids, with mmdetection's targets.

    Args:
        logits: float (..., K), one logit a class.
        targets: integers of shape `logits.shape[:-1]`: class ids 0..K-1, K is background, `ignore_index` is left out;
            or floats of `logits.shape` (one-hot, multi-hot or soft labels).
        alpha: weight of the positive class, 1 - alpha of the negative one; None is no weighting.
        gamma: focusing parameter, at least 0; 0 is the (alpha-balanced) cross entropy.
        weight: a factor for each row, shape `logits.shape[:-1]`, or for each element, `logits.shape`.
        reduction: "none" keeps `logits.shape`, "sum" adds everything, "mean" divides by the number of elements.
        avg_factor: what "mean" divides by instead (the number of positive anchors, in a detector).
        ignore_index: the integer target that is left out.
        impl: which path; see the top of this file.

    Returns: float32 (float64 for float64 logits): a scalar, or `logits.shape` for "none".

    Raises: ValueError for shapes, dtypes or values that do not fit. Source: eq. 5 of the paper.
    """
    hard = not targets.is_floating_point()
    _check(logits, targets, weight, alpha, gamma, reduction, avg_factor, hard)
    if impl == "auto":
        rowwise = weight is None or weight.shape == logits.shape[:-1]
        impl = "chunked" if hard and rowwise and reduction != "none" and not logits.is_cuda else "reference"
    if impl == "chunked":
        if not hard or reduction == "none" or (weight is not None and weight.shape != logits.shape[:-1]):
            raise ValueError("impl='chunked' takes integer targets, row weights and reduction 'sum' or 'mean'")
        total = chunked_focal_loss(logits, targets, weight, alpha, gamma, ignore_index)
    elif impl == "reference":
        loss = _reference(logits, targets, alpha, gamma, ignore_index)
        if weight is not None:
            loss = loss * (weight if weight.shape == logits.shape else weight[..., None])
        if reduction == "none":
            return loss
        total = loss.sum()
    else:
        raise ValueError(f"impl: given {impl!r}, expected 'auto', 'reference' or 'chunked'")
    if reduction == "sum":
        return total
    return total / (max(logits.numel(), 1) if avg_factor is None else avg_factor)


def _reference(logits: Tensor, targets: Tensor, alpha: float | None, gamma: float, ignore_index: int) -> Tensor:
    """Plain autograd, element by element; soft targets are the mixture y FL(1) + (1 - y) FL(0)."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    if targets.is_floating_point():
        y, kept = targets.to(x.dtype), None
    else:
        classes = torch.arange(x.shape[-1], device=x.device)
        y = (targets[..., None] == classes).to(x.dtype)
        kept = (targets != ignore_index)[..., None]
    log_p, log_not_p = -F.softplus(-x), -F.softplus(x)
    positive = torch.exp(gamma * log_not_p) * -log_p
    negative = torch.exp(gamma * log_p) * -log_not_p
    if alpha is not None:
        positive, negative = alpha * positive, (1 - alpha) * negative
    loss = y * positive + (1 - y) * negative
    return loss if kept is None else torch.where(kept, loss, torch.zeros_like(loss))


def _check(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    alpha: float | None,
    gamma: float,
    reduction: str,
    avg_factor: float | Tensor | None,
    hard: bool,
) -> None:
    if not logits.is_floating_point() or logits.dim() == 0:
        raise ValueError(f"logits: given {logits.dtype} of shape {tuple(logits.shape)}, expected floats (..., K)")
    expected = logits.shape[:-1] if hard else logits.shape
    if targets.shape != expected:
        kind = "integer" if hard else "float"
        raise ValueError(
            f"targets: {kind} of shape {tuple(targets.shape)} do not fit logits {tuple(logits.shape)}; "
            f"integers take {tuple(logits.shape[:-1])}, floats {tuple(logits.shape)}"
        )
    if weight is not None and weight.shape not in (logits.shape, logits.shape[:-1]):
        raise ValueError(f"weight: given shape {tuple(weight.shape)}, expected a row's or an element's")
    if not gamma >= 0:
        raise ValueError(f"gamma: given {gamma}, expected a number of at least 0")
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"alpha: given {alpha}, expected None or a number from 0 to 1")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction: given {reduction!r}, expected 'none', 'mean' or 'sum'")
    if avg_factor is not None and reduction != "mean":
        raise ValueError(f"avg_factor divides the mean; given with reduction {reduction!r}")
