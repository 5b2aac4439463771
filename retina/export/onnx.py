"""The file in ONNX, by torch's exporter; NMS is one NonMaxSuppression for all images and classes.

That operator takes float32 only, so the offsets of `suppress_by_class` would cost the coordinates bits. But it has
dimensions for images and classes. An operator of torch stands for it in the graph, and is translated here.

N images, K classes, C candidates of an image, M boxes that NMS keeps.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retina.export.program import INPUT, OUTPUTS, DetectionProgram, InputShape, suppress_by_class

BOOL = 9  # of onnx.TensorProto


@torch.library.custom_op("retina::suppress", mutates_args=())
def _suppress(boxes_NC4: Tensor, scores_NC: Tensor, labels_NC: Tensor, iou: float, classes: int, limit: int) -> Tensor:
    """`limit`: how many boxes of each class are needed."""
    return suppress_by_class(boxes_NC4, scores_NC, labels_NC, iou)


@_suppress.register_fake
def _(boxes_NC4: Tensor, scores_NC: Tensor, labels_NC: Tensor, iou: float, classes: int, limit: int) -> Tensor:
    return torch.empty_like(scores_NC, dtype=torch.bool)


def write_onnx(
    program: DetectionProgram, classes: int, shape: InputShape, metadata: dict[str, str], path: Path
) -> None:
    """Write the program, which runs in float32, with `metadata` in the file's metadata_props."""
    limit = program.config.detect.max_detections
    program.suppress = lambda boxes, scores, labels, iou: _suppress(boxes, scores, labels, iou, classes, limit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torchvision's own code
        exported = torch.onnx.export(
            program,
            (shape.example(),),
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            dynamic_shapes=({dim: name for dim, name in enumerate(shape._fields) if shape[dim] is None},),
            custom_translation_table={torch.ops.retina.suppress.default: _translate_suppress},
            dynamo=True,
            verbose=False,
        )
    assert exported is not None

    exported.model.metadata_props.update(metadata)
    exported.save(path)


def _translate_suppress(boxes: Any, scores: Any, labels: Any, iou: float, classes: int, limit: int) -> Any:
    """The operators of ONNX for `_suppress`."""
    from onnxscript import opset20 as op

    def whole(*numbers: int) -> Any:
        return op.Constant(value_ints=list(numbers))

    def one(number: float) -> Any:
        return op.Constant(value_floats=[number])

    class_1K1 = op.Reshape(whole(*range(classes)), whole(1, classes, 1))
    is_class_NKC = op.Equal(op.Unsqueeze(labels, whole(1)), class_1K1)
    scores_NKC = op.Where(is_class_NKC, op.Unsqueeze(scores, whole(1)), one(0.0))
    image_class_box_M3 = op.NonMaxSuppression(boxes, scores_NKC, whole(limit), one(iou), one(0.0))
    image_box_M2 = op.Gather(image_class_box_M3, whole(0, 2), axis=1)
    kept_M = op.Expand(one(1.0), op.Slice(op.Shape(image_box_M2), whole(0), whole(1)))
    return op.Cast(op.ScatterND(op.Mul(scores, one(0.0)), image_box_M2, kept_M), to=BOOL)
