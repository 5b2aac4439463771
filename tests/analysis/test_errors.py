"""The error kinds of TIDE compared with the published tool (make_tide_cases.py), and by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rows import columns

from retina.analysis.accumulate import accumulate
from retina.analysis.errors import (
    BACKGROUND,
    BOTH,
    CLASS,
    DUPLICATE,
    KINDS,
    LOCATION,
    MISSED,
    RIGHT,
    find_errors,
    lost_ap,
)
from retina.analysis.matches import match_detections
from retina.analysis.results_file import Results
from retina.analysis.scoring import score
from retina.data.annotations import Annotations

CASES = json.loads(Path(__file__).with_name("tide_cases.json").read_text())


def case_columns(case: dict[str, Any]) -> tuple[Annotations, Results]:
    return columns(case["num_images"], case["num_classes"], case["objects"], case["detections"])


def test_equal_scores_are_in_the_order_of_the_image_ids() -> None:
    """As for COCO: the right detection is of the image with the lower id, which comes second in the file."""
    annotations, results = columns(
        2, 1, [[1, 0, 50, 50, 80, 80, 0]], [[0, 0, 9, 9, 9, 9, 0.5], [1, 0, 50, 50, 80, 80, 0.5]]
    )
    annotations = annotations._replace(image_ids=np.array([2, 1]))
    assert lost_ap(find_errors(annotations, results)).mean_ap == pytest.approx(1, rel=1e-12)
    assert score(annotations, results).metrics["AP50"] == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_equal_to_the_published_tool(name: str) -> None:
    tide = CASES[name]["tide"]
    errors = find_errors(*case_columns(CASES[name]))
    lost = lost_ap(errors)
    np.testing.assert_allclose(100 * lost.ap, tide["ap"], atol=1e-6)
    assert 100 * lost.mean_ap == pytest.approx(tide["map"], abs=1e-6)
    for kind, kind_name in enumerate(KINDS):
        expected = tide["kinds"][kind_name]
        ids = errors.missed if kind == MISSED else errors.rows[errors.kinds == kind]
        assert sorted(ids.tolist()) == expected["ids"], kind_name
        assert 100 * lost.lost[kind] == pytest.approx(expected["lost"], abs=1e-6), kind_name
        np.testing.assert_allclose(100 * (lost.ap + lost.by_class[kind]), expected["fixed_ap"], atol=1e-6)
        if kind != MISSED:
            assert errors.count_kind(kind).sum() == len(ids) - errors.ignored[errors.kinds == kind].sum()


@pytest.mark.parametrize("name", [name for name in CASES if "more than 100" not in name])
def test_ap50_is_that_of_coco(name: str) -> None:
    """TIDE keeps 100 detections of an image, COCO 100 of each class and image."""
    annotations, results = case_columns(CASES[name])
    numbers = accumulate(match_detections(annotations, results))
    lost = lost_ap(find_errors(annotations, results))
    np.testing.assert_allclose(lost.ap, numbers.precision[0, :, :, 0].mean(axis=0), rtol=1e-12)
    assert lost.mean_ap == pytest.approx(numbers.metrics["AP50"], rel=1e-12)


OBJECTS = [[0, 0, 0, 0, 100, 100, 0], [0, 1, 200, 200, 100, 100, 0], [1, 0, 50, 50, 80, 80, 0]]


def test_each_kind_by_hand() -> None:
    detections = [
        [0, 0, 0, 0, 100, 90, 0.9],  # IoU 0.9
        [0, 0, 0, 0, 90, 90, 0.8],  # IoU 0.81 with an object that is taken
        [0, 0, 60, 0, 100, 100, 0.7],  # IoU 0.25
        [0, 0, 200, 200, 100, 80, 0.6],  # IoU 0.8 with class 1
        [0, 1, 60, 0, 100, 100, 0.5],  # IoU 0.25 with class 0
        [0, 0, 0, 300, 50, 50, 0.4],
    ]
    errors = find_errors(*columns(3, 2, OBJECTS, detections))
    assert errors.rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert errors.kinds.tolist() == [RIGHT, DUPLICATE, LOCATION, CLASS, BOTH, BACKGROUND]
    assert errors.targets.tolist() == [0, 0, 0, 1, -1, -1]
    assert errors.moved.tolist() == [False, False, False, True, False, False], "object 0 has a detection"
    np.testing.assert_allclose(errors.ious[:4], [0.9, 0.81, 0.25, 0.8])
    assert errors.missed.tolist() == [2], "object 1 is not missed: its class is wrong"
    lost = lost_ap(errors)
    # Class 0 has 2 objects, and one is found first: precision 1 up to recall 0.5, which is 51 of 101 recalls.
    np.testing.assert_allclose(lost.ap, [51 / 101, 0])
    np.testing.assert_allclose(lost.by_class[CLASS], [0, 1])
    np.testing.assert_allclose(lost.by_class[MISSED], [50 / 101, 0])
    assert lost.lost[CLASS] == pytest.approx(0.5)
    assert errors.count_kind(CLASS).tolist() == [0, 1] and errors.count_kind(MISSED).tolist() == [1, 0]


def test_excluded_images_do_not_count() -> None:
    annotations, results = columns(3, 2, OBJECTS, [[1, 0, 300, 300, 50, 50, 0.9], [0, 0, 0, 0, 100, 100, 0.8]])
    errors = find_errors(annotations, results, exclude=[11])
    assert errors.rows.tolist() == [1] and errors.missed.tolist() == [1]
    assert errors.objects.tolist() == [1, 1]


def test_detections_in_a_crowd_region_are_ignored() -> None:
    crowd = [0, 0, 200, 0, 150, 150, 1]
    detections = [[0, 0, 210, 10, 40, 40, 0.9], [0, 1, 210, 10, 40, 40, 0.8], [0, 0, 0, 0, 100, 100, 0.7]]
    errors = find_errors(*columns(1, 2, [OBJECTS[0], OBJECTS[1], crowd], detections))
    assert errors.ignored.tolist() == [True, False, False], "only those of its class"
    assert errors.count_kind(BACKGROUND).tolist() == [0, 1]
    assert lost_ap(errors).ap[0] == 1 and 2 not in errors.missed


def test_nothing_found_and_nothing_there() -> None:
    errors = find_errors(*columns(2, 2, OBJECTS[:1], []))
    lost = lost_ap(errors)
    assert lost.mean_ap == 0 and np.isnan(lost.ap[1]) and lost.lost[MISSED] == 0
    assert lost.by_class[MISSED, 0] == 1, "the class has nothing that could be wrong any more"
    errors = find_errors(*columns(2, 2, [], [[0, 0, 0, 0, 10, 10, 0.5]]))
    lost = lost_ap(errors)
    assert errors.kinds.tolist() == [BACKGROUND] and np.isnan(lost.ap).all() and not lost.lost.any()
