"""The softmax focal loss of class ids on the CPU: loss and gradient in one pass, in chunks that fit the cache.

With y the true class, t the largest logit of the *other* classes and S the sum of their exp(x_j - t),

    u = p / (1 - p) = exp(x_y - t) / S      1 - p = 1 / (1 + u)      log(p) = -log(1 + 1 / u)

    FL = -(1 - p)^gamma log(p)    dFL/dx_y = (1 - p)^gamma (gamma p log(p) - (1 - p))    dFL/dx_j = -s_j dFL/dx_y

with s_j = exp(x_j - t) / S, the softmax over the other classes. No power of 1 - p is negative, so nothing is infinite
at p = 1. S and u are float64, which keeps 1 - p accurate near p = 1: there a softmax over all classes would round, and
a float32 sum of many equal terms beside the largest one, which is 1, rounds them all alike.

N images or rows, C classes, D positions (all further dimensions; 1 without any); n, d those of a chunk. A chunk is
computed in the memory of its gradient where that has its dtype. Rows of few classes are first copied so that the
classes are the outer dimension of the memory: loops over a few neighbors are slow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from retina.losses.one_pass import LossAndGradient

CHUNK_ELEMENTS = 1 << 19  # 2 MB of float32; smaller chunks spend more time on starting operations
FEWEST_COLUMNS = 64  # of a chunk with further dimensions: shorter pieces of the memory cost more than they save
SHORT_ROW = 15  # up to here rows without further dimensions are copied with the classes as the outer dimension


def softmax_loss_and_gradient(
    x_NCD: Tensor,
    rows_ND: Sequence[Tensor],
    gamma: float,
    plain: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    with_gradient: bool,
) -> LossAndGradient:
    """The loss (N, D) of class ids, and the gradient (N, C, D) of its sum; C is at least 2.

    Args:
        x_NCD: logits in any strides.
        rows_ND: three tensors, as `plain` takes them: class ids, int64 in 0..C-1 for ignored rows too; a weight, in the
            dtype of the result and 0 for ignored rows; and which rows are kept.
        gamma: focusing parameter.
        plain: the same loss (n, d) of a part of the logits and rows by autograd. It computes the chunks whose loss is
            not finite here: a true class of probability 0, or a row with an infinite logit or NaN.
        with_gradient: otherwise the second result is None.

    Returns: the loss in the dtype of the weights, and a contiguous gradient in the dtype of the logits (float32 for
        float16, whose smallest number is 6e-8: the scale of the loss comes later).
    """
    dtype, classes = rows_ND[1].dtype, x_NCD.shape[1]
    loss_ND = torch.empty_like(rows_ND[1])
    gradient_NCD = None
    if with_gradient:
        gradient_dtype = torch.float32 if x_NCD.dtype == torch.float16 else x_NCD.dtype
        gradient_NCD = x_NCD.new_empty(x_NCD.shape, dtype=gradient_dtype)
    short_rows = x_NCD.shape[2] == 1 and classes <= SHORT_ROW
    in_place = gradient_NCD is not None and gradient_NCD.dtype == dtype and not short_rows
    buffer = None
    for rows, columns in _chunks(x_NCD.shape):
        ids, weight, kept = (value[rows, columns] for value in rows_ND)
        source = x_NCD[rows, :, columns]
        gradient = None if gradient_NCD is None else gradient_NCD[rows, :, columns]
        if gradient is not None and in_place:
            x = gradient
        else:
            if buffer is None:  # the first chunk is the largest
                buffer = x_NCD.new_empty(source.numel(), dtype=dtype)
            memory = buffer[: source.numel()]
            x = memory.view(classes, -1).t()[:, :, None] if short_rows else memory.view(source.shape)
        loss = _chunk(x.copy_(source), ids[:, None], weight[:, None], gamma, gradient is not None)[:, 0]
        if gradient is not None and not in_place:
            gradient.copy_(x)
        if not math.isfinite(loss.sum()):
            with torch.enable_grad():
                leaf = source.detach().requires_grad_(gradient is not None)
                loss = plain(leaf, ids, weight, kept)
                if gradient is not None:
                    gradient.copy_(torch.autograd.grad(loss.sum(), leaf)[0])
        loss_ND[rows, columns] = loss.detach()
    return loss_ND, gradient_NCD


def _chunks(shape: torch.Size) -> Iterator[tuple[slice, slice]]:
    """Slices of the rows and of the positions."""
    rows, classes, columns = shape
    size = max(CHUNK_ELEMENTS // classes, FEWEST_COLUMNS if columns > 1 else 1)
    step = max(1, size // max(columns, 1))
    for row in range(0, rows, step):
        for column in range(0, columns, size):
            yield slice(row, row + step), slice(column, column + size)


def _chunk(x_nCd: Tensor, ids_n1d: Tensor, weight_n1d: Tensor, gamma: float, with_gradient: bool) -> Tensor:
    """The loss (n, 1, d) of the logits `x_nCd`, in float64; `x_nCd` becomes their gradient `with_gradient`."""
    x_y = x_nCd.gather(1, ids_n1d).double()
    top = x_nCd.scatter_(1, ids_n1d, -torch.inf).amax(1, keepdim=True)
    sum_of_others = x_nCd.sub_(top).exp_().sum(1, keepdim=True, dtype=torch.float64)
    u = x_y.sub_(top).exp_().div_(sum_of_others)
    cross_entropy = u.reciprocal().log1p_()
    miss = u.add_(1).reciprocal_()  # 1 - p
    factor = miss.pow(gamma).mul_(weight_n1d)
    if with_gradient:
        slope = torch.addcmul(miss, 1 - miss, cross_entropy, value=gamma).mul_(factor)
        x_nCd.mul_((slope / sum_of_others).to(x_nCd.dtype)).scatter_(1, ids_n1d, slope.neg_().to(x_nCd.dtype))
    return factor.mul_(cross_entropy)
