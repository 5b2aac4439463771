"""A detector with random weights that finds objects anywhere, as a model and as a checkpoint file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from retina.config import Config
from retina.config_file import load_config
from retina.evaluate import Detector, load
from retina.export import ExportedDetector
from retina.model import RetinaNet, checkpoint

CATEGORIES = [(3, "red"), (7, "green"), (20, "blue")]  # of coco_files.py


def random_config(tiny_yaml: Path, *overrides: str) -> Config:
    small = ["model.base_channels=32", "model.head_convs=1", "model.head_norm=none", "model.norm=batch"]
    scores = ["data.short_side=[64]", "detect.score_threshold=0.4"]
    return load_config(tiny_yaml, [*small, *scores, *overrides])


def random_model(config: Config) -> RetinaNet:
    """With norms as after some training, scores around 0.5 that differ, and boxes that differ from the anchors."""
    torch.manual_seed(0)
    model = RetinaNet(config, len(CATEGORIES))
    nn.init.normal_(model.cls_logits.weight, std=0.1)
    nn.init.zeros_(model.cls_logits.bias)  # type: ignore[arg-type]
    nn.init.normal_(model.bbox_reg.weight, std=0.05)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)  # type: ignore[arg-type]
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor, std=0.1)  # type: ignore[arg-type]
    return model.eval()


def random_detector(config: Config, model: RetinaNet | None = None) -> Detector:
    return Detector(model or random_model(config), config, CATEGORIES, torch.device("cpu"), "random weights")


def write_checkpoint(path: Path, config: Config, model: RetinaNet) -> Path:
    state = {
        "model": model.state_dict(), "ema": {}, "config": config.to_yaml(), "step": 5,
        "categories": [list(category) for category in CATEGORIES],
    }  # fmt: skip
    checkpoint.save(path, state)
    return path


def random_image(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth, as photographs are."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, 6, 8)).astype(np.float32))
    smooth = nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0].permute(1, 2, 0)
    return (smooth + torch.from_numpy(rng.normal(0, 8, (height, width, 3)))).clamp(0, 255).to(torch.uint8).numpy()


def assert_equal_to_pytorch(file: Path, trained: tuple[Config, Path], sizes: list[tuple[int, int]], batch: int) -> None:
    config, checkpoint = trained
    eager, exported = load(checkpoint, config), ExportedDetector(file)
    for size in sizes:
        images = np.stack([random_image(*size, seed) for seed in range(batch)])
        for image, found in zip(images, exported(images), strict=True):
            expected = eager(image)
            assert len(expected.scores) > 20
            torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-4)
            torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=1e-2)
            assert torch.equal(found.labels, expected.labels)
