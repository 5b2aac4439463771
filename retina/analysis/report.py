"""Everything that the report of an evaluation says, as numbers: what page.py draws and tables.py writes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from retina.analysis.accumulate import accumulate
from retina.analysis.calibration import Calibration, calibrate
from retina.analysis.errors import Errors, LostAP, find_errors, lost_ap
from retina.analysis.intervals import bootstrap_weights, interval, resample
from retina.analysis.matches import Floats, Ints, Matches
from retina.analysis.recall import Breakdown, break_down_recall
from retina.analysis.results_file import Results
from retina.analysis.scoring import describe_disagreement, list_differences
from retina.analysis.thresholds import (
    ScoreCurve,
    Threshold,
    best_threshold,
    confusion_matrix,
    count_by_image,
    counted,
    score_curve,
)
from retina.config import COCO_METRICS
from retina.data.annotations import Annotations


class Report(NamedTuple):
    """The numbers of a report. K classes, R recalls, B images; AP, precision and the like from 0 to 1.

    NaN and None stand for what cannot be measured, because there are no objects or no right detections.
    """

    annotations: Annotations
    results: Results
    matches: Matches
    metrics: dict[str, float | None]  # the twelve COCO numbers, by pycocotools
    disagreement: str  # an error message if our own matching gives other numbers, else ""
    metrics_interval: Floats  # (2, 12) 95 % intervals
    ap_K: Floats
    ap_interval: Floats  # (2, K)
    precision_RK: Floats  # at IoU 0.5
    errors: Errors
    lost: LostAP
    curve: ScoreCurve  # of all classes together
    class_curves: list[ScoreCurve]
    threshold: Threshold | None
    class_thresholds: list[Threshold | None]
    score: float  # of `threshold`, or 0: the detections that are kept below
    confusion: Ints  # (K + 1, K + 1)
    recall: list[Breakdown]
    objects_B: Ints
    detections_B: Ints
    calibration: Calibration | None  # None if no detection counts, or scores are not between 0 and 1
    milliseconds: float | None  # for an image

    @property
    def names(self) -> list[str]:
        """Of the K classes."""
        return self.matches.names


def analyze(
    annotations: Annotations,
    results: Results,
    matches: Matches,
    metrics: dict[str, Any],
    milliseconds: float | None = None,
) -> Report:
    """Compute the numbers of a report.

    Args:
        annotations: the objects.
        results: the detections.
        matches: of both; images that are not among them do not count.
        metrics: of an `Evaluation` of both by pycocotools.
        milliseconds: for an image.

    Raises:
        DataError: no image counts.
    """
    accumulated = accumulate(matches)
    bounds = interval(resample(matches, bootstrap_weights(len(matches.image_ids))))
    own = {**accumulated.metrics, "per_class": accumulated.per_class}
    different = list_differences(metrics, "pycocotools", own, "the matching of this report")
    errors = find_errors(annotations, results, np.setdiff1d(annotations.image_ids, matches.image_ids))
    curve, class_curves = score_curve(matches), [score_curve(matches, k) for k in range(len(annotations.names))]
    threshold = best_threshold(curve)
    score = threshold.score if threshold else 0.0
    is_probability = bool(((results.scores >= 0) & (results.scores <= 1)).all())
    precision = accumulated.precision[..., 0]
    precision = np.where(precision < 0, np.nan, precision)  # (T, R, K)
    return Report(
        annotations,
        results,
        matches,
        {name: metrics[name] for name in COCO_METRICS},
        describe_disagreement(different, "The report may be wrong; metrics.json has the numbers of pycocotools."),
        bounds[:, : len(COCO_METRICS)],
        np.array([np.nan if ap is None else ap for ap in metrics["per_class"].values()]),
        bounds[:, len(COCO_METRICS) :],
        precision[0],
        errors,
        lost_ap(errors),
        curve,
        class_curves,
        threshold,
        [best_threshold(one) for one in class_curves],
        score,
        confusion_matrix(matches, annotations, results, score),
        break_down_recall(matches, annotations, score),
        *count_by_image(matches, score),
        calibrate(matches, score) if is_probability and counted(matches).any() else None,
        milliseconds,
    )
