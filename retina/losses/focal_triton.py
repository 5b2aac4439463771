"""The focal loss in one pass over the logits, on CUDA: each logit is read once and its gradient written once.

The plain formula moves about 348 bytes a float32 logit; this moves 8 (bfloat16: 4), which is the floor for a loss that
leaves its gradient behind. The normaliser comes from the matching, before the loss, so it goes into the gradient here;
a scale that only autograd knows is applied in the backward, by a pass that ends at once where the scale is 1.

Logits are read where they are, in any strides of (N, R, K), without one-hot or copy: an element knows its row and class
by its place, and looks its row's class id up (a byte or a few for each row, from the cache). Each program sums its part
in a fixed order, the parts are summed in a fixed order: the same bits every run, and no host synchronisation.

N images, R rows of an image, K classes; P programs.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS, BLOCKS_EACH = 1024, 4, 8  # elements at a time, and their warps; blocks of a program, one after the other
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton runs kernels on the CPU then, for the tests


@triton.jit
def _exp2(x, INTERPRETED: tl.constexpr):
    """2^x in one instruction, to 2 ulp; what would be subnormal is 0."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _reciprocal(x, INTERPRETED: tl.constexpr):
    """1 / x in one instruction, to 1 ulp, for x from 1 to 6."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _power(one_minus_p, log_one_minus_p, rest, HALVES: tl.constexpr, HAS_REST: tl.constexpr, INTERPRETED: tl.constexpr):
    """miss^(HALVES / 2 + rest): multiplications, a square root and an exponential of at most 1/4 log(miss)."""
    log2e: tl.constexpr = 1.4426950408889634
    # Below -88 `one_minus_p` is 0, and 0 * inf would be NaN where `rest` is negative.
    log_one_minus_p = tl.maximum(log_one_minus_p, -88.0)
    result = (
        _exp2(rest * log2e * log_one_minus_p, INTERPRETED) if HAS_REST else tl.full(one_minus_p.shape, 1.0, tl.float32)
    )
    if HALVES % 2 == 1:
        result *= tl.sqrt(one_minus_p)
    for _i in tl.static_range(HALVES // 2):
        result *= one_minus_p
    return result


@triton.jit
def _terms(x_t, gamma, rest, HALVES: tl.constexpr, HAS_REST: tl.constexpr, INTERPRETED: tl.constexpr):
    """(1 - p_t)^gamma, -log(p_t), and gamma p_t (-log p_t) + 1 - p_t, of signed logits (eq. 4 and 10 of the paper)."""
    size = tl.abs(x_t)
    e = _exp2(size * -1.4426950408889634, INTERPRETED)
    # One reciprocal serves 1 / (1 + e) and s = e / (2 + e), the argument of log(1 + e) = 2 artanh(s) with s <= 1/3. Its
    # series in s^2 keeps the digits of a small e, which the logarithm of 1 + e does not; these five fit to 4e-9.
    a, b = 1.0 + e, 2.0 + e
    inverse = _reciprocal(a * b, INTERPRETED)
    larger = inverse * b
    smaller = e * larger
    s = e * (a * inverse)
    t = s * s
    series = 2.00000000768 + t * (0.666663216414 + t * (0.400245952308 + t * (0.279651577452 + t * 0.281577783280)))
    log_a = s * series
    is_easy = x_t >= 0
    one_minus_p = tl.where(is_easy, smaller, larger)  # 1 - p_t
    hit = tl.where(is_easy, larger, smaller)  # p_t
    cross_entropy = tl.where(is_easy, log_a, size + log_a)
    log_one_minus_p = tl.where(is_easy, -size - log_a, -log_a)  # of use only where HAS_REST
    factor = _power(one_minus_p, log_one_minus_p, rest, HALVES, HAS_REST, INTERPRETED)
    return factor, cross_entropy, gamma * hit * cross_entropy + one_minus_p


@triton.jit
def _focal_kernel(
    logits, targets, weights, alphas_pos, alphas_neg, divisor, partial, gradient, total, rows_each,
    logit_stride_n, logit_stride_r, logit_stride_k, gradient_stride_n, gradient_stride_r, gradient_stride_k,
    alpha_pos, alpha_neg, gamma, rest, scale, ignore_index,
    K: tl.constexpr, CONTIGUOUS: tl.constexpr, PER_CLASS: tl.constexpr, WEIGHTED: tl.constexpr, DIVIDED: tl.constexpr,
    GRADIENT: tl.constexpr, HALVES: tl.constexpr, HAS_REST: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * (BLOCK * EACH)
    first_row = first // K
    first_class = (first - first_row * K).to(tl.int32)
    if DIVIDED:
        scale = scale / tl.load(divisor).to(tl.float32)
    alpha_pos, alpha_neg = alpha_pos * scale, alpha_neg * scale
    sums = tl.zeros((BLOCK,), tl.float32)
    for i in range(EACH):
        place = i * BLOCK + tl.arange(0, BLOCK)
        inside = first + place < total
        # Unsigned, so that the division by a constant is one multiplication.
        shifted = (first_class + place).to(tl.uint32)
        row = shifted // K
        column = (shifted - row * K).to(tl.int32)
        if CONTIGUOUS:
            logit_at, gradient_at = logits + first + place, gradient + first + place
        else:
            image = (first_row + row) // rows_each
            r, k = first_row + row - image * rows_each, column.to(tl.int64)
            logit_at = logits + image * logit_stride_n + r * logit_stride_r + k * logit_stride_k
            gradient_at = gradient + image * gradient_stride_n + r * gradient_stride_r + k * gradient_stride_k
        target = tl.load(targets + first_row + row, mask=inside, other=0).to(tl.int32)
        kept = inside & (target != ignore_index)
        x = tl.load(logit_at, mask=inside, other=0.0).to(tl.float32)
        is_positive = target == column
        # A certain truth has loss and gradient 0; what is left out may be infinite, so it is replaced, not weighted.
        x_t = tl.where(kept, tl.where(is_positive, x, -x), 1000.0)
        factor, cross_entropy, slope = _terms(x_t, gamma, rest, HALVES, HAS_REST, INTERPRETED)
        if PER_CLASS:
            share = scale * tl.where(is_positive, tl.load(alphas_pos + column), tl.load(alphas_neg + column))
        else:
            share = tl.where(is_positive, alpha_pos, alpha_neg)
        if WEIGHTED:
            share *= tl.load(weights + first_row + row, mask=kept, other=0.0).to(tl.float32)
        factor *= share
        sums += factor * cross_entropy
        if GRADIENT:
            slope = factor * tl.where(is_positive, -slope, slope)
            tl.store(gradient_at, slope.to(gradient.dtype.element_ty), mask=inside)
    tl.store(partial + tl.program_id(0), tl.sum(sums))


@triton.jit
def _rescale_kernel(gradient, upstream, blocks, total, BLOCK: tl.constexpr):
    factor = tl.load(upstream)
    if factor != 1.0:  # looked at on the device: the host does not wait, and usually nothing is moved
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        for _block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            value = tl.load(gradient + place, mask=place < total, other=0.0).to(tl.float32) * factor
            tl.store(gradient + place, value.to(gradient.dtype.element_ty), mask=place < total)
            place += tl.num_programs(0) * BLOCK


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

    `alphas` of positives and negatives: alpha and 1 - alpha, numbers or (K,). A float32 scalar that allows one
    backward. RuntimeError at a second one or at a second derivative.
    """
    if logits.dim() != 3:
        logits = logits.reshape(1, targets.numel(), logits.shape[-1])
    numbers = [1.0 if isinstance(share, Tensor) else share for share in alphas]
    vectors = [share.contiguous() if isinstance(share, Tensor) else None for share in alphas]
    if isinstance(divisor, Tensor) and divisor.device != logits.device:
        divisor = float(divisor)  # on the CPU, where looking costs nothing
    total: Tensor = _launch_forward(
        logits,
        targets.reshape(-1).contiguous(),  # expanded ones stay expanded in a reshape
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
    """The loss, and its gradient with respect to the logits in their memory order (empty without `with_gradient`)."""
    gradient = _empty_gradient(logits_NRK, with_gradient)
    total = logits_NRK.numel()
    programs = triton.cdiv(total, BLOCK * BLOCKS_EACH)
    partial_P = logits_NRK.new_empty(programs, dtype=torch.float32)
    halves = round(2 * gamma)
    if total:
        with torch.cuda.device_of(logits_NRK):
            _focal_kernel[(programs,)](
                logits_NRK,
                targets_R,
                partial_P if weight_R is None else weight_R,  # some pointer, where nothing is read
                partial_P if alpha_pos_K is None else alpha_pos_K,
                partial_P if alpha_neg_K is None else alpha_neg_K,
                partial_P if divisor is None else divisor,
                partial_P,
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
                CONTIGUOUS=logits_NRK.is_contiguous() and gradient.is_contiguous(),
                PER_CLASS=alpha_pos_K is not None,
                WEIGHTED=weight_R is not None,
                DIVIDED=divisor is not None,
                GRADIENT=with_gradient,
                HALVES=halves,
                HAS_REST=gamma != halves / 2,
                BLOCK=BLOCK,
                EACH=BLOCKS_EACH,
                INTERPRETED=INTERPRETED,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
    return partial_P.sum(dtype=torch.float64).float(), gradient


def _empty_gradient(logits: Tensor, with_gradient: bool) -> Tensor:
    # float16 ends at 6e-8, and the upstream gradient, which holds the loss scale, comes later.
    stored = torch.float32 if logits.dtype == torch.float16 else logits.dtype
    return torch.empty_like(logits, dtype=stored) if with_gradient else logits.new_empty(0, dtype=stored)


@_launch_forward.register_fake
def _fake_forward(logits_NRK: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return logits_NRK.new_empty((), dtype=torch.float32), _empty_gradient(logits_NRK, arguments[-1])


@torch.library.custom_op("retina::focal_rescale", mutates_args=("gradient",))
def _rescale(gradient: Tensor, upstream: Tensor) -> None:
    blocks = triton.cdiv(gradient.numel(), BLOCK)
    if blocks:
        with torch.cuda.device_of(gradient):
            _rescale_kernel[(min(blocks, 1024),)](
                gradient, upstream, blocks, gradient.numel(), BLOCK=BLOCK, num_warps=WARPS
            )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else a zero tensor of the logits' size is made for the second output
    ctx.dtype, ctx.spent = inputs[0].dtype, False


def _backward(ctx: Any, upstream: Tensor, _: None) -> tuple[Tensor | None, ...]:
    if ctx.spent or torch.is_grad_enabled():
        wish = "a second backward" if ctx.spent else "a second derivative (create_graph=True)"
        raise RuntimeError(f"the fused focal loss hands its gradient out once; for {wish} use impl='reference'")
    ctx.spent = True
    (gradient,) = ctx.saved_tensors
    if torch.compiler.is_compiling():  # the compiler would copy what is changed in place, and can fuse this
        return (gradient * upstream).to(ctx.dtype), *[None] * 11
    _rescale(gradient, upstream)
    return gradient.to(ctx.dtype), *[None] * 11


_launch_forward.register_autograd(_backward, setup_context=_setup_context)
