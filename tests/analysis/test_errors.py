"""The error kinds of TIDE compared with the published tool (make_tide_cases.py), and by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retina.analysis.errors import KINDS, MISSED, find_errors, lost_ap
from retina.analysis.results_file import Results
from retina.data.annotations import Annotations

CASES = json.loads(Path(__file__).with_name("tide_cases.json").read_text())


def columns(case: dict[str, Any]) -> tuple[Annotations, Results]:
    """The rows of a case as they would be read from files."""
    num_images, num_classes = case["num_images"], case["num_classes"]
    objects = np.array(case["objects"], np.float64).reshape(-1, 7)
    detections = np.array(case["detections"], np.float64).reshape(-1, 7)
    annotations = Annotations(
        Path("annotations.json"),
        10 + np.arange(num_images),
        np.array([f"{i}.png" for i in range(num_images)], np.dtypes.StringDType()),
        np.full(num_images, 400, np.int32),
        np.full(num_images, 400, np.int32),
        1 + np.arange(len(objects)),
        0,
        objects[:, 0].astype(np.int64),
        objects[:, 1].astype(np.int32),
        objects[:, 2:6],
        objects[:, 4] * objects[:, 5],
        objects[:, 6].astype(np.bool_),
        list(range(1, num_classes + 1)),
        [f"class {k}" for k in range(num_classes)],
    )
    results = Results(
        detections[:, 0].astype(np.int64), detections[:, 1].astype(np.int64), detections[:, 2:6], detections[:, 6]
    )
    return annotations, results


@pytest.mark.parametrize("name", CASES)
def test_equal_to_the_published_tool(name: str) -> None:
    tide = CASES[name]["tide"]
    errors = find_errors(*columns(CASES[name]))
    lost = lost_ap(errors)
    np.testing.assert_allclose(100 * lost.ap, tide["ap"], atol=1e-6)
    assert 100 * lost.mean_ap == pytest.approx(tide["map"], abs=1e-6)
    for kind, kind_name in enumerate(KINDS):
        expected = tide["kinds"][kind_name]
        ids = errors.missed if kind == MISSED else errors.rows[errors.kinds == kind]
        assert sorted(ids.tolist()) == expected["ids"], kind_name
        assert 100 * lost.lost[kind] == pytest.approx(expected["lost"], abs=1e-6), kind_name
        np.testing.assert_allclose(100 * (lost.ap + lost.by_class[kind]), expected["fixed_ap"], atol=1e-6)
