"""Weights of images are copies of images, and intervals are Student's."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import numpy as np
import pytest
from coco_cases import Case, coco_cases, evaluate_with_pycocotools, write_annotations
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import match
from scipy import stats

from retina.analysis.accumulate import NARROW, weighted_scores
from retina.analysis.intervals import Sampled, bootstrap_weights, interval, resample, resample_ap, standard_error
from retina.analysis.matches import match_detections
from retina.analysis.results_file import results_columns
from retina.data.annotations import DataError


@settings(max_examples=25, deadline=None)
@given(coco_cases(max_detections=60), st.integers(0, 2**32 - 1))
def test_a_weight_is_a_number_of_copies(case: Case, seed: int) -> None:
    """pycocotools scores a data set in which each image is repeated as often as its weight says.

    The scores within an image are made different, because pycocotools would mix the copies of equal ones.
    """
    truth, results = case
    for number, entry in enumerate(results):
        entry["score"] += 1e-6 * sum(earlier["image_id"] == entry["image_id"] for earlier in results[:number])
    with tempfile.TemporaryDirectory() as folder:
        annotations = write_annotations(truth, Path(folder))
    matches = match_detections(annotations, results_columns(results, annotations))
    counts = dict(
        zip(matches.image_ids.tolist(), np.random.default_rng(seed).integers(0, 4, 60).tolist(), strict=False)
    )
    repeated_truth, repeated_results = _repeat(truth, results, counts)
    theirs = evaluate_with_pycocotools(repeated_truth, repeated_results)
    weights = np.array([list(counts.values())] * (NARROW + 1))  # few and many resamples are summed in different ways
    for used in (weights[:1], weights):
        scores = weighted_scores(matches, used)
        expected = np.where(theirs.stats < 0, np.nan, theirs.stats)
        np.testing.assert_allclose(scores[:, :12], [expected] * len(used), rtol=1e-12, atol=1e-15)
    alone, everything = resample_ap(matches, weights), resample(matches, weights)
    columns = [0, *range(12, everything.resamples.shape[1])]
    np.testing.assert_array_equal(alone.resamples, everything.resamples[:, columns])
    np.testing.assert_array_equal(alone.numbers, everything.numbers[columns])
    np.testing.assert_array_equal(alone.with_objects, everything.with_objects[columns])


def _repeat(truth: dict, results: list, counts: dict) -> Case:  # type: ignore[type-arg]
    """Copies of the images with new ids. Those of one image are next to each other, in the order of the images."""
    new = {"images": [], "annotations": [], "categories": truth["categories"], "info": {}}
    found = []
    for image in truth["images"]:
        for number in range(counts[image["id"]]):
            image_id = 10 * image["id"] + number
            new["images"].append({**image, "id": image_id})
            for kind, target in ((truth["annotations"], new["annotations"]), (results, found)):
                of_image = copy.deepcopy([entry for entry in kind if entry["image_id"] == image["id"]])
                target.extend({**entry, "image_id": image_id} for entry in of_image)
    return new, found


def test_bootstrap_weights_draw_as_many_images_as_there_are() -> None:
    weights = bootstrap_weights(50, 2000, seed=3)
    assert (weights.sum(axis=1) == 50).all()
    np.testing.assert_allclose(weights.var(axis=0).mean(), 50 * 0.02 * 0.98, rtol=0.02)
    np.testing.assert_array_equal(weights, bootstrap_weights(50, 2000, seed=3))


def test_the_interval_of_a_mean_is_students() -> None:
    """For the mean of 12 numbers the bootstrap must give the textbook's interval, but for the noise of the draws."""
    values = np.random.default_rng(0).random(12)
    weights = bootstrap_weights(12, 20_000)
    sampled = Sampled(values.mean(keepdims=True), (weights @ values)[:, None] / 12, 12, np.array([12]))
    error = stats.sem(values)
    np.testing.assert_allclose(standard_error(sampled.resamples, 12), error, rtol=0.02)
    expected = values.mean() + stats.t.ppf([0.025, 0.975], 11) * error
    np.testing.assert_allclose(interval(sampled)[:, 0], expected, rtol=0.02)


def test_too_few_images_have_no_interval() -> None:
    resamples = np.random.default_rng(0).random((100, 3))
    resamples[:6, 1] = np.nan  # 6 percent have no object
    resamples[:5, 2] = np.nan
    np.testing.assert_array_equal(np.isnan(standard_error(resamples, 20)), [False, True, False])
    assert np.isnan(standard_error(resamples, 1)).all()


def test_an_interval_ends_at_zero_and_one() -> None:
    resamples = np.random.default_rng(0).normal(0, 0.1, (100, 2))
    low, high = interval(Sampled(np.array([0.01, 0.98]), resamples, 9, np.array([9, 9])))
    assert low[0] == 0 and high[1] == 1 and low[1] > 0 and high[0] < 1


def test_images_with_objects_by_hand() -> None:
    """Two small objects of class 0 in one image, a large one in another, which has one of class 1; and a crowd."""
    objects = [[0, 0, 0, 0, 9, 9, 0], [0, 0, 50, 0, 9, 9, 0], [1, 0, 0, 0, 200, 200, 0], [1, 1, 0, 0, 50, 50, 0],
               [2, 1, 0, 0, 50, 50, 1]]  # fmt: skip
    sampled = resample(match(4, 3, objects, []), np.ones((2, 4)))
    assert sampled.with_objects.tolist() == [2, 2, 2, 1, 1, 1] * 2 + [2, 1, 0]
    assert sampled.freedom[-3:].tolist() == [1, 1, 1] and sampled.freedom[0] == 1


def test_a_class_that_is_never_found_has_no_interval() -> None:
    matches = match(9, 2, [[i, i % 2, 0, 0, 50, 50, 0] for i in range(9)], [[0, 0, 0, 0, 50, 50, 0.9]])
    sampled = resample(matches, bootstrap_weights(9))
    assert sampled.numbers[-1] == 0 and np.isnan(interval(sampled)[:, -1]).all()
    assert not np.isnan(interval(sampled)[:, -2]).any()


def test_without_images_nothing_is_drawn() -> None:
    with pytest.raises(DataError, match="no image is left"):
        bootstrap_weights(0)


def test_a_number_of_a_run_is_that_of_pycocotools() -> None:
    truth, results = _one_image()
    with tempfile.TemporaryDirectory() as folder:
        annotations = write_annotations(truth, Path(folder))
    sampled = resample(match_detections(annotations, results_columns(results, annotations)), np.ones((3, 1)))
    assert sampled.numbers[0] == evaluate_with_pycocotools(truth, results).stats[0] and sampled.num_images == 1
    assert np.isnan(sampled.numbers[3]) and sampled.numbers[-1] == sampled.numbers[0]  # no small objects; one class


def _one_image() -> Case:
    box = [0.0, 0.0, 50.0, 50.0]
    truth = {
        "images": [{"id": 5, "file_name": "a.jpg", "width": 90, "height": 90}],
        "annotations": [{"id": 1, "image_id": 5, "category_id": 1, "bbox": box, "area": 2500.0, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "a"}],
    }
    return truth, [{"image_id": 5, "category_id": 1, "bbox": [0.0, 0.0, 50.0, 40.0], "score": 0.5}]
