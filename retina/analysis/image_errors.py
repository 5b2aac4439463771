"""The errors of a detector on each image, at the score that suits it best: which images two runs differ on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from retina.analysis.matches import Bools, Floats, Ints, Matches
from retina.analysis.thresholds import best_threshold, score_curve


class ImageErrors(NamedTuple):
    """Errors of the detections with at least `score`, which has the best F1 at IoU 0.5; -inf if none is right.

    B images, T IoU thresholds.
    """

    score: float
    missed: Ints  # (T, B) objects without detection
    wrong: Ints  # (T, B) detections without object

    def mean(self) -> Floats:
        """(B,) missed objects and wrong detections, on average over the ten IoU thresholds."""
        errors: Floats = (self.missed + self.wrong).mean(axis=0)
        return errors


def count_image_errors(matches: Matches) -> ImageErrors:
    """The errors on each image."""
    threshold = best_threshold(score_curve(matches))
    score = threshold.score if threshold else -np.inf
    num_images, kept = len(matches.image_ids), matches.scores >= score
    objects = np.bincount(matches.object_images[~matches.object_ignored[0]], minlength=num_images)

    def by_image(chosen_TD: Bools) -> Ints:
        return np.stack([np.bincount(matches.images[chosen], minlength=num_images) for chosen in chosen_TD])

    found = by_image(matches.right[0] & kept)
    wrong = by_image((matches.found[0] < 0) & ~matches.ignored[0] & kept)
    return ImageErrors(float(score), objects - found, wrong)
