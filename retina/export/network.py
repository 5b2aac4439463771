"""The network of a trained detector as an export takes it: BatchNorm folded into the convolutions, in one precision."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d

from retina.model.retinanet import RetinaNet


def inference_network(model: RetinaNet, dtype: torch.dtype) -> RetinaNet:
    """A copy of `model` in evaluation mode and channels-last memory, with parameters in `dtype`.

    BatchNorm becomes the weight and bias of the convolution before it, in float32. In bfloat16 this is not only faster:
    the running variances would lose 16 bits.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    body: Any = model.backbone.body
    fold_batch_norm(body, "conv1", "bn1")
    for stage in (body.layer1, body.layer2, body.layer3, body.layer4):
        for block in stage:
            for number in range(1, 4):
                if hasattr(block, f"conv{number}"):
                    fold_batch_norm(block, f"conv{number}", f"bn{number}")
            if block.downsample is not None:
                fold_batch_norm(block.downsample, "0", "1")
    model.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def fold_batch_norm(parent: nn.Module, conv_name: str, norm_name: str) -> None:
    """Replace the norm by nn.Identity and change the convolution; nothing if it is a norm of another kind."""
    conv: Any = getattr(parent, conv_name)
    norm: Any = getattr(parent, norm_name)
    is_folded = isinstance(norm, nn.BatchNorm2d | FrozenBatchNorm2d)
    if is_folded:
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        setattr(parent, norm_name, nn.Identity())
