"""The focal loss of single elements in Triton: its terms, in few instructions. focal_triton.py has the kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _exp2(x, INTERPRETED: tl.constexpr):
    """2^x in one instruction, to 2 ulp; a subnormal result becomes 0."""
    if INTERPRETED:
        return tl.exp2(tl.minimum(x, 127.0, propagate_nan=tl.PropagateNan.ALL))  # without NumPy's warning
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _reciprocal(x, INTERPRETED: tl.constexpr):
    """1 / x in one instruction, to 1 ulp, for x >= 1; a subnormal result becomes 0."""
    if INTERPRETED:
        return tl.where(x > 8.5e37, 0.0, 1.0 / x)
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def to_float(x, INTERPRETED: tl.constexpr):
    """As float32. For bfloat16 this is one instruction for each; Triton's own conversion needs three for two."""
    if x.dtype != tl.bfloat16 or INTERPRETED:
        return x.to(tl.float32)
    return tl.inline_asm_elementwise(
        "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], tl.float32, is_pure=True, pack=2
    )


@triton.jit
def _power(
    one_minus_p, log_one_minus_p, remainder,
    HALVES: tl.constexpr, HAS_REMAINDER: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """(1 - p)^(HALVES / 2 + remainder): multiplications, a square root and exp(remainder log(1 - p)).

    `remainder` is from -1/4 to 1/4.
    """
    log2e: tl.constexpr = 1.4426950408889634
    # Below -88 `one_minus_p` is 0, and 0 * inf would be NaN for a negative `remainder`.
    log_one_minus_p = tl.maximum(log_one_minus_p, -88.0)
    result = tl.full(one_minus_p.shape, 1.0, tl.float32)
    if HAS_REMAINDER:
        result = _exp2(remainder * log2e * log_one_minus_p, INTERPRETED)
    if HALVES % 2 == 1:
        result *= tl.sqrt(one_minus_p)
    for _i in tl.static_range(HALVES // 2):
        result *= one_minus_p
    return result


@triton.jit
def focal_terms(
    x, gamma, remainder,
    HALVES: tl.constexpr, HAS_REMAINDER: tl.constexpr, ROUNDED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """(1 - p_t)^gamma, -log(p_t) and gamma p_t (-log p_t) + 1 - p_t (eq. 4 and 10 of the paper).

    `x` is -x_t, so the logit of a negative and the negated logit of a positive. With `ROUNDED` the gradient becomes a
    bfloat16.
    """
    log2e: tl.constexpr = 1.4426950408889634
    if ROUNDED:  # to within 6e-8, which is nothing in a bfloat16; one instruction less
        one_minus_p_t = _reciprocal(1.0 + _exp2(x * -log2e, INTERPRETED), INTERPRETED)
        p_t = 1.0 - one_minus_p_t
    else:
        # exp(x_t), finite, so that it may be multiplied by 0. A NaN stays NaN.
        e = _exp2(tl.minimum(x * -log2e, 127.0, propagate_nan=tl.PropagateNan.ALL), INTERPRETED)
        one_minus_p_t = _reciprocal(1.0 + e, INTERPRETED)
        # 0 instead of 1 for x < -87, where 1 - p_t is 0: harmless, as it only multiplies -log(p_t), which is 0 too.
        p_t = e * one_minus_p_t
    # -log(p_t) = max(x, 0) - log(1 - m), with m <= 1/2. A series in m stays accurate for a small m, which a
    # logarithm of 1 - m does not; these nine coefficients fit to 2.3e-8.
    m = tl.minimum(p_t, one_minus_p_t)
    series = 0.269612752464 + m * (-0.203538992312 + m * (1.25766996225 + m * (-1.69581225132 + m * 1.44110808095)))
    series = 1.00000002273 + m * (0.49999285256 + m * (0.333700614501 + m * (0.242805080546 + m * series)))
    cross_entropy = tl.maximum(x, 0.0) + m * series
    log_one_minus_p_t = tl.minimum(x, 0.0) - m * series  # used only with HAS_REMAINDER
    factor = _power(one_minus_p_t, log_one_minus_p_t, remainder, HALVES, HAS_REMAINDER, INTERPRETED)
    return factor, cross_entropy, gamma * p_t * cross_entropy + one_minus_p_t
