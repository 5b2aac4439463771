"""Small data sets written as rows of numbers, as the columns that are read from files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retina.analysis.matches import Matches, match_detections
from retina.analysis.results_file import Results
from retina.data.annotations import Annotations

SIZE = 400  # of an image, pixels


def columns(
    num_images: int, num_classes: int, objects: Sequence[Sequence[float]], detections: Sequence[Sequence[float]]
) -> tuple[Annotations, Results]:
    """`objects`: image, class, x, y, w, h, crowd; `detections`: image, class, x, y, w, h, score. Image ids from 10."""
    truth, found = (np.array(rows, np.float64).reshape(-1, 7) for rows in (objects, detections))
    annotations = Annotations(
        Path("annotations.json"),
        10 + np.arange(num_images),
        np.array([f"{i}.png" for i in range(num_images)], np.dtypes.StringDType()),
        np.full(num_images, SIZE, np.int32),
        np.full(num_images, SIZE, np.int32),
        1 + np.arange(len(truth)),
        0,
        truth[:, 0].astype(np.int64),
        truth[:, 1].astype(np.int32),
        truth[:, 2:6],
        truth[:, 4] * truth[:, 5],
        truth[:, 6].astype(np.bool_),
        list(range(1, num_classes + 1)),
        [f"class {k}" for k in range(num_classes)],
    )
    return annotations, Results(found[:, 0].astype(np.int64), found[:, 1].astype(np.int64), found[:, 2:6], found[:, 6])


def match(
    num_images: int, num_classes: int, objects: Sequence[Sequence[float]], detections: Sequence[Sequence[float]]
) -> Matches:
    return match_detections(*columns(num_images, num_classes, objects, detections))
