"""Backgrounds, textured shapes and clutter, painted on a canvas."""

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from retina.shapes.layout import overlap
from retina.shapes.outlines import CLASSES, CONTOURS, Points, Rng, arc, random_pose

CLASS_COLOR_PROBABILITY = 0.95  # share of objects near their class's hue: a cue, as with real objects, never a proof
MIN_CONTRAST = 70.0  # levels of the channel that differs most, between an object and what lies under it
PATTERNS = ("plain", "gradient", "clouds", "stripes", "checks", "dots")
Picture = NDArray[np.float32]  # (height, width, 3), RGB, or (height, width)


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
    kind = str(rng.choice(PATTERNS if period > 4 else PATTERNS[:2]))
    return _blend(colours[0], colours[1], _pattern(rng, kind, height, width, period)[..., None])


def _blend(below: Picture, above: Picture, opacity: Picture) -> Picture:
    return np.asarray(below + opacity * (above - below))


def paint_background(rng: Rng, size: int) -> Picture:
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


def _choose_colors(rng: Rng, under: Picture, hue: float) -> Picture:
    """(2, 3): two colours near `hue`, in degrees, which stand out from most of the pixels (n, 3) under the shape."""
    hues = (hue + rng.normal(0, 8, 24)) % 360
    hsv = np.stack([hues, rng.uniform(0.6, 1, 24), rng.uniform(0.5, 1, 24)], axis=1).astype(np.float32)
    candidates = cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0] * 255
    distance = np.abs(candidates[:, None] - under).max(2)
    stands_out = np.minimum((distance > MIN_CONTRAST).mean(1), 0.95)
    first, second = candidates[np.argsort(-stands_out, kind="stable")[:2]]
    return np.stack([first, first + rng.uniform(0.3, 0.7) * (second - first)])


def paint_shape(rng: Rng, canvas: Picture, coverage: NDArray[np.uint8], x: int, y: int, label: int | None) -> None:
    """Lay a textured shape on the canvas (size, size, 3), which is changed; clutter has no label and any hue."""
    there, here = overlap(len(canvas), x, y, coverage)
    under = canvas[there]
    longer = max(coverage.shape)
    step = max(1, longer // 16)  # a sample of the pixels is enough to choose a colour
    has_own = label is not None and rng.random() < CLASS_COLOR_PROBABILITY
    hue = 360 * (label or 0) / len(CLASSES) if has_own else rng.uniform(0, 360)
    colours = _choose_colors(rng, under[::step, ::step].reshape(-1, 3), hue)
    fill = _texture(rng, under.shape[0], under.shape[1], colours, longer * rng.uniform(0.2, 0.5))
    canvas[there] = _blend(under, fill, coverage[here][..., None].astype(np.float32) / np.float32(255))


def random_clutter(rng: Rng, size: int) -> tuple[list[Points], float]:
    """Contours that look like objects and are none, and the width of their stroke (0: filled)."""
    extent = math.exp(rng.uniform(math.log(14), math.log(size / 3)))
    stroke = rng.uniform(1.2, 1.5 + extent / 25)
    match rng.choice(["outline", "arc", "lines", "blob"]):
        case "outline":  # of a class, with a part missing
            (corners,) = random_pose(rng, CONTOURS[rng.choice(CLASSES)][:1], extent)
            ahead = np.roll(corners, -1, axis=0)
            path = np.linspace(corners, ahead, 12, endpoint=False, axis=1).reshape(-1, 2)
            kept = int(len(path) * rng.uniform(0.35, 0.75))
            return [np.roll(path, rng.integers(len(path)), axis=0)[:kept]], stroke
        case "arc":
            return random_pose(rng, [arc(0, rng.uniform(1.5, 4.5))], extent), stroke
        case "lines":
            return [rng.uniform(-extent / 2, extent / 2, (2, 2)) for _ in range(rng.integers(1, 4))], stroke
        case _:  # a blob, too irregular for any class and too large to look like a dot
            angle = np.linspace(0, 2 * math.pi, 96)[:, None]
            waves = [rng.uniform(0.15, 0.3) * np.cos(k * angle + rng.uniform(0, 2 * math.pi)) for k in (2, 3, 5)]
            return random_pose(rng, [arc(0, 2 * math.pi) * (1 + sum(waves))], max(extent, 24.0)), 0.0
