"""The twelve COCO numbers and the AP of each class: quickly by hotcoco, and by pycocotools, which has the last word.

hotcoco gives the numbers of pycocotools in every digit, 49 times as fast (docs/results/scoring.md). So it scores the
evaluations during a training. The last one of a run and tools/eval.py also ask pycocotools and compare: `confirm`.
Metrics are floats between 0 and 1, None where the data set has no objects to measure.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable
from typing import Any, NamedTuple

import hotcoco
import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retina.analysis.results_file import Results
from retina.config import COCO_METRICS
from retina.data.annotations import Annotations


class Evaluation(NamedTuple):
    """The COCO numbers of a set of detections.

    `metrics`: the numbers of COCO_METRICS by name, and `per_class`, a dict from class name to AP. `precision`: by class
    name, the precision at IoU 0.5 over the recalls 0, 0.01, ..., 1, for plots.
    """

    metrics: dict[str, Any]
    precision: dict[str, list[float]]


def score(annotations: Annotations, results: Results, exclude: Iterable[int] = ()) -> Evaluation:
    """The COCO numbers of `results` by hotcoco; crowd regions count as COCO defines.

    `exclude`: ids of images that are not counted, for example because they could not be read.
    """
    # Positions in the order of the ids, from 1, in place of the ids: hotcoco refuses negative ones.
    kept = np.setdiff1d(annotations.image_ids, np.fromiter(exclude, np.int64))
    number = np.where(np.isin(annotations.image_ids, kept), np.searchsorted(kept, annotations.image_ids) + 1, 0)
    objects, detections = number[annotations.images] > 0, number[results.images] > 0
    truth = hotcoco.COCO.from_arrays(
        [{"id": i, "width": 1, "height": 1, "file_name": ""} for i in range(1, len(kept) + 1)],
        [{"id": label, "name": name} for label, name in enumerate(annotations.distinct_names, 1)],
        number[annotations.images[objects]],
        annotations.labels[objects] + np.int64(1),
        annotations.boxes[objects],
        area=annotations.areas[objects],
        iscrowd=annotations.crowd[objects].astype(np.int64),
    )
    columns = [number[results.images], results.boxes, results.scores, results.labels + 1]
    evaluation = hotcoco.COCOeval(truth, truth.load_res(np.column_stack(columns)[detections]), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summary_lines()  # computes `stats`
    return _evaluation(np.asarray(evaluation.stats), (evaluation.eval or {})["precision"], annotations.distinct_names)


def score_with_pycocotools(annotations: Annotations, results: Results, exclude: Iterable[int] = ()) -> Evaluation:
    """The same by pycocotools, whose numbers are published. About a minute for COCO's val2017."""
    truth, found = COCO(), COCO()
    truth.dataset = _ground_truth(annotations)
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        if len(results.scores):
            found = truth.loadRes(_entries(annotations, results))
        else:  # loadRes cannot take an empty list
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.imgIds = sorted(set(annotations.image_ids.tolist()) - set(exclude))
        evaluation.params.catIds = annotations.category_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return _evaluation(evaluation.stats, evaluation.eval["precision"], annotations.distinct_names)


def confirm(
    quick: Evaluation, annotations: Annotations, results: Results, exclude: Iterable[int] = ()
) -> tuple[Evaluation, str]:
    """The evaluation by pycocotools, and an error message if `quick` differs from it in any digit, else ""."""
    final = score_with_pycocotools(annotations, results, exclude)
    different = list_differences(final.metrics, "pycocotools", quick.metrics, "hotcoco")
    if final.precision != quick.precision:
        different.append("the precision over the recalls")
    kept = (
        "The numbers of pycocotools are kept. Those of earlier evaluations of this run are by hotcoco "
        f"{hotcoco.__version__} and may be wrong."
    )
    return final, describe_disagreement(different, kept)


def list_differences(one: dict[str, Any], by_one: str, two: dict[str, Any], by_two: str) -> list[str]:
    """Which of the COCO numbers, and of the AP of the classes, two programs differ in, in any digit."""
    pairs = [(name, one[name], two[name]) for name in COCO_METRICS]
    pairs += [(f"the AP of {name}", ap, two["per_class"][name]) for name, ap in one["per_class"].items()]
    return [f"{name} is {a!r} by {by_one} and {b!r} by {by_two}" for name, a, b in pairs if a != b]


def describe_disagreement(different: list[str], kept: str) -> str:
    """An error message; "" if nothing is different. `kept`: a sentence on what the numbers are that are shown."""
    if not different:
        return ""
    listed = "\n  ".join([*different[:10], *(["..."] if len(different) > 10 else [])])
    return f"TWO SCORERS DISAGREE. {kept} Please report it, with detections.json and the annotations.\n  {listed}"


def _evaluation(stats: NDArray[np.float64], precision_TRKAM: NDArray[np.float64], names: list[str]) -> Evaluation:
    """`precision_TRKAM`: IoU thresholds, recalls, classes, areas, max detections."""
    numbers = [None if value < 0 else float(value) for value in stats]
    per_class: dict[str, float | None] = {}
    curves: dict[str, list[float]] = {}
    for label, name in enumerate(names):
        class_precision = precision_TRKAM[:, :, label, 0, -1]
        has_objects = bool((class_precision > -1).any())
        per_class[name] = float(np.mean(class_precision[class_precision > -1])) if has_objects else None
        if has_objects:
            curves[name] = [float(value) for value in precision_TRKAM[0, :, label, 0, -1]]
    return Evaluation({**dict(zip(COCO_METRICS, numbers, strict=True)), "per_class": per_class}, curves)


def _ground_truth(file: Annotations) -> dict[str, Any]:
    """The contents of the annotation file as pycocotools takes them."""
    entries = zip(file.images, file.labels, file.boxes.tolist(), file.areas.tolist(), file.crowd, strict=True)
    annotations = [
        {
            "id": number,  # not the file's: pycocotools treats a match with id 0 as no match, and some files have it
            "image_id": int(file.image_ids[image]),
            "category_id": file.category_ids[label],
            "bbox": box,
            "area": area,
            "iscrowd": int(crowd),
        }
        for number, (image, label, box, area, crowd) in enumerate(entries, 1)
    ]
    return {
        "info": {},
        "images": [{"id": image_id} for image_id in file.image_ids.tolist()],
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in zip(file.category_ids, file.names, strict=True)],
    }


def _entries(annotations: Annotations, results: Results) -> list[dict[str, Any]]:
    """The detections as COCO results."""
    image_ids, category_ids = annotations.image_ids[results.images], np.array(annotations.category_ids)[results.labels]
    columns = (image_ids.tolist(), category_ids.tolist(), results.boxes.tolist(), results.scores.tolist())
    return [
        {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
        for image_id, category_id, box, score in zip(*columns, strict=True)
    ]
