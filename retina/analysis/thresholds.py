"""At which score to use the detector: precision, recall and F1 over the score, and what is confused with what.

Everything is at IoU 0.5. A detection is right if COCO's matching gives it an object. The matching goes from high to low
scores, so what is right does not change when detections with lower scores are dropped, and one matching serves all
thresholds. Detections that COCO ignores (in crowd regions) do not count.

Legend: B images, K classes, D detections, N distinct scores.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask

from retina.analysis.matches import Bools, Floats, Ints, Matches
from retina.analysis.results_file import Results
from retina.data.annotations import Annotations

MIN_IOU = 0.5
NEARLY_BEST = 0.01  # F1 below the best


class ScoreCurve(NamedTuple):
    """What the detections with at least each score are worth. Scores from high to low."""

    scores: Floats  # (N,)
    right: Ints  # (N,) detections that are right
    wrong: Ints  # (N,)
    num_objects: int

    @property
    def precision(self) -> Floats:
        """(N,) share of the detections that are right."""
        return self.right / (self.right + self.wrong)

    @property
    def recall(self) -> Floats:
        """(N,) share of the objects that are found."""
        return self.right / max(self.num_objects, 1)

    @property
    def f1(self) -> Floats:
        """(N,) harmonic mean of precision and recall."""
        return 2 * self.right / (self.right + self.wrong + self.num_objects)


class Threshold(NamedTuple):
    """The threshold with the best F1, and what it gives."""

    score: float  # in the middle between the lowest score that is kept and the next one
    low: float  # from `low` to `high` F1 is at most NEARLY_BEST worse
    high: float
    right: int
    wrong: int
    missed: int
    precision: float
    recall: float
    f1: float


class ScoreThresholds(NamedTuple):
    """The scores that a user gives: one for all classes, and others for some of them."""

    all: float
    per_class: dict[str, float | None]  # None: the file knows the class, and nothing right was found of it

    def of(self, names: Sequence[str]) -> list[float]:
        """For each class by its name."""
        scores = [self.per_class.get(name) for name in names]
        return [self.all if score is None else score for score in scores]

    def missing(self, names: Sequence[str]) -> list[str]:
        """The classes that the file does not know."""
        return [name for name in names if name not in self.per_class] if self.per_class else []


def score_thresholds(given: str) -> ScoreThresholds:
    """A number from 0 to 1, or the metrics.json of tools/eval.py, which has a threshold for each class.

    Raises:
        ValueError: it is neither.
    """
    try:
        number = float(given)
    except ValueError:
        pass
    else:
        if 0 <= number <= 1:
            return ScoreThresholds(number, {})
        raise ValueError(f"given {given}, expected a number from 0 to 1")
    try:
        found = json.loads(Path(given).read_text(encoding="utf-8"))["score_threshold"]
        for_all = found["all"]
        per_class = {str(name): None if score is None else float(score) for name, score in found["per_class"].items()}
        if for_all is not None:
            return ScoreThresholds(float(for_all), per_class)
    except OSError:
        raise ValueError(f"given {given}, which is neither a number from 0 to 1 nor a file that can be read") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{given} has no thresholds; tools/eval.py writes them into metrics.json") from None
    raise ValueError(f"{given} is of an evaluation in which nothing right was found, so it recommends no threshold")


def counted(matches: Matches) -> Bools:
    """(D,) the detections that are right or wrong at IoU 0.5."""
    used: Bools = ~matches.ignored[0, 0]
    return used


def is_right(matches: Matches) -> Bools:
    """(D,) the true positives at IoU 0.5: `matches.right[0, 0]`, without computing the others."""
    right: Bools = (matches.found[0, 0] >= 0) & counted(matches)
    return right


def score_curve(matches: Matches, label: int | None = None) -> ScoreCurve:
    """The curve of one class, or of all detections together (None)."""
    used, objects = counted(matches), ~matches.object_ignored[0]
    if label is not None:
        used, objects = used & (matches.labels == label), objects & (matches.object_labels == label)
    scores, right = matches.scores[used], is_right(matches)[used]
    order = np.argsort(-scores, kind="stable")
    scores, right = scores[order], right[order]
    last = np.flatnonzero(np.diff(scores, append=-np.inf))  # of equal scores: a threshold keeps all or none
    true = np.cumsum(right, dtype=np.int64)[last]
    return ScoreCurve(scores[last], true, last + 1 - true, int(objects.sum()))


def best_threshold(curve: ScoreCurve) -> Threshold | None:
    """The threshold with the highest F1; None if nothing is right at any."""
    if not len(curve.scores) or not curve.right[-1]:
        return None
    f1 = curve.f1
    best = int(f1.argmax())
    nearly = np.flatnonzero(f1 >= f1[best] - NEARLY_BEST)
    outside = np.flatnonzero(f1 < f1[best] - NEARLY_BEST)
    first = outside[outside < best].max(initial=-1) + 1  # the range around the best without a gap
    last = outside[outside > best].min(initial=nearly[-1] + 1) - 1
    lower, upper = _gap(curve.scores, best)
    lowest, _ = _gap(curve.scores, int(last))
    _, highest = _gap(curve.scores, int(first))
    return Threshold(
        short_number(lower, upper, (lower + upper) / 2),
        short_number(lowest, highest, lowest),
        short_number(lowest, highest, highest),
        int(curve.right[best]),
        int(curve.wrong[best]),
        curve.num_objects - int(curve.right[best]),
        float(curve.precision[best]),
        float(curve.recall[best]),
        float(f1[best]),
    )


def recommended_scores(matches: Matches) -> dict[str, Any]:
    """The `score_threshold` of metrics.json: of all classes together, and of each; None where nothing is right."""
    best = [best_threshold(score_curve(matches, label)) for label in (None, *range(len(matches.names)))]
    scores = [threshold.score if threshold else None for threshold in best]
    return {"all": scores[0], "per_class": dict(zip(matches.names, scores[1:], strict=True))}


def _gap(scores: Floats, last: int) -> tuple[float, float]:
    """The numbers between these two keep exactly the scores up to the position `last` (distinct, from high to low)."""
    upper = float(scores[last])
    return float(scores[last + 1]) if last + 1 < len(scores) else min(0.0, upper), upper


def short_number(lower: float, upper: float, wanted: float) -> float:
    """The number with the fewest decimals, at least two, between `lower` and `upper`, and of these nearest `wanted`.

    It is neither of the two, so that it does not matter whether a score that is equal to it would be kept.
    """
    for decimals in range(2, 17):
        step = 10.0**-decimals
        nearest = round(wanted, decimals)
        for short in (nearest, round(nearest + step, decimals), round(nearest - step, decimals)):
            if lower < short < upper:
                return short
    return upper


def confusion_matrix(matches: Matches, annotations: Annotations, results: Results, score: float) -> Ints:
    """(K + 1, K + 1) objects by their class (rows) and by the class that was detected (columns).

    The last row is background: detections of nothing. The last column is background, too: objects without detection.
    Only detections with at least `score` count. The diagonal is what is right. Each detection that is wrong, from the
    highest score on, takes the object with the highest IoU among those that have none yet, if that is at least 0.5.
    """
    num_classes = len(matches.names)
    kept, right = (matches.scores >= score) & counted(matches), is_right(matches)
    matrix = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    np.add.at(matrix, (matches.labels[kept & right],) * 2, 1)

    wrong = np.flatnonzero(kept & ~right)
    wrong = wrong[np.argsort(-matches.scores[wrong], kind="stable")]
    has_detection = np.isin(matches.object_rows, matches.found[0, 0][kept & right])
    left = np.flatnonzero(~has_detection & ~matches.object_ignored[0])
    for image in range(len(matches.image_ids)):
        detections, objects = wrong[matches.images[wrong] == image], left[matches.object_images[left] == image]
        predicted, true = matches.labels[detections], matches.object_labels[objects]
        pairs = _greedy_pairs(results.boxes[matches.rows[detections]], annotations.boxes[matches.object_rows[objects]])
        for detection, thing in pairs:
            matrix[true[thing], predicted[detection]] += 1
        np.add.at(matrix[-1], np.delete(predicted, [detection for detection, _ in pairs]), 1)
        np.add.at(matrix[:, -1], np.delete(true, [thing for _, thing in pairs]), 1)
    return matrix


def _greedy_pairs(detections: Floats, objects: Floats) -> list[tuple[int, int]]:
    """(detection, object) of boxes xywh; each is in one pair at most, the first detections choose first."""
    if not len(detections) or not len(objects):
        return []
    iou = mask.iou(detections, objects, [0] * len(objects))
    pairs = []
    for detection in range(len(detections)):
        best = int(iou[detection].argmax())
        if iou[detection, best] >= MIN_IOU:
            pairs.append((detection, best))
            iou[:, best] = 0
    return pairs


def count_by_image(matches: Matches, score: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(B,) objects of each image, and its detections with at least `score`."""
    num_images, kept = len(matches.image_ids), (matches.scores >= score) & counted(matches)
    objects = np.bincount(matches.object_images[~matches.object_ignored[0]], minlength=num_images)
    return objects, np.bincount(matches.images[kept], minlength=num_images)
