"""Draws one scene of textured shapes: settings and an index -> a uint8 RGB image and its COCO annotations.

The scenes are quick to generate and have the difficulties of dense detection: classes of very different frequency,
objects of very different size, rotation, occlusion, textured backgrounds, clutter that resembles objects but is not
annotated, images without objects, and crowd regions.

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
from retina.shapes.settings import ShapesSettings

GENERATOR_VERSION = 1  # increase it when the same seed gives other bytes


def draw_scene(settings: ShapesSettings, index: int) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
    """Draw a scene, a pure function of its arguments; the numbers of images in the settings have no effect.

    Args:
        settings: of the data set.
        index: of the scene in it, >= 0.

    Returns:
        The image, uint8 RGB (size, size, 3), and its COCO annotations without `id` and `image_id`:
        `bbox` xywh, floats in pixels, around the visible part; `area`, the number of visible pixels; `category_id`;
        `iscrowd`.

    Raises:
        ValueError: `index` is negative.
    """
    if index < 0:
        raise ValueError(f"index must be >= 0, given {index}")
    size = settings.size
    rng = np.random.default_rng(np.random.SeedSequence([settings.seed, index]))
    items, owner = random_layout(rng, settings)
    canvas = paint_background(rng, size)
    for _ in range(rng.integers(1, 6)):
        contours, stroke = random_clutter(rng, size, settings.classes)
        coverage, _ = rasterize(rng, contours, stroke)
        # All of it is inside of the image: a blob that is cut off could look like a circle.
        height, width = coverage.shape
        x, y = rng.integers(0, [max(1, size - width), max(1, size - height)]).tolist()
        paint_shape(rng, canvas, coverage, x, y, None, settings)
    for item in items:
        paint_shape(rng, canvas, item.coverage, item.x, item.y, item.label, settings)
    canvas += (rng.random((size, size, 1), np.float32) - 0.5) * rng.uniform(0, 30)  # grain
    image = np.rint(np.clip(canvas, 0, 255)).astype(np.uint8)
    return image, [annotate(item, number, owner) for number, item in enumerate(items, 1)]
