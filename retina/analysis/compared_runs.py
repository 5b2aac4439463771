"""Two sides of a comparison, A and B: their runs, the numbers of each, the difference, and its rows for the files."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from retina.analysis.comparison import Difference, SeedNoise, compare, seed_noise
from retina.analysis.image_errors import ImageErrors, count_image_errors
from retina.analysis.intervals import Sampled, bootstrap_weights, resample
from retina.analysis.matches import Floats, Matches, match_detections
from retina.analysis.runs import Run, RunData
from retina.analysis.scoring import describe_disagreement, list_differences, score
from retina.analysis.tables import Row
from retina.config import COCO_METRICS

LETTERS = "AB"


class Side(NamedTuple):
    """A or B: trainings that differ only in the seed, and what they are worth."""

    runs: list[Run]
    matches: list[Matches]
    errors: list[ImageErrors]
    ap: list[float]  # from 0 to 1; NaN without objects

    def mean_errors(self) -> Floats:
        """(B,) errors on each image, on average over the trainings."""
        mean: Floats = np.mean([errors.mean() for errors in self.errors], axis=0)
        return mean


class Comparison(NamedTuple):
    """Everything that is said about two sides."""

    data: RunData
    sides: list[Side]
    noise: SeedNoise | None
    difference: Difference
    disagreement: str  # an error message if another scorer gives other numbers, else ""

    @property
    def columns(self) -> list[str]:
        """Names of the numbers: COCO_METRICS, then the classes."""
        return [*COCO_METRICS, *self.data.annotations.distinct_names]

    def changes(self) -> Floats:
        """(B,) the errors of B minus those of A on each image."""
        before, after = (side.mean_errors() for side in self.sides)
        return after - before


def compare_runs(data: RunData) -> Comparison:
    """Match, resample and compare the two sides of `data`. DataError without images."""
    weights = bootstrap_weights(len(data.annotations.image_ids))
    sides, sampled, different = [], [], []
    for runs in data.sides:
        matches = [match_detections(data.annotations, run.results) for run in runs]
        sampled.append([resample(one, weights) for one in matches])
        ap = [float(one.numbers[0]) for one in sampled[-1]]
        sides.append(Side(runs, matches, [count_image_errors(one) for one in matches], ap))
        for run, one in zip(runs, sampled[-1], strict=True):
            different += [f"{run.name}: {text}" for text in _check(data, run, one)]
    noise = seed_noise(sampled)
    message = describe_disagreement(different, "The numbers of this comparison may be wrong.")
    return Comparison(data, sides, noise, compare(sampled[0], sampled[1], noise), message)


def _check(data: RunData, run: Run, sampled: Sampled) -> list[str]:
    """What hotcoco says otherwise about a run. pycocotools would take longer than the whole comparison."""
    numbers = [_number(value) for value in sampled.numbers]
    own: dict[str, Any] = dict(zip(COCO_METRICS, numbers, strict=False))
    own["per_class"] = dict(zip(data.annotations.distinct_names, numbers[len(COCO_METRICS) :], strict=True))
    return list_differences(own, "this comparison", score(data.annotations, run.results).metrics, "hotcoco")


def rows_of(comparison: Comparison) -> list[Row]:
    """A row for each COCO number, and for each class with objects, the most frequent first; from 0 to 1."""
    matches, result, noise = comparison.sides[0].matches[0], comparison.difference, comparison.noise
    counted = matches.object_labels[~matches.object_ignored[0]]
    objects = np.bincount(counted, minlength=len(matches.names))
    order = [*range(len(COCO_METRICS)), *(len(COCO_METRICS) + np.argsort(-objects, kind="stable")).tolist()]
    return [
        {
            "name": comparison.columns[i],
            "kind": "metric" if i < len(COCO_METRICS) else "class",
            "objects": None if i < len(COCO_METRICS) else int(objects[i - len(COCO_METRICS)]),
            **{name: _number(values[i]) for name, values in result._asdict().items()},
            "seed_sd": None if noise is None else _number(noise.sd[i]),
        }
        for i in order
        if not math.isnan(result.value[i])
    ]


def run_rows(comparison: Comparison) -> list[Row]:
    """A row for each run: its side and its AP from 0 to 1."""
    return [
        {"side": letter, "run": run.name, "AP": _number(ap)}
        for letter, side in zip(LETTERS, comparison.sides, strict=True)
        for run, ap in zip(side.runs, side.ap, strict=True)
    ]


def image_rows(comparison: Comparison) -> list[Row]:
    """A row for each image: its errors on both sides, those that changed most first."""
    file, matches = comparison.data.annotations, comparison.sides[0].matches[0]
    names = dict(zip(file.image_ids.tolist(), file.file_names.tolist(), strict=True))
    before, after = (side.mean_errors() for side in comparison.sides)
    order = np.argsort(-np.abs(after - before), kind="stable").tolist()
    ids = matches.image_ids.tolist()
    return [
        {"image_id": ids[i], "file": names[ids[i]], "errors_a": float(before[i]), "errors_b": float(after[i])}
        for i in order
    ]


def _number(value: Any) -> float | None:
    return None if math.isnan(value) else float(value)
