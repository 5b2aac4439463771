"""The matches and the numbers from them equal those of pycocotools in every digit."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from coco_cases import Case, coco_cases, evaluate_with_pycocotools, write_annotations
from hypothesis import given, settings

from retina.analysis.accumulate import accumulate, weighted_scores
from retina.analysis.matches import AREAS, match_detections
from retina.analysis.results_file import results_columns
from retina.config import COCO_METRICS


@settings(max_examples=40, deadline=None)
@given(coco_cases())
def test_matches_and_numbers_are_those_of_pycocotools(case: Case) -> None:
    truth, results = case
    with tempfile.TemporaryDirectory() as folder:
        annotations = write_annotations(truth, Path(folder))
    matches = match_detections(annotations, results_columns(results, annotations))
    theirs = evaluate_with_pycocotools(truth, results)

    for entry in filter(None, theirs.evalImgs):
        image = matches.image_ids.tolist().index(entry["image_id"])
        label = annotations.category_ids.index(entry["category_id"])
        area = theirs.params.areaRng.index(entry["aRng"])
        mine = np.flatnonzero((matches.images == image) & (matches.labels == label))
        mine = mine[np.argsort(matches.ranks[mine])]
        np.testing.assert_array_equal(matches.rows[mine] + 1, np.array(entry["dtIds"], int))
        np.testing.assert_array_equal(matches.found[area][:, mine] + 1, entry["dtMatches"])  # their ids start at 1
        np.testing.assert_array_equal(matches.ignored[area][:, mine], entry["dtIgnore"])
        objects = (matches.object_images == image) & (matches.object_labels == label)
        assert np.sum(objects & ~matches.object_ignored[area]) == np.sum(entry["gtIgnore"] == 0)

    numbers = accumulate(matches)
    np.testing.assert_array_equal(numbers.precision, theirs.eval["precision"][..., -1])
    np.testing.assert_array_equal(numbers.recall, theirs.eval["recall"])
    assert [-1 if value is None else value for value in numbers.metrics.values()] == theirs.stats.tolist()
    assert numbers.precision.shape[-1] == len(AREAS)

    weighted = weighted_scores(matches, np.ones((2, len(matches.image_ids))))
    stats = np.where(theirs.stats < 0, np.nan, theirs.stats)
    np.testing.assert_allclose(weighted[:, :12], np.stack([stats, stats]), rtol=1e-12, atol=1e-15)
    assert list(numbers.metrics) == list(COCO_METRICS)
