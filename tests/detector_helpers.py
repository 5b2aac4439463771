"""Shared by the tests of detectors."""

from __future__ import annotations

from pathlib import Path

import torch

from retina.config import Config
from retina.data.coco import CocoDataset
from retina.model import checkpoint
from retina.model.retinanet import RetinaNet
from retina.train.state import checkpoint_metadata


def save_random_detector(file: Path, config: Config) -> Path:
    """A checkpoint as a run writes it, with random weights that give many detections."""
    torch.manual_seed(0)
    data = CocoDataset(config.data.val_annotations, config.data.val_images)
    model = RetinaNet(config, data.num_classes)
    torch.nn.init.normal_(model.cls_logits.weight, std=0.3)
    torch.nn.init.normal_(model.bbox_reg.weight, std=0.05)
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {"model": model.state_dict(), "ema": {}, "step": 7}
    checkpoint.save(file, state | checkpoint_metadata(config, data))
    return file
