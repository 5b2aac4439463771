"""What the comparison of an exported file with PyTorch accepts, on detections made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from retina.config import Detect
from retina.detect import Detections
from retina.export.verify import Difference, compare


def detections(*rows: tuple[float, float, int]) -> Detections:
    """Boxes of 20x20 px at (x, 0), of (x, score, label)."""
    boxes = torch.tensor([[x, 0, x + 20, 20] for x, _, _ in rows]).reshape(-1, 4)
    return Detections(
        boxes.float(), torch.tensor([row[1] for row in rows]), torch.tensor([row[2] for row in rows]).long()
    )


EXPECTED = detections((0, 0.9, 0), (50, 0.8, 1), (100, 0.7, 0))
CANDIDATES = detections((0, 0.9, 0), (50, 0.8, 1), (100, 0.7, 0), (108, 0.6999, 0))


@pytest.mark.parametrize(
    ("found", "is_rounding"),
    [
        (EXPECTED, True),
        (detections((0.05, 0.9, 0), (50, 0.8005, 1), (100, 0.7, 0)), True),
        (detections((0.2, 0.9, 0), (50, 0.8, 1), (100, 0.7, 0)), False),
        (detections((0, 0.902, 0), (50, 0.8, 1), (100, 0.7, 0)), False),
        (detections((0, 0.9, 0), (50, 0.8, 0), (100, 0.7, 0)), False),  # another class
        (detections((0, 0.9, 0), (50, 0.8, 1), (108, 0.6999, 0)), False),  # the other of two boxes: 2 of 3 changed
        (detections((50, 0.8, 1)), False),
        (detections(), False),
        (detections((0, 0.9, 0), (50, 0.8, 1), (100, 0.7, 0), (200, 0.0504, 0)), False),  # no such candidate
    ],
)
def test_one_image(found: Detections, is_rounding: bool) -> None:
    boxes, scores, changed, count = compare(found, EXPECTED, CANDIDATES, Detect())
    assert Difference(1, count, boxes, scores, changed).is_rounding == is_rounding


def test_rounding_may_change_one_detection_in_a_hundred() -> None:
    ones: list[Any] = [(100.0 * i, 0.9, 0) for i in range(79)]
    candidates = detections(*ones, (7900, 0.5, 0), (7908, 0.5, 0))
    compared = compare(detections(*ones, (7908, 0.5, 0)), detections(*ones, (7900, 0.5, 0)), candidates, Detect())
    assert compared == (0.0, 0.0, 2, 80)
    assert Difference(1, 200, 0.0, 0.0, 2).is_rounding and not Difference(1, 100, 0.0, 0.0, 2).is_rounding


def test_scores_near_the_threshold_are_not_counted() -> None:
    with_more = detections((0, 0.9, 0), (50, 0.8, 1), (100, 0.7, 0), (200, 0.0501, 0))
    assert compare(EXPECTED, with_more, with_more, Detect())[2] == 0
    assert compare(EXPECTED, with_more, with_more, Detect(score_threshold=0.01))[2] == 1
    full = Detect(max_detections=3)  # the lowest of three decides
    assert compare(EXPECTED, detections((0, 0.9, 0), (50, 0.8, 1), (200, 0.7005, 0)), CANDIDATES, full)[2] == 0
