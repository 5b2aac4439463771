"""A loss whose forward computes the gradient too: the first backward is ready, any further derivative is recomputed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from retina.losses.arguments import can_read_values

LossAndGradient = tuple[Tensor, Tensor | None]


def takes_one_pass(logits: Tensor) -> bool:
    """Whether `one_pass_loss` can take these logits: on the CPU in eager mode, without forward-mode derivatives."""
    return can_read_values(logits) and not has_tangent(logits)


def has_tangent(tensor: Tensor) -> bool:
    """Whether forward-mode derivatives are taken with respect to `tensor`."""
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def one_pass_loss(
    logits: Tensor,
    fast: Callable[[Tensor, bool], LossAndGradient],
    plain: Callable[..., Tensor],
    constants: Sequence[Tensor | None],
) -> Tensor:
    """The loss of `fast`, with its gradient for the first backward and that of `plain` for all further derivatives.

    Args:
        logits: floats, the only input that gets a gradient.
        fast: called with the logits and whether a gradient is wanted; returns the loss, and the gradient of its sum.
            The loss is a scalar, or has a value for each row and as many dimensions as the logits.
        plain: called with the logits and the constants; the same loss by autograd. It may have other dimensions, of
            size 1. It must not hold the constants, which autograd frees after a backward, and guards against changes.
        constants: targets, weights and the like, which get no gradient.

    Nothing is copied for the backward but the gradient, which the first one gives away.
    """
    # Autograd keeps no tensor of torch.inference_mode, such as the labels of a teacher.
    kept = [value.clone() if value is not None and value.is_inference() else value for value in constants]
    loss: Tensor = _OnePass.apply(logits, fast, plain, torch.is_grad_enabled(), *kept)
    return loss


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        fast: Callable[[Tensor, bool], LossAndGradient],
        plain: Callable[..., Tensor],
        grad_enabled: bool,
        *constants: Tensor | None,
    ) -> Tensor:
        loss, ctx.gradient = fast(logits.detach(), grad_enabled and ctx.needs_input_grad[0])
        ctx.plain, ctx.dtype = plain, logits.dtype
        ctx.save_for_backward(logits, *constants)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()  # create_graph=True
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None or again or torch._C._functorch.is_legacy_batchedtensor(upstream):  # is_grads_batched
            logits, *constants = ctx.saved_tensors  # torch's own error if the graph was freed, or one of them changed
            with torch.enable_grad():
                x = logits if again else logits.detach().requires_grad_()
                loss = ctx.plain(x, *constants)
                (gradient,) = torch.autograd.grad(loss, x, upstream.reshape(loss.shape), create_graph=again)
        elif upstream.dim() or upstream != 1:
            gradient *= upstream
        return gradient.to(ctx.dtype), *[None] * (len(ctx.needs_input_grad) - 1)
