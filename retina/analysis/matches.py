"""Detections matched to objects as pycocotools does, once, into columns that can be accumulated again and again.

pycocotools and its faster copies give their matches as one Python object for each image, class and area range: at the
size of COCO's val2017 that takes longer than the whole evaluation, and gigabytes. Here all images are matched together,
in as many rounds as one image has detections of one class that overlap an object. The result is equal to
`COCOeval.evalImgs` in every entry (tests/analysis/test_matches.py).

Legend: B images, K classes, T IoU thresholds, A area ranges, D detections, M objects (crowd regions are among them),
P pairs of a detection and an object.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retina.analysis.results_file import Results
from retina.data.annotations import Annotations

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
AREAS = ("all", "small", "medium", "large")
AREA_RANGES = np.array([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]])  # pixels; both bounds are inside
MAX_DETECTIONS = (1, 10, 100)  # for each image and class

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class Matches(NamedTuple):
    """Which object each detection found, at ten IoU thresholds and for four area ranges.

    The detections are sorted by class, then by score from high to low; equal scores by image id, then as in the
    results. At most 100 for each image and class are among them, those with the highest scores.
    """

    image_ids: Ints  # (B,) ascending; `images` and `object_images` are positions in it
    names: list[str]  # of the K classes
    rows: Ints  # (D,) position in the results
    images: Ints  # (D,)
    labels: Ints  # (D,) ascending
    scores: Floats  # (D,)
    ranks: Ints  # (D,) place by score among the detections of this image and class, from 0
    found: NDArray[np.int32]  # (A, T, D) position of the matched object in the annotations, -1 for none
    ignored: Bools  # (A, T, D) neither right nor wrong: matched to an ignored object, or no match and outside the range
    object_rows: Ints  # (M,) position in the annotations, ascending
    object_images: Ints  # (M,)
    object_labels: Ints  # (M,)
    object_ignored: Bools  # (A, M) crowd regions, and objects outside the area range

    @property
    def right(self) -> Bools:
        """(A, T, D) the true positives; false positives are neither right nor ignored."""
        return (self.found >= 0) & ~self.ignored

    def of_class(self, label: int) -> slice:
        """The detections of one class."""
        start, stop = np.searchsorted(self.labels, [label, label + 1])
        return slice(int(start), int(stop))


def match_detections(annotations: Annotations, results: Results, exclude: Iterable[int] = ()) -> Matches:
    """Match `results` to the objects of `annotations`; `exclude`: ids of images that do not count."""
    image_ids = np.setdiff1d(annotations.image_ids, np.fromiter(exclude, np.int64))
    position = np.where(
        np.isin(annotations.image_ids, image_ids), np.searchsorted(image_ids, annotations.image_ids), -1
    )
    num_classes = len(annotations.names)

    object_rows = np.flatnonzero(position[annotations.images] >= 0)
    object_images, object_labels = (
        position[annotations.images[object_rows]],
        annotations.labels[object_rows].astype(int),
    )
    areas = annotations.areas[object_rows]
    object_ignored = annotations.crowd[object_rows] | outside_ranges(areas)

    # Detections by image and class, the highest score first.
    rows = np.flatnonzero(position[results.images] >= 0)
    group = position[results.images[rows]] * num_classes + results.labels[rows]
    order = np.lexsort((-results.scores[rows], group))
    rows, group = rows[order], group[order]
    ranks = np.arange(len(rows)) - np.searchsorted(group, group)
    kept = ranks < MAX_DETECTIONS[-1]
    rows, group, ranks = rows[kept], group[kept], ranks[kept]

    detection, thing, iou = _overlapping_pairs(
        group, results.boxes[rows], object_images * num_classes + object_labels, annotations, object_rows
    )
    found = np.full((len(AREAS), len(IOU_THRESHOLDS), len(rows)), -1, np.int32)
    for area in range(len(AREAS)):
        ignored = object_ignored[area]
        _match(found[area], group, detection, thing, iou, ignored, annotations.crowd[object_rows])
    with np.errstate(over="ignore"):  # a box of 1e200 pixels
        outside = outside_ranges(results.boxes[rows, 2] * results.boxes[rows, 3])[:, None]
    ignored = np.broadcast_to(outside, found.shape).copy()
    matched = np.nonzero(found >= 0)
    objects = found[matched]
    ignored[matched] = object_ignored[matched[0], objects]
    found[matched] = object_rows[objects]

    images, labels = group // num_classes, group % num_classes
    order = np.lexsort((-results.scores[rows], labels))  # stable: equal scores stay in the order of the images
    return Matches(
        image_ids,
        annotations.distinct_names,
        rows[order],
        images[order],
        labels[order],
        results.scores[rows[order]],
        ranks[order],
        found[:, :, order],
        ignored[:, :, order],
        object_rows,
        object_images,
        object_labels,
        object_ignored,
    )


def outside_ranges(areas: Floats) -> Bools:
    """(A, N) whether each area is outside of each range."""
    low, high = AREA_RANGES[:, :1], AREA_RANGES[:, 1:]
    outside: Bools = (areas < low) | (areas > high)
    return outside


def _overlapping_pairs(
    group: Ints, boxes: Floats, object_group: Ints, annotations: Annotations, object_rows: Ints
) -> tuple[Ints, Ints, Floats]:
    """(detection, object, IoU) of the P pairs with an IoU of at least 0.5, ordered by detection.

    For a crowd region the IoU is the share of the detection that is inside it. The floating-point operations are those
    of `bbIou` in pycocotools' maskApi.c, in its order.
    """
    by_group = np.argsort(object_group, kind="stable")
    start, stop = (np.searchsorted(object_group[by_group], group, side=side) for side in ("left", "right"))
    count = stop - start
    detection = np.repeat(np.arange(len(group)), count)
    within = np.arange(len(detection)) - np.repeat(np.cumsum(count) - count, count)
    thing = by_group[np.repeat(start, count) + within]
    d, g = boxes[detection].T, annotations.boxes[object_rows[thing]].T
    with np.errstate(all="ignore"):  # boxes of 1e200 pixels, and no overlap
        width = np.fmin(d[2] + d[0], g[2] + g[0]) - np.fmax(d[0], g[0])
        height = np.fmin(d[3] + d[1], g[3] + g[1]) - np.fmax(d[1], g[1])
        overlap, detection_area = width * height, d[2] * d[3]
        crowd = annotations.crowd[object_rows[thing]]
        iou = overlap / np.where(crowd, detection_area, detection_area + g[2] * g[3] - overlap)
        kept = (width > 0) & (height > 0) & (iou >= IOU_THRESHOLDS[0])
    return detection[kept], thing[kept], iou[kept]


def _match(
    found: NDArray[np.int32], group: Ints, detection: Ints, thing: Ints, iou: Floats, ignored: Bools, crowd: Bools
) -> None:
    """Fill `found` (T, D) for one area range, with positions among the M objects.

    A detection takes the free object with the highest IoU, the last one of equals, and an ignored one only if there is
    no other. A crowd region is always free. Round r matches detection r of every image and class at the same time.
    """
    candidates, first_pair = np.unique(detection, return_index=True)
    rounds = np.arange(len(candidates)) - np.searchsorted(group[candidates], group[candidates])
    round_of_pair = np.repeat(rounds, np.diff(first_pair, append=len(detection)))
    order = np.lexsort((-thing, -iou, ignored[thing], detection, round_of_pair))
    detection, thing, iou = detection[order], thing[order], iou[order]
    bounds = np.searchsorted(round_of_pair[order], np.arange(rounds.max(initial=-1) + 2))
    reached = iou >= np.minimum(IOU_THRESHOLDS, 1 - 1e-10)[:, None]
    taken = np.zeros((len(found), len(ignored)), np.bool_)
    for start, stop in itertools.pairwise(bounds):
        current, objects = detection[start:stop], thing[start:stop]
        first = np.flatnonzero(np.diff(current, prepend=-1))
        possible = reached[:, start:stop] & ~(taken[:, objects] & ~crowd[objects])
        none = stop - start
        best = np.minimum.reduceat(np.where(possible, np.arange(none), none), first, axis=1)
        threshold, which = np.nonzero(best < none)
        chosen = objects[best[threshold, which]]
        found[threshold, current[first][which]] = chosen
        taken[threshold, chosen] = True


def object_counts(matches: Matches) -> Any:
    """(A, K) number of objects that count, of each class in each area range."""
    num_classes = len(matches.names)
    return np.stack(
        [np.bincount(matches.object_labels[~ignored], minlength=num_classes) for ignored in matches.object_ignored]
    )
