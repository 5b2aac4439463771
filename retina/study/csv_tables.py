"""The results of a study as tables: a row for each group of cells, and a row for each run."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from typing import Any

from retina.config import COCO_METRICS
from retina.study.cells import Study
from retina.study.results import MAIN_METRICS, Group, best_of
from retina.study.verdicts import Verdicts


def group_rows(groups: list[Group], verdicts: Verdicts) -> Iterator[list[Any]]:
    """One row per group; AP in percent, as in the paper."""
    best = best_of(groups)
    numbers = [f"{name}_{kind}" for name in MAIN_METRICS for kind in ("mean", "sd")]
    yield [*groups[0].settings, "seeds", "diverged", *numbers, "paper_AP", "to_best", "exceeds_noise"]
    for group in groups:
        values = [value for name in MAIN_METRICS for value in (group.mean(name), group.sd(name))]
        yield [
            *map(_csv_value, group.settings.values()),
            len(group.values()),
            group.count("diverged"),
            *("" if math.isnan(value) else round(value, 4) for value in values),
            group.paper.get("AP", group.paper.get("text")),
            round(group.mean() - best.mean(), 4) if best is not None and group.values() else "",
            verdicts.is_worse(group, best),
        ]


def run_rows(study: Study, groups: list[Group]) -> Iterator[list[Any]]:
    """One row per run; metrics between 0 and 1, as pycocotools returns them."""
    runs = {run.cell.key: run for group in groups for run in group.runs}
    yield [*study.keys, "seed", "key", "status", *COCO_METRICS, "milliseconds", "seconds"]
    for cell in study.cells:
        run = runs[cell.key]
        result = run.result or {}
        metrics = [run.metrics.get(name) for name in COCO_METRICS]
        rest = [*metrics, result.get("milliseconds"), result.get("seconds")]
        yield [*map(_csv_value, cell.settings.values()), cell.seed, cell.key, run.status, *rest]


def _csv_value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def to_csv(rows: Iterator[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
