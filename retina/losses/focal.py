"""The focal loss (Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv 1708.02002) over sigmoids.

Motivation
==========
A one-stage detector evaluates about 100,000 anchors in an image, of which a few dozen lie on an object. Each of the
others is an easy negative whose cross entropy is small, and 100,000 small numbers outweigh a few dozen large ones: at
p = 0.01 the negatives of one image add up to about 1,000, its thirty positives at p = 0.01 to about 140. So the loss is
dominated by background that the network already classifies well.

Formulas
========
For a logit x with label y in {0, 1}: x_t = x if y = 1 else -x, and p_t = sigmoid(x_t) is the predicted
probability of the true label. With alpha_t = alpha if y = 1 else 1 - alpha,

    FL(p_t) = -alpha_t (1 - p_t)^gamma log(p_t)                                            (eq. 5)
    dFL/dx  = y' alpha_t (1 - p_t)^gamma (gamma p_t log(p_t) + p_t - 1),  y' = 2y - 1      (eq. 10, with alpha_t)

(1 - p_t)^gamma is the modulating factor: with gamma = 2 a negative at p = 0.01 counts 10,000 times less than its cross
entropy, one at p = 0.9 only a fifth less. alpha = 0.25 belongs to the *rare* positive class: with gamma = 2 the easy
negatives add little, and with a larger alpha the positives would dominate the loss.

Numerical stability
===================
(1 - p)^gamma has an infinite slope at p = 1 for gamma < 1, and meets a loss of 0 there: NaN. log(sigmoid(x)) is -inf at
x = -104 in float32; 1 - sigmoid(x) is 0 from x = 17. So log p_t is logsigmoid(x_t) and 1 - p_t is sigmoid(-x_t), never
a difference of nearly equal numbers. Whatever the dtype of the logits, it is computed in float32 at least: in float16
an easy negative would have a loss of 0 from a logit of -6 on.

Implementations
===============
`impl="auto"` takes
- "chunked" on the CPU, for a sum or a mean: one forward that also computes the gradient, in chunks that fit the cache.
  Class ids (focal_cpu.py) need no one-hot; labels of the logits' shape are in focal_labels_cpu.py. The first backward
  is ready, further derivatives come from the reference;
- "triton" (focal_triton.py) for class ids on CUDA, where Triton is installed: one pass over the logits, one backward;
- "reference" (below) for everything else: on CUDA, labels of the logits' shape; class ids with a weight for each
  element; reduction "none"; a gradient for labels, weight, alpha or avg_factor; torch.compile on the CPU (which fuses
  it); torch.func. Plain autograd, with any number of derivatives.
"""

from __future__ import annotations

import importlib.util
import math
import numbers
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from retina.losses.arguments import (
    Reduction,
    can_read_values,
    check_avg_factor,
    check_choice,
    check_class_ids,
    check_floats,
    check_ignore_index,
    check_labels,
    check_number,
    check_tensor,
    dimension_hint,
    in_functorch_transform,
    per_class_tensor,
)
from retina.losses.focal_cpu import ids_loss_and_gradient
from retina.losses.focal_labels_cpu import labels_loss_and_gradient
from retina.losses.one_pass import LossAndGradient, has_tangent, one_pass_loss, takes_one_pass

HAS_TRITON = importlib.util.find_spec("triton") is not None  # it comes with torch for CUDA on Linux
Impl = Literal["auto", "reference", "chunked", "triton"]
AlphaPair = tuple[float | Tensor, float | Tensor]  # what alpha gives to positives and to negatives: numbers or (K,)


def sigmoid_focal_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    alpha: float | Sequence[float] | Tensor | None = 0.25,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    avg_factor: float | Tensor | None = None,
    ignore_index: int = -1,
    impl: Impl = "auto",
) -> Tensor:
    """Focal loss over independent sigmoids, with mmdetection's class ids. The shape of `targets` says what they are.

    Args:
        logits: float (..., K), one logit per class; for a binary problem (N,) or (N, 1).
        targets: integers of shape `logits.shape[:-1]` are class ids: 0..K-1, K is background, `ignore_index` is
            ignored. Anything of shape `logits.shape` holds labels y, 1 for positive: one-hot, multi-hot, soft (floats
            from 0 to 1), or integers and bools, where an element equal to `ignore_index` is ignored. So a binary
            problem whose labels are 0 and 1 passes logits and labels of the same shape; as class ids of K = 1, 0 is the
            object and 1 the background.
        alpha: weight of the positive side, 1 - alpha of the negative one, 0 to 1; a number, one value per class (K,)
            as a tensor, an array or a sequence, or None for no weighting.
        gamma: focusing parameter, at least 0; 0 is the (alpha-balanced) cross entropy.
        weight: a factor for each row, shape `logits.shape[:-1]`, or for each element, `logits.shape`.
        reduction: "none" keeps `logits.shape`, "sum" adds everything, "mean" divides by the number of elements,
            the ignored ones included (as mmdetection does).
        avg_factor: what "mean" divides by instead, above 0; in a detector max(1, number of positive anchors).
        ignore_index: the integer target that is ignored: its loss and its gradient are exactly 0.
        impl: the implementation; see the top of this file.

    Returns: float32 (float64 for float64 logits): a scalar, or `logits.shape` for "none".

    Raises: ValueError for shapes, dtypes or values that do not fit. Values inside tensors are checked on the CPU only,
        because the check would make the host wait for the device. Warns of class ids with K = 1, reduction "mean"
        and no avg_factor, because they may be labels. Source: eq. 5 of the paper.
    """
    check_number("gamma", gamma, 0)
    alphas = _check_arguments(logits, targets, alpha, weight, reduction, avg_factor, ignore_index)
    path = _select_impl(impl, logits, targets, alphas, weight, reduction, avg_factor)
    divisor = 1 if reduction == "sum" else max(logits.numel(), 1) if avg_factor is None else avg_factor
    if path == "chunked":
        return _chunked_loss(logits, targets, alphas, float(gamma), weight, ignore_index, 1 / float(divisor))
    if path == "triton":
        from retina.losses.focal_triton import fused_focal_loss  # here, because importing Triton is slow

        return fused_focal_loss(logits, targets, weight, alphas, gamma, ignore_index, divisor)
    loss = _elementwise_loss(partial(_focal, gamma=gamma), logits, targets, alphas, weight, ignore_index)
    return _reduce(loss, reduction, avg_factor)


def focal_star_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    gamma: float = 2.0,
    beta: float = 1.0,
    alpha: float | Sequence[float] | Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    avg_factor: float | Tensor | None = None,
    ignore_index: int = -1,
) -> Tensor:
    """The paper's other form, FL* = -log(p_t*) / gamma with p_t* = sigmoid(gamma x_t + beta).

    `gamma`, above 0, steepens it and `beta`, any number, shifts it along x_t. Everything else is as in
    `sigmoid_focal_loss`, except that `alpha` is None unless given: the definition has none.

    Source: appendix A of the paper and its table 3 (gamma 2, beta 1 and gamma 4, beta 0).
    """
    check_number("gamma", gamma, 0, open_low=True)
    check_number("beta", beta, -math.inf)
    alphas = _check_arguments(logits, targets, alpha, weight, reduction, avg_factor, ignore_index)

    def star(x_t: Tensor) -> Tensor:
        return -F.logsigmoid(gamma * x_t + beta) / gamma

    return _reduce(_elementwise_loss(star, logits, targets, alphas, weight, ignore_index), reduction, avg_factor)


def modulating_factor(log_p: Tensor, one_minus_p: Tensor, gamma: float) -> Tensor:
    """(1 - p)^gamma for probabilities of any shape, from log p and `one_minus_p` = 1 - p."""
    # The slope of `one_minus_p` is a difference of nearly equal numbers where p is near 0; that of exp is not.
    one_minus_p = torch.where(log_p < -1, 1 - torch.exp(log_p), one_minus_p)
    # The floor keeps the slope of the power finite where p rounds to 1; the loss is below the smallest number there.
    return one_minus_p.clamp(min=torch.finfo(one_minus_p.dtype).tiny) ** gamma


def _focal(x_t: Tensor, gamma: float) -> Tensor:
    log_p_t = F.logsigmoid(x_t)
    return -modulating_factor(log_p_t, torch.sigmoid(-x_t), gamma) * log_p_t


def _chunked_loss(
    logits: Tensor,
    targets: Tensor,
    alphas: AlphaPair,
    gamma: float,
    weight: Tensor | None,
    ignore_index: int,
    scale: float,
) -> Tensor:
    """`scale` times the sum of the focal loss, in one pass (focal_cpu.py, focal_labels_cpu.py)."""
    scaled = (alphas[0] * scale, alphas[1] * scale)

    def plain(x: Tensor, y: Tensor, weight: Tensor | None) -> Tensor:
        return _elementwise_loss(partial(_focal, gamma=gamma), x, y, scaled, weight, ignore_index).sum()

    def fast(x: Tensor, with_gradient: bool) -> LossAndGradient:
        if targets.shape == x.shape:
            return labels_loss_and_gradient(x, targets, weight, scaled, gamma, ignore_index, plain, with_gradient)
        return ids_loss_and_gradient(x, targets, weight, scaled, gamma, ignore_index, with_gradient)

    return one_pass_loss(logits, fast, plain, (targets, weight))


def _elementwise_loss(
    loss_of: Callable[[Tensor], Tensor],
    logits: Tensor,
    targets: Tensor,
    alphas: AlphaPair,
    weight: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """alpha_t * loss_of(x_t) for every element, by plain autograd; soft labels mix y L(x) + (1 - y) L(-x)."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    alpha_pos, alpha_neg = alphas
    if weight is not None:
        weight = (weight if weight.shape == x.shape else weight[..., None]).to(x.dtype)
    if targets.is_floating_point() and can_read_values(targets) and ((targets == 0) | (targets == 1)).all():
        targets, ignore_index = targets.bool(), -1  # half the work; floats are never ignored
    if targets.is_floating_point():
        y = targets.to(x.dtype)
        # The logit of a masked class may be infinite, and 0 * inf is NaN: a side with weight 0 gets logit 0.
        positive, negative = loss_of(torch.where(y > 0, x, 0)), loss_of(torch.where(y < 1, -x, 0))
        loss = y * alpha_pos * positive + (1 - y) * alpha_neg * negative
    else:
        ids = targets.long()  # as uint8, 255 would equal -1
        if ids.shape == x.shape:
            is_positive, kept = ids == 1, ids != ignore_index
        else:
            is_positive = ids[..., None] == torch.arange(x.shape[-1], device=x.device)
            kept = (ids != ignore_index)[..., None]
        x = torch.where(kept, x, 0)  # ignored logits may be infinite, and 0 * inf is NaN
        weight = None if weight is None else torch.where(kept, weight, 0)
        loss = loss_of(torch.where(is_positive, x, -x))
        loss = torch.where(is_positive, alpha_pos * loss, alpha_neg * loss)
        loss = torch.where(kept, loss, 0)
    return loss if weight is None else loss * weight


def _reduce(loss: Tensor, reduction: Reduction, avg_factor: float | Tensor | None) -> Tensor:
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if isinstance(avg_factor, Tensor):
        return loss.sum() / avg_factor.reshape(()).to(loss.dtype)
    return loss.sum() / (max(loss.numel(), 1) if avg_factor is None else avg_factor)


def _select_impl(
    impl: Impl,
    logits: Tensor,
    targets: Tensor,
    alphas: AlphaPair,
    weight: Tensor | None,
    reduction: Reduction,
    avg_factor: float | Tensor | None,
) -> Literal["chunked", "triton", "reference"]:
    check_choice("impl", impl, get_args(Impl))
    inputs = (targets, weight, avg_factor, *alphas)
    constants = not any(isinstance(value, Tensor) and (value.requires_grad or has_tangent(value)) for value in inputs)
    is_labels = targets.shape == logits.shape
    fused = constants and reduction != "none" and not in_functorch_transform()  # required by both
    rows = not is_labels and (weight is None or weight.shape != logits.shape)
    chunked = fused and (is_labels or rows) and takes_one_pass(logits)
    on_device = logits.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    triton = fused and rows and HAS_TRITON and on_device and logits.dtype != torch.float64
    ids = "class ids, row weights and reduction 'sum' or 'mean'"
    no_gradient = "and gives no gradient to weight, alpha or avg_factor"
    if impl == "chunked" and not chunked:
        raise ValueError(
            f"impl='chunked' takes {ids}, or labels of the logits' shape with any weights and the same reductions, "
            f"{no_gradient}; it runs on the CPU, outside torch.compile, torch.func and forward-mode derivatives"
        )
    if impl == "triton" and not triton:
        missing = "" if HAS_TRITON else "; Triton is not installed here"
        raise ValueError(
            f"impl='triton' takes {ids}, {no_gradient}; it runs on CUDA, below float64, outside torch.func{missing}"
        )
    if impl != "auto":
        return impl
    if logits.is_cuda and fused and rows and not HAS_TRITON:
        warn_triton_missing()
    return "chunked" if chunked else "triton" if triton and logits.is_cuda else "reference"


@cache
def warn_triton_missing() -> None:
    """Warn once that the focal loss, the matching and the detection are slower on CUDA without Triton."""
    warnings.warn(
        "Triton is not installed: the focal loss, the matching and the detection are slower on CUDA", stacklevel=4
    )


def _check_arguments(
    logits: Tensor,
    targets: Tensor,
    alpha: float | Sequence[float] | Tensor | None,
    weight: Tensor | None,
    reduction: Reduction,
    avg_factor: float | Tensor | None,
    ignore_index: int,
) -> AlphaPair:
    """Raises ValueError for what does not fit; returns what alpha gives to positives and to negatives."""
    check_floats("logits", logits)
    check_tensor("targets", targets)
    if weight is not None:
        check_tensor("weight", weight)
    check_ignore_index(ignore_index)
    _check_shapes(logits, targets, weight, ignore_index)
    check_choice("reduction", reduction, get_args(Reduction))
    check_avg_factor(avg_factor, reduction)
    # Only for the default reduction: a detector divides by its positives, by avg_factor or after a "sum" or "none".
    one_class = targets.shape == logits.shape[:-1] and logits.shape[-1] == 1
    if one_class and reduction == "mean" and avg_factor is None and not torch.compiler.is_compiling():
        warnings.warn(_ONE_CLASS, stacklevel=3)
    if alpha is None:
        return 1.0, 1.0
    if isinstance(alpha, numbers.Real):
        number = float(alpha)
        check_number("alpha", number, 0, 1, hint=_ALPHA_HINT)
        return number, 1 - number
    alpha_K = per_class_tensor("alpha", alpha, logits, high=1, hint=_ALPHA_HINT)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return alpha_K.to(dtype), (1 - alpha_K).to(dtype)  # cast last: 1 - alpha may need more digits than the dtype has


_ONE_CLASS = (
    "targets without the last dimension of the logits are class ids; with one class, 0 is the object and 1 is "
    "background. Labels, where 1 is positive, need logits[..., 0] or targets[..., None]. For class ids, avg_factor "
    "turns this warning off"
)
_ALPHA_HINT = (
    "; None is no weighting, and a pos_weight w is alpha = w / (1 + w), see BCEWithLogitsLoss in docs/losses.md"
)


def _check_shapes(logits: Tensor, targets: Tensor, weight: Tensor | None, ignore_index: int) -> None:
    """Raises ValueError for targets or weights of another shape or dtype, and for targets of wrong values."""
    shape, rows = logits.shape, logits.shape[:-1]
    ids = not targets.is_floating_point() and targets.dtype != torch.bool
    if targets.shape == shape:
        check_labels(targets, ignore_index)
    elif targets.shape == rows and ids and shape[-1] > 0:
        check_class_ids(targets, shape[-1], ignore_index, background=True)
    else:
        hint = dimension_hint("targets", targets.shape, shape)
        if not hint and ids and targets.shape == (*shape[:1], *shape[2:]):
            hint = "; the classes are the last dimension of the logits: logits.movedim(1, -1)"
        raise ValueError(
            f"targets: given {targets.dtype} of shape {tuple(targets.shape)} for logits {tuple(shape)}; "
            f"expected class ids (integers) {tuple(rows)} or labels from 0 to 1 {tuple(shape)}{hint}"
        )
    if weight is not None and weight.shape not in (shape, rows):
        raise ValueError(
            f"weight: given shape {tuple(weight.shape)}, expected {tuple(rows)} (one per row) "
            f"or {tuple(shape)} (one per element){dimension_hint('weight', weight.shape, shape)}"
        )
