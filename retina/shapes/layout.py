"""Which shapes a scene has and where: the layout, and its annotations."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from retina.shapes.outlines import CLASSES, CONTOURS, Points, Rng, crowd_contours, random_pose

CATEGORIES: tuple[dict[str, Any], ...] = tuple(
    {"id": category_id, "name": name, "supercategory": "shape"}  # ids with gaps, as COCO's own
    for category_id, name in zip((1, 2, 4, 7, 8, 13, 16, 21), CLASSES, strict=True)
)
CLASS_IMBALANCE = 5.0  # the most frequent class is that many times as frequent as the rarest
MIN_OBJECT_SIZE = 8  # pixels, the longer side of the smallest object
CLASS_FREQUENCY = CLASS_IMBALANCE ** -np.linspace(0, 1, len(CLASSES))
CLASS_FREQUENCY /= CLASS_FREQUENCY.sum()
Part = tuple[slice, slice]


class Item(NamedTuple):
    """A shape and its place: pixel (row, column) of `coverage` is pixel (y + row, x + column) of the image."""

    label: int  # index into CLASSES
    crowd: bool
    coverage: NDArray[np.uint8]  # (h, w), 255 where the shape fills the pixel
    x: int
    y: int
    outline: NDArray[np.float64]  # (4,), exact xyxy in the image, of the whole shape


def rasterize(rng: Rng, contours: list[Points], stroke: float = 0.0) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Coverage (h, w) of filled contours, or of open strokes `stroke` pixels wide, and their exact xyxy in it.

    The sub-pixel offset is random. Drawn enlarged and averaged: OpenCV's own anti-aliasing makes shapes about 0.6 px
    too large on every side, this at most 0.1 px.
    """
    points = np.concatenate(contours)
    low, high = points.min(0) - stroke / 2, points.max(0) + stroke / 2
    shift = 1 + rng.random(2) - low
    width, height = np.ceil(high + shift + 1).astype(int)
    zoom = 8 if max(width, height) < 96 else 4
    fine = np.zeros((height * zoom, width * zoom), np.uint8)
    # OpenCV has pixel centres at whole numbers, 4 bits of fraction.
    fixed = [np.rint(((contour + shift) * zoom - 0.5) * 16).astype(np.int32) for contour in contours]
    if stroke:
        cv2.polylines(fine, fixed, False, 255, max(1, round(stroke * zoom)), cv2.LINE_8, 4)
    else:
        cv2.fillPoly(fine, fixed, 255, cv2.LINE_8, 4)
    coverage = np.asarray(cv2.resize(fine, (int(width), int(height)), interpolation=cv2.INTER_AREA), np.uint8)
    return coverage, np.concatenate([low + shift, high + shift])


def overlap(size: int, x: int, y: int, patch: NDArray[Any]) -> tuple[Part, Part]:
    """The part of the image that a patch with its corner at (x, y) lies on, and the part of the patch that it is."""
    left, top = max(x, 0), max(y, 0)
    right, bottom = max(min(x + patch.shape[1], size), left), max(min(y + patch.shape[0], size), top)
    there = slice(top, bottom), slice(left, right)
    return there, (slice(top - y, bottom - y), slice(left - x, right - x))


def _candidate_positions(rng: Rng, size: int, patch: NDArray[Any], items: list[Item]) -> Iterator[tuple[int, int]]:
    """Where a patch might go: anywhere, and quite often where its box meets the box of another item."""
    width_height = np.array(patch.shape[::-1])
    for _ in range(12):
        low, high = -width_height // 3, np.array([size, size])
        if items and rng.random() < 0.3:
            other = items[rng.integers(len(items))]
            low = np.array([other.x, other.y]) - width_height
            high = np.array([other.x, other.y]) + other.coverage.shape[::-1]
        x, y = rng.integers(low, high)
        yield int(x), int(y)


def random_layout(rng: Rng, size: int) -> tuple[list[Item], NDArray[np.int16]]:
    """Items in the order of painting, and (size, size) which of them is seen in a pixel: i + 1, 0 for none.

    An item is placed only where enough of it, and of every item before it, can still be seen.
    """
    items: list[Item] = []
    owner = np.zeros((size, size), np.int16)
    seen, needed = np.array([size * size]), np.array([0.0])  # visible pixels of each owner
    objects = int(rng.triangular(1, 10, 25)) if rng.random() > 0.05 else 0
    crowds = 1 if objects and rng.random() < 0.06 else 0
    large = 0
    for crowd in [True] * crowds + [False] * objects:
        label = int(rng.choice(len(CLASSES), p=CLASS_FREQUENCY))
        contours = CONTOURS[CLASSES[label]]
        longest = size / (4 if large == 2 else 2)
        # On a log scale, the whole range is there and most objects are neither tiny nor huge.
        extent = math.exp(rng.triangular(math.log(MIN_OBJECT_SIZE), math.log(size / 6), math.log(longest)))
        coverage, outline = rasterize(
            rng, crowd_contours(rng, contours) if crowd else random_pose(rng, contours, extent)
        )
        solid = coverage > 127
        # Tiny shapes need nearly all of their pixels to be told apart.
        need = solid.sum() * (0.8 if crowd else np.interp(extent, [MIN_OBJECT_SIZE, 48], [0.95, 0.5]))
        for x, y in _candidate_positions(rng, size, solid, items):
            there, here = overlap(size, x, y, solid)
            mine = solid[here]
            left = seen - np.bincount(owner[there][mine], minlength=len(seen))
            if mine.sum() >= need and np.all(left >= needed):
                items.append(Item(label, crowd, coverage, x, y, outline + np.array([x, y, x, y])))
                owner[there][mine] = len(items)
                seen, needed = np.append(left, mine.sum()), np.append(needed, need)
                large += not crowd and extent > size / 4
                break
    return items, owner


def _mask_extent(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """xyxy of the true pixels, from the first pixel's near edge to the last one's far edge."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def annotate(item: Item, number: int, owner: NDArray[np.int16]) -> dict[str, Any]:
    solid = item.coverage > 127
    there, here = overlap(len(owner), item.x, item.y, solid)
    visible = np.zeros_like(solid)
    visible[here] = owner[there] == number
    free = _mask_extent(visible) == _mask_extent(solid)
    sides = np.where(free, item.outline, _mask_extent(visible) + np.array([item.x, item.y] * 2))
    x1, y1, x2, y2 = sides.clip(0, len(owner)).tolist()
    return {
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": int(visible.sum()),
        "category_id": CATEGORIES[item.label]["id"],
        "iscrowd": int(item.crowd),
    }
