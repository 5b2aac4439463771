"""The twelve COCO numbers and the AP of each class from matches, for the images as they are or with weights.

The precision of COCO changes at true positives only, and there are few of them among the detections. So the sums over
all detections are computed once for each class and area range, up to each true positive, as a product of a sparse
matrix (true positives x images) with the weights (images x resamples).

Legend: as in matches.py; S resamples, R recalls, N true positives of a class.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from retina.analysis.matches import AREAS, IOU_THRESHOLDS, MAX_DETECTIONS, Floats, Matches, object_counts
from retina.config import COCO_METRICS

RECALLS = np.linspace(0, 1, 101)
ELEMENTS = 2_000_000  # of an array that is in work at a time
METRIC_AREAS = (0, 0, 0, 1, 2, 3) * 2  # of each of COCO_METRICS
RECALL_LIMITS = (0, 1, 2, 2, 2, 2)  # of the last six, the position in MAX_DETECTIONS
NARROW = 50  # columns of an array whose rows are too short for a loop over the rows


class Accumulated(NamedTuple):
    """What `COCOeval.accumulate` and `summarize` give, equal in every digit; -1 where there are no objects."""

    precision: Floats  # (T, R, K, A) at up to 100 detections
    recall: Floats  # (T, K, A, 3) at up to 1, 10 and 100 detections
    metrics: dict[str, float | None]  # by the names of COCO_METRICS
    per_class: dict[str, float | None]  # AP


def accumulate(matches: Matches) -> Accumulated:
    """The numbers of pycocotools for all images."""
    num_classes, counts = len(matches.names), object_counts(matches)
    precision = np.full((len(IOU_THRESHOLDS), len(RECALLS), num_classes, len(AREAS)), -1.0)
    weights = np.ones((len(matches.image_ids), 1))
    for label in range(num_classes):
        for area in range(len(AREAS)):
            if counts[area, label]:
                precision[:, :, label, area] = 0
                curves = _curves(matches, label, area, weights, counts[area, label, None].astype(float))
                for threshold, (envelope, reached) in enumerate(curves):
                    steps = np.diff(reached[:, 0], prepend=0).astype(int)
                    values = np.repeat(envelope[:, 0], steps)
                    precision[threshold, : len(values), label, area] = values
    recall = _recalls(matches, weights, counts[:, :, None].astype(float))[..., 0]
    return Accumulated(precision, recall, *_summarize(matches, precision, recall))


def _summarize(
    matches: Matches, precision: Floats, recall: Floats
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    def mean(values: Floats) -> float | None:
        return float(np.mean(values[values > -1])) if (values > -1).any() else None

    # The order of the sums of pycocotools: the last digit depends on it.
    ap = [mean(precision[..., 0]), *(mean(precision[t, ..., 0]) for t in (0, 5))]
    ap += [mean(precision[..., area]) for area in METRIC_AREAS[3:6]]
    ar = [mean(recall[:, :, area, most]) for area, most in zip(METRIC_AREAS[6:], RECALL_LIMITS, strict=True)]
    per_class = {name: mean(precision[:, :, label, 0]) for label, name in enumerate(matches.names)}
    return dict(zip(COCO_METRICS, ap + ar, strict=True)), per_class


def weighted_scores(matches: Matches, weights: NDArray[Any]) -> Floats:
    """(S, 12 + K) the COCO numbers and the AP of each class, if each image counts as often as `weights` (S, B) say.

    Weights are 0 or more. The numbers are between 0 and 1; NaN where a resample has no object to measure. A whole
    weight n gives the numbers of pycocotools on data with n copies of the image. The last digits may differ, because
    the means are summed in another order, and equal scores within an image count as one step.
    """
    weights = np.ascontiguousarray(weights.T, np.float64)  # (B, S)
    counts = _count_objects(matches, weights)
    precision = np.stack([_precision(matches, area, weights, counts[area]) for area in range(len(AREAS))])
    recall = _recalls(matches, weights, counts)
    recall[recall < 0] = np.nan
    metrics = [_mean(precision[0], (0, 1)), _mean(precision[0, 0], 0), _mean(precision[0, 5], 0)]
    metrics += [_mean(precision[area], (0, 1)) for area in METRIC_AREAS[3:6]]
    metrics += [
        _mean(recall[:, :, area, most], (0, 1)) for area, most in zip(METRIC_AREAS[6:], RECALL_LIMITS, strict=True)
    ]
    return np.column_stack([*metrics, _mean(precision[0], 0).T])


def weighted_ap(matches: Matches, weights: NDArray[Any]) -> Floats:
    """(S, 1 + K) the AP and that of each class alone, as columns of `weighted_scores`, in half of the time."""
    weights = np.ascontiguousarray(weights.T, np.float64)  # (B, S)
    precision = _precision(matches, 0, weights, _count_objects(matches, weights)[0])
    return np.column_stack([_mean(precision, (0, 1)), _mean(precision, 0).T])


def _count_objects(matches: Matches, weights: Floats) -> Floats:
    """(A, K, S) the weight of the objects that count."""
    labels, images = matches.object_labels, matches.object_images
    return np.stack([_sum_by_row(labels[~i], images[~i], len(matches.names), weights) for i in matches.object_ignored])


def _precision(matches: Matches, area: int, weights: Floats, counts: Floats) -> Floats:
    """(T, K, S) the mean precision over the recalls; NaN without objects. `counts` (K, S): objects."""
    precision = np.full((len(IOU_THRESHOLDS), *counts.shape), np.nan)
    for label in np.flatnonzero(counts.any(axis=1)):
        precision[:, label] = _average_precision(matches, int(label), area, weights, counts[label])
    return precision


def _mean(values: Floats, axes: int | tuple[int, ...]) -> Floats:
    """The mean without NaN; NaN where there is nothing else, without numpy's warning."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        mean: Floats = np.where(known, values, 0).sum(axis=axes) / known.sum(axis=axes)
    return mean


def _average_precision(matches: Matches, label: int, area: int, weights: Floats, counts: Floats) -> Floats:
    """(T, S) the mean precision over the recalls, for one class; NaN in a resample without objects."""
    objects = int((matches.object_labels == label).sum())  # about the number of true positives
    width = max(ELEMENTS // objects, 250)
    result = np.zeros((len(IOU_THRESHOLDS), weights.shape[1]))
    for start in range(0, weights.shape[1], width):
        part = slice(start, start + width)
        for threshold, (envelope, reached) in enumerate(
            _curves(matches, label, area, np.ascontiguousarray(weights[:, part]), counts[part])
        ):
            if len(envelope):
                steps = reached.copy()
                np.subtract(reached[1:], reached[:-1], out=steps[1:])
                result[threshold, part] = np.einsum("ns,ns->s", envelope, steps) / len(RECALLS)
    result[:, counts == 0] = np.nan
    return result


def _curves(
    matches: Matches, label: int, area: int, weights: Floats, counts: Floats
) -> Iterator[tuple[Floats, Floats]]:
    """For each IoU threshold, two arrays (N, S) with a row for each true positive, in the order of the scores.

    The highest precision from there on, and how many of the 101 recalls are reached there. `counts` (S,): objects.
    """
    detections = matches.of_class(label)
    images = matches.images[detections]
    ignored = matches.ignored[area][:, detections]
    right = (matches.found[area][:, detections] >= 0) & ~ignored
    places = np.flatnonzero(right.any(axis=0))
    next_place = np.searchsorted(places, np.arange(len(images)))
    before_last = next_place < len(places)

    def counted(which: NDArray[np.intp], sign: Any = 1.0) -> Floats:
        """(places, S) the weight of these detections up to each place."""
        return _running_sum(_sum_by_row(next_place[which], images[which], len(places), weights, sign))

    at_last = counted(np.flatnonzero(~ignored[-1] & before_last))
    at_places = weights[images[places]]
    safe_counts = np.maximum(counts, 1e-300)
    for threshold in range(len(IOU_THRESHOLDS)):
        rows = np.flatnonzero(right[threshold, places])
        changed = np.flatnonzero((ignored[threshold] != ignored[-1]) & before_last)
        total = at_last[rows]
        if len(changed):  # ignored at one of the two thresholds only
            total += counted(changed, np.where(ignored[threshold, changed], -1.0, 1.0))[rows]
        true = _running_sum(at_places[rows])
        total += np.spacing(1)
        envelope = _highest_from_here(true / total)
        recall = np.divide(true, safe_counts, out=true)
        nearest = np.rint(np.multiply(recall, 100, out=total), out=total)
        yield envelope, nearest + (RECALLS.take(nearest.astype(np.int64), mode="clip") <= recall)


def _running_sum(values: Floats) -> Floats:
    """`values.cumsum(axis=0)`, perhaps in place. Row by row wide rows take a third of numpy's time."""
    if values.shape[1] < NARROW:
        return values.cumsum(axis=0)
    for row in range(1, len(values)):
        values[row] += values[row - 1]
    return values


def _highest_from_here(values: Floats) -> Floats:
    """The maximum of each row and all rows below it, perhaps in place."""
    if values.shape[1] < NARROW:
        return np.maximum.accumulate(values[::-1], axis=0)[::-1]
    for row in range(len(values) - 1, 0, -1):
        np.maximum(values[row - 1], values[row], out=values[row - 1])
    return values


def _recalls(matches: Matches, weights: Floats, counts: Floats) -> Floats:
    """(T, K, A, 3, S) the share of the objects that are found with up to 1, 10 and 100 detections; -1 without any."""
    num_classes = len(matches.names)
    recall = np.full((len(IOU_THRESHOLDS), num_classes, len(AREAS), len(MAX_DETECTIONS), weights.shape[1]), -1.0)
    for area in range(len(AREAS)):
        for most, limit in enumerate(MAX_DETECTIONS):
            threshold, detection = np.nonzero(matches.right[area] & (matches.ranks < limit))
            row = threshold * num_classes + matches.labels[detection]
            found = _sum_by_row(row, matches.images[detection], len(IOU_THRESHOLDS) * num_classes, weights)
            found = found.reshape(len(IOU_THRESHOLDS), num_classes, -1)
            np.divide(found, counts[area], out=recall[:, :, area, most], where=counts[area] > 0)
    return recall


def _sum_by_row(rows: NDArray[Any], images: NDArray[Any], num_rows: int, weights: Floats, sign: Any = 1.0) -> Floats:
    """(num_rows, S) the sum of the weights of `images` in each row."""
    data = np.broadcast_to(np.asarray(sign, np.float64), rows.shape)
    matrix = sparse.coo_array((data, (rows, images)), shape=(num_rows, len(weights))).tocsr()
    total: Floats = matrix @ weights
    return total
