"""What the detector will see: how the anchors of a config fit the objects, at their size in the resized images.

Nothing is augmented. T objects, R anchors of an image.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retina.assign import assign
from retina.boxes import box_iou
from retina.check.findings import Finding, Split, box_finding
from retina.check.image_checks import Progress
from retina.config import Anchors, Config
from retina.data.augment import resized_size
from retina.data.batch import Target
from retina.data.coco import CocoDataset, Record
from retina.model.anchors import make_anchors
from retina.model.backbone import LEVELS

MAX_IMAGES = 200  # for the matching; every image has about the same number of anchors
MAX_BELOW = 0.2  # share of the objects of a class below the positive IoU, from which it is a finding
MIN_OBJECTS = 10  # of a class, for it
MAX_WITHOUT = 0.01  # share of objects without an anchor
MIN_WITHOUT = 3  # and their number
CHUNK = 20_000  # objects of which the IoUs are computed at a time, to save memory


class AnchorFit(NamedTuple):
    """Some objects of a data set that the anchors were matched to, and the totals over the images of the sample."""

    annotations: NDArray[np.int64]  # (T,) positions in the file
    labels: NDArray[np.int64]  # (T,)
    best_iou: NDArray[np.float64]  # (T,) with the best anchor
    num_anchors: NDArray[np.int64]  # (T,) positive anchors
    shares_anchor: NDArray[np.bool_]  # (T,) the best anchor is also that of another object
    images: int
    anchors: int
    positives: int
    negatives: int


def resized_objects(dataset: CocoDataset, config: Config) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Width and height, (T, 2), of every object in pixels of its resized image; and the labels, (T,)."""
    sizes, labels = [np.zeros((0, 2))], [np.zeros(0, np.int64)]
    for record in dataset.records:
        boxes = record.boxes * _scale(record, config)
        sizes.append(boxes[:, 2:] - boxes[:, :2])
        labels.append(record.labels)
    return np.concatenate(sizes), np.concatenate(labels)


def measure_fit(dataset: CocoDataset, config: Config, progress: Progress) -> AnchorFit:
    """Match the anchors to the objects of a random sample of MAX_IMAGES images, always the same.

    The totals are over these images. If fewer than MAX_IMAGES of them have objects, further ones with objects are
    matched, for the columns.
    """
    order = np.random.default_rng(0).permutation(len(dataset.records))
    further = order[MAX_IMAGES:]
    has_objects = dataset.records.num_objects > 0
    missing = MAX_IMAGES - int(has_objects[order[:MAX_IMAGES]].sum())
    images = np.concatenate([order[:MAX_IMAGES], further[has_objects[further]][:missing]])
    records = dataset.records.take(images)
    parts: list[tuple[NDArray[Any], ...]] = []
    totals = np.zeros(3, np.int64)  # anchors, positives, negatives
    for place, record in enumerate(progress(records, len(records))):
        anchors = make_anchors(config.anchors, *_padded(record, config), torch.device("cpu"))
        scale = _scale(record, config)
        boxes, ignore = (torch.from_numpy((part * scale).astype(np.float32)) for part in (record.boxes, record.ignore))
        target = Target(boxes, torch.from_numpy(record.labels), ignore)
        assignment = assign(anchors, [target], [_resized(record, config)], dataset.num_classes, config.assign)
        labels_R = assignment.labels_NR[0]
        positive_R = (labels_R >= 0) & (labels_R < dataset.num_classes)
        if place < MAX_IMAGES:
            totals += len(labels_R), int(positive_R.sum()), int((labels_R == dataset.num_classes).sum())
        if len(boxes):
            fit = _fit_objects(boxes, anchors, assignment.boxes_NR4[0][positive_R])
            parts.append((records.annotations(place), record.labels, *fit))
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)] if parts else [np.zeros(0)] * 5
    annotations, labels, best, num_anchors, shares = columns
    return AnchorFit(
        annotations.astype(np.int64),
        labels.astype(np.int64),
        best,
        num_anchors.astype(np.int64),
        shares.astype(np.bool_),
        min(len(order), MAX_IMAGES),
        *totals.tolist(),
    )


def _fit_objects(
    boxes_M4: Tensor, anchors: tuple[Tensor, ...], matched_P4: Tensor
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Best IoU, number of anchors, and whether the best anchor is shared, for the objects of one image; (M,) each."""
    best_M, index_M = box_iou(boxes_M4, torch.cat(anchors)).max(dim=1)
    num_anchors_M = (matched_P4[:, None] == boxes_M4).all(dim=2).sum(dim=0)
    _, group, size = np.unique(index_M.numpy(), return_inverse=True, return_counts=True)
    return best_M.double().numpy(), num_anchors_M.double().numpy(), (size[group] > 1).astype(np.float64)


def shape_iou(sizes: NDArray[np.float64], anchors: Anchors, offset: float) -> NDArray[np.float64]:
    """The IoU of each object with its best anchor, if their centers differ by `offset` strides in x and y.

    Args:
        sizes: (T, 2) width and height in pixels of the resized image.
        anchors: the section of the config; `quantize` is not regarded.
        offset: in strides of the level. Over random positions its mean is 1/4.

    Returns: (T,).
    """
    if len(sizes) > CHUNK:
        parts = range(0, len(sizes), CHUNK)
        return np.concatenate([shape_iou(sizes[start : start + CHUNK], anchors, offset) for start in parts])
    width, height = sizes[:, :1], sizes[:, 1:]
    stride = np.repeat([2.0**level for level in LEVELS], anchors.scales * len(anchors.ratios))
    side = anchors.octave_base * 2 ** (np.arange(anchors.scales) / anchors.scales)
    root = np.sqrt(anchors.ratios)
    anchor_w = stride * np.tile((side[:, None] / root).ravel(), len(LEVELS))
    anchor_h = stride * np.tile((side[:, None] * root).ravel(), len(LEVELS))
    overlap_w = np.minimum.reduce(np.broadcast_arrays(width, anchor_w, (width + anchor_w) / 2 - offset * stride))
    overlap_h = np.minimum.reduce(np.broadcast_arrays(height, anchor_h, (height + anchor_h) / 2 - offset * stride))
    overlap = overlap_w.clip(0) * overlap_h.clip(0)
    iou = overlap / (width * height + anchor_w * anchor_h - overlap)
    return np.asarray(iou.max(axis=1))


def check_fit(split: Split, fit: AnchorFit, config: Config) -> list[Finding]:
    """The findings about objects that the anchors do not reach."""
    if not len(fit.labels):
        return []
    findings: list[Finding] = []
    below = fit.best_iou < config.assign.positive_iou
    count, count_below = np.bincount(fit.labels), np.bincount(fit.labels, below)
    by_chance = 2 * np.sqrt(MAX_BELOW * (1 - MAX_BELOW) * count)  # two standard errors
    classes = (count_below > MAX_BELOW * count + by_chance) & (count >= MIN_OBJECTS)
    findings += _object_finding("objects-below-positive-iou", split, fit, below & classes[fit.labels])
    without = fit.num_anchors == 0
    if without.mean() > MAX_WITHOUT and without.sum() >= MIN_WITHOUT:
        findings += _object_finding("objects-without-anchor", split, fit, without)
    return findings


def _object_finding(code: str, split: Split, fit: AnchorFit, selected: NDArray[np.bool_]) -> list[Finding]:
    """A finding about some of the objects of `fit`, that with the lowest IoU first."""
    chosen = np.flatnonzero(selected)
    return box_finding(code, split, fit.annotations[chosen[np.argsort(fit.best_iou[chosen], kind="stable")]])


def _resized(record: Record, config: Config) -> tuple[int, int]:
    short_side = config.data.eval_short_side or config.data.short_side[-1]
    return resized_size(record.height, record.width, short_side, config.data)


def _scale(record: Record, config: Config) -> NDArray[np.float64]:
    height, width = _resized(record, config)
    return np.array([width / record.width, height / record.height] * 2)


def _padded(record: Record, config: Config) -> tuple[int, int]:
    multiple = config.data.pad_multiple
    height, width = _resized(record, config)
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple
