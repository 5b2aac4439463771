"""The chunked path of the focal loss: the gradient is made in the forward, in pieces that stay in the cache.

Autograd over the formula keeps about eight tensors of the logits' size alive and walks memory for each. Here a piece of
rows is treated as if every element were a negative; the few positives and the rows left out are taken away by index,
and the positives are computed apart at the end. The gradient is written once. R rows, K classes, P positives,
H rows with a hard negative.

With p = sigmoid(x) and c = -log(1 - p), a negative has FL = p^gamma c and dFL/dx = p^gamma (gamma (1 - p) c + p).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_ELEMENTS = 5 << 15  # elements; three buffers of 0.6 MB: less pays for starting operations, more for memory
NEARLY_ONE = 0.98  # up to here 1 - p and log1p(-p) are right to 1e-6


def chunked_focal_loss(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    alphas: tuple[float | Tensor, float | Tensor],
    gamma: float,
    ignore_index: int,
    scale: float,
) -> Tensor:
    """`scale` times the sum of the focal loss over class ids; arguments as in `retina.losses.sigmoid_focal_loss`.

    `alphas` of positives and negatives: alpha and 1 - alpha, numbers or (K,).

    A float32 (float64 for float64 logits) scalar that allows one backward. RuntimeError at a second one, or at a second
    derivative: the gradient was made in the forward and is handed out once, so that it exists once.
    """
    rows = None if weight is None else weight.reshape(-1)
    flat = logits.reshape(-1, logits.shape[-1])
    total: Tensor = _ChunkedFocal.apply(
        flat, targets.reshape(-1).long(), rows, alphas, float(gamma), ignore_index, scale, torch.is_grad_enabled()
    )
    return total


class _ChunkedFocal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_RK: Tensor,
        targets_R: Tensor,
        weight_R: Tensor | None,
        alphas: tuple[float | Tensor, float | Tensor],
        gamma: float,
        ignore_index: int,
        scale: float,
        with_gradient: bool,
    ) -> Tensor:
        exact = torch.float64 if logits_RK.dtype == torch.float64 else torch.float32
        # float16 ends at 6e-8, and the upstream gradient, which holds the loss scale, comes later.
        stored = torch.float32 if logits_RK.dtype == torch.float16 else logits_RK.dtype
        with_gradient &= ctx.needs_input_grad[0]
        gradient_RK = torch.empty_like(logits_RK, dtype=stored) if with_gradient else None
        classes = logits_RK.shape[1]
        left_out_R = targets_R == ignore_index
        row_P = (~left_out_R & (targets_R < classes)).nonzero()[:, 0]
        class_P = targets_R[row_P]
        alpha_pos, alpha_neg = alphas
        alpha_P = alpha_pos[class_P] if isinstance(alpha_pos, Tensor) else alpha_pos
        if weight_R is not None:
            weight_R = weight_R.masked_fill(left_out_R, 0)  # what is left out may weigh NaN

        skipped = (row_P, class_P, left_out_R.nonzero()[:, 0])
        total = _negative_loss(logits_RK, gradient_RK, exact, skipped, weight_R, alpha_neg * scale, gamma)

        x_P = logits_RK[row_P, class_P].to(exact)
        log_p_P, one_minus_p_P = F.logsigmoid(x_P), torch.sigmoid(-x_P)
        factor_P = one_minus_p_P.pow(gamma) * (alpha_P * scale)
        if weight_R is not None:
            factor_P *= weight_R[row_P]
        total -= (factor_P * log_p_P).sum(dtype=torch.float64)
        if gradient_RK is not None:
            slope_P = factor_P * (gamma * torch.sigmoid(x_P) * log_p_P - one_minus_p_P)
            gradient_RK[row_P, class_P] = slope_P.to(stored)
        ctx.gradient_RK = gradient_RK
        ctx.dtype = logits_RK.dtype
        return total.to(exact)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient_RK = ctx.gradient_RK
        if gradient_RK is None or torch.is_grad_enabled():
            wish = "a second backward" if gradient_RK is None else "a second derivative (create_graph=True)"
            raise RuntimeError(f"the chunked focal loss hands its gradient out once; for {wish} use impl='reference'")
        ctx.gradient_RK = None
        if upstream != 1:
            gradient_RK *= upstream
        return gradient_RK.to(ctx.dtype), None, None, None, None, None, None, None


def _negative_loss(
    logits_RK: Tensor,
    gradient_RK: Tensor | None,
    exact: torch.dtype,
    skipped: tuple[Tensor, Tensor, Tensor],
    weight_R: Tensor | None,
    share: float | Tensor,
    gamma: float,
) -> Tensor:
    """Loss of all elements but the `skipped` (positives by row and class, rows left out), in float64; fills the
    gradient, with 0 at the skipped."""
    row_P, class_P, left_out = skipped
    rows, classes = logits_RK.shape
    step = max(1, CHUNK_ELEMENTS // classes)
    edges = torch.arange(0, rows + step, step)
    from_P, from_left_out = torch.searchsorted(row_P, edges).tolist(), torch.searchsorted(left_out, edges).tolist()
    buffers = [torch.empty(min(step, rows), classes, dtype=exact) for _ in range(3)]
    lowest = 1.2 * math.log(torch.finfo(exact).tiny)  # p is 0 from here on
    total = torch.zeros((), dtype=torch.float64)
    for i, start in enumerate(range(0, rows, step)):
        part = slice(start, min(start + step, rows))
        x = logits_RK[part]
        p, q, log_q = (buffer[: len(x)] for buffer in buffers)
        positives = (row_P[from_P[i] : from_P[i + 1]] - start, class_P[from_P[i] : from_P[i + 1]])
        rows_out = left_out[from_left_out[i] : from_left_out[i + 1]] - start
        torch.sigmoid(x if x.dtype == exact else log_q.copy_(x), out=p)
        p[positives] = 0  # p = 0 has loss and gradient 0
        p[rows_out] = 0
        torch.sub(1, p, out=q)
        torch.neg(p, out=log_q).log1p_()
        if p.amax() > NEARLY_ONE:  # both have lost their digits there; such rows are few
            row_H = (p.amax(dim=1) > NEARLY_ONE).nonzero()[:, 0]
            minus_x_HK = (-x[row_H].to(exact)).masked_fill_(p[row_H] == 0, torch.inf)  # the skipped stay at loss 0
            q[row_H], log_q[row_H] = torch.sigmoid(minus_x_HK), F.logsigmoid(minus_x_HK)
        slope = torch.addcmul(p, q, log_q, value=-gamma, out=q)
        log_p = None if (2 * gamma).is_integer() else (x + log_q).index_fill_(0, rows_out, 0).clamp_(lowest, 0)
        factor = _power(p, log_p, gamma).mul_(share)
        if weight_R is not None:
            factor *= weight_R[part, None]
        if gradient_RK is not None:
            torch.mul(slope, factor, out=slope if gradient_RK.dtype != exact else gradient_RK[part])
            if gradient_RK.dtype != exact:
                gradient_RK[part] = slope
        total -= factor.mul_(log_q).sum()
    return total


def _power(p: Tensor, log_p: Tensor | None, gamma: float) -> Tensor:
    """p^gamma without torch.pow, which would take as long as everything else here; may overwrite `p`.

    Squares, a square root and, for what is left of gamma (at most 1/4 either way), exp of its product with `log_p`: so
    small an exponent that its rounding stays below a relative 1e-6 wherever the loss is a normal number. `log_p` is not
    needed where 2 gamma is an integer.
    """
    halves = round(2 * gamma)
    factors = [] if log_p is None else [log_p.mul_(gamma - halves / 2).exp_()]
    if halves % 2:
        factors.append(p.sqrt())
    whole = halves // 2
    while whole:
        taken = whole % 2 == 1
        if taken:
            factors.append(p)
        whole //= 2
        if whole:
            p = p * p if taken else p.mul_(p)
    if not factors:
        return torch.ones_like(p)
    product = factors.pop()
    for factor in factors:
        product *= factor
    return product
