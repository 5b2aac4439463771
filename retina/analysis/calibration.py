"""Whether a score is the probability that a detection is right.

If it is, 80 of 100 detections with a score of about 0.8 are right. Focal loss changes this (Mukhoti et al.,
"Calibrating Deep Neural Networks using Focal Loss", NeurIPS 2020). The AP depends on the order of the scores alone, so
it does not show this.

D-ECE (Küppers et al., "Multivariate Confidence Calibration for Object Detection", CVPR workshops 2020, here over the
score alone) is the mean difference between score and precision, over bins of equal width, weighted with the number of
their detections. Temperature scaling (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017) divides the
logits of all scores by one number.

Legend: B images, D detections, N bins.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit

from retina.analysis.matches import Bools, Floats, Matches
from retina.analysis.thresholds import counted, is_right

BINS = 20
MIN_DETECTIONS = 50  # in each half, to fit a temperature


class Reliability(NamedTuple):
    """Score and precision in N bins of equal width from 0 to 1. NaN in a bin without detections."""

    counts: NDArray[np.int64]  # (N,) detections
    scores: Floats  # (N,) their mean score
    precision: Floats  # (N,) share of them that is right

    @property
    def d_ece(self) -> float:
        """D-ECE, from 0 to 1; NaN without detections."""
        return self.mean(np.abs(self.scores - self.precision))

    def mean(self, values: Floats) -> float:
        """The mean of values (N,), weighted with the detections of their bins; NaN without detections."""
        total = self.counts.sum()
        return float(np.nansum(values * self.counts) / total) if total else float("nan")


class Temperature(NamedTuple):
    """A temperature fitted on one half of the images, and what it does on the other half."""

    value: float  # above 1 the scores were too far from 0.5, below 1 too close to it
    fitted_images: int
    tested_images: int
    before: Reliability  # on the other half
    after: Reliability
    log_loss_before: float
    log_loss_after: float


class Calibration(NamedTuple):
    """The calibration of all detections."""

    all: Reliability
    kept: Reliability  # detections with at least the recommended score
    temperature: Temperature | str  # why there is none


def calibrate(matches: Matches, score: float) -> Calibration:
    """Measure the calibration at IoU 0.5, and fit a temperature on half of the images, drawn at random.

    `score`: the threshold of `Calibration.kept`.
    """
    used = counted(matches)
    scores, right, images = matches.scores[used].clip(0, 1), is_right(matches)[used], matches.images[used]
    kept = scores >= score
    num_images = len(matches.image_ids)
    half = np.random.default_rng(0).permutation(num_images) < num_images // 2
    return Calibration(
        reliability(scores, right),
        reliability(scores[kept], right[kept]),
        _test_temperature(scores, right, half[images], half),
    )


def reliability(scores: Floats, right: Bools) -> Reliability:
    """Score and precision of `scores` (D,), from 0 to 1, in BINS bins; a score between two bins is in the upper one."""
    bins = np.minimum((scores * BINS).astype(np.int64), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    with np.errstate(invalid="ignore"):
        return Reliability(
            counts,
            np.bincount(bins, scores, minlength=BINS) / counts,
            np.bincount(bins, right, minlength=BINS) / counts,
        )


def _test_temperature(scores: Floats, right: Bools, fitted: Bools, half: Bools) -> Temperature | str:
    """`fitted` (D,): the detections on the images of `half` (B,)."""
    for part in (fitted, ~fitted):
        if part.sum() < MIN_DETECTIONS:
            return f"a half of the images has fewer than {MIN_DETECTIONS} detections"
        if right[part].all() or not right[part].any():
            return f"all detections on a half of the images are {'right' if right[part].all() else 'wrong'}"
    value = fit_temperature(scores[fitted], right[fitted])
    scores, right = scores[~fitted], right[~fitted]
    scaled = scale_scores(scores, value)
    return Temperature(
        value,
        int(half.sum()),
        int((~half).sum()),
        reliability(scores, right),
        reliability(scaled, right),
        log_loss(scores, right),
        log_loss(scaled, right),
    )


def fit_temperature(scores: Floats, right: Bools) -> float:
    """The temperature with the lowest log loss, between 0.05 and 20."""
    found = minimize_scalar(
        lambda log: log_loss(scale_scores(scores, np.exp(log)), right), bounds=(-3, 3), method="bounded"
    )
    return float(np.exp(found.x))


def scale_scores(scores: Floats, temperature: float) -> Floats:
    """The scores after dividing their logits by the temperature."""
    scaled: Floats = expit(logit(_inside(scores)) / temperature)
    return scaled


def log_loss(scores: Floats, right: Bools) -> float:
    """The mean negative log likelihood of what is right, in nats."""
    likelihood = _inside(np.where(right, scores, 1 - scores))
    return float(-np.log(likelihood).mean())


def _inside(scores: Floats) -> Floats:
    """Away from 0 and 1, whose logits are infinite."""
    return scores.clip(1e-12, 1 - 1e-12)
