"""A tiny data set in COCO format, which tests make for themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

IDS = [3, 7, 20]  # category ids with gaps
SIZES = [(96, 64), (64, 96), (80, 80), (96, 72), (64, 64), (72, 96)]  # width, height


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
