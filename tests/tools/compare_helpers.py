"""Shared by the tests of tools/compare.py: detections, and run folders that have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from retina.config_file import load_config

Entries = list[dict[str, Any]]


def detections(truth: dict[str, Any], shift: float, seed: int = 0) -> Entries:
    """Every object with a box that is misplaced by `shift` of its size, on average, and a few boxes of nothing."""
    rng = np.random.default_rng(seed)
    results = []
    for annotation in truth["annotations"]:
        x, y, w, h = annotation["bbox"]
        dx, dy = rng.normal(0, shift, 2) * (w, h)
        found = {"image_id": annotation["image_id"], "category_id": annotation["category_id"]}
        results.append({**found, "bbox": [x + dx, y + dy, w, h], "score": float(rng.uniform(0.4, 0.9))})
    for image in truth["images"]:
        found = {"image_id": image["id"], "category_id": truth["categories"][0]["id"]}
        results.append({**found, "bbox": [1.0, 2.0, 9.0, 9.0], "score": float(rng.uniform(0.1, 0.5))})
    return results


def write_run(folder: Path, yaml: Path, results: Entries, *overrides: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(load_config(yaml, [f"output_dir={folder}", *overrides]).to_yaml())
    (folder / "detections.json").write_text(json.dumps(results))
    return folder
