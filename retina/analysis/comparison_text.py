"""What a comparison says, in sentences and as the cells of a table, for the terminal and the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from retina.analysis.compared_runs import LETTERS, Comparison, rows_of
from retina.analysis.intervals import CONSTANT
from retina.analysis.tables import Row
from retina.analysis.text import percent
from retina.plural import plural

SAME_AP = 1e-9  # of equal detections, by another scorer
HEAD = ["", "A", "B", "B - A", "95 % interval", "p"]


def verdict(comparison: Comparison) -> str:
    """Whether one side is better, in a sentence or two."""
    result, count = comparison.difference, len(comparison.data.annotations.image_ids)
    value, low, high, p = (100 * float(part[0]) for part in (result.value, result.low, result.high, result.p))
    if math.isnan(value):
        return "There are no objects, so there is no AP to compare."
    better, worse = ("B", "A") if value > 0 else ("A", "B")
    these = "this one image" if count == 1 else f"these {count:,} images"
    if math.isnan(low):
        why = (
            "The difference is the same however the images are drawn"
            if result.error[0] <= CONSTANT
            else "Too few images"
        )
        which = f"{better} has {abs(value):.2f} AP more than {worse}" if value else "A and B have the same AP"
        return f"{which} on {these}. {why}, so there is no interval, and nothing follows."
    if value == low == high == 0:
        return "A and B have the same AP, whichever images are drawn."
    if result.is_real():
        near, far = sorted((abs(low), abs(high)))
        return (
            f"{better} is better than {worse} by {abs(value):.2f} AP (95 % interval {near:.2f} to {far:.2f}, "
            f"p {format_p(p / 100)}) on images like {these.removesuffix(' images')}."
        )
    detectable = float(result.detectable[0])
    found = (
        f"So few {'images' if comparison.noise is None else 'trainings'} cannot show a difference of any size."
        if detectable > 1
        else f"A true difference of {100 * detectable:.1f} AP would be found in four of five such comparisons; smaller "
        "ones are often missed."
    )
    return (
        f"Which one is better is not known: {better} has {abs(value):.2f} AP more on {these}, but the 95 % interval of "
        f"B - A is {low:+.2f} to {high:+.2f} (p {format_p(p / 100)}). {found}"
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
        freedom = comparison.noise.degrees_of_freedom
        seeds = (
            f"{counts[0]} and {plural(counts[1], 'training')}: the interval is for other seeds and other images. "
            f"AP has a standard deviation of {100 * comparison.noise.sd[0]:.2f} over seeds "
            f"({plural(freedom, 'degree')} of freedom). Other settings or another data set are not part of it."
        )
        if 1 in counts:
            seeds += f" {LETTERS[counts.index(1)]} has one training; its seed noise is taken to be that of the other."
    remarks = [*_other_checkpoints(comparison), *_other_settings(comparison)]
    images = "Other images means images drawn like these. Data of another kind may order A and B differently."
    rows = len(rows_of(comparison)) - 1
    if rows < 1:
        return [*remarks, seeds, images]
    return [
        *remarks,
        seeds,
        images,
        f"The rows below AP are {rows} more comparisons. Among {rows} true zeros about {rows / 20:.1f} would leave out "
        "0 by chance, so one of them alone proves little.",
    ]


def _other_checkpoints(comparison: Comparison) -> list[str]:
    """A sentence for each run whose detections are not those of its last evaluation."""
    return [
        f"{Path(run.name).as_posix()}: its last evaluation had an AP of {100 * run.last_ap:.2f}, these detections have "
        f"{100 * ap:.2f}. Either images could not be read, which did not count there, or they are of other weights: "
        "tools/eval.py writes those of best.pt, which was chosen on these images and so has an advantage over a "
        f"last.pt. For those of the last weights: tools/eval.py {Path(run.name).as_posix()}/last.pt"
        for side in comparison.sides
        for run, ap in zip(side.runs, side.ap, strict=True)
        if run.last_ap is not None and abs(run.last_ap - ap) > SAME_AP
    ]


def _other_settings(comparison: Comparison) -> list[str]:
    keys = comparison.data.differences
    if not keys:
        return []
    return [f"The trainings of one side differ in {', '.join(keys)}, and not only in the seed."]


def format_p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}" if p < 0.1 else f"= {p:.2f}"


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
    """A line for each side: its runs with their AP."""
    return [
        f"{letter}: "
        + ", ".join(
            f"{Path(run.name).as_posix()} (AP {'-' if math.isnan(ap) else f'{100 * ap:.2f}'})"
            for run, ap in zip(side.runs, side.ap, strict=True)
        )
        for letter, side in zip(LETTERS, comparison.sides, strict=True)
    ]
