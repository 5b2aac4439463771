"""Random problems for the fused focal loss, and its comparison with the reference in float64."""

from __future__ import annotations

import importlib.util
from functools import partial

import pytest
import torch
from torch import Tensor

from retina.losses import sigmoid_focal_loss

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed here (it comes with torch for CUDA on Linux)", allow_module_level=True)

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
fused = partial(sigmoid_focal_loss, impl="triton")
# The interpreter truncates to bfloat16 where a GPU rounds to nearest.
STEP = {torch.float32: 1e-5, torch.bfloat16: 4.1e-3 if CUDA else 8.1e-3, torch.float16: 1e-3}


def problem(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, scale: float = 4) -> tuple[Tensor, Tensor]:
    """Fresh logits, and class ids with background and ignored rows."""
    logits = (scale * torch.randn(shape, device=DEVICE)).to(dtype).requires_grad_()
    return logits, torch.randint(-1, shape[-1] + 1, shape[:-1], device=DEVICE)


def compare(logits: Tensor, ids: Tensor, upstream: float = 1.0, **options: object) -> None:
    loss = fused(logits, ids, **options)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(loss, logits, torch.full_like(loss, upstream))
    exact = logits.detach().double().requires_grad_()
    expected = sigmoid_focal_loss(exact, ids, impl="reference", **options)  # type: ignore[arg-type]
    (slope,) = torch.autograd.grad(expected, exact, torch.full_like(expected, upstream))
    assert loss.dtype == torch.float32 and gradient.dtype == logits.dtype and gradient.shape == logits.shape
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=2e-6, atol=1e-37)
    step = STEP[logits.dtype] * (2 if upstream != 1 and logits.dtype == torch.bfloat16 else 1)
    smallest = 6e-8 if logits.dtype == torch.float16 else 1e-37
    torch.testing.assert_close(gradient.double(), slope, rtol=step, atol=smallest)
    assert not gradient[ids == -1].any()
