"""Model over a data set -> the twelve COCO numbers and per-class AP, computed by pycocotools and nothing else.

Everything returned is plain numbers between 0 and 1, None where the data set has nothing to measure.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import distributed, nn

from retina.config import METRICS, Config
from retina.data.coco import CocoDataset, read_annotations
from retina.data.loader import Batch, eval_batches
from retina.detect import Detections, detect
from retina.device import autocast
from retina.model.anchors import make_anchors


class Evaluation(NamedTuple):
    """`metrics`: METRICS and `per_class`, a dict from name to AP. `precision`: at IoU 0.5, by name, over recall
    0, 0.01, ..., 1; for plots."""

    metrics: dict[str, Any]
    precision: dict[str, list[float]]


def run_detector(
    model: nn.Module, dataset: CocoDataset, config: Config, device: torch.device, progress: Any = iter
) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Detections over the whole data set in COCO results format, and by image id what could not be read.

    Boxes are xywh in pixels of the original image, category ids the data set's own. Under torch.distributed each
    process takes a share and all return the whole. `progress` wraps the iterable of batches.
    """
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    originals = {record.image_id: (record.height, record.width) for record in dataset.records}
    was_training = model.training
    model.eval()
    results: list[dict[str, Any]] = []
    unreadable: dict[int, str] = {}
    batches: Iterable[Batch] = progress(eval_batches(dataset, config, rank, world))
    with torch.inference_mode(), autocast(device, config.train.precision):
        for batch in batches:
            unreadable |= batch.unreadable
            images = batch.to(device).normalized().contiguous(memory_format=torch.channels_last)
            anchors = make_anchors(config.anchors, images.shape[2], images.shape[3], device)
            found = detect(model(images), anchors, batch.sizes, config.detect)
            for image_id, (height, width), detections in zip(batch.image_ids, batch.sizes, found, strict=True):
                if image_id in batch.unreadable:
                    continue
                full_height, full_width = originals[image_id]
                scale = torch.tensor([full_width / width, full_height / height] * 2)
                results += coco_results(image_id, detections, scale, dataset.category_ids)
    model.train(was_training)
    if world > 1:
        gathered: list[Any] = [None] * world
        distributed.all_gather_object(gathered, (results, unreadable))
        results = [entry for part, _ in gathered for entry in part]
        unreadable = {image_id: said for _, part in gathered for image_id, said in part.items()}
    return sorted(results, key=lambda entry: (entry["image_id"], -entry["score"])), unreadable


def coco_results(
    image_id: int, detections: Detections, scale: torch.Tensor, category_ids: list[int]
) -> list[dict[str, Any]]:
    """One image's detections as COCO results entries; `scale` (4,) takes boxes to pixels of the original image."""
    boxes = detections.boxes.cpu() * scale
    xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
    return [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": [round(v, 3) for v in box], "score": score}
        for box, score, label in zip(xywh.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True)
    ]


def score(results: list[dict[str, Any]], dataset: CocoDataset, without: Iterable[int] = ()) -> Evaluation:
    """COCO's numbers for `results` on the images of `dataset`, by pycocotools; crowd regions count as COCO says.

    `without`: ids of images that could not be looked at, and so are not counted.
    """
    truth = COCO()
    tree = read_annotations(dataset.annotations)
    # pycocotools takes a match with annotation 0 for no match, and users' files do count from 0.
    tree["annotations"] = [{**entry, "id": i} for i, entry in enumerate(tree["annotations"], 1)]
    truth.dataset = {"info": {}, **tree}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        # loadRes cannot take an empty list; a COCO object without annotations is what it would have to return.
        found = truth.loadRes([dict(entry) for entry in results]) if results else COCO()  # it writes into them
        if not results:
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        judge = COCOeval(truth, found, "bbox")
        judge.params.imgIds = sorted({record.image_id for record in dataset.records} - set(without))
        judge.params.catIds = dataset.category_ids
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    stats = [None if value < 0 else float(value) for value in judge.stats]
    precision_TRKAM = judge.eval["precision"]  # IoU thresholds, recalls, classes, areas, max detections
    per_class: dict[str, float | None] = {}
    curves: dict[str, list[float]] = {}
    for label, name in enumerate(dataset.names):
        valid = precision_TRKAM[:, :, label, 0, -1]
        has_truth = bool((valid > -1).any())
        per_class[name] = float(np.mean(valid[valid > -1])) if has_truth else None
        if has_truth:
            curves[name] = [float(value) for value in precision_TRKAM[0, :, label, 0, -1]]
    return Evaluation({**dict(zip(METRICS, stats, strict=True)), "per_class": per_class}, curves)


def table(metrics: dict[str, Any]) -> str:
    """The metrics as text for a terminal, in percent as papers print them."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    lines = []
    for names in (METRICS[:6], METRICS[6:]):
        lines.append("  ".join(f"{name:>6}" for name in names))
        lines.append("  ".join(f"{percent(metrics[name]):>6}" for name in names))
    width = max([len(name) for name in metrics["per_class"]] + [5])
    lines += ["", f"{'class':<{width}}      AP"]
    lines += [f"{name:<{width}}  {percent(value):>6}" for name, value in metrics["per_class"].items()]
    return "\n".join(lines)
