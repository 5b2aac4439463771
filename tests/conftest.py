"""Shared by the tests: a tiny COCO-format data set made here, and a configuration that trains on it in seconds."""

from __future__ import annotations

import json
import os
from pathlib import Path

# Before torch is imported, and for the processes that tests start: `make test` runs one process for each core.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image

from retina.config import Config
from retina.config_file import load_config

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels run on the CPU, slowly
IDS = [3, 7, 20]  # category ids with gaps
SIZES = [(96, 64), (64, 96), (80, 80), (96, 72), (64, 64), (72, 96)]  # width, height


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first, so that the processes of `make test` finish at about the same time."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def write_coco(root: Path, split: str, count: int, seed: int) -> Path:
    """Bright rectangles on noise, one color a class; every fifth image is empty, every fourth has a crowd box."""
    rng = np.random.default_rng(seed)
    folder = root / split
    folder.mkdir(parents=True)
    tree: dict[str, list[dict[str, object]]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in zip(IDS, ("red", "green", "blue"), strict=True)],
    }
    for index in range(count):
        width, height = SIZES[index % len(SIZES)]
        pixels = rng.integers(0, 90, (height, width, 3), dtype=np.uint8)
        image_id = 1000 + 7 * index
        for _ in range(0 if index % 5 == 4 else 1 + index % 3):
            label = int(rng.integers(3))
            w, h = rng.integers(16, 40, 2)
            x, y = rng.integers(0, width - w), rng.integers(0, height - h)
            pixels[y : y + h, x : x + w, label] = 250
            box = [float(v) for v in (x, y, w, h)]
            tree["annotations"].append(
                {"id": len(tree["annotations"]) + 1, "image_id": image_id, "category_id": IDS[label], "bbox": box,
                 "area": float(w * h), "iscrowd": 0}
            )  # fmt: skip
        if index % 4 == 3:
            tree["annotations"].append(
                {"id": len(tree["annotations"]) + 1, "image_id": image_id, "category_id": IDS[0],
                 "bbox": [0.0, 0.0, 30.0, 30.0], "area": 900.0, "iscrowd": 1}
            )  # fmt: skip
        name = f"{index:04}.png"
        Image.fromarray(pixels).save(folder / name)
        tree["images"].append({"id": image_id, "file_name": name, "width": width, "height": height})
    path = root / f"{split}.json"
    path.write_text(json.dumps(tree))
    return path


@pytest.fixture(scope="session")
def coco_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("coco")
    write_coco(root, "train", 22, seed=1)
    write_coco(root, "val", 10, seed=2)
    return root


@pytest.fixture(scope="session")
def tiny_yaml(coco_root: Path) -> Path:
    path = coco_root / "tiny.yaml"
    path.write_text(f"""
data:
  train_annotations: {coco_root}/train.json
  train_images: {coco_root}/train
  val_annotations: {coco_root}/val.json
  val_images: {coco_root}/val
  short_side: [48, 64]
  max_side: 96
  zoom: [0.8, 1.25]
  photometric: 0.5
  workers: 0
model: {{backbone: resnet18, weights: null, norm: group, frozen_stages: -1, channels: 32, head_convs: 1,
  head_norm: group}}
train: {{steps: 6, batch_size: 4, reference_batch: 4, lr: 0.01, warmup_steps: 2, precision: fp32, log_every: 1,
  eval_every: 3, checkpoint_every: 2, ema: 0.9, clip_norm: 10}}
""")
    return path


@pytest.fixture
def tiny(tiny_yaml: Path, tmp_path: Path) -> Config:
    return load_config(tiny_yaml, [f"output_dir={tmp_path}/run"])
