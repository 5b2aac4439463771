"""Which objects are found: recall over their size, their shape and the number of their neighbors, at IoU 0.5.

Legend: M objects without crowd regions, N bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

from retina.analysis.matches import Floats, Ints, Matches
from retina.analysis.thresholds import is_right
from retina.data.annotations import Annotations

SIDES = [0, 8, 16, 32, 64, 96, 128, 256, 512]  # pixels; COCO's small ends at 32, its medium at 96
RATIOS = [0, 1 / 3, 1 / 2, 2 / 3, 3 / 2, 2, 3]  # width / height
RATIO_NAMES = ["below 1:3", "1:3 to 1:2", "1:2 to 2:3", "2:3 to 3:2", "3:2 to 2:1", "2:1 to 3:1", "above 3:1"]
NEIGHBORS = [0, 1, 2, 3, 5, 10]


class Breakdown(NamedTuple):
    """Recall by one property of the objects."""

    title: str
    names: list[str]  # of the N bins with objects
    objects: Ints  # (N,)
    found: Ints  # (N,) with at least the recommended score
    found_at_all: Ints  # (N,) with any score

    def interval(self) -> Floats:
        """(2, N) Wilson's 95 % interval of the recall."""
        pairs = zip(self.found.tolist(), self.objects.tolist(), strict=True)
        bounds = [binomtest(found, objects).proportion_ci(0.95, "wilson") for found, objects in pairs]
        return np.array([(bound.low, bound.high) for bound in bounds]).reshape(-1, 2).T


def break_down_recall(matches: Matches, annotations: Annotations, score: float) -> list[Breakdown]:
    """Recall by size, shape and neighbors; `score`: the threshold of `Breakdown.found`."""
    objects = ~matches.object_ignored[0]
    rows = matches.object_rows[objects]
    scores = found_scores(matches)[objects]
    width, height = annotations.boxes[rows, 2:].clip(min=0).T  # some files have negative ones
    every = np.ones(len(rows), np.bool_)
    neighbors = _count_neighbors(annotations.boxes[rows], matches.object_images[objects])

    def breakdown(title: str, edges: Sequence[float], names: list[str], values: Floats | Ints) -> Breakdown:
        place = np.searchsorted(edges, values, side="right") - 1
        counts, found, found_at_all = (
            np.bincount(place[which], minlength=len(edges)) for which in (every, scores >= score, scores > -np.inf)
        )
        used = np.flatnonzero(counts)
        return Breakdown(title, [names[i] for i in used], counts[used], found[used], found_at_all[used])

    return [
        breakdown(
            "size (square root of the area of the box, pixels)", SIDES, _range_names(SIDES), (width * height) ** 0.5
        ),
        breakdown("shape (width to height)", RATIOS, RATIO_NAMES, width / np.maximum(height, 1e-9)),
        breakdown("neighbors (other objects whose boxes overlap it)", NEIGHBORS, _count_names(NEIGHBORS), neighbors),
    ]


def found_scores(matches: Matches) -> Floats:
    """(all objects,) the score of the detection that found each object, -inf where there is none."""
    right = is_right(matches)
    scores = np.full(len(matches.object_rows), -np.inf)
    scores[np.searchsorted(matches.object_rows, matches.found[0, 0][right])] = matches.scores[right]
    return scores


def _range_names(edges: Sequence[float]) -> list[str]:
    return [f"{low:g} to {high:g}" for low, high in pairwise(edges)] + [f"{edges[-1]:g} or more"]


def _count_names(edges: list[int]) -> list[str]:
    pairs = pairwise(edges)
    return [f"{low}" if high == low + 1 else f"{low} to {high - 1}" for low, high in pairs] + [f"{edges[-1]} or more"]


def _count_neighbors(boxes: Floats, images: Ints) -> Ints:
    """(M,) for boxes xywh, the number of other boxes in the same image that overlap each."""
    neighbors = np.zeros(len(boxes), np.int64)
    order = np.argsort(images, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(images[order])) + 1):
        low, high = boxes[rows, :2], boxes[rows, :2] + boxes[rows, 2:]
        overlap = (low[:, None] < high[None]).all(axis=2) & (low[None] < high[:, None]).all(axis=2)
        neighbors[rows] = overlap.sum(axis=1) - np.diag(overlap)
    return neighbors
