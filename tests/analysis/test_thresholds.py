"""Precision, recall and F1 over the score compared with scikit-learn, and the confusion matrix by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rows import columns, match
from sklearn.metrics import precision_recall_curve

from retina.analysis.matches import match_detections
from retina.analysis.thresholds import (
    ScoreCurve,
    best_threshold,
    confusion_matrix,
    count_by_image,
    is_right,
    score_curve,
    score_thresholds,
    short_number,
)


def random_rows(seed: int, levels: int) -> tuple[list[list[float]], list[list[float]]]:
    """30 objects of 3 classes in 4 images, and about 60 detections, with equal scores for few `levels`."""
    rng = np.random.default_rng(seed)
    objects = [[int(rng.integers(4)), int(rng.integers(3)), *rng.uniform(20, 180, 4), 0] for _ in range(30)]
    detections = []
    for image, label, *box, _ in objects:
        for _ in range(int(rng.integers(4))):
            shift = rng.normal(0, 12, 4)
            wrong = int(rng.integers(3)) if rng.random() < 0.3 else label
            detections.append([image, wrong, *(np.array(box) + shift), int(rng.integers(1, levels + 1)) / levels])
    return objects, detections


@pytest.mark.parametrize("levels", [5, 10_000])
def test_curve_is_that_of_scikit_learn(levels: int) -> None:
    objects, detections = random_rows(levels, levels)
    matches = match(4, 3, objects, detections)
    curve = score_curve(matches)
    precision, recall, scores = precision_recall_curve(is_right(matches), matches.scores)
    np.testing.assert_array_equal(curve.scores, scores[::-1])
    np.testing.assert_allclose(curve.precision, precision[-2::-1])
    # scikit-learn's recall is the share of the right detections; ours is the share of the objects.
    np.testing.assert_allclose(curve.recall * 30, recall[-2::-1] * is_right(matches).sum())
    np.testing.assert_allclose(curve.f1, 2 / (1 / curve.precision + 1 / curve.recall), rtol=1e-12)
    parts = [score_curve(matches, label) for label in range(3)]
    assert sum(part.right[-1] for part in parts) == curve.right[-1]
    assert sum(part.num_objects for part in parts) == 30


def test_best_threshold_by_hand() -> None:
    scores = np.array([0.9, 0.81234, 0.62, 0.61, 0.3])
    right, wrong = np.array([40, 60, 61, 61, 65]), np.array([0, 20, 21, 22, 60])
    best = best_threshold(ScoreCurve(scores, right, wrong, 100))  # F1: 0.571, 0.667, 0.670, 0.667, 0.578
    assert best is not None
    assert best.score == 0.615, "in the middle between 0.62 and 0.61"
    assert (best.right, best.wrong, best.missed) == (61, 21, 39)
    assert best.precision == pytest.approx(61 / 82) and best.recall == 0.61 and best.f1 == pytest.approx(122 / 182)
    assert (best.low, best.high) == (0.31, 0.81), "F1 is within 0.01 for the three in the middle"
    alone = best_threshold(ScoreCurve(scores, np.array([40, 60, 70, 70, 75]), np.array([0, 20, 21, 27, 65]), 100))
    assert alone is not None and (alone.low, alone.score, alone.high) == (0.611, 0.615, 0.619)


def test_few_scores_are_separated_in_the_middle() -> None:
    """A threshold just below 0.8 would drop the next object with a score of 0.75."""
    best = best_threshold(ScoreCurve(np.array([0.9, 0.8, 0.1]), np.array([1, 2, 2]), np.array([0, 0, 1]), 2))
    assert best is not None and (best.low, best.score, best.high, best.f1) == (0.11, 0.45, 0.79, 1)
    all_right = best_threshold(ScoreCurve(np.array([0.9, 0.8]), np.array([1, 2]), np.array([0, 0]), 2))
    assert all_right is not None and (all_right.low, all_right.score, all_right.high) == (0.01, 0.4, 0.79)


@given(st.lists(st.integers(0, 10**9), min_size=2, max_size=20, unique=True), st.data())
def test_threshold_keeps_exactly_the_scores_of_the_best_f1(numbers: list[int], data: st.DataObject) -> None:
    scores = np.array(sorted(numbers, reverse=True)) / 10**9
    last = data.draw(st.integers(0, len(scores) - 1 - (scores[-1] == 0)))
    right = np.minimum(np.arange(1, len(scores) + 1), last + 1)  # all from there on are wrong
    best = best_threshold(ScoreCurve(scores, right, np.arange(1, len(scores) + 1) - right, last + 1))
    assert best is not None and best.right == last + 1
    for threshold in (best.score, best.low, best.high):
        assert 0 < threshold < 1 and float(f"{threshold:.12g}") == threshold
    assert (scores >= best.score).sum() == (scores > best.score).sum() == last + 1
    assert best.low <= best.score <= best.high


@pytest.mark.parametrize(
    ("lower", "upper", "wanted", "expected"),
    [
        (0.1, 0.8, 0.45, 0.45),
        (0.611, 0.612, 0.611, 0.6111),
        (0.29, 0.3, 0.3, 0.299),
        (0, 1e300, 5e299, 5e299),
        (0, 0, 0, 0),
    ],
)
def test_short_number(lower: float, upper: float, wanted: float, expected: float) -> None:
    assert short_number(lower, upper, wanted) == expected


def test_no_threshold_without_a_right_detection() -> None:
    objects = [[0, 0, 0, 0, 100, 100, 0]]
    assert best_threshold(score_curve(match(1, 1, objects, []))) is None
    assert best_threshold(score_curve(match(1, 1, objects, [[0, 0, 200, 200, 50, 50, 0.9]]))) is None


def test_confusion_matrix_by_hand() -> None:
    objects = [
        [0, 0, 0, 0, 100, 100, 0],
        [0, 1, 200, 200, 100, 100, 0],
        [1, 1, 50, 50, 80, 80, 0],
        [1, 0, 200, 50, 80, 80, 0],
        [1, 0, 300, 300, 90, 90, 1],
    ]
    detections = [
        [0, 1, 0, 0, 100, 100, 0.95],  # wrong class, with a higher score than the right one
        [0, 0, 0, 0, 100, 100, 0.9],  # right: keeps the object although it comes second
        [0, 0, 200, 200, 100, 90, 0.8],  # class 1 taken for class 0
        [0, 0, 200, 200, 100, 80, 0.7],  # the same object again: background
        [1, 1, 50, 50, 80, 80, 0.3],  # right, but below the threshold
        [1, 0, 310, 310, 40, 40, 0.9],  # in a crowd region
        [1, 1, 200, 55, 80, 80, 0.6],  # class 0 taken for class 1
    ]
    annotations, results = columns(2, 2, objects, detections)
    matches = match_detections(annotations, results)
    #             detected as 0, 1, not found
    expected = [[1, 1, 0], [1, 0, 1], [1, 1, 0]]
    assert confusion_matrix(matches, annotations, results, 0.5).tolist() == expected
    assert [part.tolist() for part in count_by_image(matches, 0.5)] == [[2, 2], [4, 1]]


def test_the_detection_with_the_higher_score_takes_the_object() -> None:
    objects = [[0, 2, 0, 0, 100, 100, 0]]
    detections = [[0, 0, 0, 0, 100, 95, 0.6], [0, 1, 0, 0, 100, 90, 0.7]]
    annotations, results = columns(1, 3, objects, detections)
    matrix = confusion_matrix(match_detections(annotations, results), annotations, results, 0.5)
    assert matrix[2].tolist() == [0, 1, 0, 0] and matrix[3].tolist() == [1, 0, 0, 0]


def test_confusion_matrix_counts_everything_once() -> None:
    objects, detections = random_rows(7, 10_000)
    annotations, results = columns(4, 3, objects, detections)
    matches = match_detections(annotations, results)
    best = best_threshold(score_curve(matches))
    assert best is not None
    matrix = confusion_matrix(matches, annotations, results, best.score)
    assert np.trace(matrix) == best.right and matrix[-1, -1] == 0
    assert matrix[:-1].sum() == 30 and matrix[:, :-1].sum() == best.right + best.wrong
    np.testing.assert_array_equal(matrix[:-1].sum(axis=1), np.bincount([int(row[1]) for row in objects]))


def test_score_thresholds_of_a_number_and_of_a_file(tmp_path: Path) -> None:
    assert score_thresholds("0.25").of(["cat", "dog"]) == [0.25, 0.25]
    file = tmp_path / "metrics.json"
    file.write_text(json.dumps({"AP": 0.5, "score_threshold": {"all": 0.4, "per_class": {"cat": 0.7, "dog": None}}}))
    found = score_thresholds(str(file))
    assert found.of(["cat", "dog"]) == [0.7, 0.4] and found.missing(["cat", "dog", "bird"]) == ["bird"]
    assert score_thresholds("0.25").missing(["cat"]) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("1.5", "from 0 to 1"),
        ("nan", "from 0 to 1"),
        ("no.json", "neither a number"),
        ('{"AP": 0.5}', "has no thresholds"),
        ('{"score_threshold": {"all": null, "per_class": {}}}', "in which nothing right was found"),
        ("[]", "has no thresholds"),
        ("{", "has no thresholds"),
    ],
)
def test_score_thresholds_that_are_none(tmp_path: Path, given: str, message: str) -> None:
    if given[0] in "[{":
        (tmp_path / "metrics.json").write_text(given)
        given = str(tmp_path / "metrics.json")
    with pytest.raises(ValueError, match=message):
        score_thresholds(given)
