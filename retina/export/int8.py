"""int8 for x86 CPUs: activations and weights of the convolutions, calibrated on images (PyTorch 2 export quantization).

Weights have a scale per output channel, activations one per tensor, from the minima and maxima of the calibration
images. The compiler runs the convolutions with oneDNN's int8 kernels (AVX-512 VNNI, AMX). All else stays in floating
point.
"""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from retina.model.backbone import LEVELS
from retina.model.retinanet import Outputs, RetinaNet, per_anchor, run_head


class UnsharedHeads(nn.Module):
    """RetinaNet with a copy of the heads for each level.

    The activations of the levels differ, so each level gets scales of its own. And the compiler fuses a quantized
    weight with its convolution only if it has one user.
    """

    def __init__(self, model: RetinaNet, levels: int) -> None:
        super().__init__()
        self.backbone, self.num_classes = copy.deepcopy(model.backbone), model.num_classes
        # torchvision's upsampling, equal in its values: the compiler's fusion of a sum fails on a view.
        fpn: Any = self.backbone.fpn
        fpn.forward = partial(FeaturePyramidNetwork.forward, fpn)
        heads = nn.ModuleList([model.cls_head, model.cls_logits, model.box_head, model.bbox_reg])
        self.heads = nn.ModuleList([copy.deepcopy(heads) for _ in range(levels)])

    def forward(self, images: Tensor) -> Outputs:
        logits, deltas = [], []
        for level, heads in zip(self.backbone(images), self.heads, strict=True):
            cls_head, cls_logits, box_head, bbox_reg = cast("Any", heads)
            logits.append(per_anchor(cls_logits(run_head(cls_head, level)), self.num_classes))
            deltas.append(per_anchor(bbox_reg(run_head(box_head, level)), 4))
        return Outputs(logits, deltas)


def quantize(network: RetinaNet, batches: list[Tensor]) -> nn.Module:
    """The network with quantized convolutions; it takes batches of the shape of `batches` only.

    `batches`: what the network sees of the calibration images, float32 (N, 3, H, W), normalized and padded, all of one
    shape.
    """
    from torchao.quantization.pt2e import allow_exported_model_train_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    unshared = UnsharedHeads(network, len(LEVELS)).to(memory_format=torch.channels_last)
    captured = torch.export.export(unshared.eval(), (batches[0],)).module()
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The input of maxpool2d is not quantized")  # as intended: see the top
        prepared = prepare_pt2e(captured, quantizer)
    for batch in batches:
        prepared(batch)
    converted: nn.Module = allow_exported_model_train_eval(convert_pt2e(prepared))  # a caller may call eval()
    return converted
