"""The network of a trained detector as an export takes it: BatchNorm folded into the convolutions, in one precision."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d

from retina.model.retinanet import RetinaNet


def inference_network(model: RetinaNet, dtype: torch.dtype) -> RetinaNet:
    """A copy of `model` in evaluation mode and channels-last memory, with parameters in `dtype`.

    BatchNorm becomes the weight and bias of the convolution before it, in float32. In bfloat16 this is not only faster:
    the running variances would lose 16 bits. The convolution is the child before the norm in their module, as in the
    networks of torchvision.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for parent in list(model.backbone.body.modules()):
        for conv_name, norm_name in itertools.pairwise(name for name, _ in parent.named_children()):
            fold_batch_norm(parent, conv_name, norm_name)
    model.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def fold_batch_norm(parent: nn.Module, conv_name: str, norm_name: str) -> None:
    """Replace the norm by nn.Identity and change the convolution; nothing if the two are something else."""
    conv: Any = getattr(parent, conv_name)
    norm: Any = getattr(parent, norm_name)
    is_folded = isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d | FrozenBatchNorm2d)
    if is_folded:
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        setattr(parent, norm_name, nn.Identity())
