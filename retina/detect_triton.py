"""The largest logit of each anchor, as a kernel on CUDA. N images, R anchors, K classes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROW_BLOCK = 4096  # logits that a program loads at a time


@triton.jit
def _max_kernel(logits, largest, rows, K: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLUMNS)
    inside = (r < rows)[:, None] & (k < K)[None, :]
    values = tl.load(logits + r[:, None] * K + k[None, :], mask=inside, other=float("-inf"))
    tl.store(largest + r, tl.max(values, axis=1), mask=r < rows)


def max_over_classes(logits_NRK: Tensor) -> Tensor:
    """The largest logit of each anchor, (N, R); as `amax`, which needs eight times as long for few classes."""
    logits_NRK = logits_NRK.contiguous()
    images, rows, classes = logits_NRK.shape
    largest_NR = logits_NRK.new_empty(images, rows)
    columns = triton.next_power_of_2(classes)
    block = max(1, ROW_BLOCK // columns)
    if largest_NR.numel():
        with torch.cuda.device_of(logits_NRK):
            _max_kernel[(triton.cdiv(images * rows, block),)](
                logits_NRK, largest_NR, images * rows, K=classes, COLUMNS=columns, ROWS=block, num_warps=4
            )
    return largest_NR
