"""What the report says in words."""

from __future__ import annotations

import math

import numpy as np

from retina.analysis.calibration import Temperature
from retina.analysis.errors import KINDS, MAX_DETECTIONS, MISSED
from retina.analysis.report import Report
from retina.analysis.tables import HALF, SCALED, Row
from retina.analysis.thresholds import Threshold
from retina.plural import plural

METRIC_TEXTS = {
    "AP": "mean over IoU 0.5 to 0.95",
    "AP50": "at IoU 0.5",
    "AP75": "at IoU 0.75",
    "APs": "small objects, below 32 x 32 pixels",
    "APm": "medium objects",
    "APl": "large objects, above 96 x 96 pixels",
    "AR1": "recall with one detection for an image and class",
    "AR10": "recall with 10",
    "AR100": "recall with 100",
    "ARs": "recall with 100, small objects",
    "ARm": "medium objects",
    "ARl": "large objects",
}

# What an error of a kind is, and what helps.
KIND_TEXTS = {
    "class": (
        "the box is right, the class is wrong",
        "more training examples of the classes that are confused; check that their labels agree",
    ),
    "location": (
        "the class is right, the IoU is 0.1 to 0.5",
        "loss.box=giou or a higher loss.box_weight, larger images (data.short_side), boxes drawn by one rule",
    ),
    "both": ("the class is wrong, and the IoU is 0.1 to 0.5", "what helps against wrong classes and wrong boxes"),
    "duplicate": ("a second detection of an object", "a lower detect.nms_iou"),
    "background": (
        "no object is there",
        "look at the pictures below: are these objects that nobody labeled? If not: more images of what is confused "
        "with objects, also without objects; a higher threshold",
    ),
    "missed": (
        "no detection is about the object",
        "tools/check_data.py says whether the anchors fit; larger images, more training examples like those below",
    ),
}

KIND_NAMES = {
    "class": "wrong classes",
    "location": "wrong boxes (location)",
    "both": "detections with a wrong class and a wrong box",
    "duplicate": "duplicates",
    "background": "detections of nothing (background)",
    "missed": "missed objects",
}

GALLERY_TEXTS = {
    "background": "no object with an IoU of 0.5, of any class",
    "missed": "the largest first",
    "class": "the box fits an object of another class",
    "location": "IoU of 0.1 to 0.5 with an object of the class",
    "duplicate": "the object has a detection with a higher score",
}


def summary(report: Report) -> list[str]:
    """What the numbers say, in two or three sentences: how good, how sure, where the AP is lost, the threshold."""
    num_images, ap = len(report.matches.image_ids), report.metrics["AP"]
    objects = int(report.errors.objects.sum())
    if ap is None:
        return [f"There are no objects in the {plural(num_images, 'image')}, so there is no AP."]
    low, high = 100 * report.metrics_interval[:, 0]
    sure = (
        "These images do not show how far it may be from the AP on all images of this kind."
        if math.isnan(low)
        else f"The AP on all images of this kind is between {low:.1f} and {high:.1f} (95 % interval)."
    )
    sentences = [f"AP is {100 * ap:.1f} on {plural(num_images, 'image')} with {plural(objects, 'object')}. {sure}"]
    sentences += _lost_sentence(report)
    if (best := report.threshold) is not None:
        sentences.append(
            f"Keep detections with a score of at least {best.score!r}: then {100 * best.precision:.0f} % of the "
            f"detections are right and {100 * best.recall:.0f} % of the objects are found (F1 {best.f1:.2f}, at IoU "
            f"0.5; from {best.low:.2f} to {best.high:.2f} it is nearly as good)."
        )
    else:
        sentences.append("No detection is right at IoU 0.5, so there is no threshold to recommend.")
    return sentences


def _lost_sentence(report: Report) -> list[str]:
    lost, by_class = report.lost.lost, report.lost.by_class
    first, second = np.argsort(-lost, kind="stable")[:2].tolist()
    if lost[first] <= 0:
        return []
    count = int(report.errors.count_kind(first).sum())
    these = "this error" if count == 1 else f"these {count:,} errors"
    text = (
        f"Most AP is lost to {KIND_NAMES[KINDS[first]]}: without {these} AP50 would be "
        f"{100 * lost[first]:.1f} points higher than {100 * report.lost.mean_ap:.1f}"
    )
    measured = np.flatnonzero(~np.isnan(by_class[first]))
    if len(measured) > 1:
        worst = int(measured[by_class[first, measured].argmax()])
        number = int(report.errors.count_kind(first)[worst])
        what = (
            f"{number:,} of {plural(int(report.errors.objects[worst]), 'object')}"
            if first == MISSED
            else plural(number, "error")
        )
        text += f", most of all for {report.names[worst]} ({what}; {100 * by_class[first, worst]:.1f} points)"
    if lost[second] > 0:
        text += f". Next are {KIND_NAMES[KINDS[second]]} with {100 * lost[second]:.1f} points"
    return [f"{text}."]


def other_ap50(report: Report) -> list[str]:
    """A sentence if the AP50 of TIDE is not COCO's."""
    here, above = report.lost.mean_ap, report.metrics["AP50"]
    if above is None or f"{100 * here:.2f}" == f"{100 * above:.2f}":
        return []
    text = f"AP50 is {100 * here:.2f} here and {100 * above:.2f} above"
    if np.bincount(report.results.images).max(initial=0) > MAX_DETECTIONS:
        text += (
            f": of each image TIDE takes the {MAX_DETECTIONS} detections with the highest scores, and COCO "
            f"{MAX_DETECTIONS} of each class"
        )
    return [f"{text}."]


def calibration_sentences(summary: list[Row], threshold: Threshold | None, temperature: Temperature | str) -> list[str]:
    """What the calibration says. `summary`: the table; `temperature`: why there is none, or one."""
    rows = {row["detections"]: row for row in summary}
    kept = rows["kept"]
    sentences = [f"D-ECE is {rows['all']['D_ECE']:.3f} over {plural(rows['all']['count'], 'detection')}."]
    if threshold is not None:  # which keeps a right detection at least
        gap = kept["mean_score"] - kept["precision"]
        sentences[0] = sentences[0].rstrip(".") + (
            f", and {kept['D_ECE']:.3f} over the {kept['count']:,} kept at the recommended threshold. The mean "
            f"score of these is {abs(gap):.3f} {'above' if gap > 0 else 'below'} their precision."
        )
    if isinstance(temperature, str):
        return [*sentences, f"No temperature was fitted: {temperature}."]
    before, after = rows[HALF], rows[SCALED]
    return [
        *sentences,
        f"A temperature of {after['temperature']:.2f}, fitted on {after['fitted_images']} images, changes D-ECE on the "
        f"other {after['images']} from {before['D_ECE']:.3f} to {after['D_ECE']:.3f}, and the log loss from "
        f"{before['log_loss']:.3f} to {after['log_loss']:.3f}. To use it, divide the logits of the scores by it.",
    ]


def percent(value: float | None) -> str:
    """In percent with one decimal; "-" for what was not measured."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def span(low: float | None, high: float | None) -> str:
    """An interval in percent; "-" without one."""
    return "-" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}"
