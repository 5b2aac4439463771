"""How often tools/compare.py is right: detectors with a known difference, on data sets drawn again and again.

    python benchmarks/compare_simulation.py [--trials 400] [--images 300] [--difference 2] [--seeds 3 --seed-sd 1]

A trial draws images with objects, and the detections of two detectors A and B on them. Some images and objects are hard
for both. The detectors are equal, or B is better by a planted number of AP points. With --seeds each side has several
trainings, whose quality varies. Prints how often the difference is called real, how often the interval has the true
one, and how often the standard errors promise that it is found: as often as a noncentral t exceeds Student's quantile.
The first is also printed for the AP of each class.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from retina.analysis.accumulate import accumulate
from retina.analysis.comparison import Difference, compare, seed_noise
from retina.analysis.intervals import LEVEL, bootstrap_weights, resample_ap
from retina.analysis.matches import Matches, match_detections
from retina.analysis.results_file import Results
from retina.data.annotations import Annotations

SHARES = np.array([0.6, 0.3, 0.1])  # of the objects, for each third of the classes
SIDE = 500  # pixels

Floats = NDArray[np.float64]


class Scene(NamedTuple):
    """A data set, and what its objects and images do to every detector."""

    shares: Floats  # (classes,) of the objects
    annotations: Annotations
    ease: Floats  # (objects,) how easy each is, that of its image included; 0 is average
    image_ease: Floats  # (images,)
    shift: Floats  # (objects, 4) standard normal: where a box is misplaced, in parts of its size


def draw_scene(rng: np.random.Generator, num_images: int, num_classes: int) -> Scene:
    """Images with 1 to about 20 objects."""
    shares = np.repeat(SHARES, num_classes // 3) / (num_classes // 3)
    counts = 1 + rng.negative_binomial(1.5, 0.25, num_images)
    images = np.repeat(np.arange(num_images), counts)
    total = len(images)
    sizes = np.exp(rng.normal(np.log(60), 0.7, (total, 2))).clip(8, 400)
    boxes = np.concatenate([rng.random((total, 2)) * (SIDE - sizes), sizes], axis=1)
    image_ease = rng.normal(0, 0.7, num_images)
    annotations = Annotations(
        Path("simulated"),
        np.arange(1, num_images + 1),
        np.array([f"{i}.jpg" for i in range(num_images)], np.dtypes.StringDType()),
        np.full(num_images, SIDE, np.int32),
        np.full(num_images, SIDE, np.int32),
        np.arange(1, total + 1),
        0,
        images,
        rng.choice(num_classes, total, p=shares).astype(np.int32),
        boxes,
        boxes[:, 2] * boxes[:, 3],
        np.zeros(total, np.bool_),
        list(range(1, num_classes + 1)),
        [f"class {k}" for k in range(num_classes)],
    )
    return Scene(
        shares, annotations, image_ease[images] + rng.normal(0, 0.7, total), image_ease, rng.normal(0, 1, (total, 4))
    )


def detect(rng: np.random.Generator, scene: Scene, quality: float) -> Results:
    """The detections of a detector: it misses, shifts and scores objects by their ease, and finds what is not there."""
    file = scene.annotations
    ease = scene.ease + quality + rng.normal(0, 0.4, len(scene.ease))
    seen = rng.random(len(ease)) < 1 / (1 + np.exp(-1.5 - ease))
    shift = np.sqrt(0.7) * scene.shift[seen] + np.sqrt(0.3) * rng.normal(0, 1, (seen.sum(), 4))
    shift *= 0.08 * np.exp(-0.35 * ease[seen])[:, None]
    size = file.boxes[seen, 2:]
    boxes = np.concatenate([file.boxes[seen, :2] + shift[:, :2] * size, size * np.exp(shift[:, 2:])], axis=1)
    logits = 1 + ease[seen] + rng.normal(0, 1, seen.sum())
    false = np.repeat(np.arange(len(file.image_ids)), rng.poisson(3 * np.exp(-0.3 * (quality + scene.image_ease))))
    false_sizes = np.exp(rng.normal(np.log(60), 0.7, (len(false), 2)))
    false_boxes = np.concatenate([rng.random((len(false), 2)) * SIDE, false_sizes], axis=1)
    scores = np.concatenate([logits, rng.normal(-1.2, 1, len(false))])
    return Results(
        np.concatenate([file.images[seen], false]),
        np.concatenate([file.labels[seen], rng.choice(len(scene.shares), len(false), p=scene.shares)]).astype(int),
        np.concatenate([boxes, false_boxes]),
        1 / (1 + np.exp(-scores)),
    )


def true_ap(quality: float, num_classes: int, num_images: int = 20_000, parts: int = 8) -> float:
    """AP in percent on a data set so large that chance plays little role; the mean of parts, to save memory."""
    values = []
    for part in range(parts):
        rng = np.random.default_rng([1, part])
        values.append(accumulate(match(rng, draw_scene(rng, num_images, num_classes), quality)).metrics["AP"] or 0)
    return 100 * float(np.mean(values))


def match(rng: np.random.Generator, scene: Scene, quality: float) -> Matches:
    return match_detections(scene.annotations, detect(rng, scene, quality))


def run_trial(rng: np.random.Generator, scene: Scene, qualities: Sequence[Floats], resamples: int) -> Difference:
    """`qualities`: of the trainings of A and of B."""
    weights = bootstrap_weights(len(scene.image_ease), resamples)
    a, b = ([resample_ap(match(rng, scene, quality), weights) for quality in side] for side in qualities)
    return compare(a, b, seed_noise([a, b]))


def promised_rate(results: list[Difference], planted: float) -> float:
    """How often such intervals leave out 0 if the true difference is `planted`, from 0 to 1.

    By the mean variance of the trials: an estimated error that is too small promises more than one that is as much too
    large promises less, so a mean over trials of what each promises would be too high.
    """
    error = np.sqrt(np.mean([result.error[0] ** 2 for result in results]))
    freedom = np.mean([result.freedom[0] for result in results])
    quantile = stats.t.ppf(0.5 + LEVEL / 2, freedom)
    return float(stats.nct.sf(quantile, freedom, planted / error) + stats.nct.cdf(-quantile, freedom, planted / error))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--images", type=int, default=300, help="validation images (%(default)s)")
    parser.add_argument("--classes", type=int, default=3, help="a multiple of 3 (%(default)s)")
    parser.add_argument("--difference", type=float, default=0.0, help="planted, in points of AP (%(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="trainings on each side (%(default)s)")
    parser.add_argument("--seed-sd", type=float, default=0.0, help="their standard deviation, points of AP")
    parser.add_argument("--resamples", type=int, default=1000)
    arguments = parser.parse_args()
    classes = arguments.classes
    start, points_per_quality = true_ap(0, classes), 5 * (true_ap(0.1, classes) - true_ap(-0.1, classes))
    shift = arguments.difference / points_per_quality
    planted = true_ap(shift, classes) - start if shift else 0.0
    print(f"AP {start:.1f}, planted difference {planted:.2f}, {arguments}")
    found: list[list[bool]] = []
    covered, results, values, widths = [], [], [], []
    for trial in range(arguments.trials):
        rng = np.random.default_rng([2026, trial])
        sd = arguments.seed_sd / points_per_quality
        sides = [quality + rng.normal(0, sd, arguments.seeds) for quality in (0.0, shift)]
        scene = draw_scene(rng, arguments.images, arguments.classes)
        result = run_trial(rng, scene, sides, arguments.resamples)
        value, low, high = 100 * result.value[0], 100 * result.low[0], 100 * result.high[0]
        found.append([result.is_real(column) for column in range(classes + 1)])
        covered.append(low <= planted <= high)
        values.append(value)
        widths.append((high - low) / 2)
        results.append(result)
    rows = {"called different": [row[0] for row in found], "interval has the true difference": covered}
    rows |= {f"class {k} called different": [row[k + 1] for row in found] for k in range(classes)}
    for name, rates in rows.items():
        rate = float(np.mean(rates))
        print(f"{name}: {100 * rate:.1f} % +- {100 * np.sqrt(rate * (1 - rate) / arguments.trials):.1f}")
    print(f"promised: {100 * promised_rate(results, planted / 100):.1f} %")
    print(
        f"measured: mean {np.mean(values):.2f}, sd {np.std(values, ddof=1):.2f}; mean half width {np.mean(widths):.2f}"
    )


if __name__ == "__main__":
    main()
