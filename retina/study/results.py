"""The results of a study: its cells grouped by their settings."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from retina.config import COCO_METRICS
from retina.data.annotations import DataError, read_annotations
from retina.study.cells import Cell, Settings, Study, format_value, short_key
from retina.study.paper import paper_row, paper_tables

MAIN_METRICS = COCO_METRICS[:3]
MAX_PLOTTED_GROUPS = 7  # more could not be told from each other in a figure


@dataclass(frozen=True)
class Run:
    """One run of a study and its result so far."""

    cell: Cell
    result: dict[str, Any] | None
    failure: str | None  # why the cell was given up

    @property
    def status(self) -> str:
        if self.result is None:
            return "waiting" if self.failure is None else "failed"
        return "finished" if self.result["diverged"] is None else "diverged"

    @property
    def metrics(self) -> dict[str, Any]:
        return (self.result or {}).get("metrics") or {}


@dataclass(frozen=True)
class Group:
    """The runs that differ only in their seed. All numbers are percent."""

    settings: Settings
    runs: list[Run]
    paper: dict[str, Any]  # {column: number}, or {"text": word}, or empty

    @property
    def label(self) -> str:
        return ", ".join(f"{short_key(key)} {format_value(value)}" for key, value in self.settings.items())

    def count(self, status: str) -> int:
        return sum(run.status == status for run in self.runs)

    def values(self, name: str = "AP") -> list[float]:
        return [100 * run.metrics[name] for run in self.runs if run.metrics.get(name) is not None]

    def mean(self, name: str = "AP") -> float:
        return mean(self.values(name))

    def sd(self, name: str = "AP") -> float:
        return sd(self.values(name))


def group_cells(study: Study) -> list[Group]:
    """One group for each combination of settings, in the order of the study."""
    all_tables = paper_tables()
    tables = [all_tables[name] for name in study.paper]
    groups: dict[str, Group] = {}
    for cell in study.cells:
        group = groups.setdefault(
            json.dumps(cell.settings), Group(cell.settings, [], paper_row(tables, cell.config) or {})
        )
        group.runs.append(Run(cell, cell.result(), cell.failure()))
    return list(groups.values())


def with_ap(groups: list[Group]) -> list[Group]:
    return [group for group in groups if group.values()]


def best_of(groups: list[Group]) -> Group | None:
    """The group with the highest mean AP among those that did not diverge with any seed.

    None also if the groups were measured on different images.
    """
    if len({run.cell.config.data.val_annotations for group in with_ap(groups) for run in group.runs}) > 1:
        return None
    return max((group for group in with_ap(groups) if not group.count("diverged")), key=Group.mean, default=None)


def select_for_plots(groups: list[Group]) -> list[Group]:
    """All groups with an AP, or seven of them: the best, the worst, and five evenly spaced by rank between them."""
    measured = with_ap(groups)
    if len(measured) <= MAX_PLOTTED_GROUPS:
        return measured
    ranked = sorted(measured, key=Group.mean, reverse=True)
    return [ranked[round(rank)] for rank in np.linspace(0, len(ranked) - 1, MAX_PLOTTED_GROUPS)]


@cache  # reading the annotations of COCO takes seconds
def count_images_and_objects(annotations: str) -> tuple[int | None, dict[str, int]]:
    """(number of images, objects by class, most frequent class first); (None, {}) if the file cannot be read."""
    try:
        file = read_annotations(Path(annotations))
    except DataError:
        return None, {}
    counts = np.bincount(file.labels[~file.crowd], minlength=len(file.names)).tolist()
    classes = dict(zip(file.distinct_names, counts, strict=True))
    return len(file.image_ids), dict(sorted(classes.items(), key=lambda item: -item[1]))


def number_of_images(files: Sequence[str]) -> str:
    """Of the annotation files of the cells, as text: 200, or 50 or 200."""
    numbers = {count_images_and_objects(file)[0]: None for file in files}
    return "an unknown number of" if None in numbers else " or ".join(map(str, numbers))


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def sd(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def as_number(value: Any) -> float | None:
    """2, 0.5 and [400] as a float; None for null, words and booleans."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def distinct_values(groups: list[Group], key: str) -> list[Any]:
    """The values of a key: numbers in ascending order, others in the order of the study."""
    values = list({json.dumps(group.settings[key]): group.settings[key] for group in groups}.values())
    return sorted(values, key=lambda v: as_number(v) or 0) if all(as_number(v) is not None for v in values) else values
