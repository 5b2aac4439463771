"""Small COCO data sets that are hard to score, and pycocotools' answer for them.

Scores and boxes come from few values, so that scores and IoUs are often equal.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retina.data.annotations import Annotations, read_annotations

Case = tuple[dict[str, Any], list[dict[str, Any]]]  # ground truth, results


@st.composite
def coco_cases(draw: st.DrawFn, max_detections: int = 130) -> Case:
    """Crowds, ties, ids from 0 and with gaps, empty classes and images, boxes without area, wrong areas."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    step = draw(st.sampled_from([3, 11, 40, 0.1]))  # pixels of the grid that the corners are on
    image_ids = draw(st.lists(st.integers(0, 60), min_size=1, max_size=5, unique=True))
    category_ids = draw(st.lists(st.integers(0, 90), min_size=1, max_size=4, unique=True))
    objects, detections = draw(st.integers(0, 25)), draw(st.integers(0, max_detections))
    levels = draw(st.sampled_from([2, 5, 1000]))  # different scores
    ids = rng.permutation(objects * 3)[:objects]  # with 0 and gaps
    boxes = _boxes(rng, objects, step)
    near = rng.random(detections) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    chosen = rng.integers(0, max(objects, 1), detections)
    found = _boxes(rng, detections, step)
    if objects:
        found[near] = boxes[chosen[near]] + np.round(rng.normal(0, 1, (near.sum(), 4))) * step * rng.integers(0, 2)
    annotations = [
        {
            "id": int(ids[i]),
            "image_id": int(rng.choice(image_ids)),
            "category_id": int(rng.choice(category_ids)),
            "bbox": boxes[i].tolist(),
            "area": float(rng.choice([boxes[i, 2] * boxes[i, 3], 0, 1023.9, 1024, 9216, 9217, 1e11])),
            "iscrowd": int(rng.random() < 0.2),
        }
        for i in range(objects)
    ]
    results = []
    for i in range(detections):
        like = annotations[chosen[i]] if objects and near[i] else None
        results.append(
            {
                "image_id": like["image_id"] if like else int(rng.choice(image_ids)),
                "category_id": like["category_id"] if like else int(rng.choice(category_ids)),
                "bbox": found[i].tolist(),
                "score": int(rng.integers(0, levels)) / levels,
            }
        )
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in image_ids]
    categories = [{"id": i, "name": f"class {i}"} for i in category_ids]
    return {"info": {}, "images": images, "categories": categories, "annotations": annotations}, results


def _boxes(rng: np.random.Generator, count: int, step: float) -> NDArray[np.float64]:
    """xywh, some without area."""
    boxes: NDArray[np.float64] = rng.integers(0, 8, (count, 4)) * float(step)
    return boxes


def write_annotations(ground_truth: dict[str, Any], folder: Path) -> Annotations:
    path = folder / "annotations.json"
    path.write_text(json.dumps(ground_truth))
    return read_annotations(path)


def evaluate_with_pycocotools(ground_truth: dict[str, Any], results: list[dict[str, Any]]) -> COCOeval:
    """COCOeval after `summarize`. The annotations get ids from 1, because it takes a match with id 0 for no match."""
    annotations = [{**entry, "id": i} for i, entry in enumerate(ground_truth["annotations"], 1)]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {**ground_truth, "annotations": annotations}
        truth.createIndex()
        if results:
            found = truth.loadRes([dict(entry) for entry in results])
        else:
            found = COCO()
            found.dataset = {**ground_truth, "annotations": []}
            found.createIndex()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation
