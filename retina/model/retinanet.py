"""RetinaNet: images -> class logits and box deltas for every anchor, the same in training and evaluation.

N images, R anchors of a level, K classes, A anchors of a cell. Each level keeps its own outputs. In channels-last
memory, (N, A*K, H, W) viewed as (N, R, K) costs nothing, and to concatenate the levels would copy the largest tensors
of the program.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from retina.config import Config
from retina.losses import prior_bias
from retina.model.anchors import num_anchors_per_cell
from retina.model.backbone import ResNetFPN
from retina.model.fused import conv_norm_relu


class Outputs(NamedTuple):
    """Class logits (N, R, K) and box deltas (N, R, 4) of each level P3..P7, in the dtype of the network's autocast."""

    logits: list[Tensor]
    deltas: list[Tensor]


class RetinaNet(nn.Module):
    """Backbone, FPN and two heads, shared by all levels (paper, section 4)."""

    def __init__(self, config: Config, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes: given {num_classes}, expected at least 1")
        per_cell = num_anchors_per_cell(config.anchors)
        self.num_classes = num_classes
        self.backbone = ResNetFPN(config.model)
        self.cls_head = _head(config)
        self.cls_logits = _output_conv(config.model.channels, per_cell * num_classes, prior_bias(config.model.prior))
        self.box_head = _head(config)
        self.bbox_reg = _output_conv(config.model.channels, per_cell * 4, 0.0)

    def forward(self, images: Tensor) -> Outputs:
        """`images`: float (N, 3, H, W), normalized, zero in the padding. Of no images, outputs of none."""
        features = self.backbone(images)
        return Outputs(
            [per_anchor(self.cls_logits(run_head(self.cls_head, level)), self.num_classes) for level in features],
            [per_anchor(self.bbox_reg(run_head(self.box_head, level)), 4) for level in features],
        )


def _head(config: Config) -> nn.Sequential:
    channels = config.model.channels

    def norm(width: int) -> nn.Module:
        return nn.GroupNorm(width // 8, width)  # groups of 8 channels: 32 groups at 256, as in torchvision V2

    layers = [
        Conv2dNormActivation(channels, channels, norm_layer=norm if config.model.head_norm == "group" else None)
        for _ in range(config.model.head_convs)
    ]
    head = nn.Sequential(*layers)
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            _init_conv(module)
    return head


def run_head(head: nn.Sequential, x: Tensor) -> Tensor:
    for conv, *norm, _ in cast("list[Any]", head):  # a convolution, a norm where there is one, and a ReLU
        x = conv_norm_relu(conv, norm[0] if norm else None, x)
    return x


def _output_conv(channels: int, outputs: int, bias: float) -> nn.Conv2d:
    conv = nn.Conv2d(channels, outputs, 3, padding=1)
    _init_conv(conv)
    assert conv.bias is not None
    nn.init.constant_(conv.bias, bias)
    return conv


def _init_conv(conv: nn.Conv2d) -> None:
    nn.init.normal_(conv.weight, std=0.01)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def per_anchor(x: Tensor, last: int) -> Tensor:
    """(N, A*last, H, W) -> (N, H*W*A, last); a view if the memory is channels-last."""
    images, channels, height, width = x.shape
    rows = height * width * (channels // last)  # not -1, which torch cannot tell without images
    return x.permute(0, 2, 3, 1).reshape(images, rows, last)
