"""Initial weights: torchvision's ImageNet classifiers, torchvision's RetinaNets, or a file of either.

The tables below map the keys of torchvision's RetinaNet to ours. A key that they do not cover, or a key of ours that
gets no value, is an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet_ResNet50_FPN_V2_Weights, RetinaNet_ResNet50_FPN_Weights

from retina.model.retinanet import RetinaNet

# torchvision's key -> ours; {} is a number. The published V1 file is older than the class and has keys of its own.
TORCHVISION_KEYS = {
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
}
TORCHVISION_V1_FILE_KEYS = {
    "backbone.fpn.inner_blocks.{}.": "backbone.fpn.inner_blocks.{}.0.",
    "backbone.fpn.layer_blocks.{}.": "backbone.fpn.layer_blocks.{}.0.",
    **{f"head.classification_head.conv.{2 * i}.": f"cls_head.{i}.0." for i in range(4)},
    **{f"head.regression_head.conv.{2 * i}.": f"box_head.{i}.0." for i in range(4)},
}
COCO_NAMES: list[str] = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
TORCHVISION_DETECTORS = {
    "COCO_V1": RetinaNet_ResNet50_FPN_Weights.COCO_V1,
    "COCO_V2": RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1,
}


class WeightsError(ValueError):
    """Weights that do not fit the model. The message names the first keys or shapes that differ."""


def load_pretrained(model: RetinaNet, backbone: str, source: str, names: list[str]) -> tuple[bool, str]:
    """Load weights into `model`, in place.

    Args:
        model: the detector.
        backbone: its `model.backbone`.
        source: a weights name of torchvision's classifier `backbone` (IMAGENET1K_V1, ...), COCO_V1 or COCO_V2 for
            torchvision's RetinaNets, or a file with the state dict of either.
        names: the classes of the data set. If COCO has all of them, the model gets COCO's class outputs for them.
            Otherwise its class outputs keep their initial values.

    Returns: whether all weights are now those of a trained detector, and a message for the log.

    Raises:
        FileNotFoundError: `source` is unknown or cannot be downloaded; the message explains what to do.
        WeightsError: keys or shapes do not fit.
    """
    if Path(source).is_file():
        state = torch.load(source, map_location="cpu", weights_only=True)
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise WeightsError(
                f"{source}: expected a plain state dict of tensors, given keys {', '.join(list(state)[:5])}"
            )
    elif source in TORCHVISION_DETECTORS:
        state = download(TORCHVISION_DETECTORS[source])
    else:
        # torchvision has no resnet10
        known = {} if backbone == "resnet10" else torchvision.models.get_model_weights(backbone).__members__
        if source not in known:
            choices = ", ".join([*known, *TORCHVISION_DETECTORS]) if known else "it has none; use model.weights=null"
            raise FileNotFoundError(
                f"model.weights: {source!r} is neither a file nor a weights name of {backbone}: {choices}"
            )
        state = download(known[source])
    if any(key.startswith("head.") for key in state):
        state, message = from_torchvision(state, names)
        has_class_outputs = "cls_logits.weight" in state
        if not has_class_outputs:
            state |= {f"cls_logits.{key}": value for key, value in model.cls_logits.state_dict().items()}
        load_exactly(model, state, source)
        return has_class_outputs, f"weights: torchvision's RetinaNet from {source}, {message}"
    load_exactly(model.backbone.body, {key: value for key, value in state.items() if not key.startswith("fc.")}, source)
    return False, f"weights: {backbone} classifier from {source}; FPN and heads start from random values"


def from_torchvision(state: dict[str, Tensor], names: list[str] | None = None) -> tuple[dict[str, Tensor], str]:
    """Rename the keys of torchvision's RetinaNet to ours and select the class outputs.

    Args:
        state: a state dict of torchvision's RetinaNet.
        names: the classes whose outputs are kept, in this order, found by COCO's names. If COCO lacks one of them, all
            class outputs are removed. None keeps all of them as they are.

    Returns: the state dict, and a message about the class outputs.

    Raises:
        WeightsError: a key that is not in the tables.
    """
    result = {}
    rules = [(_pattern(old), new) for old, new in (TORCHVISION_KEYS | TORCHVISION_V1_FILE_KEYS).items()]
    for key, value in state.items():
        for pattern, new in rules:
            if match := pattern.match(key):
                result[new.format(*match.groups()) + key[match.end() :]] = value
                break
        else:
            raise WeightsError(f"torchvision RetinaNet: no rule for key {key!r}")
    if names is None:
        return result, "all class outputs kept"
    missing = [name for name in names if name not in COCO_NAMES]
    weight, bias = result.pop("cls_logits.weight"), result.pop("cls_logits.bias")
    if missing:
        return result, f"new class outputs ({', '.join(missing[:3])}{', ...' * (len(missing) > 3)} not in COCO)"
    rows = torch.tensor([COCO_NAMES.index(name) for name in names])
    per_cell = len(bias) // len(COCO_NAMES)
    for key, value in (("weight", weight), ("bias", bias)):
        selected = value.reshape(per_cell, len(COCO_NAMES), *value.shape[1:])[:, rows]
        result[f"cls_logits.{key}"] = selected.reshape(-1, *value.shape[1:])
    return result, f"{len(names)} of COCO's class outputs"


def load_exactly(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """`load_state_dict` that raises WeightsError naming each tensor that is missing, not used or of another shape.

    BatchNorm's `num_batches_tracked` may be missing or unused: frozen layers have none, and BatchNorm with a fixed
    momentum never reads it. `source` names the weights in messages.
    """
    own = module.state_dict()
    state = {key: value for key, value in state.items() if key in own or not key.endswith("num_batches_tracked")}
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unused = [key for key in state if key not in own]
    wrong_shape = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    for problem, keys in (("missing", missing), ("not used", unused), ("of another shape", wrong_shape)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise WeightsError(
                f"{source}: {problem}: {', '.join(keys[:3])}{more}; is it the backbone and norm of the config?"
            )
    module.load_state_dict(own | state)


def download(weights: Any) -> dict[str, Tensor]:
    """The state dict of a torchvision weights enum, cached by torch. FileNotFoundError tells where to put the file."""
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=True, check_hash=True)
    except (URLError, ConnectionError, TimeoutError) as error:
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        raise FileNotFoundError(
            f"cannot download {weights}: {error}\nFetch {weights.url} elsewhere and put it at {file}, "
            "or give its path as model.weights=FILE, or start from scratch: "
            "model.weights=null model.norm=group model.frozen_stages=-1"
        ) from error
    return state


def _pattern(key: str) -> re.Pattern[str]:
    return re.compile(re.escape(key).replace(r"\{\}", r"(\d+)"))
