"""The chunked path of the focal loss: the gradient is made in the forward, in pieces that stay in the cache.

Autograd over the formula keeps about eight tensors of the logits' size alive and walks memory for each. Here a piece of
rows is treated as if every element were a negative, the few positives are then set right by index, and the gradient is
written once. Rows R, classes K.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 1 << 17  # elements; large enough for every core to get a share, small enough for the cache


def chunked_focal_loss(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    alpha: float | None,
    gamma: float,
    ignore_index: int,
) -> Tensor:
    """Sum of the focal loss over integer targets; arguments as in `retina.losses.sigmoid_focal_loss`.

    Returns a float32 (float64 for float64 logits) scalar whose backward only scales a stored gradient; it cannot be
    differentiated twice.
    """
    classes = logits.shape[-1]
    rows = None if weight is None else weight.reshape(-1)
    total: Tensor = _ChunkedFocal.apply(
        logits.reshape(-1, classes), targets.reshape(-1), rows, alpha, float(gamma), ignore_index
    )
    return total


class _ChunkedFocal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_RK: Tensor,
        targets_R: Tensor,
        weight_R: Tensor | None,
        alpha: float | None,
        gamma: float,
        ignore_index: int,
    ) -> Tensor:
        rows, classes = logits_RK.shape
        accumulate = torch.float64 if logits_RK.dtype == torch.float64 else torch.float32
        gradient_RK = torch.empty_like(logits_RK) if ctx.needs_input_grad[0] else None
        sums = []
        step = max(1, CHUNK // max(classes, 1))
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            x, target_R = logits_RK[part].to(accumulate).contiguous(), targets_R[part]
            scale_R = (target_R != ignore_index).to(accumulate)
            if weight_R is not None:
                scale_R *= weight_R[part]
            loss, gradient = _focal_terms(-x, gamma, 1.0 if alpha is None else 1 - alpha)
            row_R = ((target_R >= 0) & (target_R < classes) & (target_R != ignore_index)).nonzero()[:, 0]
            index = row_R * classes + target_R[row_R].long()
            positive, slope = _focal_terms(x.reshape(-1)[index], gamma, 1.0 if alpha is None else alpha)
            loss.view(-1)[index] = positive
            gradient.neg_().view(-1)[index] = slope
            sums.append(torch.dot(loss.sum(dim=1), scale_R))
            if gradient_RK is not None:
                gradient_RK[part] = gradient.mul_(scale_R[:, None])
        ctx.save_for_backward(gradient_RK)
        return torch.stack(sums).sum() if sums else logits_RK.new_zeros((), dtype=accumulate)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_RK,) = ctx.saved_tensors
        return gradient_RK * upstream.to(gradient_RK.dtype), None, None, None, None, None


def _focal_terms(x_t: Tensor, gamma: float, alpha_t: float) -> tuple[Tensor, Tensor]:
    """FL and dFL/dx_t for signed logits (eq. 5 and appendix B)."""
    miss = torch.sigmoid(-x_t)  # 1 - p_t
    cross_entropy = F.softplus(-x_t)  # -log p_t
    if gamma == 2:
        factor = miss * miss
    elif gamma == 0:
        factor = torch.ones_like(miss)
    else:
        factor = torch.exp(F.softplus(x_t).mul_(-gamma))
    factor *= alpha_t
    loss = factor * cross_entropy
    slope = cross_entropy.mul_(gamma).mul_(torch.sigmoid(x_t)).add_(miss).mul_(factor).neg_()
    return loss, slope
