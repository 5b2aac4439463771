"""The names of weights in the files of other frameworks, and ours: one table for each framework.

A key of a file that its table does not cover is an error, and so is a key of ours that gets no value (`load_exactly` in
pretrained.py).
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from torch import Tensor

from retina.model.weights_file import WeightsError

# Their key -> ours, each the beginning of a key or all of it. {} is a number. None: known and not needed. The first
# that fits counts.

# The published V1 file is older than torchvision's class and has keys of its own, the second half.
TORCHVISION_KEYS: dict[str, str | None] = {
    "backbone.body.": "backbone.body.",
    "backbone.fpn.inner_blocks.{}.0.": "backbone.fpn.inner_blocks.{}.0.",
    "backbone.fpn.layer_blocks.{}.0.": "backbone.fpn.layer_blocks.{}.0.",
    "backbone.fpn.extra_blocks.": "backbone.fpn.extra_blocks.",
    "head.classification_head.conv.{}.0.": "cls_head.{}.0.",
    "head.classification_head.conv.{}.1.": "cls_head.{}.1.",
    "head.classification_head.cls_logits.": "cls_logits.",
    "head.regression_head.conv.{}.0.": "box_head.{}.0.",
    "head.regression_head.conv.{}.1.": "box_head.{}.1.",
    "head.regression_head.bbox_reg.": "bbox_reg.",
    "backbone.fpn.inner_blocks.{}.": "backbone.fpn.inner_blocks.{}.0.",
    "backbone.fpn.layer_blocks.{}.": "backbone.fpn.layer_blocks.{}.0.",
    **{f"head.classification_head.conv.{2 * i}.": f"cls_head.{i}.0." for i in range(4)},
    **{f"head.regression_head.conv.{2 * i}.": f"box_head.{i}.0." for i in range(4)},
}
TORCHVISION_RESNET_KEYS: dict[str, str | None] = {"fc.": None, "": "backbone.body."}
DETECTRON2_KEYS: dict[str, str | None] = {
    "backbone.bottom_up.stem.conv1.norm.": "backbone.body.bn1.",
    "backbone.bottom_up.stem.conv1.": "backbone.body.conv1.",
    **{
        f"backbone.bottom_up.res{i + 1}.{theirs}.": f"backbone.body.layer{i}.{ours}."
        for i in range(1, 5)
        for theirs, ours in (
            ("{}.conv{}.norm", "{}.bn{}"),
            ("{}.conv{}", "{}.conv{}"),
            ("{}.shortcut.norm", "{}.downsample.1"),
            ("{}.shortcut", "{}.downsample.0"),
        )
    },
    **{f"backbone.fpn_lateral{i}.": f"backbone.fpn.inner_blocks.{i - 3}.0." for i in (3, 4, 5)},
    **{f"backbone.fpn_output{i}.": f"backbone.fpn.layer_blocks.{i - 3}.0." for i in (3, 4, 5)},
    "backbone.top_block.": "backbone.fpn.extra_blocks.",
    **{f"head.cls_subnet.{2 * i}.": f"cls_head.{i}.0." for i in range(4)},
    **{f"head.bbox_subnet.{2 * i}.": f"box_head.{i}.0." for i in range(4)},
    "head.cls_score.": "cls_logits.",
    "head.bbox_pred.": "bbox_reg.",
    "pixel_mean": None,  # these three are in older files
    "pixel_std": None,
    "anchor_generator.cell_anchors.{}": None,
}
# MSRA's ResNets in detectron2's model zoo, in Caffe2's names. Like detectron2, this leaves out the bias of the first
# convolution, which only the ResNet-50 has.
_MSRA_BRANCHES = (
    ("1", "downsample.0", "downsample.1"), ("2a", "conv1", "bn1"), ("2b", "conv2", "bn2"), ("2c", "conv3", "bn3"),
)  # fmt: skip
_MSRA_NORM = (
    ("gamma", "weight"), ("beta", "bias"), ("running_mean", "running_mean"), ("running_var", "running_var"),
)  # fmt: skip
MSRA_RESNET_KEYS: dict[str, str | None] = {
    "fc1000_": None,
    "conv1_b": None,
    "conv1_w": "backbone.body.conv1.weight",
    **{f"res_conv1_bn_{theirs}": f"backbone.body.bn1.{ours}" for theirs, ours in _MSRA_NORM},
    **{
        f"res{i + 1}_{{}}_branch{branch}_w": f"backbone.body.layer{i}.{{}}.{conv}.weight"
        for i in range(1, 5)
        for branch, conv, _ in _MSRA_BRANCHES
    },
    **{
        f"res{i + 1}_{{}}_branch{branch}_bn_{theirs}": f"backbone.body.layer{i}.{{}}.{norm}.{ours}"
        for i in range(1, 5)
        for branch, _, norm in _MSRA_BRANCHES
        for theirs, ours in _MSRA_NORM
    },
}
MMDETECTION_KEYS: dict[str, str | None] = {
    "backbone.": "backbone.body.",
    "neck.lateral_convs.{}.conv.": "backbone.fpn.inner_blocks.{}.0.",
    **{f"neck.fpn_convs.{i}.conv.": f"backbone.fpn.layer_blocks.{i}.0." for i in range(3)},
    "neck.fpn_convs.3.conv.": "backbone.fpn.extra_blocks.p6.",
    "neck.fpn_convs.4.conv.": "backbone.fpn.extra_blocks.p7.",
    "bbox_head.cls_convs.{}.conv.": "cls_head.{}.0.",
    "bbox_head.reg_convs.{}.conv.": "box_head.{}.0.",
    "bbox_head.retina_cls.": "cls_logits.",
    "bbox_head.retina_reg.": "bbox_reg.",
}


class Framework(NamedTuple):
    """Whose weights they are, and what they need that no shape shows."""

    name: str
    marker: str  # a key that only its files have
    keys: dict[str, str | None]
    settings: dict[str, Any]  # by which the weights were trained, as far as they change what the network computes
    preset: str | None = None  # the file in configs/presets with all settings of the detector; None for a classifier
    orders_anchors_by_size: bool = False  # all ratios of the first size come first; ours: all sizes of the first ratio


_RGB = {"data.normalization": "imagenet", "model.stride_in_1x1": False}
_CAFFE = {"data.normalization": "caffe_bgr", "model.stride_in_1x1": True}
_ANCHORS = {"anchors.octave_base": 4.0, "anchors.offset": 0.0}
_QUANTIZED = _ANCHORS | {"anchors.quantize": True, "anchors.stride": "padded"}
_EXACT = _ANCHORS | {"anchors.quantize": False, "anchors.stride": "level"}
_EPS = {"model.norm_eps": 1e-5}
_RELU, _NO_RELU = {"model.relu_before_p7": True}, {"model.relu_before_p7": False}
TORCHVISION_V1 = Framework(
    "torchvision's RetinaNet", "head.classification_head.cls_logits.bias", TORCHVISION_KEYS,
    _RGB | _QUANTIZED | _RELU | {"model.norm_eps": 0.0},
    "torchvision_v1",
)  # fmt: skip
TORCHVISION_V2 = TORCHVISION_V1._replace(
    marker="head.classification_head.conv.0.1.weight", settings=TORCHVISION_V1.settings | _EPS, preset="torchvision_v2"
)
DETECTRON2 = Framework(
    "detectron2's RetinaNet", "head.cls_score.bias", DETECTRON2_KEYS, _CAFFE | _EXACT | _RELU | _EPS, "detectron2",
    orders_anchors_by_size=True,
)  # fmt: skip
MMDETECTION = Framework(
    "mmdetection's RetinaNet",
    "bbox_head.retina_cls.bias",
    MMDETECTION_KEYS,
    _RGB | _EXACT | _NO_RELU | _EPS,
    "mmdetection",
)
MMDETECTION_CAFFE = MMDETECTION._replace(settings=MMDETECTION.settings | _CAFFE)  # no key tells them apart
TORCHVISION_RESNET = Framework(
    "torchvision's ImageNet classifier", "layer4.0.conv1.weight", TORCHVISION_RESNET_KEYS, _RGB
)
MSRA_RESNET = Framework("MSRA's ImageNet classifier", "res5_0_branch2a_w", MSRA_RESNET_KEYS, _CAFFE)
FRAMEWORKS = (TORCHVISION_V2, TORCHVISION_V1, DETECTRON2, MMDETECTION, TORCHVISION_RESNET, MSRA_RESNET)


def framework_of(state: dict[str, Tensor], source: str) -> Framework:
    """Whose weights these are, by their keys. Raises WeightsError if none is known; `source` names the weights."""
    for framework in FRAMEWORKS:
        if framework.marker in state:
            return framework
    raise WeightsError(
        f"{source}: neither a RetinaNet of this project, torchvision, detectron2 or mmdetection, nor a ResNet of "
        f"torchvision or MSRA; its keys are {', '.join(list(state)[:3])}, ..."
    )


def rename_keys(state: dict[str, Tensor], framework: Framework, source: str = "weights") -> dict[str, Tensor]:
    """The state dict with our keys. Raises WeightsError for a key that is not in the table of the framework."""
    rules = [(re.compile(re.escape(old).replace(r"\{\}", r"(\d+)")), new) for old, new in framework.keys.items()]
    result = {}
    for key, value in state.items():
        match, new = next(((found, new) for rule, new in rules if (found := rule.match(key))), (None, None))
        if match is None:
            raise WeightsError(f"{source}: no rule for key {key!r} of {framework.name}")
        if new is not None:
            result[new.format(*match.groups()) + key[match.end() :]] = value
    return result
