"""Places the objects of a scene and makes their annotations.

`random_layout`: a random generator and the settings of the data set -> the objects, and which one is visible in each
pixel. `annotate`: one object -> its COCO annotation, with its box in pixels of the image.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from retina.shapes.outlines import CLASSES, CONTOURS, Points, Rng, crowd_contours, random_pose
from retina.shapes.settings import ShapesSettings

CATEGORIES: tuple[dict[str, Any], ...] = tuple(
    {"id": category_id, "name": name, "supercategory": "shape"}  # ids with gaps, as in COCO
    for category_id, name in zip((1, 2, 4, 7, 8, 13, 16, 21, 22, 27, 33, 34), CLASSES, strict=True)
)
Slices = tuple[slice, slice]  # rows and columns of an array


class Item(NamedTuple):
    """An object and its position: pixel (row, column) of `coverage` is pixel (y + row, x + column) of the image."""

    label: int  # index into CLASSES
    crowd: bool
    coverage: NDArray[np.uint8]  # (h, w), the share of each pixel inside of the shape, times 255
    x: int
    y: int
    box: NDArray[np.float64]  # (4,) xyxy in the image: the exact box of the whole shape, covered parts included


def rasterize(rng: Rng, contours: list[Points], stroke: float = 0.0) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Draw contours with anti-aliasing, at a random sub-pixel offset.

    They are drawn enlarged and then averaged, because OpenCV's own anti-aliasing makes a shape about 0.6 px too large
    on every side; this makes it at most 0.1 px too large.

    Args:
        rng: draws the offset.
        contours: points in pixels; overlapping contours make holes.
        stroke: width of open lines in pixels; 0 fills the contours.

    Returns:
        Coverage, uint8 (h, w), 255 inside of the shape; and the exact box of the shape in it, float64 (4,) xyxy.
    """
    points = np.concatenate(contours)
    low, high = points.min(0) - stroke / 2, points.max(0) + stroke / 2
    shift = 1 + rng.random(2) - low
    width, height = np.ceil(high + shift + 1).astype(int)
    zoom = 8 if max(width, height) < 96 else 4
    fine = np.zeros((height * zoom, width * zoom), np.uint8)
    # For OpenCV, pixel centers are whole numbers, and the last 4 bits are the fraction.
    fixed_point = [np.rint(((contour + shift) * zoom - 0.5) * 16).astype(np.int32) for contour in contours]
    if stroke:
        cv2.polylines(fine, fixed_point, False, 255, max(1, round(stroke * zoom)), cv2.LINE_8, 4)
    else:
        cv2.fillPoly(fine, fixed_point, 255, cv2.LINE_8, 4)
    coverage = np.asarray(cv2.resize(fine, (int(width), int(height)), interpolation=cv2.INTER_AREA), np.uint8)
    return coverage, np.concatenate([low + shift, high + shift])


def overlap_slices(size: int, x: int, y: int, patch: NDArray[Any]) -> tuple[Slices, Slices]:
    """Where a patch with its top left corner at (x, y) overlaps the image: slices of the image, slices of the patch."""
    left, top = max(x, 0), max(y, 0)
    right, bottom = max(min(x + patch.shape[1], size), left), max(min(y + patch.shape[0], size), top)
    in_image = slice(top, bottom), slice(left, right)
    return in_image, (slice(top - y, bottom - y), slice(left - x, right - x))


def _candidate_positions(rng: Rng, size: int, patch: NDArray[Any], items: list[Item]) -> Iterator[tuple[int, int]]:
    """Twelve random (x, y) for a patch: anywhere, or with probability 0.3 where its box meets that of another item."""
    width_height = np.array(patch.shape[::-1])
    for _ in range(12):
        low, high = -width_height // 3, np.array([size, size])
        if items and rng.random() < 0.3:
            other = items[rng.integers(len(items))]
            low = np.array([other.x, other.y]) - width_height
            high = np.array([other.x, other.y]) + other.coverage.shape[::-1]
        x, y = rng.integers(low, high)
        yield int(x), int(y)


def random_layout(rng: Rng, settings: ShapesSettings) -> tuple[list[Item], NDArray[np.int16]]:
    """Choose classes, sizes and positions of the objects of a scene.

    An item is placed only where enough of it and of every earlier item stays visible. If none of the candidate
    positions allows that, the item is omitted.

    Args:
        rng: draws everything.
        settings: the size of the image, and how many objects of which classes and sizes.

    Returns:
        The items in the order in which they are painted, and the owner of each pixel, int16 (size, size): i + 1 where
        item i is visible, 0 for the background.
    """
    size, (smallest, most_likely, largest) = settings.size, settings.size_range
    frequency = settings.class_imbalance ** -np.linspace(0, 1, settings.classes)
    frequency /= frequency.sum()
    items: list[Item] = []
    owner = np.zeros((size, size), np.int16)
    visible, required = np.array([size * size]), np.array([0.0])  # pixels of each owner
    objects = int(rng.triangular(*settings.objects)) if rng.random() > 0.05 else 0
    crowds = 1 if objects and rng.random() < 0.06 else 0
    large = 0
    for crowd in [True] * crowds + [False] * objects:
        label = int(rng.choice(settings.classes, p=frequency))
        contours = CONTOURS[CLASSES[label]]
        longest = max(size / 4, most_likely) if large == 2 else largest
        # The log scale covers the whole range; most objects are neither tiny nor huge.
        extent = smallest
        if smallest < longest:
            extent = math.exp(rng.triangular(math.log(smallest), math.log(most_likely), math.log(longest)))
        coverage, box = rasterize(rng, crowd_contours(rng, contours) if crowd else random_pose(rng, contours, extent))
        solid = coverage > 127
        # The classes of tiny shapes can be distinguished only by nearly all of their pixels.
        min_visible = solid.sum() * (0.8 if crowd else np.interp(extent, [8, 48], [0.95, 0.5]))
        for x, y in _candidate_positions(rng, size, solid, items):
            in_image, in_patch = overlap_slices(size, x, y, solid)
            inside = solid[in_patch]  # the pixels of the shape that are inside of the image
            still_visible = visible - np.bincount(owner[in_image][inside], minlength=len(visible))
            if inside.sum() >= min_visible and np.all(still_visible >= required):
                items.append(Item(label, crowd, coverage, x, y, box + np.array([x, y, x, y])))
                owner[in_image][inside] = len(items)
                visible = np.append(still_visible, inside.sum())
                required = np.append(required, min_visible)
                large += not crowd and extent > size / 4
                break
    return items, owner


def _mask_extent(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The box of the true pixels, xyxy, in whole pixels."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def annotate(item: Item, number: int, owner: NDArray[np.int16]) -> dict[str, Any]:
    """The COCO annotation of an item without `id` and `image_id`.

    A side of the box that is not covered by other items or cut off is exact to a fraction of a pixel, because it comes
    from the outline. Any other side is the edge of the last visible pixel.

    Args:
        item: the object.
        number: its number in `owner`, from 1.
        owner: as `random_layout` returns it.

    Returns:
        `bbox` xywh in pixels of the image, `area` in visible pixels, `category_id`, `iscrowd`.
    """
    solid = item.coverage > 127
    in_image, in_patch = overlap_slices(len(owner), item.x, item.y, solid)
    visible = np.zeros_like(solid)
    visible[in_patch] = owner[in_image] == number
    fully_visible = _mask_extent(visible) == _mask_extent(solid)  # for each side
    sides = np.where(fully_visible, item.box, _mask_extent(visible) + np.array([item.x, item.y] * 2))
    x1, y1, x2, y2 = sides.clip(0, len(owner)).tolist()
    return {
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": int(visible.sum()),
        "category_id": CATEGORIES[item.label]["id"],
        "iscrowd": int(item.crowd),
    }
