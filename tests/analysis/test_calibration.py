"""The calibration of scores compared with scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from rows import match
from scipy.special import expit, logit
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss as sklearn_log_loss

from retina.analysis.calibration import (
    BINS,
    Temperature,
    calibrate,
    fit_temperature,
    log_loss,
    reliability,
    scale_scores,
)


def sample(temperature: float, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and right detections whose probability is the score after dividing its logit by `temperature`."""
    rng = np.random.default_rng(seed)
    scores = rng.beta(0.7, 1.5, count).clip(1e-6, 1 - 1e-6)
    return scores, rng.random(count) < expit(logit(scores) / temperature)


def test_reliability_is_that_of_scikit_learn() -> None:
    scores, right = sample(2, 3000)
    ours = reliability(scores, right)
    precision, mean_scores = calibration_curve(right, scores, n_bins=BINS)
    used = ours.counts > 0
    np.testing.assert_allclose(ours.precision[used], precision)
    np.testing.assert_allclose(ours.scores[used], mean_scores)
    assert ours.counts.sum() == 3000
    assert ours.d_ece == pytest.approx(np.average(np.abs(precision - mean_scores), weights=ours.counts[used]))


def test_d_ece_by_hand() -> None:
    ours = reliability(np.array([0.91, 0.93, 0.61, 1.0]), np.array([True, False, False, True]))
    assert ours.d_ece == pytest.approx((2 * abs(0.92 - 0.5) + 0.61 + 0) / 4), "1.0 is in the bin from 0.95"
    assert np.isnan(reliability(np.empty(0), np.empty(0, bool)).d_ece)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_temperature_is_that_of_a_logistic_regression(temperature: float) -> None:
    scores, right = sample(temperature, 4000)
    regression = LogisticRegression(C=np.inf, fit_intercept=False).fit(logit(scores)[:, None], right)
    fitted = fit_temperature(scores, right)
    assert fitted == pytest.approx(1 / regression.coef_[0, 0], rel=1e-3)
    assert fitted == pytest.approx(temperature, rel=0.1)
    scaled = scale_scores(scores, fitted)
    np.testing.assert_allclose(scaled, regression.predict_proba(logit(scores)[:, None])[:, 1], atol=1e-3)
    assert log_loss(scaled, right) == pytest.approx(sklearn_log_loss(right, scaled))


def test_temperature_is_tested_on_the_other_half() -> None:
    """Each image has ten objects and a detection for each; one with a score above 0.5 is mostly right."""
    rng = np.random.default_rng(1)
    objects, detections = [], []
    for image in range(30):
        for place in range(10):
            box = [30.0 * place, 0, 20, 20]
            objects.append([image, 0, *box, 0])
            score = float(rng.uniform(0.2, 0.8))
            found = rng.random() < expit(logit(score) / 0.3)
            detections.append([image, 0, *(box if found else [30.0 * place, 200, 20, 20]), score])
    result = calibrate(match(30, 1, objects, detections), 0.5)
    found = result.temperature
    assert isinstance(found, Temperature) and (found.fitted_images, found.tested_images) == (15, 15)
    assert found.value == pytest.approx(0.3, rel=0.35)
    assert found.before.counts.sum() == found.after.counts.sum() == 150, "the detections of half of the images"
    assert found.after.d_ece < found.before.d_ece and found.log_loss_after < found.log_loss_before
    assert result.all.counts.sum() == 300
    assert result.kept.counts.sum() == sum(row[-1] >= 0.5 for row in detections)
    changed = []  # images whose detections the temperature depends on
    for image in range(30):
        rows = [[*row[:2], 0, 300, 20, 20, 0.79] if row[0] == image else row for row in detections]
        again = calibrate(match(30, 1, objects, rows), 0.5).temperature
        assert isinstance(again, Temperature)
        changed += [image] * (again.value != found.value)
    assert len(changed) == 15
    few = calibrate(match(30, 1, objects, detections[:40]), 0.5).temperature
    assert few == "a half of the images has fewer than 50 detections"
    all_right = [[image, 0, 30.0 * place, 0, 20, 20, 0.7] for image in range(30) for place in range(10)]
    alike = calibrate(match(30, 1, objects, all_right), 0.5).temperature
    assert alike == "all detections on a half of the images are right"
