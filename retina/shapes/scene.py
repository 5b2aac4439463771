"""Draws one scene of textured shapes: seed, index and size in pixels -> a uint8 RGB image and its COCO annotations.

The scenes are quick to generate and have the difficulties of dense detection: classes of very different frequency,
objects from 8 pixels to half the image, rotation, occlusion, textured backgrounds, clutter that resembles objects but
is not annotated, images without objects, and crowd regions.

A scene is made in three steps. `random_layout` places the objects and records which one is visible in each pixel. Then
the background and the clutter are painted. Then the objects are painted in order, so a later one covers earlier ones.

A box is tight around the visible part of an object, as in COCO. A side that is not covered is exact to a fraction of a
pixel, because it comes from the outline. A side that is covered, or cut off by the border, is the edge of the last
visible pixel.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from retina.shapes.layout import annotate, random_layout, rasterize
from retina.shapes.painting import paint_background, paint_shape, random_clutter

GENERATOR_VERSION = 1  # increase it when the same seed gives other bytes


def draw_scene(seed: int, index: int, size: int) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
    """Draw a scene, a pure function of its arguments.

    Args:
        seed: of the data set, >= 0.
        index: of the scene in it, >= 0.
        size: side of the image in pixels, >= 64.

    Returns:
        The image, uint8 RGB (size, size, 3), and its COCO annotations without `id` and `image_id`:
        `bbox` xywh, floats in pixels, around the visible part; `area`, the number of visible pixels; `category_id`;
        `iscrowd`.

    Raises:
        ValueError: `size` is less than 64, or `seed` or `index` is negative.
    """
    if size < 64 or seed < 0 or index < 0:
        raise ValueError(f"seed and index must be >= 0 and size >= 64; got {seed=}, {index=}, {size=}")
    rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
    items, owner = random_layout(rng, size)
    canvas = paint_background(rng, size)
    for _ in range(rng.integers(1, 6)):
        contours, stroke = random_clutter(rng, size)
        coverage, _ = rasterize(rng, contours, stroke)
        # All of it is inside of the image: a blob that is cut off could look like a circle.
        height, width = coverage.shape
        x, y = rng.integers(0, [max(1, size - width), max(1, size - height)]).tolist()
        paint_shape(rng, canvas, coverage, x, y, None)
    for item in items:
        paint_shape(rng, canvas, item.coverage, item.x, item.y, item.label)
    canvas += (rng.random((size, size, 1), np.float32) - 0.5) * rng.uniform(0, 30)  # grain
    image = np.rint(np.clip(canvas, 0, 255)).astype(np.uint8)
    return image, [annotate(item, number, owner) for number, item in enumerate(items, 1)]
