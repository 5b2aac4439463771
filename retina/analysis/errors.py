"""Where the AP is lost: the six kinds of errors of TIDE (Bolya et al., "TIDE: A General Toolbox for Identifying Object
Detection Errors", ECCV 2020, arXiv:2008.08115).

At IoU 0.5 every detection that is wrong gets one kind, the first that applies (section 2.2 of the paper):

    location     an object of its class has an IoU of 0.1 to 0.5 with it
    class        an object of another class has an IoU of at least 0.5
    duplicate    an object of its class has an IoU of at least 0.5, but a detection with a higher score has it
    background   no object has an IoU of more than 0.1
    both         what remains: another class, and an IoU of 0.1 to 0.5

and an object is `missed` if no detection is matched to it and no class or location error is about it.

What a kind costs is the AP50 that would be gained if only this kind were corrected (section 2.3). A class or location
error is moved to the object that it is about, if that has no match and no such error with a higher score; otherwise it
is removed, as all duplicate, background and both errors are. Missed objects are taken out of the ground truth. The
gains do not add up to 1 - AP50: errors hide each other.

Legend: D detections, M objects (crowd regions are among them), K classes, E kinds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from pycocotools import mask

from retina.analysis.accumulate import RECALLS
from retina.analysis.matches import Bools, Floats, Ints, outside_ranges
from retina.analysis.results_file import Results
from retina.data.annotations import Annotations

KINDS = ("class", "location", "both", "duplicate", "background", "missed")
CLASS, LOCATION, BOTH, DUPLICATE, BACKGROUND, MISSED = range(len(KINDS))
RIGHT = -1  # instead of a kind
FOREGROUND_IOU, BACKGROUND_IOU = 0.5, 0.1
MAX_DETECTIONS = 100  # of an image, those with the highest scores, as in TIDE


class Errors(NamedTuple):
    """What is wrong with each detection and each object.

    Detections are sorted by image id, then by score from high to low. The rows are positions in the results and in the
    annotations.
    """

    rows: Ints  # (D,)
    kinds: Ints  # (D,) index in KINDS, or RIGHT
    targets: Ints  # (D,) row of the object that a class, location or duplicate error is about, or that was found; or -1
    labels: Ints  # (D,) class of the detection
    target_labels: Ints  # (D,) class of the target; that of the detection where it has none
    scores: Floats  # (D,)
    ious: Floats  # (D,) with the target; without one, the largest with any object
    ignored: Bools  # (D,) wrong, but in a crowd region of its class, so that it does not count
    moved: Bools  # (D,) correcting the error gives the target a match
    missed: Ints  # rows of the missed objects
    objects: Ints  # (K,) number of objects that COCO counts: without crowd regions
    missed_objects: Ints  # (K,) how many of them are missed

    def count_kind(self, kind: int) -> Ints:
        """(K,) number of errors of a kind by class; class errors by the class of the object, as its gain in AP."""
        if kind == MISSED:
            return self.missed_objects
        return np.bincount(self.target_labels[(self.kinds == kind) & ~self.ignored], minlength=len(self.objects))


class LostAP(NamedTuple):
    """AP50, and what each kind of error costs, from 0 to 1. NaN for classes without objects."""

    ap: Floats  # (K,)
    mean_ap: float  # over the classes with objects
    by_class: Floats  # (E, K) AP50 gained if the errors of a kind were corrected; may be below 0
    lost: Floats  # (E,) gain of the mean, at least 0


def find_errors(annotations: Annotations, results: Results, exclude: Iterable[int] = ()) -> Errors:
    """Give every detection and every object its kind. `exclude`: ids of images that do not count."""
    num_images = len(annotations.image_ids)
    counted = ~np.isin(annotations.image_ids, np.fromiter(exclude, np.int64))
    ignored = annotations.crowd | outside_ranges(annotations.areas)[0]  # as COCO does
    object_rows = np.flatnonzero(counted[annotations.images] & ~ignored)
    crowd_rows = np.flatnonzero(counted[annotations.images] & ignored)
    place = np.argsort(np.argsort(annotations.image_ids, kind="stable"))  # COCO orders equal scores by the image id
    rows = np.lexsort((-results.scores, place[results.images]))
    rows = rows[counted[results.images[rows]]]
    images = np.arange(num_images)
    detection_parts = _parts(rows, place[results.images[rows]], images)
    object_parts = _parts(object_rows, place[annotations.images[object_rows]], images)
    crowd_parts = _parts(crowd_rows, place[annotations.images[crowd_rows]], images)
    parts = [
        _errors_of_image(annotations, results, detections[:MAX_DETECTIONS], objects, crowds)
        for detections, objects, crowds in zip(detection_parts, object_parts, crowd_parts, strict=True)
    ]
    kinds, targets, ious, ignored, moved, missed = (np.concatenate(part) for part in zip(*parts, strict=True))
    rows = np.concatenate([detections[:MAX_DETECTIONS] for detections in detection_parts])
    labels = results.labels[rows]
    num_classes = len(annotations.names)
    return Errors(
        rows,
        kinds,
        targets,
        labels,
        np.where(targets >= 0, annotations.labels[targets] if len(annotations.labels) else labels, labels),
        results.scores[rows],
        ious,
        ignored,
        moved,
        missed,
        np.bincount(annotations.labels[object_rows], minlength=num_classes),
        np.bincount(annotations.labels[missed], minlength=num_classes),
    )


def _parts(rows: Ints, images: Ints, all_images: Ints) -> list[Ints]:
    """The rows of each image; `images` (of the rows) may be in any order, rows of an image keep theirs."""
    order = np.argsort(images, kind="stable")
    return np.split(rows[order], np.searchsorted(images[order], all_images[1:]))


def _errors_of_image(
    annotations: Annotations, results: Results, detections: Ints, objects: Ints, crowds: Ints
) -> tuple[Ints, Ints, Floats, Bools, Bools, Ints]:
    """Kinds, targets, IoUs, ignored and moved of the detections, and the missed objects, for one image.

    `detections`, `objects`, `crowds`: their rows; the detections from high to low score.
    """
    num_detections, labels = len(detections), results.labels[detections]
    if not num_detections or not len(objects):
        kinds = np.full(num_detections, BACKGROUND)
        ignored = _in_crowd(annotations, results, detections, crowds)
        nothing = np.zeros(num_detections, np.bool_)
        return kinds, np.full(num_detections, -1), np.zeros(num_detections), ignored, nothing, objects
    iou_DM = mask.iou(results.boxes[detections], annotations.boxes[objects], [0] * len(objects))
    same_DM = labels[:, None] == annotations.labels[objects]
    matched = _match(iou_DM * same_DM)
    right = matched >= 0
    taken = np.zeros(len(objects), np.bool_)
    taken[matched[right]] = True

    best = {}  # kind: (IoU, object)
    for kind, candidates in ((LOCATION, same_DM), (CLASS, ~same_DM), (DUPLICATE, same_DM & taken), (BOTH, True)):
        iou = iou_DM * candidates
        best[kind] = iou.max(axis=1), iou.argmax(axis=1)
    conditions = {
        RIGHT: right,
        LOCATION: (best[LOCATION][0] >= BACKGROUND_IOU) & (best[LOCATION][0] <= FOREGROUND_IOU),
        CLASS: best[CLASS][0] >= FOREGROUND_IOU,
        DUPLICATE: best[DUPLICATE][0] >= FOREGROUND_IOU,
        BACKGROUND: best[BOTH][0] <= BACKGROUND_IOU,
    }
    kinds = np.select(list(conditions.values()), list(conditions), default=BOTH)
    about = np.select([right, *(kinds == kind for kind in (LOCATION, CLASS, DUPLICATE))],
                      [matched, *(best[kind][1] for kind in (LOCATION, CLASS, DUPLICATE))], default=-1)  # fmt: skip
    ious = np.where(about >= 0, iou_DM[np.arange(num_detections), about], best[BOTH][0])

    movable = np.flatnonzero(((kinds == CLASS) | (kinds == LOCATION)) & ~taken[about])
    first_objects, first = np.unique(about[movable], return_index=True)  # the error with the highest score
    moved = np.zeros(num_detections, np.bool_)
    moved[movable[first]] = True
    missed = ~taken
    missed[first_objects] = False
    ignored = _in_crowd(annotations, results, detections, crowds) & ~right
    return kinds, np.where(about >= 0, objects[about], -1), ious, ignored, moved, objects[missed]


def _match(iou_DM: Floats) -> Ints:
    """(D,) the object of each detection, or -1: from the highest score on, the free one with the highest IoU."""
    matched = np.full(len(iou_DM), -1)
    free = iou_DM.copy()
    for detection in np.flatnonzero(iou_DM.max(axis=1) >= FOREGROUND_IOU):
        best = free[detection].argmax()
        if free[detection, best] >= FOREGROUND_IOU:
            matched[detection] = best
            free[:, best] = 0
    return matched


def _in_crowd(annotations: Annotations, results: Results, detections: Ints, crowds: Ints) -> Bools:
    """(D,) whether more than half of a detection is in a crowd region of its class."""
    if not len(detections) or not len(crowds):
        return np.zeros(len(detections), np.bool_)
    inside = mask.iou(results.boxes[detections], annotations.boxes[crowds], [1] * len(crowds))
    same = results.labels[detections][:, None] == annotations.labels[crowds]
    in_crowd: Bools = ((inside > FOREGROUND_IOU) & same).any(axis=1)
    return in_crowd


def lost_ap(errors: Errors) -> LostAP:
    """AP50, and the AP50 that correcting each kind of error would gain.

    A class of which all objects are missed, without any detection, does not count in the mean once missed objects are
    corrected, because nothing is left of it. This is as in the published tool. In `by_class` it then has an AP of 1.
    """
    counted, right = ~errors.ignored, errors.kinds == RIGHT
    has_objects = errors.objects > 0

    def ap_by_class(used: Bools, right: Bools, labels: Ints, objects: Ints) -> Floats:
        """(K,) NaN where there is neither an object nor a detection."""
        aps = np.full(len(objects), np.nan)
        for label in np.flatnonzero(has_objects):
            mine = used & (labels == label)
            if objects[label] or mine.any():
                aps[label] = average_precision(errors.scores[mine], right[mine], int(objects[label]))
        return aps

    ap = ap_by_class(counted, right, errors.labels, errors.objects)
    mean_ap = float(np.nanmean(ap)) if has_objects.any() else float("nan")
    by_class, lost = np.full((len(KINDS), len(ap)), np.nan), np.zeros(len(KINDS))
    for kind in range(len(KINDS)):
        fixed = errors.moved & (errors.kinds == kind)
        used = (counted & (errors.kinds != kind)) | fixed
        labels = np.where(fixed, errors.target_labels, errors.labels)
        objects = errors.objects - errors.missed_objects if kind == MISSED else errors.objects
        fixed_ap = ap_by_class(used, right | fixed, labels, objects)
        by_class[kind] = np.where(has_objects, np.nan_to_num(fixed_ap, nan=1) - ap, np.nan)
        lost[kind] = max(0.0, float(np.nanmean(fixed_ap)) - mean_ap) if not np.isnan(fixed_ap).all() else 0
    return LostAP(ap, mean_ap, by_class, lost)


def average_precision(scores: Floats, right: Bools, num_objects: int) -> float:
    """COCO's AP of one class: the mean over 101 recalls of the highest precision at this recall or a higher one.

    0 without objects.
    """
    if not num_objects or not len(scores):
        return 0.0
    true = np.cumsum(right[np.argsort(-scores, kind="stable")])
    precision = np.maximum.accumulate((true / np.arange(1, len(true) + 1))[::-1])[::-1]
    reached = np.searchsorted(true / num_objects, RECALLS)
    return float(np.append(precision, 0)[reached].mean())
