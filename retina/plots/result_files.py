"""Reads the result files of a run, for plots."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))  # Windows programs write a byte order mark
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def read_metrics(
    path: Path, columns: Sequence[str] = ("step", "loss", "loss_cls", "loss_box", "lr")
) -> dict[str, NDArray[np.float64]]:
    """Columns of a metrics.csv by name, sorted by step.

    Of a step that is there twice (a resumed run) the later line counts. An incomplete last line, which the run may be
    writing, is ignored.

    Args:
        path: the metrics.csv of a run.
        columns: the names to read, "step" first.

    Returns:
        One array (steps,) for each name, in the order of `columns`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, or a value is not a number.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: is {path.parent} the folder of a run?")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := set(columns) - set(reader.fieldnames or ()):
            raise ValueError(f"{path} lacks the columns {sorted(missing)}; it has {reader.fieldnames}")
        rows = list(reader)
    if rows and None in rows[-1].values():
        rows.pop()
    by_step: dict[float, list[float]] = {}
    for number, row in enumerate(rows, start=2):
        try:
            values = [float(row[column]) for column in columns]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: not numbers: {row}") from error
        by_step[values[0]] = values
    table = np.array([by_step[step] for step in sorted(by_step)]).reshape(-1, len(columns))
    return dict(zip(columns, table.T, strict=True))
