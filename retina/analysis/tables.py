"""The numbers of a report as tables: one list of rows for each table and each picture, for JSON and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from retina.analysis.accumulate import RECALLS
from retina.analysis.calibration import BINS, Calibration, Reliability, Temperature
from retina.analysis.errors import KINDS
from retina.analysis.gallery import Example
from retina.analysis.report import Report
from retina.analysis.thresholds import ScoreCurve, Threshold

ALL = "all"  # the name of all classes together
HALF, SCALED = "second half", "second half with temperature"  # detections of which the calibration is measured
MAX_POINTS = 200  # of a curve
MAX_ROWS = 200  # classes in a table of a page

Row = dict[str, Any]

TABLE_TEXTS = {
    "evaluation": "images, also those that could not be read and do not count; objects, detections, milliseconds",
    "coco": "the twelve COCO numbers with their intervals",
    "classes": "each class: images, objects, detections, AP with its interval, AP50",
    "lost_ap": "AP50 that each kind of error costs, and the number of errors, by class",
    "precision_recall": "precision at 101 recalls, IoU 0.5, by class",
    "scores": "precision, recall and F1 over the score, by class",
    "thresholds": "the threshold with the best F1, by class",
    "confusion": "the confusion matrix at the recommended threshold; pairs that do not occur are left out",
    "recall": "recall by size, shape and neighbors, with its interval",
    "images": "objects and kept detections of each image",
    "calibration": "score and precision in 20 bins",
    "calibration_summary": "D-ECE, mean score and precision, and what the temperature does",
    "gallery": "the errors that are drawn, with their boxes (x, y, width, height in pixels)",
}


def make_tables(report: Report, gallery: dict[str, list[Example]]) -> dict[str, list[Row]]:
    """The rows of each table by its name. Values are text, numbers and None."""
    tables = {
        "evaluation": [_evaluation(report)],
        "coco": _coco(report),
        "classes": _classes(report),
        "lost_ap": _lost_ap(report),
        "precision_recall": _precision_recall(report),
        "scores": [
            row for name, curve, _ in _curves_and_thresholds(report) for row in _curve_rows(name, curve)
        ],
        "thresholds": [
            {"class": name, **dict.fromkeys(Threshold._fields), **(threshold._asdict() if threshold else {})}
            for name, _, threshold in _curves_and_thresholds(report)
        ],
        "confusion": _confusion(report),
        "recall": _recall(report),
        "images": _images(report),
        "calibration": _calibration(report),
        "calibration_summary": _calibration_summary(report),
        "gallery": [example.row(report) for examples in gallery.values() for example in examples],
    }  # fmt: skip
    return {name: [{key: _plain(value) for key, value in row.items()} for row in rows] for name, rows in tables.items()}


def to_csv(rows: list[Row]) -> str:
    """CSV with a header; the columns are the keys of all rows."""
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _plain(value: Any) -> Any:
    """A value of Python; None for NaN."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _evaluation(report: Report) -> Row:
    counted = len(report.matches.image_ids)
    return {
        "images": counted,
        "excluded_images": len(report.annotations.image_ids) - counted,
        "objects": report.errors.objects.sum(),
        "detections": len(report.results.scores),
        "AP50_of_TIDE": report.lost.mean_ap,
        "milliseconds": report.milliseconds,
        "images_per_second": 1000 / report.milliseconds if report.milliseconds else None,
    }


def _coco(report: Report) -> list[Row]:
    low, high = report.metrics_interval
    return [
        {"metric": name, "value": value, "low": low[i], "high": high[i]}
        for i, (name, value) in enumerate(report.metrics.items())
    ]


def _classes(report: Report) -> list[Row]:
    matches, (low, high) = report.matches, report.ap_interval
    counted = ~matches.object_ignored[0]
    rows = []
    for label, name in enumerate(report.names):
        images = np.unique(matches.object_images[counted & (matches.object_labels == label)])
        rows.append(
            {
                "class": name,
                "images": len(images),
                "objects": report.errors.objects[label],
                "detections": int((matches.labels == label).sum()),
                "AP": report.ap_K[label],
                "low": low[label],
                "high": high[label],
                "AP50": report.precision_RK[:, label].mean(),
            }
        )
    return rows


def _lost_ap(report: Report) -> list[Row]:
    errors, lost = report.errors, report.lost
    rows = []
    for kind, kind_name in enumerate(KINDS):
        counts = errors.count_kind(kind)
        rows.append({"kind": kind_name, "class": ALL, "lost_AP50": lost.lost[kind], "errors": counts.sum()})
        rows += [
            {"kind": kind_name, "class": name, "lost_AP50": lost.by_class[kind, label], "errors": counts[label]}
            for label, name in enumerate(report.names)
        ]
    return rows


def _precision_recall(report: Report) -> list[Row]:
    return [
        {"class": name, "recall": recall, "precision": report.precision_RK[i, label]}
        for label, name in enumerate(report.names)
        for i, recall in enumerate(RECALLS)
        if report.errors.objects[label]
    ]


def _curves_and_thresholds(report: Report) -> Iterator[tuple[str, ScoreCurve, Threshold | None]]:
    yield ALL, report.curve, report.threshold
    yield from zip(report.names, report.class_curves, report.class_thresholds, strict=True)


def _curve_rows(name: str, curve: ScoreCurve) -> Iterator[Row]:
    """At most MAX_POINTS of the points of a curve."""
    for i in thinned(len(curve.scores)):
        yield {
            "class": name,
            "score": curve.scores[i],
            "precision": curve.precision[i],
            "recall": curve.recall[i],
            "F1": curve.f1[i],
        }


def thinned(count: int) -> list[int]:
    """Evenly spaced positions, all of them where there are few."""
    return np.unique(np.linspace(0, count - 1, min(count, MAX_POINTS)).round().astype(int)).tolist() if count else []


def _confusion(report: Report) -> list[Row]:
    names = [*report.names, "background"]
    true, predicted = np.nonzero(report.confusion)
    return [
        {"object": names[i], "detected": names[j], "count": report.confusion[i, j]}
        for i, j in zip(true, predicted, strict=True)
    ]


def _recall(report: Report) -> list[Row]:
    rows = []
    for part in report.recall:
        low, high = part.interval()
        rows += [
            {"property": part.title, "range": name, "objects": part.objects[i], "found": part.found[i],
             "found_at_any_score": part.found_at_all[i], "low": low[i], "high": high[i]}
            for i, name in enumerate(part.names)
        ]  # fmt: skip
    return rows


def _images(report: Report) -> list[Row]:
    names = dict(
        zip(report.annotations.image_ids.tolist(), report.annotations.file_names.tolist(), strict=True)
    )  # fmt: skip
    return [
        {"image_id": image_id, "file": names[image_id], "objects": objects, "detections": detections}
        for image_id, objects, detections in zip(
            report.matches.image_ids.tolist(), report.objects_B.tolist(), report.detections_B.tolist(), strict=True
        )
    ]


def _reliabilities(calibration: Calibration | None) -> dict[str, Reliability]:
    if calibration is None:
        return {}
    parts = {"all": calibration.all, "kept": calibration.kept}
    if isinstance(temperature := calibration.temperature, Temperature):
        parts |= {HALF: temperature.before, SCALED: temperature.after}
    return parts


def _calibration_summary(report: Report) -> list[Row]:
    rows = {
        name: {
            "detections": name,
            "count": part.counts.sum(),
            "D_ECE": part.d_ece,
            "mean_score": part.mean(part.scores),
            "precision": part.mean(part.precision),
        }
        for name, part in _reliabilities(report.calibration).items()
    }
    if report.calibration and isinstance(found := report.calibration.temperature, Temperature):
        rows[HALF] |= {"log_loss": found.log_loss_before, "images": found.tested_images}
        rows[SCALED] |= {"log_loss": found.log_loss_after, "images": found.tested_images, "temperature": found.value}
        rows[SCALED] |= {"fitted_images": found.fitted_images}
    return list(rows.values())


def _calibration(report: Report) -> list[Row]:
    return [
        {
            "detections": name,
            "from": i / BINS,
            "to": (i + 1) / BINS,
            "count": part.counts[i],
            "mean_score": part.scores[i],
            "precision": part.precision[i],
        }
        for name, part in _reliabilities(report.calibration).items()
        for i in range(BINS)
    ]
