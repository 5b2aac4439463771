"""Checks of the boxes of one annotation file; annotation_checks.py calls them. T annotations."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retina.check.findings import MAX_EXAMPLES, Finding, Split, box_finding, lower
from retina.config import Config
from retina.data.annotations import Annotations
from retina.data.augment import resized_size

MIN_SIDE = 2.0  # pixels of a box at the training size
FEW = 0.01  # share of the boxes, up to which wrong ones do not stop a training
MANY_WHOLE = 0.05  # share of the images with a box that covers all
WRONG_NUMBERS = {"boxes-normalized", "boxes-xyxy", "boxes-centered"}  # of such boxes nothing else can be said


def check_box_numbers(split: Split) -> list[Finding]:
    """Boxes that are not [x, y, width, height] in pixels."""
    file = split.file
    if not len(file.boxes):
        return []
    x, y, w, h = file.boxes.T
    image_w, image_h = file.widths[file.images], file.heights[file.images]
    normalized = ((file.boxes >= 0) & (file.boxes <= 1)).all(axis=1) & (w > 0) & (h > 0)
    if normalized.mean() >= 0.9 and np.median(image_w) > 2:
        return box_finding("boxes-normalized", split, np.flatnonzero(normalized))
    outside = _pixels_outside(file)
    out = outside > 1
    far_out = outside > 0.05 * np.maximum(image_w, image_h)
    as_corners = (x >= -1) & (y >= -1) & (w > x) & (h > y) & (w <= image_w + 1) & (h <= image_h + 1)
    if len(out) >= 10 and far_out.mean() >= 0.1 and as_corners.mean() >= 0.95:
        return box_finding("boxes-xyxy", split, np.flatnonzero(out))
    with np.errstate(over="ignore", invalid="ignore"):
        as_centered = np.minimum(x - w / 2, y - h / 2) >= -1
        as_centered &= (x + w / 2 <= image_w + 1) & (y + h / 2 <= image_h + 1)
    if len(out) >= 20 and out.mean() >= 0.05 and as_centered.mean() >= 0.99:
        return box_finding("boxes-centered", split, np.flatnonzero(out))
    negative = (w < 0) | (h < 0)
    findings = box_finding("box-negative", split, np.flatnonzero(negative))
    return lower(findings, "warning") if negative.mean() <= FEW else findings


def _pixels_outside(file: Annotations) -> NDArray[np.float64]:
    """(T,) by how many pixels a box reaches out of its image; negative if it is inside."""
    x, y, w, h = file.boxes.T
    with np.errstate(over="ignore", invalid="ignore"):
        edges = [-x, -y, x + w - file.widths[file.images], y + h - file.heights[file.images]]
    return np.asarray(np.maximum.reduce(edges))


def check_boxes(split: Split, config: Config) -> list[Finding]:
    file = split.file
    x, y, w, h = file.boxes.T
    image_w, image_h = file.widths[file.images], file.heights[file.images]
    out = _pixels_outside(file)
    with np.errstate(over="ignore", invalid="ignore"):
        negative = (w < 0) | (h < 0)
        without_area = ((w == 0) | (h == 0)) & ~negative
        outside = ((x >= image_w) | (y >= image_h) | (x + w <= 0) | (y + h <= 0)) & ~negative & ~without_area
        clipped = (out > 1) & ~outside & ~negative & ~without_area
        usable = ~(negative | without_area | outside)
        whole = usable & (w >= 0.99 * image_w) & (h >= 0.99 * image_h) & ~file.crowd
        largest = (w + 2) * (h + 2)  # of the pixels that a box touches
        area = ((file.areas <= 0) | (file.areas > largest)) & usable
    many_whole = MANY_WHOLE * len(file.image_ids)
    worst_first = np.argsort(-np.where(clipped, out, -np.inf))[: clipped.sum()]
    return [
        *box_finding("box-without-area", split, np.flatnonzero(without_area)),
        *box_finding("box-outside", split, np.flatnonzero(outside)),
        *box_finding("box-clipped", split, worst_first),
        *box_finding("box-tiny", split, np.flatnonzero(usable & _is_tiny(file, config))),
        *(box_finding("box-whole-image", split, np.flatnonzero(whole)) if whole.sum() > many_whole else ()),
        *box_finding("area-contradicts-box", split, np.flatnonzero(area)),
        *_check_repeated_boxes(split, np.flatnonzero(usable & ~file.crowd)),
    ]


def _is_tiny(file: Annotations, config: Config) -> NDArray[np.bool_]:
    """(T,) whether a side is below MIN_SIDE pixels in the resized image."""
    short_side = config.data.eval_short_side or config.data.short_side[-1]
    sizes = zip(file.heights.tolist(), file.widths.tolist(), strict=True)
    heights_B = np.array([resized_size(height, width, short_side, config.data)[0] for height, width in sizes])
    scale_T = (heights_B / file.heights)[file.images]
    return np.asarray(file.boxes[:, 2:].min(axis=1) * scale_T < MIN_SIDE)


def _check_repeated_boxes(split: Split, annotations: NDArray[np.int64]) -> list[Finding]:
    """Boxes of one image with equal corners in whole pixels."""
    file = split.file
    if not len(annotations):
        return []
    corners = np.rint(np.clip(file.boxes[annotations], -(2**40), 2**40)).astype(np.int64)
    place = _groups(np.column_stack([file.images[annotations], corners]))
    everything = np.arange(len(annotations))
    at_place = first_equal(place)
    of_class = first_equal(place * len(file.names) + file.labels[annotations])
    repeated = np.flatnonzero(of_class != everything)
    two_classes = np.flatnonzero((of_class == everything) & (at_place != everything))

    def other(index: int) -> str:
        return f"annotation {file.ids[annotations[index]]}"

    def name(index: int) -> str:
        return file.names[int(file.labels[annotations[index]])]

    copies = [f"as {other(of_class[i])}" for i in repeated[:MAX_EXAMPLES]]
    classes = [f"{name(i)}; {other(at_place[i])} is {name(at_place[i])}" for i in two_classes[:MAX_EXAMPLES]]
    return [
        *box_finding("box-repeated", split, annotations[repeated], copies),
        *box_finding("box-two-classes", split, annotations[two_classes], classes),
    ]


def first_equal(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each value the index of the first that equals it, (T,)."""
    _, first, group = np.unique(values, return_index=True, return_inverse=True)
    return np.asarray(first[group])


def _groups(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The number of the group of equal rows to which each row of (T, C) belongs, (T,)."""
    return np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)
