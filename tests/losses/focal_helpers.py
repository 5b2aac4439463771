"""Shared by the tests of the focal loss: its value and gradient with 50 digits."""

from __future__ import annotations

from functools import cache

import mpmath
import pytest
import torch

cpu_impls = pytest.mark.parametrize("impl", ["reference", "chunked"])


@cache
def exact_loss_and_gradient(x: float, positive: bool, gamma: float, alpha: float = 0.25) -> tuple[float, float]:
    """FL and dFL/dx with 50 digits, from eq. 5 and the derivative of appendix B."""
    with mpmath.workdps(50):
        x_t = mpmath.mpf(x if positive else -x)
        alpha_t = mpmath.mpf(alpha if positive else 1 - alpha)
        p_t, miss = 1 / (1 + mpmath.exp(-x_t)), 1 / (1 + mpmath.exp(x_t))
        log_p_t = mpmath.log1p(-miss) if miss < 0.5 else mpmath.log(p_t)
        power = miss ** mpmath.mpf(gamma)
        slope = alpha_t * power * (gamma * p_t * log_p_t - miss)
        return float(-alpha_t * power * log_p_t), float(slope if positive else -slope)


def close(given: float, expected: float, relative: float, dtype: torch.dtype) -> bool:
    """Within `relative`, or within the smallest normal number. So never NaN, and 0 only if `expected` is that small."""
    return abs(given - expected) <= max(relative * abs(expected), torch.finfo(dtype).tiny)
