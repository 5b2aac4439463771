"""The focal loss on CUDA in one pass over the logits: each logit is read once and its gradient written once.

The plain formula moves about 348 bytes per float32 logit. This kernel moves 8 (bfloat16: 4), the minimum for a loss
that also stores its gradient. The normalizer is known before the loss, so the kernel includes it in the gradient. The
upstream gradient is applied in the backward, by a kernel that ends at once if it is 1.

The kernel reads logits of any strides in (N, R, K), without one-hot labels and without a copy. In a detector nearly all
rows are background. So a program first loads the class ids of all its rows. In a block that has only background, an
element needs no class id, and a quarter to two fifths fewer instructions. Otherwise an element computes its row and
class from its index, and loads the class id of its row (from the cache, mostly). Each program adds up its part in a
fixed order, and the parts are added in a fixed order. So every run gives the same bits. The host never waits.

N images, R rows of an image, K classes; P programs.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from retina.losses.focal_terms_triton import focal_terms, to_float

ELEMENTS = 8192  # of a program, which has them in blocks, in a loop; at most 32 blocks
EACH = 8  # elements of a thread in a block
RESCALE_BLOCK = 1024
FEWEST_CLASSES = 12  # below this a block has many rows, and is seldom all background: the branch does not pay
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton then runs the kernels on the CPU, for the tests


@triton.jit
def _mixed_blocks(
    ids, first_class, elements, ignore_index,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Bit i is set if block i of a program has a part of a row whose class id is not K.

    All bits are set if the program is cut off, or if background is ignored. `ids`: at the first row of the program,
    which begins `first_class` elements before it. `elements`: of the program.
    """
    begin = tl.arange(0, ROWS) * K - first_class
    end = tl.minimum(begin + K, elements)
    differs = tl.load(ids + tl.arange(0, ROWS), mask=begin < elements, other=K).to(tl.int64) != K
    # Rows after the last element shift by any number of bits; they do not differ.
    blocks = (2 << (end - 1) // BLOCK) - (1 << tl.maximum(begin, 0) // BLOCK)
    mixed = tl.reduce_or(tl.where(differs, blocks, 0), 0)
    return tl.where((ignore_index == K) | (elements < ELEMENTS), -1, mixed)


@triton.jit
def _row_and_column(element, K: tl.constexpr):
    element = element.to(tl.uint32)  # then the compiler turns the division by a constant into one multiplication
    row = element // K
    return row, (element - row * K).to(tl.int32)


@triton.jit
def _strided(first_row, element, rows_per_image, stride_n, stride_r, stride_k, K: tl.constexpr):
    row, column = _row_and_column(element, K)
    row += first_row
    image = row // rows_per_image
    return image * stride_n + (row - image * rows_per_image) * stride_r + column.to(tl.int64) * stride_k


@triton.jit
def _store(pointers, slope, mask, GRADIENT: tl.constexpr):
    if GRADIENT:
        tl.store(pointers, slope.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _focal_kernel(
    logits, targets, weights, alphas_pos, alphas_neg, divisor, partial_sums, gradient, total, rows_per_image,
    logit_stride_n, logit_stride_r, logit_stride_k, gradient_stride_n, gradient_stride_r, gradient_stride_k,
    alpha_pos, alpha_neg, gamma, remainder, scale, ignore_index,
    K: tl.constexpr, CONTIGUOUS: tl.constexpr, PER_CLASS: tl.constexpr, WEIGHTED: tl.constexpr, DIVIDED: tl.constexpr,
    GRADIENT: tl.constexpr, HALVES: tl.constexpr, HAS_REMAINDER: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, ELEMENTS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    first_element = tl.program_id(0).to(tl.int64) * ELEMENTS
    first_row = first_element // K
    first_class = (first_element - first_row * K).to(tl.int32)
    if DIVIDED:
        scale = scale / tl.load(divisor).to(tl.float32)
    alpha_pos, alpha_neg = alpha_pos * scale, alpha_neg * scale
    ROUNDED: tl.constexpr = logits.dtype.element_ty == tl.bfloat16
    elements = tl.minimum(total - first_element, ELEMENTS).to(tl.int32)
    sums = tl.zeros((BLOCK,), tl.float32)
    lane = tl.arange(0, BLOCK)
    if CONTIGUOUS:
        logits, gradient = logits + first_element, gradient + first_element
        loaded = tl.load(logits + lane, mask=lane < elements, other=0.0)
    mixed = -1
    if ROWS:
        mixed = _mixed_blocks(targets + first_row, first_class, elements, ignore_index, K, ROWS, BLOCK, ELEMENTS)
    # In bfloat16 instructions are the limit, and those of the loop itself count.
    for i in tl.range(0, ELEMENTS // BLOCK, loop_unroll_factor=4 if ROUNDED and CONTIGUOUS else 1):
        left = elements - i * BLOCK
        if CONTIGUOUS:
            x, gradient_pointers = to_float(loaded, INTERPRETED), gradient + lane
            logits, gradient = logits + BLOCK, gradient + BLOCK
            loaded = tl.load(logits + lane, mask=lane < left - BLOCK, other=0.0)  # on its way during the computation
        else:
            element = first_class + i * BLOCK + lane
            at = _strided(first_row, element, rows_per_image, logit_stride_n, logit_stride_r, logit_stride_k, K)
            x = tl.load(logits + at, mask=lane < left, other=0.0).to(tl.float32)
            gradient_pointers = gradient + _strided(
                first_row, element, rows_per_image, gradient_stride_n, gradient_stride_r, gradient_stride_k, K
            )
        if ((mixed >> i) & 1) == 0:  # only background; the same for all threads
            factor, cross_entropy, slope = focal_terms(x, gamma, remainder, HALVES, HAS_REMAINDER, ROUNDED, INTERPRETED)
            factor *= alpha_neg
            _store(gradient_pointers, factor * slope, None, GRADIENT)
            sums = tl.fma(factor, cross_entropy, sums)
        else:
            row, column = _row_and_column(first_class + i * BLOCK + lane, K)
            target = tl.load(targets + first_row + row, mask=lane < left, other=0).to(tl.int64)
            not_ignored = (lane < left) & (target != ignore_index)
            is_positive = target.to(tl.int32) == column
            # x = -1000 has loss and gradient 0. Ignored logits are replaced, not weighted by 0: they may be infinite.
            x = tl.where(not_ignored, tl.where(is_positive, -x, x), -1000.0)
            factor, cross_entropy, slope = focal_terms(x, gamma, remainder, HALVES, HAS_REMAINDER, ROUNDED, INTERPRETED)
            if PER_CLASS:
                alpha_t = scale * tl.where(is_positive, tl.load(alphas_pos + column), tl.load(alphas_neg + column))
            else:
                alpha_t = tl.where(is_positive, alpha_pos, alpha_neg)
            if WEIGHTED:
                alpha_t *= tl.load(weights + first_row + row, mask=not_ignored, other=0.0).to(tl.float32)
            factor *= alpha_t
            _store(gradient_pointers, factor * tl.where(is_positive, -slope, slope), lane < left, GRADIENT)
            sums = tl.fma(factor, cross_entropy, sums)
    tl.store(partial_sums + tl.program_id(0), tl.sum(sums))


@triton.jit
def _rescale_kernel(gradient, upstream, blocks, total, BLOCK: tl.constexpr):
    factor = tl.load(upstream)
    if factor != 1.0:  # read on the device, so the host does not wait; usually 1, and nothing is moved
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        for _block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            value = tl.load(gradient + offsets, mask=offsets < total, other=0.0).to(tl.float32) * factor
            tl.store(gradient + offsets, value.to(gradient.dtype.element_ty), mask=offsets < total)
            offsets += tl.num_programs(0) * BLOCK


def fused_focal_loss(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    alphas: tuple[float | Tensor, float | Tensor],
    gamma: float,
    ignore_index: int,
    divisor: float | Tensor,
) -> Tensor:
    """Sum of the focal loss over class ids, divided by `divisor`; arguments as in `retina.losses.sigmoid_focal_loss`.

    `alphas` are the factors of positives and of negatives, alpha and 1 - alpha: numbers or (K,).

    Returns: a float32 scalar that allows one backward.

    Raises: RuntimeError in the backward, for a second backward or a second derivative.
    """
    if logits.dim() != 3:
        logits = logits.reshape(1, targets.numel(), logits.shape[-1])
    numbers = [1.0 if isinstance(alpha, Tensor) else alpha for alpha in alphas]
    vectors = [alpha.contiguous() if isinstance(alpha, Tensor) else None for alpha in alphas]
    if isinstance(divisor, Tensor) and divisor.device != logits.device:
        divisor = float(divisor)  # it is on the CPU, where reading it costs nothing
    total: Tensor = _launch_forward(
        logits,
        targets.reshape(-1).contiguous(),  # reshape alone keeps an expanded tensor expanded
        None if weight is None else weight.reshape(-1).contiguous(),
        *vectors,
        *numbers,
        float(gamma),
        ignore_index,
        divisor if isinstance(divisor, Tensor) else None,
        1.0 if isinstance(divisor, Tensor) else 1 / divisor,
        logits.requires_grad and torch.is_grad_enabled(),
    )[0]
    return total


@torch.library.custom_op("retina::focal_forward", mutates_args=())
def _launch_forward(
    logits_NRK: Tensor,
    targets_R: Tensor,
    weight_R: Tensor | None,
    alpha_pos_K: Tensor | None,
    alpha_neg_K: Tensor | None,
    alpha_pos: float,
    alpha_neg: float,
    gamma: float,
    ignore_index: int,
    divisor: Tensor | None,
    scale: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient in the memory order of the logits (empty without `with_gradient`)."""
    gradient = _empty_gradient(logits_NRK, with_gradient)
    total = logits_NRK.numel()
    block = _block(logits_NRK.dtype)
    programs = triton.cdiv(total, ELEMENTS)
    partial_sums_P = logits_NRK.new_empty(programs, dtype=torch.float32)
    halves = round(2 * gamma)
    contiguous = logits_NRK.is_contiguous() and gradient.is_contiguous()
    plain = contiguous and weight_R is None and alpha_pos_K is None
    if total:
        with torch.cuda.device_of(logits_NRK):
            _focal_kernel[(programs,)](
                logits_NRK,
                targets_R,
                partial_sums_P if weight_R is None else weight_R,  # any pointer will do where nothing is read
                partial_sums_P if alpha_pos_K is None else alpha_pos_K,
                partial_sums_P if alpha_neg_K is None else alpha_neg_K,
                partial_sums_P if divisor is None else divisor,
                partial_sums_P,
                gradient,
                total,
                logits_NRK.shape[1],
                *logits_NRK.stride(),
                *(gradient.stride() if with_gradient else (0, 0, 0)),
                alpha_pos,
                alpha_neg,
                gamma,
                gamma - halves / 2,
                scale,
                ignore_index,
                K=logits_NRK.shape[2],
                CONTIGUOUS=contiguous,
                PER_CLASS=alpha_pos_K is not None,
                WEIGHTED=weight_R is not None,
                DIVIDED=divisor is not None,
                GRADIENT=with_gradient,
                HALVES=halves,
                HAS_REMAINDER=gamma != halves / 2,
                ROWS=_rows_of_a_program(logits_NRK.shape[2]) if plain else 0,
                BLOCK=block,
                ELEMENTS=ELEMENTS,
                INTERPRETED=INTERPRETED,
                num_warps=_warps(block),
                enable_fp_fusion=True,
            )
    return partial_sums_P.sum(dtype=torch.float64).float(), gradient


def _block(dtype: torch.dtype) -> int:
    """Elements of a block: the fastest on an H200. With one warp in a program, nothing waits for other warps."""
    return 256 if dtype == torch.bfloat16 else 1024


def _warps(block: int) -> int:
    return block // (32 * EACH)


def _rows_of_a_program(K: int) -> int:
    """The most rows that a program has a part of, as a power of two; 0 if they are not worth a look."""
    return int(triton.next_power_of_2(ELEMENTS // K + 2)) if K >= FEWEST_CLASSES else 0


def _empty_gradient(logits: Tensor, with_gradient: bool) -> Tensor:
    # The smallest float16 is 6e-8, and the upstream gradient, which includes the loss scale, comes later.
    gradient_dtype = torch.float32 if logits.dtype == torch.float16 else logits.dtype
    return (
        torch.empty_like(logits, dtype=gradient_dtype) if with_gradient else logits.new_empty(0, dtype=gradient_dtype)
    )


@_launch_forward.register_fake
def _fake_forward(logits_NRK: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return logits_NRK.new_empty((), dtype=torch.float32), _empty_gradient(logits_NRK, arguments[-1])


@torch.library.custom_op("retina::focal_rescale", mutates_args=("gradient",))
def _rescale(gradient: Tensor, upstream: Tensor) -> None:
    blocks = triton.cdiv(gradient.numel(), RESCALE_BLOCK)
    if blocks:
        with torch.cuda.device_of(gradient):
            _rescale_kernel[(min(blocks, 1024),)](gradient, upstream, blocks, gradient.numel(), BLOCK=RESCALE_BLOCK)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    # Otherwise autograd makes a zero tensor of the size of the logits for the second output.
    ctx.set_materialize_grads(False)
    ctx.dtype, ctx.backward_done = inputs[0].dtype, False


def _backward(ctx: Any, upstream: Tensor, _: None) -> tuple[Tensor | None, ...]:
    if ctx.backward_done or torch.is_grad_enabled():
        request = "a second backward" if ctx.backward_done else "a second derivative (create_graph=True)"
        raise RuntimeError(f"the fused focal loss allows one backward; for {request} use impl='reference'")
    ctx.backward_done = True
    (gradient,) = ctx.saved_tensors
    if torch.compiler.is_compiling():  # the compiler would copy a tensor that is changed in place; it can fuse this
        return (gradient * upstream).to(ctx.dtype), *[None] * 11
    _rescale(gradient, upstream)
    return gradient.to(ctx.dtype), *[None] * 11


_launch_forward.register_autograd(_backward, setup_context=_setup_context)
