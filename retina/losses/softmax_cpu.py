"""The softmax focal loss of class ids on the CPU: loss and gradient in one pass, in chunks that fit the cache.

With m the logit of the true class y minus the log-sum-exp of the other classes, p = sigmoid(m) is the probability of y,
1 - p = sigmoid(-m), and s_j the softmax over the *other* classes. Then

    FL = -(1 - p)^gamma log(p)    dFL/dx_y = (1 - p)^gamma (gamma p log(p) - (1 - p))    dFL/dx_j = -s_j dFL/dx_y

No power of 1 - p is negative, so nothing is infinite at p = 1. m is a float64, which keeps 1 - p accurate near p = 1;
a softmax over all classes would round there.

N images or rows, C classes, D positions (all further dimensions; 1 without any). A chunk is copied with the classes
first, (C, n, d), or with the classes last, (n, C): torch's softmax over fewer than 16 elements in the last dimension is
10 times slower.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from retina.losses.one_pass import LossAndGradient

CHUNK_ELEMENTS = 1 << 18  # two float32 buffers of 1 MB; smaller chunks spend more time on starting operations
FEWEST_COLUMNS = 64  # of a chunk with the classes first: shorter pieces of the memory cost more than they save
SHORT_ROW = 15  # up to here the classes come first even without further dimensions


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
    first = x_NCD.shape[2] > 1 or classes <= SHORT_ROW
    buffers = None
    for rows, columns in _chunks(x_NCD.shape, first):
        ids, weight, kept = (value[rows, columns] for value in rows_ND)
        x = x_NCD[rows, :, columns]
        gradient = None if gradient_NCD is None else gradient_NCD[rows, :, columns]
        if buffers is None:  # the first chunk is the largest
            buffers = x.new_empty(2, x.numel(), dtype=dtype)
        copies = buffers[:, : x.numel()]
        if first:
            parts = (x.transpose(0, 1), None if gradient is None else gradient.transpose(0, 1))
            loss = _chunk(parts, ids[None], weight[None], gamma, copies, dim=0)[0]
        else:
            parts = (x[:, :, 0], None if gradient is None else gradient[:, :, 0])
            loss = _chunk(parts, ids, weight, gamma, copies, dim=1)
        if not math.isfinite(loss.sum()):
            with torch.enable_grad():
                leaf = x.detach().requires_grad_(gradient is not None)
                loss = plain(leaf, ids, weight, kept)
                if gradient is not None:
                    gradient.copy_(torch.autograd.grad(loss.sum(), leaf)[0])
        loss_ND[rows, columns] = loss.detach()
    return loss_ND, gradient_NCD


def _chunks(shape: torch.Size, first: bool) -> Iterator[tuple[slice, slice]]:
    """Slices of the rows and of the positions."""
    rows, classes, columns = shape
    size = max(CHUNK_ELEMENTS // classes, FEWEST_COLUMNS if first else 1)
    step = max(1, size // max(columns, 1))
    for row in range(0, rows, step):
        for column in range(0, columns, size):
            yield slice(row, row + step), slice(column, column + size)


def _chunk(
    parts: tuple[Tensor, Tensor | None], ids: Tensor, weight: Tensor, gamma: float, copies: Tensor, dim: int
) -> Tensor:
    """The loss of a chunk, in float64; `parts` are its logits, and its gradient, which is filled.

    The classes are dimension `dim`, which is of size 1 in `ids` and `weight`. `copies` are two buffers.
    """
    source, gradient = parts
    x, s = (copy.view(source.shape) for copy in copies)
    x.copy_(source)
    x_y = x.gather(dim, ids)
    x.scatter_(dim, ids, -torch.inf)
    if gradient is not None and gradient.is_contiguous() and gradient.dtype == s.dtype:
        s = gradient
    torch.softmax(x, dim, out=s)
    # The largest s is 1 / sum of exp(x - top): the log-sum-exp without a second pass of exp.
    margin = x_y.double() - x.amax(dim, keepdim=True) + s.amax(dim, keepdim=True).double().log_()
    p, miss, log_p = torch.sigmoid(margin), torch.sigmoid(-margin), F.logsigmoid(margin)
    factor = miss.pow(gamma).mul_(weight)
    slope = torch.addcmul(-miss, p, log_p, value=gamma).mul_(factor).to(s.dtype)
    if gradient is not None:
        s.mul_(-slope).scatter_(dim, ids, slope)
        if s is not gradient:
            gradient.copy_(s)
    return factor.mul_(log_p).neg_()
