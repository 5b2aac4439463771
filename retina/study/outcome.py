"""How far a run of a study has come and how it ended, read from its folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from retina.atomic_files import write_text
from retina.study.cells import Cell


def last_evaluation(cell: Cell) -> dict[str, Any] | None:
    """The last entry of eval.json."""
    path = cell.folder / "eval.json"
    entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return entries[-1] if entries else None


def is_trained(cell: Cell) -> bool:
    """Whether the evaluation after the last step is there."""
    evaluation = last_evaluation(cell)
    return evaluation is not None and bool(evaluation["step"] == cell.config.train.steps)


def write_result(cell: Cell, seconds: float | None, milliseconds: float | None) -> dict[str, Any] | None:
    """result.json of a training that has ended by itself, finished or diverged; None where there is more to do.

    `seconds` is None where the training was not one piece; what was known before is kept then.
    """
    broken = sorted(
        json.loads(p.read_text(encoding="utf-8"))["step"] for p in cell.folder.glob("nonfinite_step_*.json")
    )
    if is_trained(cell):
        metrics, diverged = {k: v for k, v in (last_evaluation(cell) or {}).items() if k != "step"}, None
    elif broken:
        metrics, diverged = None, broken[-1]
    else:
        return None
    before = cell.result() or {}
    result = {
        "settings": cell.settings,
        "seed": cell.seed,
        "step": cell.config.train.steps if diverged is None else diverged,
        "metrics": metrics,
        "diverged": diverged,
        "milliseconds": milliseconds,
        "seconds": before.get("seconds") if seconds is None else seconds,
    }
    write_text(cell.folder / "result.json", json.dumps(result, indent=1))
    return result


def describe_result(result: dict[str, Any]) -> str:
    """A result in a word: AP 39.8."""
    if result["diverged"] is not None:
        return f"diverged at step {result['diverged']}"
    ap = result["metrics"]["AP"]
    return "no AP: nothing to measure" if ap is None else f"AP {100 * ap:.1f}"


def error_line(log: Path) -> str:
    """The line of a log that says what went wrong: the last one with an error in it, else the last one."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    telling = [line for line in lines if re.match(r"error: |(\w+\.)*\w*(Error|Exception)\b", line)]
    said = [line for line in telling if "ChildFailedError" not in line and "SignalException" not in line] or lines
    return said[-1].strip().removeprefix("error: ") if said else "no output"


def checkpoint_time(cell: Cell) -> int:
    """Tells checkpoints apart; 0 without one."""
    path = cell.folder / "last.pt"
    return path.stat().st_mtime_ns if path.exists() else 0


def last_logged_step(cell: Cell) -> int:
    """The last step in metrics.csv."""
    path = cell.folder / "metrics.csv"
    rows = path.read_text(encoding="utf-8").splitlines()[1:] if path.exists() else []
    return int(float(rows[-1].split(",")[0])) if rows else 0
