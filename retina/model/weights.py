"""Weights of any source, with our keys, and what is known of their classes and settings.

A source is a published name (of torchvision), a checkpoint of this project, or a file of torchvision, detectron2 or
mmdetection.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, get_args
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor
from torchvision.models.detection import RetinaNet_ResNet50_FPN_V2_Weights, RetinaNet_ResNet50_FPN_Weights

from retina.config import Backbone
from retina.config_file import config_from_yaml
from retina.model import checkpoint
from retina.model.key_tables import MMDETECTION, MMDETECTION_CAFFE, framework_of, rename_keys
from retina.model.weights_file import WeightsError, read_file, tensors_of

Categories = list[tuple[int, str]]  # (id, name) of each class output

COCO_NAMES: list[str] = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # by category id, with 11 gaps
TORCHVISION_DETECTORS = {
    "COCO_V1": RetinaNet_ResNet50_FPN_Weights.COCO_V1,
    "COCO_V2": RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1,
}
_WITH_GAPS: Categories = list(enumerate(COCO_NAMES))
_WITHOUT_GAPS: Categories = [(i, name) for i, name in _WITH_GAPS if name not in ("__background__", "N/A")]
# Settings that change what the network computes, and no shape.
INVISIBLE_SETTINGS = (
    *("data.normalization", "model.stride_in_1x1", "model.relu_before_p7", "model.norm_eps"),
    *("anchors.octave_base", "anchors.ratios", "anchors.quantize", "anchors.stride", "anchors.offset"),
)


class Weights(NamedTuple):
    """Weights with the keys of our RetinaNet."""

    state: dict[str, Tensor]  # of a classifier: only keys that begin with "backbone.body."
    source: str  # the file or the published name, for messages
    origin: str  # for messages, for example "detectron2's RetinaNet"
    categories: Categories | None  # of the class outputs, in their order; None: unknown
    settings: dict[str, Any]  # known settings of their training, by key; all of them for a checkpoint of this project
    preset: str | None  # the file in configs/presets that has all settings of the detector; None: unknown
    orders_anchors_by_size: bool = False
    step: int | None = None  # of the training, of a checkpoint of this project

    @property
    def is_own(self) -> bool:
        """Whether they are of this project. Then `settings` are all of the config."""
        return "train.steps" in self.settings

    @property
    def is_detector(self) -> bool:
        return {"cls_logits.bias", "bbox_reg.bias"} <= self.state.keys()

    @property
    def classes(self) -> int:
        """The number of class outputs, K; 0 for a classifier of images."""
        return len(self.state["cls_logits.bias"]) * 4 // len(self.state["bbox_reg.bias"]) if self.is_detector else 0

    @property
    def known_settings(self) -> dict[str, Any]:
        """What is known of the config that the weights need, by key. The preset has the rest."""
        shown = network_settings(self.state)
        return {key: value for key, value in shown.items() if key not in ("anchors", "model.norm")} | self.settings


def read_weights(source: str, backbone: str = "resnet50") -> Weights:
    """Find, read and rename weights.

    Args:
        source: a weights name of torchvision's classifier `backbone` (IMAGENET1K_V1, ...); COCO_V1 or COCO_V2 for
            torchvision's RetinaNets, with resnet50 only; or a file: a checkpoint of this project, torchvision's,
            detectron2's (also .pkl) or mmdetection's weights, or safetensors with the keys of any of these.
        backbone: `model.backbone`, for the names.

    Raises:
        FileNotFoundError: `source` is a folder, is unknown for this backbone, or cannot be downloaded; the message
            explains what to do.
        WeightsError: the file cannot be read, or has keys of another framework.
        CheckpointError: a damaged checkpoint of this project.
        ConfigError: the settings in a checkpoint do not fit this version of the program.
    """
    path = Path(source)
    if path.is_file():
        return _from_content(read_file(path), path)
    known: dict[str, Any] = {}
    if backbone != "resnet10":
        known |= torchvision.models.get_model_weights(backbone).__members__
    if backbone == "resnet50":
        known |= TORCHVISION_DETECTORS
    if source not in known:
        raise FileNotFoundError(f"model.weights: {_why_unknown(path, backbone, list(known))}")
    return _from_tensors(_download(known[source]), source, {})


def _why_unknown(path: Path, backbone: str, known: list[str]) -> str:
    if path.is_dir():
        names = (checkpoint.BEST, checkpoint.LAST, "model.safetensors")  # of a run, and of save_pretrained
        inside = [str(path / name) for name in names if (path / name).is_file()]
        return f"{path} is a folder, expected a file of weights" + (f"; give {inside[0]}" if inside else " or a name")
    choices = ", ".join(known) or "it has none; use model.weights=null"
    of_resnet50 = f" ({path} is a RetinaNet with resnet50)" if str(path) in TORCHVISION_DETECTORS else ""
    return f"{str(path)!r} is neither a file nor a weights name of {backbone}: {choices}{of_resnet50}"


def network_settings(state: dict[str, Tensor]) -> dict[str, Any]:
    """The settings that the shapes of a state dict with our keys show, by key; those that do not apply are left out.

    "anchors" is the number of anchors of a cell, anchors.scales times the number of anchors.ratios.
    """
    settings: dict[str, Any] = {"model.backbone": _backbone_of(state)}
    conv1, p6 = state.get("backbone.body.conv1.weight"), state.get("backbone.fpn.extra_blocks.p6.weight")
    if conv1 is not None:
        settings["model.base_channels"] = len(conv1)
        settings["model.norm"] = "batch" if "backbone.body.bn1.running_var" in state else "group"
    if p6 is not None:
        settings["model.channels"] = p6.shape[0]
        settings["model.p6_from"] = "p5" if p6.shape[0] == p6.shape[1] else "c5"
    if "bbox_reg.bias" in state:
        settings["model.head_convs"] = sum(key.startswith("cls_head.") and key.endswith(".0.weight") for key in state)
        settings["model.head_norm"] = "group" if "cls_head.0.1.weight" in state else "none"
        settings["anchors"] = len(state["bbox_reg.bias"]) // 4
    return settings


def _from_content(content: Any, path: Path) -> Weights:
    """Of a file, from what `read_file` gave."""
    if checkpoint.is_payload(content):
        saved = checkpoint.verified_state(content, path)
        return _own(saved["ema"] or saved["model"], str(path), f"the checkpoint of step {saved['step']}", saved)
    tensors = tensors_of(content, path)
    meta = content.get("meta") if isinstance(content.get("meta"), dict) else {}
    if "cls_logits.bias" in tensors:  # a safetensors file of ours
        try:
            saved = {"config": meta["config"], "categories": json.loads(meta["categories"])}
        except (KeyError, ValueError):
            raise WeightsError(
                f"{path}: weights of this project without their config (as YAML) and categories (as JSON) in the "
                "metadata; HubDetector(detector).save_pretrained(FOLDER) of retina.hub saves all of it, and "
                "detector.model.load_state_dict(...) puts bare weights into a detector"
            ) from None
        return _own(tensors, str(path), "weights of this project", saved)
    return _from_tensors(tensors, str(path), meta)


def _own(state: dict[str, Tensor], source: str, origin: str, saved: dict[str, Any]) -> Weights:
    categories = [(int(i), str(name)) for i, name in saved["categories"]]
    settings = config_from_yaml(saved["config"]).flat()
    return Weights(state, source, origin, categories, settings, None, step=saved.get("step"))


def _from_tensors(tensors: dict[str, Tensor], source: str, meta: dict[str, Any]) -> Weights:
    """Of another framework. `meta` is mmdetection's, with the names of the classes and the config as text."""
    framework = framework_of(tensors, source)
    if framework is MMDETECTION and "style='caffe'" in str(meta.get("cfg", meta.get("config"))):
        framework = MMDETECTION_CAFFE
    weights = Weights(
        rename_keys(tensors, framework, source),
        source,
        framework.name,
        None,
        framework.settings,
        framework.preset,
        framework.orders_anchors_by_size,
    )
    dataset = meta.get("dataset_meta") or meta
    names = [str(name) for name in dataset.get("classes") or dataset.get("CLASSES") or ()]
    return weights._replace(categories=_categories(names, weights.classes))


def _categories(names: list[str], classes: int) -> Categories | None:
    """With COCO's ids if the names are COCO's, or if there are none and as many outputs as COCO has classes."""
    for coco in (_WITHOUT_GAPS, _WITH_GAPS):
        if names == [name for _, name in coco] or (not names and classes == len(coco)):
            return coco
    return list(enumerate(names)) if names and len(names) == classes else None


def _backbone_of(state: dict[str, Tensor]) -> str:
    """The `model.backbone` that has these blocks; "unknown" if none has."""
    blocks = Counter(key.split(".")[2] for key in state if key.startswith("backbone.body.layer") and "conv1." in key)
    depth = "-".join(str(blocks[f"layer{i}"]) for i in range(1, 5))
    conv2 = state.get("backbone.body.layer1.0.conv2.weight")
    if conv2 is None:
        return "unknown"
    if "backbone.body.layer1.0.conv3.weight" not in state:
        return {"1-1-1-1": "resnet10", "2-2-2-2": "resnet18", "3-4-6-3": "resnet34"}.get(depth, "unknown")
    width, of_group = conv2.shape[:2]
    number = {"3-4-6-3": 50, "3-4-23-3": 101, "3-8-36-3": 152}.get(depth)
    name = f"resnet{number}" if width == of_group else f"resnext{number}_{width // of_group}x{of_group}d"
    return name if name in get_args(Backbone) else "unknown"


def _download(weights: Any) -> dict[str, Tensor]:
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
