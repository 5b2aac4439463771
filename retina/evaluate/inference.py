"""A trained detector: load it from a file, run it on a batch or on an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from retina.config import Config
from retina.config_file import config_from_yaml
from retina.data.augment import eval_transform
from retina.data.loader import Batch, single_image_batch
from retina.detect import Detections, detect
from retina.device import autocast
from retina.model import checkpoint
from retina.model.anchors import make_anchors
from retina.model.pretrained import COCO_NAMES, TORCHVISION_DETECTORS, WeightsError, load_exactly, load_pretrained
from retina.model.retinanet import RetinaNet

Categories = list[tuple[int, str]]  # (id, name) of each label


def load_detector(
    config: Config, file: Path | None, categories: Categories | None, device: torch.device
) -> tuple[RetinaNet, Categories, str]:
    """The model of `config` with trained weights, its categories, and a sentence about where the weights come from.

    Args:
        config: the network and anchors that the weights were trained with.
        file: a checkpoint of ours, or torchvision's RetinaNet weights. None takes best.pt or last.pt of the run folder,
            or else `model.weights` where that names a whole detector.
        categories: those of the data set, which the checkpoint must have too. torchvision's weights are matched by
            COCO's names; None takes all of COCO's.
        device: where the model goes.

    Of a checkpoint with a moving average of the weights, the average is loaded.

    Raises: FileNotFoundError, CheckpointError, WeightsError. The last also where the checkpoint was trained with
        another network or other anchors than `config` has, which no shape of a tensor would show.
    """
    if file is None:
        candidates = [config.run_dir / name for name in (checkpoint.BEST, checkpoint.LAST)]
        file = next((path for path in candidates if path.exists()), None)
        if file is None and config.model.weights not in TORCHVISION_DETECTORS:
            raise FileNotFoundError(f"no checkpoint in {config.run_dir}; train first, or give --checkpoint FILE")
    elif not file.is_file():
        raise FileNotFoundError(f"{file}: no such checkpoint")
    if file is None or not checkpoint.is_checkpoint(file):
        categories = categories or list(enumerate(COCO_NAMES))
        weights = str(file or config.model.weights)
        model = RetinaNet(config, len(categories))
        is_detector, source = load_pretrained(model, config.model.backbone, weights, [name for _, name in categories])
        if not is_detector:
            raise WeightsError(f"{weights} is not a detector for these classes ({source})")
    else:
        state = checkpoint.load(file)
        trained_categories = [(int(i), str(name)) for i, name in state["categories"]]
        if categories is not None and trained_categories != categories:
            raise WeightsError(
                f"{file} was trained on other categories, {trained_categories}; the data set has {categories}"
            )
        _check_settings(config, config_from_yaml(state["config"]), file)
        model = RetinaNet(config, len(trained_categories))
        load_exactly(model, state["ema"] or state["model"], str(file))
        categories, source = trained_categories, f"{file}, step {state['step']}"
    return model.to(device, memory_format=torch.channels_last).eval(), categories, source  # type: ignore[call-overload]


def _check_settings(config: Config, trained: Config, file: Path) -> None:
    """WeightsError where `config` describes another network or other anchors than the checkpoint was trained with."""
    differing = [
        f"{section}.{key} was {value}, is {now}"
        for section in ("model", "anchors")
        for key, value in getattr(trained, section).model_dump().items()
        if (now := getattr(getattr(config, section), key)) != value and key not in ("weights", "frozen_stages")
    ]
    if trained.detect.max_ratio != config.detect.max_ratio:
        differing.append(f"detect.max_ratio was {trained.detect.max_ratio}, is {config.detect.max_ratio}")
    if differing:
        raise WeightsError(f"{file} was trained with other settings than the config's: {'; '.join(differing)}")


@torch.inference_mode()
def detect_batch(model: RetinaNet, batch: Batch, config: Config) -> list[Detections]:
    """Detections on each image of a batch, on its device; boxes in pixels of the padded frame."""
    images = batch.normalized().contiguous(memory_format=torch.channels_last)
    anchors = make_anchors(config.anchors, images.shape[2], images.shape[3], images.device)
    with autocast(images.device, config.train.precision):
        outputs = model(images)
    return detect(outputs, anchors, batch.sizes, config.detect)


@torch.inference_mode()
def predict(model: RetinaNet, image: NDArray[np.uint8], config: Config, device: torch.device) -> Detections:
    """Detections on one RGB image, uint8 (H, W, 3), on the CPU; boxes xyxy in pixels of that image."""
    batch = single_image_batch(eval_transform(image, config.data), config.data).to(device)
    (detections,) = detect_batch(model, batch, config)
    height, width = batch.sizes[0]
    scale = torch.tensor([image.shape[1] / width, image.shape[0] / height] * 2)
    return Detections(detections.boxes.cpu() * scale, detections.scores.cpu(), detections.labels.cpu())


def detections_to_dict(file: Path, detections: Detections, categories: Categories) -> dict[str, Any]:
    """The detections on one image in plain values; boxes xyxy in pixels."""
    entries = zip(detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True)
    return {
        "file": str(file),
        "detections": [
            {"category_id": categories[label][0], "name": categories[label][1], "score": score, "box_xyxy": box}
            for box, score, label in entries
        ],
    }
