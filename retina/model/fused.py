"""Convolution + bias (+ residual) + ReLU as one cuDNN kernel, for half precision on CUDA.

A BatchNorm with frozen statistics is a scale and a shift of each channel. The scale is multiplied into the weight, and
the shift becomes the bias. So a layer of the network is one kernel, and its activations are written once instead of two
to four times. Elsewhere (on the CPU, in float32, with other norms) the layers run one after the other.

N images, C and D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

HALF = (torch.bfloat16, torch.float16)


def conv_norm_relu(conv: nn.Conv2d, norm: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(norm(conv(x)) + residual).

    Args:
        conv: the convolution, with or without a bias.
        norm: the module after it; None for none.
        x: float (N, C, H, W).
        residual: of the shape of the result.
    """
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    if not x.is_cuda or dtype not in HALF or not (norm is None or _has_frozen_statistics(norm)):
        x = conv(x) if norm is None else norm(conv(x))
        if residual is not None:
            x += residual
        return F.relu(x, inplace=True)
    weight, bias = conv.weight, conv.bias
    if norm is not None:
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        weight, bias = weight * scale[:, None, None, None], shift if bias is None else shift + bias * scale
    assert bias is not None
    residual = None if residual is None else residual.to(dtype)
    sizes = [list(size) for size in (conv.stride, conv.padding, conv.dilation)]
    result: Tensor = _conv_relu(x.to(dtype), weight.to(dtype), bias.to(dtype), residual, *sizes, conv.groups)
    return result


def _has_frozen_statistics(norm: nn.Module) -> bool:
    return isinstance(norm, FrozenBatchNorm2d) or (isinstance(norm, nn.BatchNorm2d) and not norm.training)


@torch.library.custom_op("retina::conv_relu", mutates_args=())
def _conv_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=torch.channels_last)
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)
    residual = residual.contiguous(memory_format=torch.channels_last)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, stride, padding, dilation, groups)


@_conv_relu.register_fake
def _fake_conv_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    result = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return torch.empty_like(result, memory_format=torch.channels_last)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, _, ctx.stride, ctx.padding, ctx.dilation, ctx.groups = inputs
    ctx.save_for_backward(x, weight, output)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, output = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
    gradient = torch.ops.aten.threshold_backward(upstream, output, 0)
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, ctx.stride, ctx.padding, ctx.dilation, False, [0, 0], ctx.groups,
        [needs_x, needs_weight, False],
    )  # fmt: skip
    of_bias = gradient.sum(dim=(0, 2, 3)) if needs_bias else None
    return of_x, of_weight, of_bias, gradient if needs_residual else None, *[None] * 4


_conv_relu.register_autograd(_backward, setup_context=_setup_context)
