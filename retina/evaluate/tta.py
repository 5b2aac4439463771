"""Test-time augmentation: detections at several image sizes, also on the mirrored image, merged by one NMS.

As `GeneralizedRCNNWithTTA` of detectron2 does for boxes (detectron2/modeling/test_time_augmentation.py): each version
of an image is detected on with its own NMS and limit, the boxes are mapped back to the image, and all of them go
through NMS and limit once more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from retina import config as cfg
from retina.data.batch import Batch
from retina.data.coco import CocoDataset
from retina.data.loader import eval_batches
from retina.detect import Detections, batched_nms
from retina.evaluate.detections import on_image, scaled
from retina.evaluate.inference import detect_batches
from retina.model.retinanet import RetinaNet


@torch.inference_mode()
def inference_with_tta(
    model: RetinaNet, dataset: CocoDataset, config: cfg.Config, device: torch.device, progress: Any = iter
) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """As `inference_on_dataset`, in one process, on each image at `detect.tta_scales` times its evaluation size."""
    sizes = dataset.records.sizes()
    found: dict[int, list[Detections]] = defaultdict(list)  # by image id, in pixels of the image
    unreadable: dict[int, str] = {}
    for scale in config.detect.tta_scales:
        at_scale = _at_scale(config, scale)
        batches: Iterable[Batch] = progress(eval_batches(dataset, at_scale))
        for index, (batch, detections) in enumerate(detect_batches(model, _with_mirrored(batches), at_scale, device)):
            unreadable |= batch.unreadable
            for image_id, size, each in zip(batch.image_ids, batch.sizes, detections, strict=True):
                upright = each if index % 2 == 0 else _mirror_boxes(each, size[1])
                found[image_id].append(scaled(upright, size, sizes[image_id]))
    results = []
    for image_id in sorted(found.keys() - unreadable):
        merged, size = merge(found[image_id], config.detect), sizes[image_id]
        results += on_image(merged, size, size, dataset.categories).coco_results(image_id)
    return results, unreadable


def merge(versions: list[Detections], config: cfg.Detect) -> Detections:
    """One NMS over the detections on several versions of an image, all in pixels of the same image."""
    boxes, scores, labels = (torch.cat(parts) for parts in zip(*versions, strict=True))
    keep = batched_nms(boxes, scores, labels, config.nms_iou)[: config.max_detections]
    return Detections(boxes[keep], scores[keep], labels[keep])


def _at_scale(config: cfg.Config, scale: float) -> cfg.Config:
    data = config.data
    short_side = data.eval_short_side or data.short_side[-1]
    sides = {"eval_short_side": max(1, round(short_side * scale)), "max_side": max(1, round(data.max_side * scale))}
    return config.model_copy(update={"data": data.model_copy(update=sides)})


def _with_mirrored(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Each batch, followed by one with its images mirrored; the padding stays at the right."""
    for batch in batches:
        yield batch
        mirrored = batch.images.clone()
        for image, (height, width) in zip(mirrored, batch.sizes, strict=True):
            image[:, :height, :width] = image[:, :height, :width].flip(2)
        yield batch._replace(images=mirrored)


def _mirror_boxes(detections: Detections, width: int) -> Detections:
    x1, y1, x2, y2 = detections.boxes.unbind(1)
    return detections._replace(boxes=torch.stack([width - x2, y1, width - x1, y2], dim=1))
