"""The outline of each class as polygons, and random poses of them.

Input: a random generator and a size in pixels. Output: contours, float64 arrays (n, 2) of x and y. The outlines in
CONTOURS have no unit, a random pose is in pixels. y points down, as in images.
"""

import math

import numpy as np
from numpy.typing import NDArray

CLASSES = (
    "circle", "square", "triangle", "heart", "crescent", "star",
    "arrow", "ring", "cross", "hourglass", "chevron", "gear",
)  # fmt: skip
Points = NDArray[np.float64]  # (n, 2), x and y
Rng = np.random.Generator


def arc(start: float, stop: float, n: int = 96, radius: float = 1.0, x: float = 0.0) -> Points:
    """`n` points on the circle around (x, 0), from angle `start` to angle `stop` in radians."""
    angle = np.linspace(start, stop, n)
    return np.stack([radius * np.cos(angle) + x, radius * np.sin(angle)], 1)


def _crescent() -> Points:
    # Two circles that intersect at (cos a, ±sin a): the outer one around the origin, the inner one moved to the right.
    angle, inner_x = 0.9, 0.75
    inner_radius = math.hypot(math.cos(angle) - inner_x, math.sin(angle))
    inner_angle = math.atan2(math.sin(angle), math.cos(angle) - inner_x)
    outer = arc(angle, 2 * math.pi - angle)
    return np.concatenate([outer, arc(2 * math.pi - inner_angle, inner_angle, 64, inner_radius, inner_x)])


def _heart() -> Points:
    t = np.linspace(0, 2 * math.pi, 96)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], 1)


def _gear() -> Points:
    """Eight teeth."""
    return arc(0, 2 * math.pi, 33)[:32] * np.where(np.arange(32) % 4 < 2, 1.0, 0.72)[:, None]


def _star() -> Points:
    return arc(0, 2 * math.pi, 11)[:10] * np.where(np.arange(10) % 2, 0.45, 1.0)[:, None]


# Each class as closed contours. Where two of them overlap there is a hole.
CONTOURS: dict[str, list[Points]] = {
    "circle": [arc(0, 2 * math.pi)],
    "square": [np.array([(-1.0, -1.0), (1, -1), (1, 1), (-1, 1)])],
    "triangle": [arc(0, 2 * math.pi, 4)[:3]],
    "heart": [_heart()],
    "arrow": [np.array([(1.0, 0.0), (0.1, 0.8), (0.1, 0.28), (-1, 0.28), (-1, -0.28), (0.1, -0.28), (0.1, -0.8)])],
    "crescent": [_crescent()],
    "star": [_star()],
    "ring": [arc(0, 2 * math.pi), arc(0, 2 * math.pi, radius=0.55)],
    "cross": [
        np.array([(-1.0, -0.32), (-0.32, -0.32), (-0.32, -1), (0.32, -1), (0.32, -0.32), (1, -0.32), (1, 0.32),
                  (0.32, 0.32), (0.32, 1), (-0.32, 1), (-0.32, 0.32), (-1, 0.32)])
    ],
    "hourglass": [np.array([(-1.0, -1.0), (1, -1), (0.2, 0), (1, 1), (-1, 1), (-0.2, 0)])],
    "chevron": [np.array([(-1.0, -1.0), (-0.1, -1), (1, 0), (-0.1, 1), (-1, 1), (0.1, 0)])],
    "gear": [_gear()],
}  # fmt: skip


def random_pose(rng: Rng, contours: list[Points], extent: float) -> list[Points]:
    """Stretch a little, rotate by any angle, and scale so that the longer side of the box is `extent` pixels."""
    angle, stretch = rng.uniform(0, 2 * math.pi), math.exp(rng.uniform(-0.2, 0.2))
    cos, sin = math.cos(angle), math.sin(angle)
    matrix = np.array([[cos, sin], [-sin, cos]]) * np.array([[stretch], [1.0]])
    rotated = [contour @ matrix for contour in contours]
    scale = extent / np.ptp(np.concatenate(rotated), axis=0).max()
    return [contour * scale for contour in rotated]


def crowd_contours(rng: Rng, contours: list[Points]) -> list[Points]:
    """A crowd region: many small copies of one shape, each in a random pose, on a jittered grid; in pixels."""
    cell = rng.uniform(12, 15)
    columns, rows = rng.integers(5, 9), rng.integers(4, 8)
    crowd = []
    for row, column in np.ndindex(rows, columns):
        center = (np.array([column, row]) + rng.uniform(-0.1, 0.1, 2)) * cell
        crowd += [contour + center for contour in random_pose(rng, contours, cell * rng.uniform(0.7, 0.9))]
    return crowd
