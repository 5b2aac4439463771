"""Recall by the kind of object, by hand."""

from __future__ import annotations

import numpy as np
from rows import columns

from retina.analysis.matches import match_detections
from retina.analysis.recall import break_down_recall

OBJECTS = [
    [0, 0, 0, 0, 20, 20, 0],  # alone
    [0, 0, 100, 100, 40, 40, 0],  # overlaps the next two
    [0, 1, 120, 100, 40, 40, 0],
    [0, 0, 100, 120, 40, 90, 0],
    [1, 0, 100, 100, 200, 60, 0],  # at the place of others, in another image
    [1, 1, 300, 100, 10, 10, 0],  # touches it only
    [1, 1, 100, 100, 200, 200, 1],  # a crowd region
]


def test_breakdown_by_hand() -> None:
    detections = [
        [0, 0, 0, 0, 20, 20, 0.9],
        [0, 0, 100, 100, 40, 40, 0.3],
        [0, 0, 120, 100, 40, 40, 0.9],  # wrong class
        [1, 0, 100, 100, 200, 60, 0.9],
    ]
    annotations, results = columns(2, 2, OBJECTS, detections)
    size, shape, neighbors = break_down_recall(match_detections(annotations, results), annotations, 0.5)
    assert size.names == ["8 to 16", "16 to 32", "32 to 64", "96 to 128"]
    assert size.objects.tolist() == [1, 1, 3, 1], "sides of 10, 20, 40, 40, 60 and 109.5 pixels"
    assert size.found.tolist() == [0, 1, 0, 1] and size.found_at_all.tolist() == [0, 1, 1, 1]
    assert shape.names == ["1:3 to 1:2", "2:3 to 3:2", "above 3:1"]
    assert shape.objects.tolist() == [1, 4, 1] and shape.found.tolist() == [0, 1, 1]
    assert neighbors.names == ["0", "2"] and neighbors.objects.tolist() == [3, 3]
    assert neighbors.found.tolist() == [2, 0] and neighbors.found_at_all.tolist() == [2, 1]


def test_interval_by_hand() -> None:
    """Wilson (1927): (p + z^2/2n ± z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    annotations, results = columns(1, 1, [[0, 0, 50 * i, 0, 20, 20, 0] for i in range(8)],
                                   [[0, 0, 50 * i, 0, 20, 20, 0.9] for i in range(6)])  # fmt: skip
    size, *_ = break_down_recall(match_detections(annotations, results), annotations, 0.5)
    z, n, p = 1.959964, 8, 6 / 8
    center, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    np.testing.assert_allclose(size.interval()[:, 0], np.array([center - half, center + half]) / (1 + z**2 / n), 1e-6)
