"""Weights, images and boxes from nothing but names, equal on every machine: inputs of the parity fixtures.

So the fixtures hold only what the other frameworks computed from them. make_parity_fixtures.py and
test_foreign_parity.py use them.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

CLASSES = 4
# Height and width; a batch is padded to 96x128. mmdetection takes the second for 96x96, so it has padding beyond that.
SIZES = [(96, 128), (80, 70)]
# Two equal boxes; small ones that share their best anchors; one at the edge of the second image.
BOXES = [
    np.array([[8, 10, 60, 70], [8, 10, 60, 70], [64, 20, 71, 25], [65, 21, 69, 24], [20, 40, 118, 94]], np.float32),
    np.array([[50, 30, 70, 80], [3, 3, 40, 25]], np.float32),
]
LABELS = [np.array([1, 3, 0, 2, 2]), np.array([3, 0])]
# The last layers have smaller weights, so that scores and boxes are of a usual size.
OUTPUTS = {"cls_score": 0.25, "retina_cls": 0.25, "bbox_pred": 0.06, "retina_reg": 0.06}
RESIZE_FROM = [(75, 100), (90, 61)]  # to a short side of 60 and a long side of at most 84
SHORT_SIDE, MAX_SIDE = 60, 84


def uniform(name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Numbers in [-1, 1) from the generator splitmix64 (Steele et al. 2014), which is a few integer operations."""
    with np.errstate(over="ignore"):
        z = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64(zlib.crc32(name.encode())) << np.uint64(32)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64).reshape(shape) / 2**52 - 1


def image(name: str, size: tuple[int, int]) -> NDArray[np.uint8]:
    """RGB, uint8 (H, W, 3): noise over a ramp."""
    height, width = size
    ramp = np.linspace(0, 128, height)[:, None, None] + np.linspace(0, 64, width)[None, :, None]
    return (ramp + 31.5 * (uniform(name, (height, width, 3)) + 1)).astype(np.uint8)


def weights(shapes: dict[str, tuple[int, ...]], pixel_deviation: float) -> dict[str, NDArray[np.float32]]:
    """A value for each key of detectron2 or mmdetection, so that the outputs are neither tiny nor huge.

    `pixel_deviation`: of the normalized pixels, by which the first convolution divides.
    """
    state = {}
    for key, shape in shapes.items():
        u = uniform(key, shape)
        output = next((part for part in OUTPUTS if part in key), None)
        if len(shape) == 4:  # a convolution; with this deviation it keeps that of its input after a ReLU
            value = u * np.sqrt(6 / np.prod(shape[1:])) * OUTPUTS.get(output, 1)
            value = value / pixel_deviation if shape[1] == 3 else value
        elif key.endswith(("running_var", "conv3.norm.weight", "bn3.weight")):  # these end a residual branch
            value = 1 + 0.2 * u if key.endswith("running_var") else 0.3 + 0.05 * u
        elif key.endswith("weight"):
            value = 1 + 0.2 * u
        else:
            value = 0.1 * u - (2.5 if output in ("cls_score", "retina_cls") else 0)
        state[key] = value.astype(np.float32)
    return state


def gradient_samples(gradient: NDArray[np.float32]) -> NDArray[np.float32]:
    """Up to 16 of its values, and its norm."""
    flat = gradient.reshape(-1)
    chosen = flat[np.linspace(0, len(flat) - 1, min(16, len(flat))).astype(int)]
    return np.append(chosen, np.linalg.norm(flat.astype(np.float64))).astype(np.float32)
