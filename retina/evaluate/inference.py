"""A trained detector: load it, and run it on an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from retina.config import Config
from retina.config_file import from_yaml
from retina.data.augment import eval_view
from retina.data.loader import Batch, frame_batch
from retina.detect import Detections, detect
from retina.device import autocast
from retina.model import checkpoint
from retina.model.anchors import make_anchors
from retina.model.pretrained import COCO_NAMES, DETECTORS, WeightsError, load_exactly, load_pretrained
from retina.model.retinanet import RetinaNet

Categories = list[tuple[int, str]]


def load_detector(
    config: Config, file: Path | None, categories: Categories | None, device: torch.device
) -> tuple[RetinaNet, Categories, str]:
    """The model of `config` with trained weights, its (id, name) for each label, and where the weights came from.

    `file`: a checkpoint of ours, or torchvision's RetinaNet weights; None is the run folder's best.pt or last.pt, else
    `model.weights` where that names a whole detector. `categories`: what the data set has, to be checked against the
    checkpoint (torchvision's weights need them, by COCO's names). The moving average of the weights is taken where
    there is one.

    Raises FileNotFoundError, CheckpointError, WeightsError; the last also where the checkpoint was trained with another
    network or other anchors than `config` has, which no shape of a tensor would show.
    """
    if file is None:
        found = [
            config.run_dir / name for name in (checkpoint.BEST, checkpoint.LAST) if (config.run_dir / name).exists()
        ]
        if not found and config.model.weights not in DETECTORS:
            raise FileNotFoundError(f"no checkpoint in {config.run_dir}; train first, or give --checkpoint FILE")
        file = found[0] if found else None
    elif not file.is_file():
        raise FileNotFoundError(f"{file}: no such checkpoint")
    if file is None or not checkpoint.is_checkpoint(file):
        categories = categories or list(enumerate(COCO_NAMES))
        source = str(file or config.model.weights)
        model = RetinaNet(config, len(categories))
        whole, said = load_pretrained(model, config.model.backbone, source, [name for _, name in categories])
        if not whole:
            raise WeightsError(f"{source} is not a detector for these classes ({said})")
    else:
        state = checkpoint.load(file)
        own = [(int(i), str(name)) for i, name in state["categories"]]
        if categories is not None and own != categories:
            raise WeightsError(f"{file} was trained on other categories, {own}; the data set has {categories}")
        _check_settings(config, from_yaml(state["config"]), file)
        model = RetinaNet(config, len(own))
        load_exactly(model, state["ema"] or state["model"], str(file))
        categories, said = own, f"{file}, step {state['step']}"
    return model.to(device, memory_format=torch.channels_last).eval(), categories, said  # type: ignore[call-overload]


def _check_settings(config: Config, trained: Config, file: Path) -> None:
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
def predict(model: RetinaNet, image: NDArray[np.uint8], config: Config, device: torch.device) -> Detections:
    """Detections on one RGB image, uint8 (H, W, 3); boxes xyxy in its own pixels, on the CPU."""
    batch = frame_batch(eval_view(image, config.data), config.data).to(device)
    (found,) = _detect_batch(model, batch, config, device)
    height, width = batch.sizes[0]
    scale = torch.tensor([image.shape[1] / width, image.shape[0] / height] * 2)
    return Detections(found.boxes.cpu() * scale, found.scores.cpu(), found.labels.cpu())


def _detect_batch(model: RetinaNet, batch: Batch, config: Config, device: torch.device) -> list[Detections]:
    anchors = make_anchors(config.anchors, batch.images.shape[2], batch.images.shape[3], device)
    with autocast(device, config.train.precision):
        outputs = model(batch.normalized().contiguous(memory_format=torch.channels_last))
    return detect(outputs, anchors, batch.sizes, config.detect)


def as_json(file: Path, found: Detections, categories: Categories) -> dict[str, Any]:
    """One image's detections in plain values, boxes xyxy in pixels."""
    entries = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    return {
        "file": str(file),
        "detections": [
            {"category_id": categories[label][0], "name": categories[label][1], "score": score, "box_xyxy": box}
            for box, score, label in entries
        ],
    }
