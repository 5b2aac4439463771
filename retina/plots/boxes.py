"""Boxes with class names and scores, drawn on an image."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw

from retina.plots.fonts import load_font
from retina.plots.style import class_color, clean_text


def draw_boxes(
    image: Image.Image,
    boxes_xyxy: ArrayLike,
    labels: Sequence[str],
    scores: Sequence[float] | None = None,
    *,
    dashed: Sequence[bool] | None = None,
    text_size: int | None = None,
    line_width: int | None = None,
    colors: Sequence[str] | None = None,
) -> Image.Image:
    """Draw boxes with their class names (and scores) on a copy of an image.

    Args:
        image: of any mode; the result is RGB.
        boxes_xyxy: (M, 4) corners in pixels of the image; they are clipped to it.
        labels: M class names; each class has its color.
        scores: M numbers, written after the names; the highest are drawn on top.
        dashed: M flags, True for a dashed outline (crowds).
        text_size: of the names, in pixels; 0 draws none; None chooses it by the longest side of the image.
        line_width: of the outlines, in pixels; None chooses it by the longest side of the image.
        colors: M colors ("#RRGGBB") in place of those of the classes.

    Returns:
        A new RGB image of the same size. Lines and text scale with its longest side.

    Raises:
        ValueError: the lengths differ, or a box is not finite.
    """
    boxes = np.asarray(boxes_xyxy, dtype=float).reshape(-1, 4)
    for name, given in (("labels", labels), ("scores", scores), ("dashed", dashed), ("colors", colors)):
        if given is not None and len(given) != len(boxes):
            raise ValueError(f"draw_boxes: {len(boxes)} boxes, but {len(given)} {name}")
    if not np.isfinite(boxes).all():
        raise ValueError(f"draw_boxes: not finite: box {boxes[~np.isfinite(boxes).all(axis=1)][0].tolist()}")

    labels = [clean_text(name) for name in labels]
    image = image.convert("RGB")  # a copy, whatever the mode
    if not len(boxes):
        return image
    draw = ImageDraw.Draw(image)
    # a box covers the pixels floor(x1) to ceil(x2) - 1
    pixels = np.concatenate([np.floor(boxes[:, :2]), np.ceil(boxes[:, 2:]) - 1], axis=1)
    pixels = np.clip(pixels, 0, [image.width - 1, image.height - 1] * 2)
    corners = [(int(x1), int(y1), max(int(x1), int(x2)), max(int(y1), int(y2))) for x1, y1, x2, y2 in pixels]
    colors = list(colors or map(class_color, labels))
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    # the last one is drawn on top: the box with the highest score, or without scores the smallest
    order = [int(index) for index in np.argsort(-areas if scores is None else np.asarray(scores), kind="stable")]
    line_width = line_width or max(1, round(max(image.size) / 250))
    for index in order:
        _draw_outline(draw, corners[index], colors[index], line_width, dashed is not None and dashed[index])

    texts = list(labels) if scores is None else [f"{n} {s:.2f}" for n, s in zip(labels, scores, strict=True)]
    if text_size == 0:
        return image
    size = text_size or max(11, max(image.size) // 40)
    longest = max(load_font(size, text).getlength(text) for text in texts)
    size = min(size, max(4, int(size * image.width / (longest + size))))
    fonts = [load_font(size, text) for text in texts]
    padding = max(1, size // 6)
    text_boxes: dict[int, tuple[int, int, int, int]] = {}
    for index in reversed(order):  # those on top choose their place first
        width, height = math.ceil(fonts[index].getlength(texts[index])) + 2 * padding, sum(fonts[index].getmetrics())
        text_boxes[index] = _place_label(corners[index], width, height, image.size, list(text_boxes.values()))
    for index in order:
        x1, y1, x2, y2 = text_boxes[index]
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=colors[index])
        draw.text((x1 + padding, y1), texts[index], fill=_text_color(colors[index]), font=fonts[index])
    return image


def _text_color(color: str) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 130 else "white"


def _draw_outline(
    draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], color: str, line_width: int, dashed: bool
) -> None:
    """A line of `line_width` pixels inside the box, with a thin edge of black or white that shows on any background."""
    x1, y1, x2, y2 = box
    edge = max(1, line_width // 4)

    def spans(start: int, end: int) -> list[tuple[int, int]]:
        """The whole side, or its dashes: every other one of an odd number of segments, so that corners are drawn."""
        count = (end - start) // (6 * line_width) | 1 if dashed else 1
        limits = [start + round((end - start + 1) * i / count) for i in range(count + 1)]
        return [(limits[i], limits[i + 1] - 1) for i in range(0, count, 2)]

    sides = []
    for left, right in spans(x1, x2):
        sides += [(left, y1, right, min(y1 + line_width - 1, y2)), (left, max(y1, y2 - line_width + 1), right, y2)]
    for top, bottom in spans(y1, y2):
        sides += [(x1, top, min(x1 + line_width - 1, x2), bottom), (max(x1, x2 - line_width + 1), top, x2, bottom)]
    for left, top, right, bottom in sides:
        draw.rectangle((left - edge, top - edge, right + edge, bottom + edge), fill=_text_color(color))
    for side in sides:
        draw.rectangle(side, fill=color)


def _place_label(
    box: tuple[int, int, int, int],
    width: int,
    height: int,
    image_size: tuple[int, int],
    taken: list[tuple[int, int, int, int]],
) -> tuple[int, int, int, int]:
    """A rectangle (x1, y1, x2, y2) at a corner of the box, inside the image; the one that overlaps `taken` least."""
    x1, y1, x2, y2 = box[0], box[1], box[2] + 1, box[3] + 1
    tops = (y1 - height, y1, y2, y2 - height)  # above, inside, below, inside
    candidates = []
    for left, top in ((left, top) for top in tops for left in (x1, x2 - width)):
        x = max(0, min(left, image_size[0] - width))
        y = max(0, min(top, image_size[1] - height))
        candidates.append((x, y, x + width, y + height))

    def overlap(place: tuple[int, int, int, int]) -> int:
        return sum(
            max(0, min(place[2], other[2]) - max(place[0], other[0]))
            * max(0, min(place[3], other[3]) - max(place[1], other[1]))
            for other in taken
        )

    return min(candidates, key=overlap)
