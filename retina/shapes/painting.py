"""Paints backgrounds, textured shapes and clutter.

All pixels are float32 RGB from 0 to 255, arrays (height, width, 3); sizes and positions are in pixels. The functions
draw their random numbers from the generator that is passed in.
"""

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from retina.shapes.layout import overlap_slices
from retina.shapes.outlines import CLASSES, CONTOURS, Points, Rng, arc, random_pose
from retina.shapes.settings import ShapesSettings

MIN_CONTRAST = 70.0  # of 255, in the channel that differs most, between an object and the pixels under it
PATTERNS = ("plain", "gradient", "clouds", "stripes", "checks", "dots")
FloatImage = NDArray[np.float32]  # (height, width, 3), RGB, or (height, width)


def _pattern(rng: Rng, kind: str, height: int, width: int, period: float) -> FloatImage:
    """A pattern, (height, width) in [0, 1], with details of `period` pixels, at a random angle."""
    if kind == "clouds":
        coarse = rng.random((int(height / period) + 2, int(width / period) + 2), np.float32)
        return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), np.float32).clip(0, 1)
    angle = rng.uniform(0, 2 * math.pi)
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    u, v = cos * x + sin * y, cos * y - sin * x
    frequency = np.float32(2 * math.pi / period)  # radians per pixel
    match kind:
        case "plain":
            values = np.zeros_like(u)
        case "gradient":
            values = (u - u.min()) / (np.ptp(u) + 1)
        case "stripes":
            values = 0.5 + 2 * np.sin(frequency * u)
        case "checks":
            values = 0.5 + 3 * np.sin(frequency * u) * np.sin(frequency * v)
        case _:  # dots
            values = 2 * (np.cos(frequency * u) + np.cos(frequency * v)) - 1
    return values.clip(0, 1)


def _texture(rng: Rng, height: int, width: int, colors: FloatImage, period: float) -> FloatImage:
    """(height, width, 3): two colors (2, 3) mixed by a random pattern; plain or a gradient up to a `period` of 4."""
    kind = str(rng.choice(PATTERNS if period > 4 else PATTERNS[:2]))  # fine details would hide a small shape
    return _blend(colors[0], colors[1], _pattern(rng, kind, height, width, period)[..., None])


def _blend(below: FloatImage, above: FloatImage, opacity: FloatImage) -> FloatImage:
    return np.asarray(below + opacity * (above - below))


def paint_background(rng: Rng, size: int) -> FloatImage:
    """(size, size, 3): two textures of tinted grays, blended by a coarse pattern."""
    base = rng.uniform(40, 215) + rng.uniform(-15, 15, 3)
    layers = []
    for _ in range(2):
        colors = (base + rng.uniform(-50, 50, (2, 1)) + rng.uniform(-10, 10, (2, 3))).astype(np.float32)
        layers.append(_texture(rng, size, size, colors, size * math.exp(rng.uniform(-3.5, -1.8))))
    kind = str(rng.choice(["clouds", "gradient"]))
    pattern = _pattern(rng, kind, size, size, size * rng.uniform(0.2, 0.6))[..., None]
    opacity: FloatImage = np.clip(0.5 + rng.uniform(1, 8) * (pattern - 0.5), 0, 1)
    return _blend(layers[0], layers[1], opacity)


def _choose_colors(rng: Rng, background: FloatImage, hue: float) -> FloatImage:
    """Two colors (2, 3) near `hue`, in degrees, that contrast with most of the `background` pixels (n, 3)."""
    hues = (hue + rng.normal(0, 8, 24)) % 360
    hsv = np.stack([hues, rng.uniform(0.6, 1, 24), rng.uniform(0.5, 1, 24)], axis=1).astype(np.float32)
    candidates = cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0] * 255
    contrast = np.abs(candidates[:, None] - background).max(2)
    contrasting = np.minimum((contrast > MIN_CONTRAST).mean(1), 0.95)  # share of the pixels
    first, second = candidates[np.argsort(-contrasting, kind="stable")[:2]]
    return np.stack([first, first + rng.uniform(0.3, 0.7) * (second - first)])


def paint_shape(
    rng: Rng,
    canvas: FloatImage,
    coverage: NDArray[np.uint8],
    x: int,
    y: int,
    label: int | None,
    settings: ShapesSettings,
) -> None:
    """Paint a textured shape on the canvas, in place.

    Args:
        rng: draws the colors and the texture.
        canvas: (size, size, 3).
        coverage: (h, w), 255 inside of the shape.
        x: column of the canvas at which the coverage begins; may be negative.
        y: row of the canvas at which the coverage begins; may be negative.
        label: index into CLASSES; None for clutter, which has any hue.
        settings: the number of classes, and how often an object has the hue of its class.
    """
    in_canvas, in_coverage = overlap_slices(len(canvas), x, y, coverage)
    background = canvas[in_canvas]
    longer_side = max(coverage.shape)
    step = max(1, longer_side // 16)  # a sample of the pixels is enough to choose a color
    use_class_hue = label is not None and rng.random() < settings.class_color
    hue = 360 * (label or 0) / settings.classes if use_class_hue else rng.uniform(0, 360)
    colors = _choose_colors(rng, background[::step, ::step].reshape(-1, 3), hue)
    fill = _texture(rng, background.shape[0], background.shape[1], colors, longer_side * rng.uniform(0.2, 0.5))
    canvas[in_canvas] = _blend(background, fill, coverage[in_coverage][..., None].astype(np.float32) / np.float32(255))


def random_clutter(rng: Rng, size: int, classes: int) -> tuple[list[Points], float]:
    """Contours that resemble objects but are not annotated, and the width of their stroke; in pixels, 0 is filled.

    `classes`: number of classes that they may resemble.
    """
    extent = math.exp(rng.uniform(math.log(14), math.log(size / 3)))
    stroke = rng.uniform(1.2, 1.5 + extent / 25)
    match rng.choice(["outline", "arc", "lines", "blob"]):
        case "outline":  # of a class, with a part missing
            (corners,) = random_pose(rng, CONTOURS[rng.choice(CLASSES[:classes])][:1], extent)
            next_corners = np.roll(corners, -1, axis=0)
            path = np.linspace(corners, next_corners, 12, endpoint=False, axis=1).reshape(-1, 2)
            num_kept = int(len(path) * rng.uniform(0.35, 0.75))
            return [np.roll(path, rng.integers(len(path)), axis=0)[:num_kept]], stroke
        case "arc":
            return random_pose(rng, [arc(0, rng.uniform(1.5, 4.5))], extent), stroke
        case "lines":
            return [rng.uniform(-extent / 2, extent / 2, (2, 2)) for _ in range(rng.integers(1, 4))], stroke
        case _:  # a blob: too irregular for any class, too large for a dot of a texture
            angle = np.linspace(0, 2 * math.pi, 96)[:, None]
            waves = [rng.uniform(0.15, 0.3) * np.cos(k * angle + rng.uniform(0, 2 * math.pi)) for k in (2, 3, 5)]
            return random_pose(rng, [arc(0, 2 * math.pi) * (1 + sum(waves))], max(extent, 24.0)), 0.0
