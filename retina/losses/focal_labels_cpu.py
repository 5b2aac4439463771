"""The focal loss of labels of the logits' shape on the CPU: loss and gradient in one pass, in chunks for the cache.

An element is a pair of sides, "is positive" with weight y alpha and "is negative" with weight (1 - y) (1 - alpha).
With z = -x for the first and z = x for the second, p = sigmoid(z), q = 1 - p = sigmoid(-z) and c = -log(q),

    FL = p^gamma c        dFL/dz = p^gamma (gamma q c + p)

A chunk whose labels are all 0 or 1 computes only the side that counts. R rows, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from retina.losses.focal_cpu import raise_to_power
from retina.losses.one_pass import LossAndGradient

CHUNK_ELEMENTS = 1 << 16  # ten float32 buffers of 0.3 MB


def labels_loss_and_gradient(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    alphas: tuple[float | Tensor, float | Tensor],
    gamma: float,
    ignore_index: int,
    plain: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    with_gradient: bool,
) -> LossAndGradient:
    """The sum of the focal loss, and its gradient; arguments as in `retina.losses.sigmoid_focal_loss`.

    Args:
        logits: (..., K), in any strides.
        labels: of the same shape: floats from 0 to 1, bools or integers.
        weight: a factor for each row or for each element.
        alphas: the factors of positives and of negatives, alpha and 1 - alpha: numbers or (K,).
        gamma: focusing parameter.
        ignore_index: the integer label that is ignored.
        plain: the same sum for a part of the logits, labels and weight, by autograd. It computes the chunks whose loss
            is not finite here, because a logit is infinite or NaN, or the weight of an ignored element.
        with_gradient: otherwise the second result is None.

    Returns: a scalar, float32 (float64 for float64 logits), and a contiguous gradient in the dtype of the logits
        (float32 for float16, whose smallest number is 6e-8: the scale of the loss comes later).
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    gradient_dtype = torch.float32 if logits.dtype == torch.float16 else logits.dtype
    gradient = logits.new_empty(logits.shape, dtype=gradient_dtype) if with_gradient else None
    if not logits.numel():
        return logits.new_zeros((), dtype=dtype), gradient
    by_row = weight is not None and weight.shape != logits.shape
    # Without a value for each row or class the shape does not matter, and the chunks are equal for every K.
    classes = logits.shape[-1] if by_row or isinstance(alphas[0], Tensor) else 1
    x_RK, y_RK = logits.reshape(-1, classes), labels.reshape(-1, classes)
    gradient_RK = None if gradient is None else gradient.view(-1, classes)
    weight_RK = None if weight is None else weight.reshape(-1, 1 if by_row else classes)
    total = logits.new_zeros((), dtype=torch.float64)
    step = max(1, CHUNK_ELEMENTS // max(classes, 1))
    for start in range(0, len(x_RK), step):
        x, y = x_RK[start : start + step], y_RK[start : start + step]
        part = None if gradient_RK is None else gradient_RK[start : start + step]
        factor = None if weight_RK is None else weight_RK[start : start + step]
        loss = _chunk(x, y, part, factor, alphas, gamma, ignore_index, dtype)
        if not math.isfinite(loss):
            with torch.enable_grad():
                leaf = x.detach().requires_grad_(part is not None)
                loss = plain(leaf, y, factor if factor is None or not by_row else factor[:, 0])
                if part is not None:
                    part.copy_(torch.autograd.grad(loss, leaf)[0])
        total += loss.detach()
    return total.to(dtype), gradient


def _chunk(
    logits: Tensor,
    labels: Tensor,
    gradient: Tensor | None,
    weight: Tensor | None,
    alphas: tuple[float | Tensor, float | Tensor],
    gamma: float,
    ignore_index: int,
    dtype: torch.dtype,
) -> Tensor:
    """The loss of a chunk; also fills `gradient`."""
    x = logits.to(dtype)
    ignored = None
    if labels.is_floating_point():
        y = labels.to(dtype)
        if torch.addcmul(y, y, y, value=-1).amax() > 0:  # y - y^2
            loss, slope = _soft_loss(x, y, weight, alphas, gamma)
            if gradient is not None:
                gradient.copy_(slope)
            return loss
    else:
        ids = labels.long()  # as uint8, 255 would equal -1
        y, ignored = (ids == 1).to(dtype), ids == ignore_index
    sign = torch.sub(1, y, alpha=2)
    z = x * sign
    if ignored is not None:
        z.masked_fill_(ignored, -torch.inf)  # p = 0: loss and gradient 0
    # Beyond the threshold softplus is z itself; by then it differs from z by less than the precision.
    c = F.softplus(z, threshold=20 if dtype == torch.float32 else 40)
    p = torch.sigmoid(z)
    slope = sign.mul_(torch.addcmul(p, torch.sigmoid(-z), c, value=gamma))
    log_p = None if (2 * gamma).is_integer() else z.sub_(c)
    loss = _weighted_loss(p, log_p, c, slope, _mix(alphas, y), weight, gamma)
    if gradient is not None:
        gradient.copy_(slope)
    return loss


def _mix(alphas: tuple[float | Tensor, float | Tensor], y: Tensor) -> float | Tensor:
    """alpha for labels 1, 1 - alpha for labels 0, exactly."""
    alpha_pos, alpha_neg = (torch.as_tensor(alpha, dtype=y.dtype) for alpha in alphas)
    if alpha_pos.dim() == 0 and alpha_pos == alpha_neg:
        return float(alpha_pos)
    return torch.lerp(alpha_neg, alpha_pos, y)


def _soft_loss(
    x: Tensor, y: Tensor, weight: Tensor | None, alphas: tuple[float | Tensor, float | Tensor], gamma: float
) -> tuple[Tensor, Tensor]:
    """Loss and gradient of a chunk with soft labels: both sides of each element."""
    minus_x = -x
    p, q = torch.sigmoid(x), torch.sigmoid(minus_x)
    smaller = x.abs().neg_().exp_().log1p_()  # the smaller of -log(p) and -log(q)
    minus_log_q, minus_log_p = x.relu().add_(smaller), minus_x.relu_().add_(smaller)
    slope = torch.addcmul(p, q, minus_log_q, value=gamma)
    positive_slope = torch.addcmul(q, p, minus_log_p, value=gamma)
    power_is_simple = (2 * gamma).is_integer()
    log_p, log_q = (None, None) if power_is_simple else (-minus_log_p, -minus_log_q)
    alpha_pos, alpha_neg = y * alphas[0], torch.sub(1, y).mul_(alphas[1])
    loss = _weighted_loss(p, log_p, minus_log_q, slope, alpha_neg, weight, gamma)
    loss += _weighted_loss(q, log_q, minus_log_p, positive_slope, alpha_pos, weight, gamma)
    return loss, slope.sub_(positive_slope)


def _weighted_loss(
    p: Tensor,
    log_p: Tensor | None,
    c: Tensor,
    slope: Tensor,
    alpha: float | Tensor,
    weight: Tensor | None,
    gamma: float,
) -> Tensor:
    """The sum of weight alpha p^gamma c; multiplies `slope` by weight alpha p^gamma, and overwrites `p` and `log_p`."""
    if log_p is not None:
        log_p.clamp_(1.2 * math.log(torch.finfo(p.dtype).tiny), 0)  # p is 0 from there down
    factor = raise_to_power(p, log_p, gamma).mul_(alpha)
    if weight is not None:
        factor *= weight
    slope *= factor
    return factor.mul_(c).sum()
