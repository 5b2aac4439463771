"""Where a recommended score threshold should lie: python benchmarks/threshold.py

The threshold with the best F1 is chosen on a few objects and used on others. Every number between the lowest score that
it keeps and the next one is as good on the first ones. Right detections have scores of Beta(8, 2), wrong ones of
Beta(1.2, 8), one for each object; a right one is missing for one object in ten.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retina.analysis.thresholds import ScoreCurve, best_threshold

DRAWS = 2000
LARGE = 100_000  # objects on which F1 is measured


def draw(rng: np.random.Generator, objects: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Scores, and whether each is right."""
    found = int((rng.random(objects) < 0.9).sum())
    scores = np.concatenate([rng.beta(8, 2, found), rng.beta(1.2, 8, objects)])
    return scores, np.arange(len(scores)) < found


def curve_of(scores: NDArray[np.float64], right: NDArray[np.bool_], objects: int) -> ScoreCurve:
    order = np.argsort(-scores)
    true = np.cumsum(right[order])
    return ScoreCurve(scores[order], true, np.arange(1, len(scores) + 1) - true, objects)


def f1_at(curve: ScoreCurve, threshold: float) -> float:
    return float(curve.f1[max(np.searchsorted(-curve.scores, -threshold) - 1, 0)])


def main() -> None:
    rng = np.random.default_rng(0)
    others = curve_of(*draw(rng, LARGE), LARGE)
    print(f"best possible F1 on other objects: {others.f1.max():.3f}; means of {DRAWS} draws")
    print("objects  just below the lowest score kept  in the middle of the gap")
    for objects in (5, 10, 20, 50, 200):
        below, middle = [], []
        for _ in range(DRAWS):
            curve = curve_of(*draw(rng, objects), objects)
            best = best_threshold(curve)
            if best is None:
                continue
            last = int(curve.f1.argmax())
            below.append(f1_at(others, float(curve.scores[last])))
            middle.append(f1_at(others, best.score))
        print(f"{objects:7}  {np.mean(below):32.3f}  {np.mean(middle):24.3f}")


if __name__ == "__main__":
    main()
