"""The chunked path of the focal loss: the forward computes the gradient too, in chunks of rows that fit the cache.

Autograd over the formula keeps about eight tensors of the size of the logits alive, and reads or writes memory for each
of them. Here every element of a chunk is first treated as a negative. The few positives and the ignored rows are set to
0 by index, and the positives are computed separately. The gradient is written once.

With p = sigmoid(x) and c = -log(1 - p), a negative has FL = p^gamma c and dFL/dx = p^gamma (gamma (1 - p) c + p).

R rows, K classes, P positives, H rows with a hard negative.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from retina.losses.one_pass import LossAndGradient

# Three float32 buffers of 0.6 MB: smaller chunks spend more time on starting operations, larger ones on memory access.
CHUNK_ELEMENTS = 5 << 15
NEARLY_ONE = 0.98  # for p up to here, 1 - p and log1p(-p) are accurate to 1e-6


def ids_loss_and_gradient(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    alphas: tuple[float | Tensor, float | Tensor],
    gamma: float,
    ignore_index: int,
    with_gradient: bool,
) -> LossAndGradient:
    """The sum of the focal loss over class ids, and its gradient; arguments as in `retina.losses.sigmoid_focal_loss`.

    `alphas` are the factors of positives and of negatives, alpha and 1 - alpha: numbers or (K,). Without
    `with_gradient` the second result is None.

    Returns: a scalar, float32 (float64 for float64 logits), and a contiguous gradient in the dtype of the logits
        (float32 for float16, whose smallest number is 6e-8: the scale of the loss comes later).
    """
    logits_RK, targets_R = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1).long()
    weight_R = None if weight is None else weight.reshape(-1)
    compute_dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    gradient_dtype = torch.float32 if logits.dtype == torch.float16 else logits.dtype
    gradient_RK = None
    if with_gradient:
        gradient_RK = torch.empty_like(logits_RK, dtype=gradient_dtype, memory_format=torch.contiguous_format)
    ignored_R = targets_R == ignore_index
    row_P = (~ignored_R & (targets_R < logits_RK.shape[1])).nonzero()[:, 0]
    class_P = targets_R[row_P]
    alpha_pos, alpha_neg = alphas
    alpha_P = alpha_pos[class_P] if isinstance(alpha_pos, Tensor) else alpha_pos
    if weight_R is not None:
        weight_R = weight_R.masked_fill(ignored_R, 0)  # the weight of an ignored row may be NaN

    skipped = (row_P, class_P, ignored_R.nonzero()[:, 0])
    total = _negative_loss(logits_RK, gradient_RK, compute_dtype, skipped, weight_R, alpha_neg, gamma)

    x_P = logits_RK[row_P, class_P].to(compute_dtype)
    log_p_P, one_minus_p_P = F.logsigmoid(x_P), torch.sigmoid(-x_P)
    factor_P = one_minus_p_P.pow(gamma) * alpha_P
    if weight_R is not None:
        factor_P *= weight_R[row_P]
    total -= (factor_P * log_p_P).sum(dtype=torch.float64)
    if gradient_RK is None:
        return total.to(compute_dtype), None
    slope_P = factor_P * (gamma * torch.sigmoid(x_P) * log_p_P - one_minus_p_P)
    gradient_RK[row_P, class_P] = slope_P.to(gradient_dtype)
    return total.to(compute_dtype), gradient_RK.view(logits.shape)


def _negative_loss(
    logits_RK: Tensor,
    gradient_RK: Tensor | None,
    compute_dtype: torch.dtype,
    skipped: tuple[Tensor, Tensor, Tensor],
    weight_R: Tensor | None,
    alpha_neg: float | Tensor,
    gamma: float,
) -> Tensor:
    """The loss of all elements except the `skipped` ones, a float64 scalar; also fills `gradient_RK`.

    `skipped` holds the positives, by row and class, and the ignored rows. Their gradient is set to 0.
    """
    row_P, class_P, ignored_rows = skipped
    rows, classes = logits_RK.shape
    step = max(1, CHUNK_ELEMENTS // classes)
    edges = torch.arange(0, rows + step, step, device=logits_RK.device)
    positive_edges = torch.searchsorted(row_P, edges).tolist()
    ignored_edges = torch.searchsorted(ignored_rows, edges).tolist()
    buffers = [logits_RK.new_empty(min(step, rows), classes, dtype=compute_dtype) for _ in range(3)]
    lowest_log_p = 1.2 * math.log(torch.finfo(compute_dtype).tiny)  # p is 0 from here down
    total = logits_RK.new_zeros((), dtype=torch.float64)
    for i, start in enumerate(range(0, rows, step)):
        chunk = slice(start, min(start + step, rows))
        x = logits_RK[chunk]
        p, q, log_q = (buffer[: len(x)] for buffer in buffers)  # q = 1 - p
        chunk_positives = slice(positive_edges[i], positive_edges[i + 1])
        positives = (row_P[chunk_positives] - start, class_P[chunk_positives])
        ignored = ignored_rows[ignored_edges[i] : ignored_edges[i + 1]] - start
        torch.sigmoid(x if x.dtype == compute_dtype else log_q.copy_(x), out=p)
        p[positives] = 0  # p = 0 has loss and gradient 0
        p[ignored] = 0
        torch.sub(1, p, out=q)
        torch.neg(p, out=log_q).log1p_()
        if p.amax() > NEARLY_ONE:  # q and log_q are inaccurate there; such rows are few
            row_H = (p.amax(dim=1) > NEARLY_ONE).nonzero()[:, 0]
            minus_x_HK = -x[row_H].to(compute_dtype)
            minus_x_HK.masked_fill_(p[row_H] == 0, torch.inf)  # the skipped elements keep loss 0
            q[row_H], log_q[row_H] = torch.sigmoid(minus_x_HK), F.logsigmoid(minus_x_HK)
        slope = torch.addcmul(p, q, log_q, value=-gamma, out=q)
        log_p = None if (2 * gamma).is_integer() else (x + log_q).index_fill_(0, ignored, 0).clamp_(lowest_log_p, 0)
        factor = raise_to_power(p, log_p, gamma).mul_(alpha_neg)
        if weight_R is not None:
            factor *= weight_R[chunk, None]
        if gradient_RK is not None:
            torch.mul(slope, factor, out=slope if gradient_RK.dtype != compute_dtype else gradient_RK[chunk])
            if gradient_RK.dtype != compute_dtype:
                gradient_RK[chunk] = slope
        total -= factor.mul_(log_q).sum()
    return total


def raise_to_power(p: Tensor, log_p: Tensor | None, gamma: float) -> Tensor:
    """p^gamma without torch.pow, which would take as long as the rest of this file; may overwrite `p`.

    The power is a product of squares, a square root and exp(r log p), where r = gamma - round(2 gamma) / 2 is from -1/4
    to 1/4: so small an exponent that its rounding stays below a relative 1e-6 wherever the loss is a normal number.
    `log_p` may be None where 2 gamma is an integer.
    """
    halves = round(2 * gamma)
    factors = [] if log_p is None else [log_p.mul_(gamma - halves / 2).exp_()]
    if halves % 2:
        factors.append(p.sqrt())
    whole = halves // 2
    while whole:
        is_odd = whole % 2 == 1
        if is_odd:
            factors.append(p)
        whole //= 2
        if whole:
            p = p * p if is_odd else p.mul_(p)
    if not factors:
        return torch.ones_like(p)
    product = factors.pop()
    for factor in factors:
        product *= factor
    return product
