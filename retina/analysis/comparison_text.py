"""What a comparison says, in sentences and tables, for the terminal, the page and the files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retina.analysis.comparison import Difference, SeedNoise, compare, seed_noise
from retina.analysis.image_errors import ImageErrors, count_image_errors
from retina.analysis.intervals import bootstrap_weights, resample
from retina.analysis.matches import Floats, Matches, match_detections
from retina.analysis.runs import Run, RunData
from retina.analysis.tables import Row
from retina.analysis.text import percent
from retina.config import COCO_METRICS

HEAD = ["", "A", "B", "B - A", "95 % interval", "p"]
LETTERS = "AB"


class Side(NamedTuple):
    """A or B: trainings that differ only in the seed, and what they are worth."""

    runs: list[Run]
    matches: list[Matches]
    errors: list[ImageErrors]

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

    @property
    def columns(self) -> list[str]:
        """Names of the numbers: COCO_METRICS, then the classes."""
        return [*COCO_METRICS, *self.data.annotations.names]

    def changes(self) -> Floats:
        """(B,) the errors of B minus those of A on each image."""
        before, after = (side.mean_errors() for side in self.sides)
        return after - before


def compare_runs(data: RunData) -> Comparison:
    """Match, resample and compare the two sides of `data`."""
    weights = bootstrap_weights(len(data.annotations.image_ids))
    sides, sampled = [], []
    for runs in data.sides:
        matches = [match_detections(data.annotations, run.results) for run in runs]
        sides.append(Side(runs, matches, [count_image_errors(one) for one in matches]))
        sampled.append([resample(one, weights) for one in matches])
    noise = seed_noise(sampled)
    return Comparison(data, sides, noise, compare(sampled[0], sampled[1], noise))


def verdict(comparison: Comparison) -> str:
    """Whether one side is better, in a sentence or two."""
    result, count = comparison.difference, len(comparison.data.annotations.image_ids)
    value, low, high, p = (100 * float(part[0]) for part in (result.value, result.low, result.high, result.p))
    if math.isnan(value):
        return "There are no objects, so there is no AP to compare."
    if math.isnan(low):
        return f"B has {value:+.2f} AP. With objects on so few images nothing follows from that."
    if value == low == high == 0:
        return "A and B have the same AP, whichever images are drawn: their detections do not differ."
    better, worse = ("B", "A") if value > 0 else ("A", "B")
    if result.is_real():
        near, far = sorted((abs(low), abs(high)))
        return (
            f"{better} is better than {worse} by {abs(value):.2f} AP (95 % interval {near:.2f} to {far:.2f}, "
            f"p {format_p(p / 100)}) on images like these {count}."
        )
    return (
        f"Which one is better is not known: {better} has {abs(value):.2f} AP more on these {count} images, but the "
        f"95 % interval of B - A is {low:+.2f} to {high:+.2f} (p {format_p(p / 100)}). A true difference of "
        f"{100 * result.detectable[0]:.1f} AP would be found in four of five such comparisons; smaller ones are often "
        "missed."
    )


def limits(comparison: Comparison) -> list[str]:
    """What does not follow from the verdict."""
    counts = [len(side.runs) for side in comparison.sides]
    if comparison.noise is None:
        seeds = (
            "One training on each side: how much another seed would change the difference is not part of the interval. "
            "The verdict is about these two sets of weights, not about two ways to train."
        )
    else:
        seeds = (
            f"{counts[0]} and {counts[1]} trainings: the interval is for other seeds and other images. AP has a "
            f"standard deviation of {100 * comparison.noise.sd[0]:.2f} over seeds. Other settings or another data set "
            "are not part of it."
        )
        if 1 in counts:
            seeds += f" {LETTERS[counts.index(1)]} has one training; its seed noise is taken to be that of the other."
    rows = len(rows_of(comparison)) - 1
    return [
        seeds,
        "Other images means images drawn like these. Data of another kind may order A and B differently.",
        f"The rows below AP are {rows} more comparisons. Among {rows} true zeros about {rows / 20:.0f} would leave out "
        "0 by chance, so one of them alone proves little.",
    ]


def format_p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}" if p < 0.1 else f"= {p:.2f}"


def rows_of(comparison: Comparison) -> list[Row]:
    """A row for each COCO number, and for each class with objects, the most frequent first; from 0 to 1."""
    matches, result = comparison.sides[0].matches[0], comparison.difference
    counted = matches.object_labels[~matches.object_ignored[0]]
    objects = np.bincount(counted, minlength=len(matches.names))
    order = [*range(len(COCO_METRICS)), *(len(COCO_METRICS) + np.argsort(-objects, kind="stable")).tolist()]
    return [
        {
            "name": comparison.columns[i],
            "kind": "metric" if i < len(COCO_METRICS) else "class",
            "objects": None if i < len(COCO_METRICS) else int(objects[i - len(COCO_METRICS)]),
            **{name: _number(values[i]) for name, values in result._asdict().items()},
        }
        for i in order
        if not math.isnan(result.value[i])
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


def table_rows(rows: Sequence[Row]) -> list[list[str]]:
    """The rows as text, in percent, for HEAD."""
    return [
        [
            row["name"],
            percent(row["a"]),
            percent(row["b"]),
            f"{100 * row['value']:+.2f}",
            "-" if row["low"] is None else f"{100 * row['low']:+.2f} to {100 * row['high']:+.2f}",
            "-" if row["p"] is None else format_p(row["p"]).removeprefix("= "),
        ]
        for row in rows
    ]


def describe_sides(comparison: Comparison) -> list[str]:
    """A line for each side: its runs."""
    return [
        f"{letter}: {', '.join(Path(run.name).as_posix() for run in side.runs)}"
        for letter, side in zip(LETTERS, comparison.sides, strict=True)
    ]


def _number(value: Any) -> float | None:
    return None if math.isnan(value) else float(value)
