"""Largest relative error of the float32 focal loss and its gradient, over logits where they are normal numbers.

    python benchmarks/focal_error.py

The reference is float64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from retina.losses import sigmoid_focal_loss

ALPHA = 0.25


def exact(x: Tensor, positive: bool, gamma: float) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64, by autograd over logsigmoid."""
    x = x.double().requires_grad_()
    x_t = x if positive else -x
    loss = (ALPHA if positive else 1 - ALPHA) * torch.exp(gamma * F.logsigmoid(-x_t)) * -F.logsigmoid(x_t)
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


def max_relative_error(computed: Tensor, expected: Tensor) -> float:
    """The largest relative error where `expected` is a normal float32."""
    normal = expected.abs() > torch.finfo(torch.float32).tiny
    return ((computed.double() - expected).abs() / expected.abs())[normal].max().item()


def main() -> None:
    """Print a line for each gamma: value and gradient of the reference path, gradient of the chunked path."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.linspace(-87.3, 87.3, 400_001), 5 * torch.randn(400_000, generator=generator)])
    print(f"{len(x):,} logits, torch {torch.__version__}\ngamma   value   gradient   gradient, chunked")
    for gamma in (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0):
        errors = [0.0, 0.0, 0.0]
        for positive in (True, False):
            loss, gradient = exact(x, positive, gamma)
            ids = torch.full(x.shape, 0 if positive else 1)
            logits = x[:, None].clone().requires_grad_()
            value = sigmoid_focal_loss(logits, ids, gamma=gamma, reduction="none", impl="reference")
            (reference,) = torch.autograd.grad(value.sum(), logits)
            (chunked,) = torch.autograd.grad(sigmoid_focal_loss(logits, ids, gamma=gamma, reduction="sum"), logits)
            pairs = ((value.detach()[:, 0], loss), (reference[:, 0], gradient), (chunked[:, 0], gradient))
            errors = [max(old, max_relative_error(*pair)) for old, pair in zip(errors, pairs, strict=True)]
        print(f"{gamma:5g} {errors[0]:7.1e} {errors[1]:10.1e} {errors[2]:19.1e}")


if __name__ == "__main__":
    main()
