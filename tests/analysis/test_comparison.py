"""The difference of two sides, against textbook tests and draws by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from retina.analysis.comparison import SeedNoise, compare, seed_noise
from retina.analysis.intervals import Sampled, bootstrap_weights


def seeds_alone(*numbers: float) -> list[Sampled]:
    """Trainings whose numbers do not depend on the images."""
    return [Sampled(np.array([number]), np.full((50, 1), number), 20, np.array([20])) for number in numbers]


def mean_of_images(values: np.ndarray, weights: np.ndarray) -> Sampled:  # type: ignore[type-arg]
    """A training whose number is the mean of one value for each image."""
    return Sampled(
        values.mean(keepdims=True), (weights @ values)[:, None] / len(values), len(values), np.array([len(values)])
    )


def test_seeds_alone_are_students_test() -> None:
    a, b = [0.31, 0.33, 0.30], [0.36, 0.34, 0.35]
    result = compare(seeds_alone(*a), seeds_alone(*b), seed_noise([seeds_alone(*a), seeds_alone(*b)]))
    expected = stats.ttest_ind(b, a)  # pooled variance
    bounds = expected.confidence_interval(0.95)
    np.testing.assert_allclose([result.p[0], result.low[0], result.high[0]], [expected.pvalue, bounds.low, bounds.high])
    assert result.is_real() and result.a[0] == pytest.approx(np.mean(a)) and result.value[0] == pytest.approx(0.11 / 3)


def test_images_alone_are_the_paired_test() -> None:
    rng = np.random.default_rng(1)
    hard = rng.random(40)
    a, b = hard + 0.05 * rng.random(40), hard + 0.02 + 0.05 * rng.random(40)
    weights = bootstrap_weights(40, 20_000)
    result = compare([mean_of_images(a, weights)], [mean_of_images(b, weights)], None)
    expected = stats.ttest_rel(b, a)
    bounds = expected.confidence_interval(0.95)
    np.testing.assert_allclose([result.low[0], result.high[0]], [bounds.low, bounds.high], rtol=0.02)
    assert result.is_real() and not stats.ttest_ind(b, a).pvalue < 0.05, "only the pairing shows it"


def test_seeds_and_images_are_the_hierarchical_bootstrap() -> None:
    """The standard error of draws of seeds and images, with two trainings against three."""
    rng = np.random.default_rng(2)
    weights = bootstrap_weights(30, 40_000)
    hard = rng.normal(0, 1, 30)
    sides = [
        [mean_of_images(hard + rng.normal(0, 0.3, 30) + shift, weights) for shift in rng.normal(0, 0.2, count)]
        for count in (2, 3)
    ]
    noise = seed_noise(sides)
    assert noise is not None and noise.degrees_of_freedom == 3 and noise.num_groups == 2
    result = compare(*sides, noise)
    drawn = np.zeros(len(weights))
    for sign, side in zip((-1, 1), sides, strict=True):
        images = np.mean([run.resamples[:, 0] for run in side], axis=0)
        seeds = rng.normal(0, noise.sd[0], (len(drawn), len(side))).mean(axis=1)
        drawn += sign * (images + seeds)
    error = drawn.std() * np.sqrt(30 / 29)
    seeds_error = noise.sd[0] * np.sqrt(1 / 2 + 1 / 3)
    freedom = error**4 / ((error**2 - seeds_error**2) ** 2 / 29 + seeds_error**4 / 3)
    np.testing.assert_allclose(result.high[0] - result.value[0], stats.t.ppf(0.975, freedom) * error, rtol=0.02)
    alone = compare(*sides, None)
    assert result.high[0] - result.low[0] > 1.3 * (alone.high[0] - alone.low[0])


def test_a_detectable_difference_is_found_in_four_of_five() -> None:
    """Normal numbers with a known noise: the interval leaves out 0 about as often as promised."""
    rng = np.random.default_rng(3)
    noise = SeedNoise(np.array([1.0]), 10_000, 1)
    size = compare(seeds_alone(0.0), seeds_alone(0.0), noise).detectable[0]
    differences = size + rng.normal(0, np.sqrt(2), 4000)
    found = [compare(seeds_alone(0.0), seeds_alone(one), noise).is_real() for one in differences[:1000]]
    assert np.mean(found) == pytest.approx(0.8, abs=0.04)


def test_one_training_takes_the_noise_of_the_other_side() -> None:
    a, b = seeds_alone(0.3), seeds_alone(0.4, 0.42, 0.44)
    result = compare(a, b, seed_noise([a, b]))
    reach = stats.t.ppf(0.975, 2) * 0.02 * np.sqrt(1 + 1 / 3)
    np.testing.assert_allclose([result.low[0], result.high[0]], [0.12 - reach, 0.12 + reach])
    assert seed_noise([a, a]) is None


def test_equal_runs_do_not_differ() -> None:
    run = mean_of_images(np.arange(10.0), bootstrap_weights(10))
    result = compare([run], [run], None)
    assert (result.value[0], result.low[0], result.high[0], result.p[0]) == (0, 0, 0, 1) and not result.is_real()


def test_what_is_not_measured_is_unknown() -> None:
    missing = Sampled(np.array([np.nan]), np.full((50, 1), np.nan), 20, np.array([0]))
    result = compare([missing], [missing], None)
    assert np.isnan([result.value[0], result.low[0], result.p[0]]).all() and not result.is_real()


def test_a_difference_that_does_not_vary_has_no_interval() -> None:
    """Everything is right with B and wrong with A: how sure that is does not follow from the resamples."""
    result = compare(seeds_alone(0.0), seeds_alone(1.0), None)
    assert result.value[0] == 1 and np.isnan([result.low[0], result.high[0], result.p[0]]).all()
    assert not result.is_real()


def test_nothing_is_known_of_a_class_on_one_image() -> None:
    """A third of the resamples lack it, so the error is NaN, also where both sides have an AP of 0."""
    weights = bootstrap_weights(30)
    with np.errstate(invalid="ignore"):
        resamples = np.where(weights[:, :1] > 0, 0.0, np.nan)
    run = Sampled(np.array([0.0]), resamples, 30, np.array([1]))
    for noise in (None, SeedNoise(np.array([0.0]), 2, 2)):
        result = compare([run, run], [run, run], noise)
        assert np.isnan([result.low, result.high, result.p]).all() and not result.is_real()


def test_an_interval_stays_within_what_a_difference_can_be() -> None:
    result = compare(seeds_alone(0.1, 0.9), seeds_alone(0.2, 0.8), SeedNoise(np.array([0.5]), 2, 2))
    assert (result.low[0], result.high[0]) == (-1, 1) and result.detectable[0] > 1


def test_degrees_of_freedom_are_those_of_the_images_with_objects() -> None:
    run = mean_of_images(np.arange(40) / 40, bootstrap_weights(40))
    other = mean_of_images((np.arange(40) / 40) ** 2, bootstrap_weights(40))
    few = [one._replace(with_objects=np.array([4])) for one in (run, other)]
    result = compare(few[:1], few[1:], None)
    assert result.freedom[0] == pytest.approx(3)
    np.testing.assert_allclose(result.high[0] - result.value[0], stats.t.ppf(0.975, 3) * result.error[0])
