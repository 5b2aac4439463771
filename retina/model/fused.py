"""Convolution + bias (+ residual) + ReLU as one cuDNN kernel, for half precision on CUDA.

A BatchNorm with frozen statistics is a scale and a shift of each channel. The scale is multiplied into the weight, and
the shift becomes the bias. So a layer of the network is one kernel, which writes its activations once, instead of two
to four. Elsewhere (on the CPU, in float32, with other norms) the modules run one after the other.

N images, C and D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d


def conv_norm_relu(
    conv: nn.Conv2d, norm: Any, x: Tensor, residual: Tensor | None = None, projection: Any = None
) -> Tensor:
    """relu(norm(conv(x)) + projection(residual)), as a layer of torchvision's ResNet computes it.

    Args:
        conv: the convolution, with or without a bias.
        norm: the module after it; None for none.
        x: float (N, C, H, W).
        residual: added before the ReLU; None for nothing.
        projection: a 1x1 convolution and a norm that give the residual the shape of the result (the `downsample` of a
            block); None if it has this shape.
    """
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    is_half = x.is_cuda and dtype in (torch.bfloat16, torch.float16) and torch.version.hip is None
    if not (is_half and _is_foldable(norm) and (projection is None or _is_foldable(projection[1]))):
        x = conv(x) if norm is None else norm(conv(x))
        if residual is not None:
            x += residual if projection is None else projection(residual)
        return F.relu(x, inplace=True)
    weight, bias = _fold(conv, norm)
    x, stride, padding = x.to(dtype), conv.stride, conv.padding
    if projection is not None and residual is not None:
        projection_weight, projection_bias = _fold(*projection)
        residual, bias = F.conv2d(residual, projection_weight, stride=projection[0].stride), bias + projection_bias
    if x.shape[1] == 3 and (conv.kernel_size, stride, padding, conv.dilation) == ((7, 7), (2, 2), (3, 3), (1, 1)):
        (x, weight), stride, padding = _space_to_depth(x, weight), (1, 1), (0, 0)
    residual = None if residual is None else residual.to(dtype)
    sizes = [list(size) for size in (stride, padding, conv.dilation)]
    result: Tensor = torch.ops.retina.conv_relu(x, weight.to(dtype), bias.to(dtype), residual, *sizes, conv.groups)
    return result


def _is_foldable(norm: nn.Module | None) -> bool:
    """Whether it is nothing, or a BatchNorm whose statistics are fixed."""
    return (
        norm is None or isinstance(norm, FrozenBatchNorm2d) or (isinstance(norm, nn.BatchNorm2d) and not norm.training)
    )


def _fold(conv: nn.Conv2d, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that does the work of both."""
    if norm is None:
        assert conv.bias is not None
        return conv.weight, conv.bias
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    return conv.weight * scale[:, None, None, None], shift if conv.bias is None else shift + conv.bias * scale


def _space_to_depth(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Input and weight of the same convolution with 4x4 taps, stride 1 and no padding, for 7x7, stride 2, padding 3.

    Each 2x2 square of pixels becomes the channels of one. Tensor cores would pad 3 channels to 8; these are 16, with a
    fourth color that is 0.
    """
    height, width = x.shape[2:]
    x = F.pad(x, (4, 2 + width % 2, 4, 2 + height % 2, 0, 1))
    weight = F.pad(weight, (1, 0, 1, 0, 0, 1))  # 8x8 taps, of which the first row and column are 0
    return F.pixel_unshuffle(x, 2), F.pixel_unshuffle(weight, 2)


def _conv_relu(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *sizes: Any) -> Tensor:
    """`sizes`: stride, padding, dilation and groups, as in the schema below."""
    x = x.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=torch.channels_last)
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *sizes)
    residual = residual.contiguous(memory_format=torch.channels_last)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *sizes)


def _fake_conv_relu(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *sizes: Any) -> Tensor:
    return torch.empty_like(F.conv2d(x, weight, bias, *sizes), memory_format=torch.channels_last)


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


# torch.library.custom_op would do the same, and need 20 microseconds more of the host for each call.
torch.library.define(
    "retina::conv_relu",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? residual, int[] stride, int[] padding, int[] dilation, int groups)"
    " -> Tensor",
)
torch.library.impl("retina::conv_relu", "CUDA", _conv_relu)
torch.library.register_fake("retina::conv_relu", _fake_conv_relu)
torch.library.register_autograd("retina::conv_relu", _backward, setup_context=_setup_context)
