"""Is B better than A? The difference of two runs, or of several seeds on each side, with its interval and p-value.

Two things make a difference that is not there: the images of the validation set, and the seed of a training. A
hierarchical bootstrap draws both again. The images are drawn alike for all runs, because all were measured on the same
ones: the comparison is paired. The seeds are drawn independently of the images, so the variance of the difference is a
sum. Its first part comes from resampled images. The second is that of a mean of so many seeds, which needs no draws:
s^2 (1/n_a + 1/n_b), with s corrected for the few seeds it was estimated from. The interval is the difference -+
Student's quantile x standard error, with Welch's and Satterthwaite's degrees of freedom. Without images it is Fisher's
least significant difference. docs/results/compare.md tests it by simulation.

Legend: S resamples, C columns (COCO_METRICS or AP alone, then the AP of each class).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from retina.analysis.intervals import CONSTANT, LEVEL, Sampled, standard_error

POWER = 0.8  # of the smallest difference that a comparison would find

Floats = NDArray[np.float64]


class SeedNoise(NamedTuple):
    """How much trainings differ that differ only in the seed."""

    sd: Floats  # (C,) standard deviation, pooled over the groups
    degrees_of_freedom: int
    num_groups: int


class Difference(NamedTuple):
    """B minus A, from 0 to 1, for each column; NaN where it is unknown."""

    a: Floats  # (C,) the mean of the runs of A
    b: Floats  # (C,)
    value: Floats  # (C,)
    error: Floats  # (C,) standard error
    freedom: Floats  # (C,) degrees of freedom
    low: Floats  # (C,) of the 95 % interval; NaN where the error is unknown, or 0 while the difference is not
    high: Floats  # (C,)
    p: Floats  # (C,) of no difference, two-sided
    detectable: Floats  # (C,) a true difference of this size would be found in 80 % of such comparisons

    def is_real(self, column: int = 0) -> bool:
        """Whether the interval leaves out 0. Column 0 is AP."""
        return bool(self.low[column] > 0 or self.high[column] < 0)


def seed_noise(groups: Sequence[Sequence[Sampled]]) -> SeedNoise | None:
    """The pooled noise of groups of runs that differ only in the seed; None if no group has two."""
    several = [np.stack([run.numbers for run in group]) for group in groups if len(group) > 1]
    if not several:
        return None
    degrees_of_freedom = sum(len(group) - 1 for group in several)
    squares = sum(((group - group.mean(axis=0)) ** 2).sum(axis=0) for group in several)
    return SeedNoise(np.sqrt(squares / degrees_of_freedom), degrees_of_freedom, len(several))


def compare(a: Sequence[Sampled], b: Sequence[Sampled], noise: SeedNoise | None) -> Difference:
    """The difference between the runs of B and those of A.

    Args:
        a: the runs of one side.
        b: the runs of the other. All runs of both sides were resampled with the same weights.
        noise: of the seeds, from `seed_noise`: of both sides, or of a whole study. None: the images alone.
    """
    mean_a, mean_b = (np.mean([run.numbers for run in side], axis=0) for side in (a, b))
    value = mean_b - mean_a
    drawn = np.mean([run.resamples for run in b], axis=0) - np.mean([run.resamples for run in a], axis=0)
    images = standard_error(drawn, a[0].num_images)
    seeds, seeds_freedom = np.zeros(len(value)), 1
    if noise is not None:
        seeds, seeds_freedom = noise.sd * np.sqrt(1 / len(a) + 1 / len(b)), noise.degrees_of_freedom
    error = np.sqrt(images**2 + seeds**2)
    with np.errstate(invalid="ignore", divide="ignore"):
        freedom = error**4 / (images**4 / a[0].freedom + seeds**4 / seeds_freedom)
        varies, equal = error > CONSTANT, (error <= CONSTANT) & (value == 0)  # neither where the error is NaN
        freedom = np.where(varies, freedom, 1)
        reach = np.where(varies, stats.t.ppf(0.5 + LEVEL / 2, freedom) * error, np.where(equal, 0, np.nan))
        p = np.where(varies, 2 * stats.t.sf(np.abs(value / error), freedom), np.where(equal, 1, np.nan))
    detectable = reach + stats.t.ppf(POWER, freedom) * error
    low, high = np.clip([value - reach, value + reach], -1, 1)  # as an AP is between 0 and 1
    return Difference(mean_a, mean_b, value, error, freedom, low, high, p, detectable)
