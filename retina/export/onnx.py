"""Export to ONNX by torch's exporter; NMS is one NonMaxSuppression, over all images and classes.

ONNX's operator takes float32 only, so the offsets of `suppress_by_class` would cost the coordinates bits. But it has
dimensions for images and classes. A custom operator of torch stands for it in the graph.

N images, K classes, C candidates of an image, M boxes that NMS keeps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retina.export.program import INPUT, OUTPUTS, Detector, suppress_by_class


@torch.library.custom_op("retina::suppress", mutates_args=())
def _suppress(boxes_NC4: Tensor, scores_NC: Tensor, labels_NC: Tensor, iou: float, classes: int, limit: int) -> Tensor:
    return suppress_by_class(boxes_NC4, scores_NC, labels_NC, iou)


@_suppress.register_fake
def _(boxes_NC4: Tensor, scores_NC: Tensor, labels_NC: Tensor, iou: float, classes: int, limit: int) -> Tensor:
    return torch.empty_like(scores_NC, dtype=torch.bool)


def _translate_suppress(boxes: Any, scores: Any, labels: Any, iou: float, classes: int, limit: int) -> Any:
    """`_suppress` in ONNX operators. `limit`: boxes to keep of each class."""
    from onnxscript import opset20 as op

    class_1K1 = op.Constant(value_ints=list(range(classes)))
    class_1K1 = op.Reshape(class_1K1, op.Constant(value_ints=[1, classes, 1]))
    is_class_NKC = op.Equal(op.Unsqueeze(labels, op.Constant(value_ints=[1])), class_1K1)
    scores_NKC = op.Where(
        is_class_NKC, op.Unsqueeze(scores, op.Constant(value_ints=[1])), op.Constant(value_float=0.0)
    )
    image_class_box_M3 = op.NonMaxSuppression(
        boxes,
        scores_NKC,
        op.Constant(value_ints=[limit]),
        op.Constant(value_floats=[iou]),
        op.Constant(value_floats=[0.0]),
    )
    image_box_M2 = op.Gather(image_class_box_M3, op.Constant(value_ints=[0, 2]), axis=1)
    nothing_NC = op.Cast(op.Mul(scores, op.Constant(value_float=0.0)), to=6)
    ones_M = op.Gather(op.Cast(op.Add(op.Mul(image_class_box_M3, 0), 1), to=6), op.Constant(value_int=0), axis=1)
    return op.Cast(op.ScatterND(nothing_NC, image_box_M2, ones_M), to=9)
