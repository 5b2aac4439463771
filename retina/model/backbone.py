"""torchvision's ResNet and FPN, with the choices in which published RetinaNets differ.

N images, C channels. The levels P3..P7 have strides 8..128.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import ops
from torchvision.models import resnet
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from retina.config import Model
from retina.model.fused import conv_norm_relu

LEVELS = (3, 4, 5, 6, 7)


class FrozenStatsBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm with frozen statistics and a scale and shift that train (mmdetection's `norm_eval`)."""

    def __init__(self, num_features: int, eps: float) -> None:
        super().__init__(num_features, eps)
        self.eval()

    def train(self, mode: bool = True) -> FrozenStatsBatchNorm2d:
        return super().train(False)


class FrozenBatchNorm2d(ops.FrozenBatchNorm2d):  # type: ignore[misc]
    """torchvision's, as one kernel that keeps the dtype. torchvision's multiply and add would promote bf16 to fp32."""

    def forward(self, x: Tensor) -> Tensor:
        # The published V1 weights need an eps of 0, which batch_norm refuses. 1e-12 is lost in a float32 variance.
        variance = self.running_var + self.eps
        return F.batch_norm(x, self.running_mean, variance, self.weight, self.bias, eps=1e-12)


class P6P7(ExtraFPNBlock):  # type: ignore[misc]
    """P6 by a strided convolution on C5 or P5, P7 by another on P6 (paper, section 4, footnote 2)."""

    def __init__(self, c5_channels: int, channels: int, p6_from: str, relu: bool) -> None:
        super().__init__()
        self.from_c5, self.relu = p6_from == "c5", relu
        self.p6 = nn.Conv2d(c5_channels if self.from_c5 else channels, channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        for conv in (self.p6, self.p7):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        p6 = self.p6(x[-1] if self.from_c5 else results[-1])
        p7 = self.p7(F.relu(p6) if self.relu else p6)
        return [*results, p6, p7], [*names, "p6", "p7"]


class FPN(FeaturePyramidNetwork):  # type: ignore[misc]
    """torchvision's FPN with another upsampling: one that keeps the dtype, and adds gradients in a fixed order.

    Autocast computes torchvision's in float32 on CUDA, and the backward that torch.compile makes of it adds in no fixed
    order, so that a resumed run would end with other bits.
    """

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        names, maps = list(features), list(features.values())
        top_down = self.inner_blocks[-1](maps[-1])
        results = [self.layer_blocks[-1](top_down)]
        for i in reversed(range(len(maps) - 1)):
            lateral = self.inner_blocks[i](maps[i])
            top_down = lateral + _upsample(top_down, *lateral.shape[2:])
            results.insert(0, self.layer_blocks[i](top_down))
        results, names = self.extra_blocks(results, maps, names)
        return OrderedDict(zip(names, results, strict=True))


def _upsample(x: Tensor, height: int, width: int) -> Tensor:
    """Each cell of `x` (N, C, H, W) four times, cut to `height` and `width`: 2H or 2H - 1, and 2W or 2W - 1.

    Equal to nearest-neighbor interpolation to that size. The result is in channels-last memory.
    """
    cells = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)
    doubled = cells.reshape(x.shape[0], 2 * x.shape[2], 2 * x.shape[3], x.shape[1])
    return doubled[:, :height, :width].permute(0, 3, 1, 2)


class ResNetFPN(nn.Module):
    """Normalized images (N, 3, H, W) -> [P3, ..., P7]; level l has shape (N, C, ceil(H / 2^l), ceil(W / 2^l))."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.body: Any = _build_resnet(config)
        width = self.body.fc.in_features
        del self.body.fc
        self.fpn = FPN(
            [width // 4, width // 2, width],
            config.channels,
            P6P7(width, config.channels, config.p6_from, config.relu_before_p7),
        )
        stages = [[self.body.conv1, self.body.bn1], *([getattr(self.body, f"layer{i}")] for i in range(1, 5))]
        for module in (module for stage in stages[: config.frozen_stages + 1] for module in stage):
            module.requires_grad_(False)  # weights only: BatchNorm still updates its statistics, as in torchvision

    def forward(self, images: Tensor) -> list[Tensor]:
        body = self.body
        x = body.maxpool(conv_norm_relu(body.conv1, body.bn1, images))
        stages = []
        for stage in (body.layer1, body.layer2, body.layer3, body.layer4):
            for block in stage:
                x = _run_block(block, x)
            stages.append(x)
        return list(self.fpn(OrderedDict(zip(("c3", "c4", "c5"), stages[1:], strict=True))).values())


def _run_block(block: Any, x: Tensor) -> Tensor:
    """As the forward of torchvision's BasicBlock or Bottleneck, with `conv_norm_relu` for its layers."""
    y = conv_norm_relu(block.conv1, block.bn1, x)
    last_conv, last_norm = block.conv2, block.bn2
    if isinstance(block, resnet.Bottleneck):
        y = conv_norm_relu(block.conv2, block.bn2, y)
        last_conv, last_norm = block.conv3, block.bn3
    return conv_norm_relu(last_conv, last_norm, y, x, block.downsample)


def _build_resnet(config: Model) -> Any:
    norm_layer = _norm_layer(config)
    if config.backbone != "resnet10":
        body = torchvision.models.get_model(config.backbone, weights=None, norm_layer=norm_layer)
        if config.stride_in_1x1:  # torchvision has no argument for it
            for stage in (body.layer2, body.layer3, body.layer4):
                stage[0].conv1.stride, stage[0].conv2.stride = stage[0].conv2.stride, stage[0].conv1.stride
        return body
    width = config.base_channels
    body = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], norm_layer=norm_layer)
    if width != 64:  # torchvision has no argument for it
        body.inplanes = width
        body.conv1, body.bn1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False), norm_layer(width)
        for stage, stride in enumerate((1, 2, 2, 2)):
            layer = body._make_layer(resnet.BasicBlock, width * 2**stage, 1, stride=stride)
            setattr(body, f"layer{stage + 1}", layer)
        for conv in (module for module in body.modules() if isinstance(module, nn.Conv2d)):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        body.fc = nn.Linear(width * 8, 1)
    return body


def _norm_layer(config: Model) -> Callable[[int], nn.Module]:
    layers: dict[str, Callable[[int], nn.Module]] = {
        "frozen": partial(FrozenBatchNorm2d, eps=config.norm_eps),
        "frozen_stats": partial(FrozenStatsBatchNorm2d, eps=config.norm_eps),
        "batch": partial(nn.BatchNorm2d, eps=config.norm_eps),
        "group": partial(nn.GroupNorm, 32, eps=config.norm_eps),
    }
    return layers[config.norm]
