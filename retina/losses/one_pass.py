"""A loss whose forward computes the gradient too: the first backward is ready, any further derivative is recomputed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from retina.losses.arguments import can_read_values

LossAndGradient = tuple[Tensor, Tensor | None]


def takes_one_pass(logits: Tensor) -> bool:
    """Whether `one_pass_loss` can take these logits: on the CPU in eager mode, without forward-mode derivatives."""
    return can_read_values(logits) and forward_ad.unpack_dual(logits).tangent is None  # type: ignore[no-untyped-call]


def one_pass_loss(
    logits: Tensor, fast: Callable[[Tensor, bool], LossAndGradient], plain: Callable[[Tensor], Tensor]
) -> Tensor:
    """The loss of `fast`, with its gradient for the first backward and that of `plain` for all further derivatives.

    Args:
        logits: floats, the only input that gets a gradient.
        fast: called with the logits and whether a gradient is wanted; returns the loss, and the gradient of its sum.
            The loss is a scalar, or has a value for each row and as many dimensions as the logits.
        plain: the same loss by autograd. It may have other dimensions, of size 1.

    Nothing of the size of the logits is kept beside the gradient, which the first backward gives away.
    """
    loss: Tensor = _OnePass.apply(logits, fast, plain, torch.is_grad_enabled())
    return loss


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        fast: Callable[[Tensor, bool], LossAndGradient],
        plain: Callable[[Tensor], Tensor],
        grad_enabled: bool,
    ) -> Tensor:
        loss, ctx.gradient = fast(logits.detach(), grad_enabled and ctx.needs_input_grad[0])
        ctx.plain, ctx.dtype = plain, logits.dtype
        ctx.save_for_backward(logits)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()  # create_graph=True
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None or again:
            (logits,) = ctx.saved_tensors  # torch's own error if the graph was freed
            with torch.enable_grad():
                x = logits if again else logits.detach().requires_grad_()
                loss = ctx.plain(x)
                (gradient,) = torch.autograd.grad(loss, x, upstream.reshape(loss.shape), create_graph=again)
        elif upstream.dim() or upstream != 1:
            gradient *= upstream
        return gradient.to(ctx.dtype), None, None, None
