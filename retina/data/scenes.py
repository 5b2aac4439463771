"""Seeded scenes of textured shapes, with their annotations.

A data set that is generated in a minute and still has what makes dense detection hard: a long tail of classes,
objects from 8 pixels to half the image, rotation, occlusion, backgrounds with texture, clutter that looks like
objects and is not labelled, images without any object, and crowd regions.

A scene has three steps: `_layout` places outlines and keeps track of which pixel belongs to whom, then the
background and the clutter are painted, then the objects in their order, so that a later one covers an earlier one.

A box is tight around what can be SEEN, as in COCO. A free side is exact to a fraction of a pixel, since it comes from
the outline itself; a side that is covered, or cut off by the border, ends with the last visible pixel.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

GENERATOR_VERSION = 1  # raise it when the same seed gives other bytes
CLASSES = ("circle", "square", "triangle", "heart", "crescent", "star", "arrow", "ring")
CATEGORIES: tuple[dict[str, Any], ...] = tuple(
    {"id": category_id, "name": name, "supercategory": "shape"}  # ids with gaps, as COCO's own
    for category_id, name in zip((1, 2, 4, 7, 8, 13, 16, 21), CLASSES, strict=True)
)
LONGEST_TAIL = 5.0  # the most frequent class is that many times as frequent as the rarest
SMALLEST = 8  # pixels, the longer side of the smallest object

_FREQUENCY = LONGEST_TAIL ** -np.linspace(0, 1, len(CLASSES))
_FREQUENCY /= _FREQUENCY.sum()
OWN_COLOUR = 0.95  # share of objects near their class's hue: a cue, as with real objects, never a proof
_CONTRAST = 70.0  # levels of the channel that differs most, between an object and what lies under it
_PATTERNS = ("plain", "gradient", "clouds", "stripes", "checks", "dots")

Points = NDArray[np.float64]  # (n, 2), x and y
Picture = NDArray[np.float32]  # (height, width, 3), RGB, or (height, width)
Part = tuple[slice, slice]
Rng = np.random.Generator


class _Item(NamedTuple):
    """A shape and its place: pixel (row, column) of `coverage` is pixel (y + row, x + column) of the image."""

    label: int  # index into CLASSES
    crowd: bool
    coverage: NDArray[np.uint8]  # (h, w), 255 where the shape fills the pixel
    x: int
    y: int
    outline: NDArray[np.float64]  # (4,), exact xyxy in the image, of the whole shape


# ---------------------------------------------------------------------------------------------------- outlines


def _arc(start: float, stop: float, n: int = 96, radius: float = 1.0, x: float = 0.0) -> Points:
    angle = np.linspace(start, stop, n)
    return np.stack([radius * np.cos(angle) + x, radius * np.sin(angle)], 1)


def _crescent() -> Points:
    # Two circles that meet at (cos a, ±sin a): the outer one round the origin, the inner one moved to the right.
    meet, inner_x = 0.9, 0.75
    inner_radius = math.hypot(math.cos(meet) - inner_x, math.sin(meet))
    inner_meet = math.atan2(math.sin(meet), math.cos(meet) - inner_x)
    outer = _arc(meet, 2 * math.pi - meet)
    return np.concatenate([outer, _arc(2 * math.pi - inner_meet, inner_meet, 64, inner_radius, inner_x)])


def _heart() -> Points:
    t = np.linspace(0, 2 * math.pi, 96)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], 1)


def _star() -> Points:
    return _arc(0, 2 * math.pi, 11)[:10] * np.where(np.arange(10) % 2, 0.45, 1.0)[:, None]


# Each class as closed contours; where two of them overlap there is a hole.
_CONTOURS: dict[str, list[Points]] = {
    "circle": [_arc(0, 2 * math.pi)],
    "square": [np.array([(-1.0, -1.0), (1, -1), (1, 1), (-1, 1)])],
    "triangle": [_arc(0, 2 * math.pi, 4)[:3]],
    "heart": [_heart()],
    "arrow": [np.array([(1.0, 0.0), (0.1, 0.8), (0.1, 0.28), (-1, 0.28), (-1, -0.28), (0.1, -0.28), (0.1, -0.8)])],
    "crescent": [_crescent()],
    "star": [_star()],
    "ring": [_arc(0, 2 * math.pi), _arc(0, 2 * math.pi, radius=0.55)],
}


def _pose(rng: Rng, contours: list[Points], extent: float) -> list[Points]:
    """Stretch a little, turn by any angle, and scale so that the longer side of the box is `extent` pixels."""
    angle, stretch = rng.uniform(0, 2 * math.pi), math.exp(rng.uniform(-0.2, 0.2))
    cos, sin = math.cos(angle), math.sin(angle)
    matrix = np.array([[cos, sin], [-sin, cos]]) * np.array([[stretch], [1.0]])
    turned = [contour @ matrix for contour in contours]
    scale = extent / np.ptp(np.concatenate(turned), axis=0).max()
    return [contour * scale for contour in turned]


def _crowd(rng: Rng, contours: list[Points]) -> list[Points]:
    """A dense patch: the same shape, tiny and posed anew, in every cell of a jittered grid."""
    cell = rng.uniform(12, 15)
    columns, rows = rng.integers(5, 9), rng.integers(4, 8)
    placed = []
    for row, column in np.ndindex(rows, columns):
        centre = (np.array([column, row]) + rng.uniform(-0.1, 0.1, 2)) * cell
        placed += [contour + centre for contour in _pose(rng, contours, cell * rng.uniform(0.7, 0.9))]
    return placed


def _rasterise(rng: Rng, contours: list[Points], stroke: float = 0.0) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
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


# ------------------------------------------------------------------------------------------------------ layout


def _overlap(size: int, x: int, y: int, patch: NDArray[Any]) -> tuple[Part, Part]:
    """The part of the image that a patch with its corner at (x, y) lies on, and the part of the patch that it is."""
    left, top = max(x, 0), max(y, 0)
    right, bottom = max(min(x + patch.shape[1], size), left), max(min(y + patch.shape[0], size), top)
    there = slice(top, bottom), slice(left, right)
    return there, (slice(top - y, bottom - y), slice(left - x, right - x))


def _positions(rng: Rng, size: int, patch: NDArray[Any], items: list[_Item]) -> Iterator[tuple[int, int]]:
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


def _layout(rng: Rng, size: int) -> tuple[list[_Item], NDArray[np.int16]]:
    """Items in the order of painting, and (size, size) which of them is seen in a pixel: i + 1, 0 for none.

    An item is placed only where enough of it, and of every item before it, can still be seen.
    """
    items: list[_Item] = []
    owner = np.zeros((size, size), np.int16)
    seen, needed = np.array([size * size]), np.array([0.0])  # visible pixels of each owner
    objects = int(rng.triangular(1, 10, 25)) if rng.random() > 0.05 else 0
    crowds = 1 if objects and rng.random() < 0.06 else 0
    large = 0
    for crowd in [True] * crowds + [False] * objects:
        label = int(rng.choice(len(CLASSES), p=_FREQUENCY))
        contours = _CONTOURS[CLASSES[label]]
        longest = size / (4 if large == 2 else 2)
        # On a log scale, the whole range is there and most objects are neither tiny nor huge.
        extent = math.exp(rng.triangular(math.log(SMALLEST), math.log(size / 6), math.log(longest)))
        coverage, outline = _rasterise(rng, _crowd(rng, contours) if crowd else _pose(rng, contours, extent))
        solid = coverage > 127
        # Tiny shapes need nearly all of their pixels to be told apart.
        need = solid.sum() * (0.8 if crowd else np.interp(extent, [SMALLEST, 48], [0.95, 0.5]))
        for x, y in _positions(rng, size, solid, items):
            there, here = _overlap(size, x, y, solid)
            mine = solid[here]
            left = seen - np.bincount(owner[there][mine], minlength=len(seen))
            if mine.sum() >= need and np.all(left >= needed):
                items.append(_Item(label, crowd, coverage, x, y, outline + np.array([x, y, x, y])))
                owner[there][mine] = len(items)
                seen, needed = np.append(left, mine.sum()), np.append(needed, need)
                large += not crowd and extent > size / 4
                break
    return items, owner


def _ends(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """xyxy of the true pixels, from the first pixel's near edge to the last one's far edge."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def _annotate(item: _Item, number: int, owner: NDArray[np.int16]) -> dict[str, Any]:
    solid = item.coverage > 127
    there, here = _overlap(len(owner), item.x, item.y, solid)
    visible = np.zeros_like(solid)
    visible[here] = owner[there] == number
    free = _ends(visible) == _ends(solid)
    sides = np.where(free, item.outline, _ends(visible) + np.array([item.x, item.y] * 2))
    x1, y1, x2, y2 = sides.clip(0, len(owner)).tolist()
    return {
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": int(visible.sum()),
        "category_id": CATEGORIES[item.label]["id"],
        "iscrowd": int(item.crowd),
    }


# ---------------------------------------------------------------------------------------------------- painting


def _pattern(rng: Rng, kind: str, height: int, width: int, period: float) -> Picture:
    """(height, width) in [0, 1], whose grain is `period` pixels, turned by any angle."""
    if kind == "clouds":
        coarse = rng.random((int(height / period) + 2, int(width / period) + 2), np.float32)
        return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), np.float32).clip(0, 1)
    angle = rng.uniform(0, 2 * math.pi)
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    u, v = cos * x + sin * y, cos * y - sin * x
    turn = np.float32(2 * math.pi / period)
    match kind:
        case "plain":
            mix = np.zeros_like(u)
        case "gradient":
            mix = (u - u.min()) / (np.ptp(u) + 1)
        case "stripes":
            mix = 0.5 + 2 * np.sin(turn * u)
        case "checks":
            mix = 0.5 + 3 * np.sin(turn * u) * np.sin(turn * v)
        case _:  # dots
            mix = 2 * (np.cos(turn * u) + np.cos(turn * v)) - 1
    return mix.clip(0, 1)


def _texture(rng: Rng, height: int, width: int, colours: Picture, period: float) -> Picture:
    """(height, width, 3): two colours (2, 3) mixed by a random pattern; too fine a pattern would hide the shape."""
    kind = str(rng.choice(_PATTERNS if period > 4 else _PATTERNS[:2]))
    return _blend(colours[0], colours[1], _pattern(rng, kind, height, width, period)[..., None])


def _blend(below: Picture, above: Picture, opacity: Picture) -> Picture:
    return np.asarray(below + opacity * (above - below))


def _background(rng: Rng, size: int) -> Picture:
    """(size, size, 3): two textures of greys with a tint, each seen where a coarse pattern lets it."""
    base = rng.uniform(40, 215) + rng.uniform(-15, 15, 3)
    layers = []
    for _ in range(2):
        colours = (base + rng.uniform(-50, 50, (2, 1)) + rng.uniform(-10, 10, (2, 3))).astype(np.float32)
        layers.append(_texture(rng, size, size, colours, size * math.exp(rng.uniform(-3.5, -1.8))))
    kind = str(rng.choice(["clouds", "gradient"]))
    between = _pattern(rng, kind, size, size, size * rng.uniform(0.2, 0.6))[..., None]
    opacity: Picture = np.clip(0.5 + rng.uniform(1, 8) * (between - 0.5), 0, 1)
    return _blend(layers[0], layers[1], opacity)


def _colours(rng: Rng, under: Picture, hue: float) -> Picture:
    """(2, 3): two colours near `hue`, in degrees, which stand out from most of the pixels (n, 3) under the shape."""
    hues = (hue + rng.normal(0, 8, 24)) % 360
    hsv = np.stack([hues, rng.uniform(0.6, 1, 24), rng.uniform(0.5, 1, 24)], axis=1).astype(np.float32)
    candidates = cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0] * 255
    distance = np.abs(candidates[:, None] - under).max(2)
    stands_out = np.minimum((distance > _CONTRAST).mean(1), 0.95)
    first, second = candidates[np.argsort(-stands_out, kind="stable")[:2]]
    return np.stack([first, first + rng.uniform(0.3, 0.7) * (second - first)])


def _paint(rng: Rng, canvas: Picture, coverage: NDArray[np.uint8], x: int, y: int, label: int | None) -> None:
    """Lay a textured shape on the canvas (size, size, 3), which is changed; clutter has no label and any hue."""
    there, here = _overlap(len(canvas), x, y, coverage)
    under = canvas[there]
    longer = max(coverage.shape)
    step = max(1, longer // 16)  # a sample of the pixels is enough to choose a colour
    has_own = label is not None and rng.random() < OWN_COLOUR
    hue = 360 * (label or 0) / len(CLASSES) if has_own else rng.uniform(0, 360)
    colours = _colours(rng, under[::step, ::step].reshape(-1, 3), hue)
    fill = _texture(rng, under.shape[0], under.shape[1], colours, longer * rng.uniform(0.2, 0.5))
    canvas[there] = _blend(under, fill, coverage[here][..., None].astype(np.float32) / np.float32(255))


def _clutter(rng: Rng, size: int) -> tuple[list[Points], float]:
    """Contours that look like objects and are none, and the width of their stroke (0: filled)."""
    extent = math.exp(rng.uniform(math.log(14), math.log(size / 3)))
    stroke = rng.uniform(1.2, 1.5 + extent / 25)
    match rng.choice(["outline", "arc", "lines", "blob"]):
        case "outline":  # of a class, with a part missing
            (corners,) = _pose(rng, _CONTOURS[rng.choice(CLASSES)][:1], extent)
            ahead = np.roll(corners, -1, axis=0)
            path = np.linspace(corners, ahead, 12, endpoint=False, axis=1).reshape(-1, 2)
            kept = int(len(path) * rng.uniform(0.35, 0.75))
            return [np.roll(path, rng.integers(len(path)), axis=0)[:kept]], stroke
        case "arc":
            return _pose(rng, [_arc(0, rng.uniform(1.5, 4.5))], extent), stroke
        case "lines":
            return [rng.uniform(-extent / 2, extent / 2, (2, 2)) for _ in range(rng.integers(1, 4))], stroke
        case _:  # a blob, too irregular for any class and too large to look like a dot
            angle = np.linspace(0, 2 * math.pi, 96)[:, None]
            waves = [rng.uniform(0.15, 0.3) * np.cos(k * angle + rng.uniform(0, 2 * math.pi)) for k in (2, 3, 5)]
            return _pose(rng, [_arc(0, 2 * math.pi) * (1 + sum(waves))], max(extent, 24.0)), 0.0


def draw_scene(seed: int, index: int, size: int) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
    """One scene, a pure function of its arguments.

    Args:
        seed: of the data set, >= 0.
        index: of the scene in it, >= 0.
        size: side of the image in pixels, >= 64.

    Returns:
        The image, uint8 RGB (size, size, 3), and its COCO annotations without `id` and `image_id`:
        `bbox` xywh, floats in pixels, around what can be seen; `area`, the visible pixels; `category_id`; `iscrowd`.

    Raises:
        ValueError: `size` is less than 64, or `seed` or `index` is negative.
    """
    if size < 64 or seed < 0 or index < 0:
        raise ValueError(f"seed and index must be >= 0 and size >= 64; got {seed=}, {index=}, {size=}")
    rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
    items, owner = _layout(rng, size)
    canvas = _background(rng, size)
    for _ in range(rng.integers(1, 6)):
        contours, stroke = _clutter(rng, size)
        coverage, _ = _rasterise(rng, contours, stroke)
        # All of it in the image: a blob cut off by the border could be taken for a circle.
        height, width = coverage.shape
        x, y = rng.integers(0, [max(1, size - width), max(1, size - height)]).tolist()
        _paint(rng, canvas, coverage, x, y, None)
    for item in items:
        _paint(rng, canvas, item.coverage, item.x, item.y, item.label)
    canvas += (rng.random((size, size, 1), np.float32) - 0.5) * rng.uniform(0, 30)  # grain
    image = np.rint(np.clip(canvas, 0, 255)).astype(np.uint8)
    return image, [_annotate(item, number, owner) for number, item in enumerate(items, 1)]
