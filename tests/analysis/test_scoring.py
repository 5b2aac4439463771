"""The quick scorer gives the numbers of pycocotools in every digit, and a difference is reported."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from coco_cases import Case, coco_cases, evaluate_with_pycocotools, write_annotations
from hypothesis import given, settings

from retina.analysis import scoring
from retina.analysis.results_file import results_columns
from retina.config import COCO_METRICS

BOX = [10.0, 10.0, 20.0, 20.0]


@settings(max_examples=40, deadline=None)
@given(coco_cases())
def test_the_quick_scorer_agrees_with_pycocotools(case: Case) -> None:
    truth, results = case
    with tempfile.TemporaryDirectory() as folder:
        annotations = write_annotations(truth, Path(folder))
    columns = results_columns(results, annotations)
    quick = scoring.score(annotations, columns)
    theirs = evaluate_with_pycocotools(truth, results)
    numbers = [quick.metrics[name] for name in COCO_METRICS]
    assert [-1 if number is None else number for number in numbers] == theirs.stats.tolist()
    first = int(annotations.image_ids[0])
    for excluded in ([], [first]):
        quick = scoring.score(annotations, columns, excluded)
        final, message = scoring.confirm(quick, annotations, columns, excluded)
        assert final == quick and message == ""


def test_ids_may_be_negative_and_all_images_excluded(tmp_path: Path) -> None:
    truth = {
        "images": [{"id": i, "file_name": "a.jpg", "width": 90, "height": 90} for i in (-7, 3)],
        "annotations": [{"id": -1, "image_id": -7, "category_id": -2, "bbox": BOX, "area": 400.0, "iscrowd": 0}],
        "categories": [{"id": -2, "name": "a"}],
    }
    annotations = write_annotations(truth, tmp_path)
    columns = results_columns([{"image_id": -7, "category_id": -2, "bbox": BOX, "score": 0.5}], annotations)
    assert scoring.score(annotations, columns).metrics["per_class"]["a"] == pytest.approx(1)
    nothing = scoring.score(annotations, columns, [-7, 3])
    assert all(nothing.metrics[name] is None for name in COCO_METRICS)
    assert scoring.confirm(nothing, annotations, columns, [-7, 3])[1] == ""


def test_a_difference_cannot_be_overlooked(tmp_path: Path) -> None:
    truth = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 90, "height": 90}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": BOX, "area": 400.0, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "cell"}],
    }
    annotations = write_annotations(truth, tmp_path)
    columns = results_columns([{"image_id": 1, "category_id": 1, "bbox": BOX, "score": 0.5}], annotations)
    right = scoring.score(annotations, columns)
    last_digit = float(np.nextafter(right.metrics["AP"], 0))
    wrong = right._replace(metrics=right.metrics | {"AP": last_digit, "per_class": {"cell": 0.5}})
    final, message = scoring.confirm(wrong, annotations, columns)
    assert final == right, "pycocotools has the last word"
    assert message.startswith("TWO SCORERS DISAGREE. The numbers of pycocotools are kept.")
    ap = right.metrics["AP"]
    assert f"AP is {ap!r} by pycocotools and {last_digit!r} by hotcoco" in message
    assert f"the AP of cell is {ap!r} by pycocotools and 0.5 by hotcoco" in message and "AP50" not in message
