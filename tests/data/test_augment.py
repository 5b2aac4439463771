"""`train_transform`: the same seed gives the same bits, also after a change of its code."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from retina.config import Data
from retina.data.augment import train_transform
from retina.data.coco import Record

# The first 16 digits of the SHA-256 of pixels, boxes, labels and ignore regions of 12 samples, with opencv 4.14.0 and
# albumentations 2.0.8. That of "default" is from a time when each sample still built a new Compose.
HASHES: dict[str, tuple[dict[str, Any], str]] = {
    "default": ({"short_side": (75,)}, "ce67e3c9c47a68dc"),
    "shrunk": ({"short_side": (20, 30)}, "525f716aa9de4a70"),
    "same size": ({"short_side": (40,), "vertical_flip": 0.5}, "6bb8089f89d304a5"),
    "zoom": ({"short_side": (60,), "zoom": (0.5, 2.0)}, "c8a3d887c5690b4e"),
    "colors": ({"short_side": (50,), "zoom": (0.8, 1.25), "photometric": 0.7}, "3e368935f15e2523"),
    "torchvision": (
        {"short_side": (60,), "zoom": (0.8, 1.25), "photometric": 0.5, "resize": "torchvision"},
        "64d27a47664df722",
    ),
}


def sample(image_id: int) -> tuple[NDArray[np.uint8], Record]:
    """A 56x40 image, smooth with noise, and its record: objects, among them a tiny one, and ignore regions."""
    rng = np.random.default_rng(image_id)
    y, x = np.mgrid[:40, :56]
    smooth = 110 + 60 * np.sin(x / 9 + image_id)[..., None] + 40 * np.cos(y / 5)[..., None] * np.array([1, -1, 0.5])
    image = (smooth + rng.integers(0, 30, (40, 56, 3))).clip(0, 255).astype(np.uint8)
    corners = rng.uniform((0, 0), (40, 25), (image_id % 5, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(0.2, 15, corners.shape)], axis=1).astype(np.float32)
    ignore = np.array([[0, 0, 56, 40], [3.5, 2.25, 17, 9]], np.float32)[: image_id % 3]
    return image, Record(image_id, Path("a.jpg"), 56, 40, boxes, np.arange(len(boxes)), ignore)


def digest(config: Data, memory: NDArray[np.uint8] | None = None) -> str:
    result = hashlib.sha256()
    for image_id in range(12):
        parts = train_transform(*sample(image_id), config, 3, image_id % 2, image_id % 3 // 2, memory)
        assert memory is None or not isinstance(parts[0], np.ndarray) or parts[0].base is memory
        for part in parts[config.resize == "torchvision" :]:  # the last bits of floats depend on the processor
            result.update(f"{part.dtype} {tuple(part.shape)}".removeprefix("torch.").encode())
            result.update(np.ascontiguousarray(part).tobytes())
    return result.hexdigest()[:16]


@pytest.mark.parametrize("name", HASHES)
def test_the_bits_of_a_sample_are_those_of_a_new_compose_for_each(name: str) -> None:
    settings, expected = HASHES[name]
    assert digest(Data(**settings)) == expected
    assert digest(Data(**settings), np.zeros((160, 160, 3), np.uint8)) == expected, "into given memory"


def test_the_random_choices_are_independent() -> None:
    """An image is flipped in one direction, in both or in none, and the colors do not follow the flips."""
    image = np.zeros((8, 8, 3), np.uint8)
    image[1, 2], image[4:] = (90, 90, 90), (180, 20, 20)
    config = Data(short_side=(8,), flip=0.5, vertical_flip=0.5, photometric=0.5)
    seen: Counter[tuple[bool, bool, bool]] = Counter()
    for image_id in range(800):
        record = Record(
            image_id, Path("a.jpg"), 8, 8, np.array([[2, 1, 3, 2]], np.float32), np.array([0]), np.zeros((0, 4))
        )
        result, boxes, _, _ = train_transform(image, record, config, 0, 0)
        left, top = boxes[0, :2].tolist()
        assert isinstance(result, np.ndarray)
        colors = {tuple(pixel) for pixel in result.reshape(-1, 3).tolist()}
        seen[left == 5, top == 6, colors != {(0, 0, 0), (90, 90, 90), (180, 20, 20)}] += 1
    # Eight outcomes of 1/8 each: 100, with a standard deviation of 9.4.
    assert len(seen) == 8 and all(60 < count < 140 for count in seen.values()), seen
