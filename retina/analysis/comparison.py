"""Is B better than A? The difference of two runs, or of several seeds on each side, with its interval and p-value.

Two things make a difference that is not there: the images of the validation set, and the seed of a training. A
hierarchical bootstrap draws both again: the images, the same for all runs, because all were measured on the same ones
(the comparison is paired), and for each side as many seeds as it has. With one training on each side only the images
are drawn. The interval is the difference -+ Student's quantile x the standard deviation of the draws, with Welch's and
Satterthwaite's degrees of freedom: few seeds give a wide interval. docs/results/compare.md tests this by simulation.

Legend: S resamples, C columns (COCO_METRICS, then the AP of each class).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from retina.analysis.intervals import Sampled, standard_error

POWER = 0.8  # of the smallest difference that a comparison would find

Floats = NDArray[np.float64]


class SeedNoise(NamedTuple):
    """Deviations of trainings from the mean of those that differ only in the seed; unbiased, so they can be drawn."""

    deviations: Floats  # (trainings, C)
    degrees_of_freedom: int


class Difference(NamedTuple):
    """B minus A, from 0 to 1, for each column; NaN where it is unknown."""

    a: Floats  # (C,) the mean of the runs of A
    b: Floats  # (C,)
    value: Floats  # (C,)
    low: Floats  # (C,) of the 95 % interval
    high: Floats  # (C,)
    p: Floats  # (C,) of no difference, two-sided
    detectable: Floats  # (C,) a true difference of this size would be found in 80 % of such comparisons

    def is_real(self, column: int = 0) -> bool:
        """Whether the interval leaves out 0. Column 0 is AP."""
        return bool(self.low[column] > 0 or self.high[column] < 0)


def seed_noise(groups: Sequence[Sequence[Sampled]]) -> SeedNoise | None:
    """The seed noise of groups of runs that differ only in the seed; None if no group has two."""
    several = [np.stack([run.numbers for run in group]) for group in groups if len(group) > 1]
    if not several:
        return None
    # A mean of n values is nearer to them than the true mean; the factor corrects this.
    deviations = [np.sqrt(len(group) / (len(group) - 1)) * (group - group.mean(axis=0)) for group in several]
    return SeedNoise(np.concatenate(deviations), sum(len(group) - 1 for group in several))


def compare(a: Sequence[Sampled], b: Sequence[Sampled], noise: SeedNoise | None, seed: int = 0) -> Difference:
    """The difference between the runs of B and those of A.

    Args:
        a: the runs of one side.
        b: the runs of the other. All runs of both sides were resampled with the same weights.
        noise: of the seeds, from `seed_noise`: of both sides, or of a whole study. None: the images alone.
        seed: of the draws of seeds.
    """
    mean_a, mean_b = (np.mean([run.numbers for run in side], axis=0) for side in (a, b))
    value = mean_b - mean_a
    drawn = np.mean([run.resamples for run in b], axis=0) - np.mean([run.resamples for run in a], axis=0)
    num_images = a[0].num_images
    error = standard_error(drawn, num_images)
    freedom = np.full(len(value), float(num_images - 1))
    if noise is not None:
        rng = np.random.default_rng(seed)
        for sign, side in ((1, b), (-1, a)):
            chosen = rng.integers(len(noise.deviations), size=(len(drawn), len(side)))
            drawn = drawn + sign * noise.deviations[chosen].mean(axis=1)
        total = standard_error(drawn, num_images)
        seeds = np.sqrt(np.maximum(total**2 - error**2, 0))
        with np.errstate(invalid="ignore", divide="ignore"):
            freedom = total**4 / (error**4 / (num_images - 1) + seeds**4 / noise.degrees_of_freedom)
        error = total
    freedom = np.where(error > 0, freedom, 1)
    reach = stats.t.ppf(0.975, freedom) * error
    with np.errstate(invalid="ignore", divide="ignore"):
        p = np.where(error > 0, 2 * stats.t.sf(np.abs(value / error), freedom), np.where(value == 0, 1.0, np.nan))
    detectable = reach + stats.t.ppf(POWER, freedom) * error
    return Difference(mean_a, mean_b, value, value - reach, value + reach, p, detectable)
