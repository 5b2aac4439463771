"""Run a model on a data set -> the twelve COCO numbers and the AP of each class, all computed by pycocotools.

Metrics are floats between 0 and 1, None where the data set has no objects to measure.
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
from torch import distributed

from retina.config import COCO_METRICS, Config
from retina.data.annotations import Annotations
from retina.data.coco import CocoDataset
from retina.data.loader import Batch, eval_batches
from retina.detect import Detections
from retina.evaluate.inference import detect_batches
from retina.model.retinanet import RetinaNet


class Evaluation(NamedTuple):
    """The result of `evaluate_detections`.

    `metrics`: the numbers of COCO_METRICS by name, and `per_class`, a dict from class name to AP. `precision`: by class
    name, the precision at IoU 0.5 over the recalls 0, 0.01, ..., 1, for plots.
    """

    metrics: dict[str, Any]
    precision: dict[str, list[float]]


@torch.inference_mode()
def inference_on_dataset(
    model: RetinaNet, dataset: CocoDataset, config: Config, device: torch.device, progress: Any = iter
) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Detections on the whole data set in COCO results format, and the reason for each image that could not be read.

    Boxes are xywh in pixels of the original image, category ids are those of the data set. The reasons are by image id.
    Under torch.distributed, each process runs a part of the images and all return all results. `progress` wraps the
    iterable of batches.
    """
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    records = dataset.records
    original_sizes = dict(
        zip(records.image_ids.tolist(), zip(records.heights, records.widths, strict=True), strict=True)
    )
    was_training = model.training
    model.eval()
    results: list[dict[str, Any]] = []
    unreadable: dict[int, str] = {}
    batches: Iterable[Batch] = progress(eval_batches(dataset, config, rank, world))
    for batch, batch_detections in detect_batches(model, batches, config, device):
        unreadable |= batch.unreadable
        for image_id, (height, width), detections in zip(batch.image_ids, batch.sizes, batch_detections, strict=True):
            if image_id in batch.unreadable:
                continue
            original_height, original_width = original_sizes[image_id]
            scale = torch.tensor([original_width / width, original_height / height] * 2)
            results += coco_results(image_id, detections, scale, dataset.category_ids)
    model.train(was_training)
    if world > 1:
        gathered: list[Any] = [None] * world
        distributed.all_gather_object(gathered, (results, unreadable))
        results = [entry for part, _ in gathered for entry in part]
        unreadable = {image_id: reason for _, part in gathered for image_id, reason in part.items()}
    return sorted(results, key=lambda entry: (entry["image_id"], -entry["score"])), unreadable


def coco_results(
    image_id: int, detections: Detections, scale: torch.Tensor, category_ids: list[int]
) -> list[dict[str, Any]]:
    """The detections on one image as COCO results; `scale` (4,) converts boxes to pixels of the original image."""
    boxes = detections.boxes * scale
    xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
    return [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": [round(v, 3) for v in box], "score": score}
        for box, score, label in zip(xywh.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True)
    ]


def evaluate_detections(results: list[dict[str, Any]], dataset: CocoDataset, exclude: Iterable[int] = ()) -> Evaluation:
    """The COCO numbers of `results` on the images of `dataset`, by pycocotools; crowd regions count as COCO defines.

    `exclude`: ids of images that are not counted, for example because they could not be read.
    """
    coco_gt = COCO()
    coco_gt.dataset = _ground_truth(dataset.file)
    with contextlib.redirect_stdout(io.StringIO()):
        coco_gt.createIndex()
        if results:
            coco_dt = coco_gt.loadRes([dict(entry) for entry in results])  # copies, because loadRes writes into them
        else:  # loadRes cannot take an empty list
            coco_dt = COCO()
            coco_dt.dataset = {**coco_gt.dataset, "annotations": []}
            coco_dt.createIndex()
        coco_eval = COCOeval(coco_gt, coco_dt, "bbox")
        coco_eval.params.imgIds = sorted(set(dataset.records.image_ids.tolist()) - set(exclude))
        coco_eval.params.catIds = dataset.category_ids
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    stats = [None if value < 0 else float(value) for value in coco_eval.stats]
    precision_TRKAM = coco_eval.eval["precision"]  # IoU thresholds, recalls, classes, areas, max detections
    per_class: dict[str, float | None] = {}
    curves: dict[str, list[float]] = {}
    for label, name in enumerate(dataset.names):
        class_precision = precision_TRKAM[:, :, label, 0, -1]
        has_objects = bool((class_precision > -1).any())
        per_class[name] = float(np.mean(class_precision[class_precision > -1])) if has_objects else None
        if has_objects:
            curves[name] = [float(value) for value in precision_TRKAM[0, :, label, 0, -1]]
    return Evaluation({**dict(zip(COCO_METRICS, stats, strict=True)), "per_class": per_class}, curves)


def _ground_truth(file: Annotations) -> dict[str, Any]:
    """The contents of the annotation file as pycocotools takes them."""
    entries = zip(file.images, file.labels, file.boxes.tolist(), file.areas.tolist(), file.crowd, strict=True)
    annotations = [
        {
            "id": number,  # not the file's: pycocotools treats a match with id 0 as no match, and some files have it
            "image_id": int(file.image_ids[image]),
            "category_id": file.category_ids[label],
            "bbox": box,
            "area": area,
            "iscrowd": int(crowd),
        }
        for number, (image, label, box, area, crowd) in enumerate(entries, 1)
    ]
    return {
        "info": {},
        "images": [{"id": image_id} for image_id in file.image_ids.tolist()],
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in zip(file.category_ids, file.names, strict=True)],
    }


def format_metrics(metrics: dict[str, Any]) -> str:
    """The metrics as a table for the terminal, in percent."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    lines = []
    for names in (COCO_METRICS[:6], COCO_METRICS[6:]):
        lines.append("  ".join(f"{name:>6}" for name in names))
        lines.append("  ".join(f"{percent(metrics[name]):>6}" for name in names))
    width = max([len(name) for name in metrics["per_class"]] + [5])
    lines += ["", f"{'class':<{width}}      AP"]
    lines += [f"{name:<{width}}  {percent(value):>6}" for name, value in metrics["per_class"].items()]
    return "\n".join(lines)
