"""How sure the COCO numbers are: resampled images, standard errors and 95 % intervals.

A bootstrap draws as many images as there are, with replacement. An image that is drawn twice counts twice, which is the
same as a weight of 2, so nothing is matched again. Efron and Tibshirani, An Introduction to the Bootstrap, 1993.

Legend: S resamples, B images, K classes, C columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from retina.analysis.accumulate import METRIC_AREAS, accumulate, weighted_ap, weighted_scores
from retina.analysis.matches import Floats, Matches
from retina.data.annotations import DataError

RESAMPLES = 1000
LEVEL = 0.95
CONSTANT = 1e-12  # standard error of numbers that do not vary


class Sampled(NamedTuple):
    """The numbers of a run, as they are and resampled. C columns: COCO_METRICS or AP alone, then each class's AP."""

    numbers: Floats  # (C,) those of pycocotools, NaN where there are no objects
    resamples: Floats  # (S, C)
    num_images: int  # that were drawn
    with_objects: NDArray[np.int64]  # (C,) how many of them have objects of this class or size

    @property
    def freedom(self) -> NDArray[np.int64]:
        """(C,) degrees of freedom: an image without such objects says little about the number."""
        return np.maximum(self.with_objects - 1, 1)


def bootstrap_weights(num_images: int, resamples: int = RESAMPLES, seed: int = 0) -> NDArray[np.int64]:
    """(S, B) how often each image is drawn; each row adds up to B. DataError without images."""
    if not num_images:
        raise DataError("no image is left to count, so there is nothing to measure")
    return np.random.default_rng(seed).multinomial(num_images, np.full(num_images, 1 / num_images), resamples)


def resample(matches: Matches, weights: NDArray[Any]) -> Sampled:
    """The numbers of a run for its images as they are, and for each row of `weights` (S, B)."""
    accumulated = accumulate(matches)
    return Sampled(
        _known([*accumulated.metrics.values(), *accumulated.per_class.values()]),
        weighted_scores(matches, weights),
        weights.shape[1],
        _images_with_objects(matches, METRIC_AREAS),
    )


def resample_ap(matches: Matches, weights: NDArray[Any]) -> Sampled:
    """The AP and that of each class, in half of the time."""
    accumulated = accumulate(matches)
    return Sampled(
        _known([accumulated.metrics["AP"], *accumulated.per_class.values()]),
        weighted_ap(matches, weights),
        weights.shape[1],
        _images_with_objects(matches, METRIC_AREAS[:1]),
    )


def _known(numbers: list[float | None]) -> Floats:
    """NaN in place of None."""
    return np.array([np.nan if number is None else number for number in numbers])


def _images_with_objects(matches: Matches, areas: tuple[int, ...]) -> NDArray[np.int64]:
    """(areas and K,) the number of images with objects that count, for each of `areas` and for each class."""
    of_area = [len(np.unique(matches.object_images[~ignored])) for ignored in matches.object_ignored]
    counted = ~matches.object_ignored[0]
    pairs = np.unique(np.stack([matches.object_labels, matches.object_images])[:, counted], axis=1)
    return np.array([*(of_area[area] for area in areas), *np.bincount(pairs[0], minlength=len(matches.names))])


def standard_error(resamples: Floats, num_images: int) -> Floats:
    """(C,) the standard deviation over other images like these, from resamples (S, C).

    NaN for fewer than two images, and where more than 5 percent of the resamples have no object: the objects are then
    on fewer than three images.
    """
    known = ~np.isnan(resamples)
    count = known.sum(axis=0)
    if num_images < 2:
        return np.full(resamples.shape[1], np.nan)
    mean = np.where(known, resamples, 0).sum(axis=0) / np.maximum(count, 1)
    squares = np.where(known, (resamples - mean) ** 2, 0).sum(axis=0) / np.maximum(count - 1, 1)
    # The factor: the resamples vary about their own mean, with one degree of freedom less than images.
    error = np.sqrt(squares * num_images / (num_images - 1))
    return np.where(count >= 0.95 * len(resamples), error, np.nan)


def interval(sampled: Sampled) -> Floats:
    """(2, C) the 95 % interval of each number: the number -+ Student's quantile x standard error, within 0 and 1.

    NaN where the resamples do not vary, because they do not say then how far off the number may be.
    Not the percentiles of the resamples: an image that is drawn twice raises the AP, so their mean lies above the
    number, by more than the width of the interval where there are many images (docs/results/compare.md).
    """
    error = standard_error(sampled.resamples, sampled.num_images)
    reach = stats.t.ppf(0.5 + LEVEL / 2, sampled.freedom) * np.where(error > CONSTANT, error, np.nan)
    bounds: Floats = np.clip([sampled.numbers - reach, sampled.numbers + reach], 0, 1)
    return bounds
