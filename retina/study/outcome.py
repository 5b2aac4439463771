"""How far a run of a study is and how it ended, read from the files in its folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from retina.atomic_files import write_text
from retina.study.cells import Cell


def evaluations(cell: Cell) -> list[dict[str, Any]]:
    """The entries of eval.json."""
    path = cell.folder / "eval.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def is_trained(cell: Cell) -> bool:
    """Whether eval.json has the evaluation after the last step, or after that of train.early_stop."""
    entries, train = evaluations(cell), cell.config.train
    if not entries:
        return False
    values = [value for entry in entries if (value := entry[train.best_metric]) is not None]
    since_best = len(values) - 1 - values.index(max(values)) if values else 0
    return bool(entries[-1]["step"] == train.steps) or 0 < train.early_stop <= since_best


def write_result(cell: Cell, seconds: float | None, milliseconds: float | None, code: str) -> dict[str, Any] | None:
    """Write and return result.json of a run that is trained or has diverged; None for a run that is neither.

    `seconds` is None if the run was resumed; the value of an earlier result.json is kept then. `code`: the
    `code_digest` at the start of the run.
    """
    nonfinite_steps = sorted(
        json.loads(p.read_text(encoding="utf-8"))["step"] for p in cell.folder.glob("nonfinite_step_*.json")
    )
    step, diverged = 0, None
    if is_trained(cell):
        metrics = evaluations(cell)[-1]
        step = metrics.pop("step")
    elif nonfinite_steps:
        metrics, diverged = None, nonfinite_steps[-1]
        step = diverged
    else:
        return None
    earlier = cell.result() or {}
    result = {
        "settings": cell.settings,
        "seed": cell.seed,
        "step": step,
        "metrics": metrics,
        "diverged": diverged,
        "milliseconds": milliseconds,
        "code": earlier.get("code") if earlier else code,
        "seconds": earlier.get("seconds") if seconds is None else seconds,
    }
    write_text(cell.folder / "result.json", json.dumps(result, indent=1))
    return result


def describe_result(result: dict[str, Any]) -> str:
    """A result in a few words: AP 39.8."""
    if result["diverged"] is not None:
        return f"diverged at step {result['diverged']}"
    ap = result["metrics"]["AP"]
    return "no AP: nothing to measure" if ap is None else f"AP {100 * ap:.1f}"


def error_line(log: Path) -> str:
    """The line of a log that names the error: the last error line, or the last line if there is none."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    errors = [line for line in lines if re.match(r"error: |(\w+\.)*\w*(Error|Exception)\b", line)]
    # torchrun and the other processes of the run add errors, which do not name the cause
    others = ("ChildFailedError", "SignalException", "lost the connection to another one")
    candidates = [line for line in errors if not any(other in line for other in others)] or errors or lines
    return candidates[-1].strip().removeprefix("error: ") if candidates else "no output"


def checkpoint_time(cell: Cell) -> int:
    """When last.pt was written, in nanoseconds, to tell whether a run wrote a new one; 0 without a checkpoint."""
    path = cell.folder / "last.pt"
    return path.stat().st_mtime_ns if path.exists() else 0


def last_logged_step(cell: Cell) -> int:
    """The last step in metrics.csv; 0 without one."""
    path = cell.folder / "metrics.csv"
    rows = path.read_text(encoding="utf-8").splitlines()[1:] if path.exists() else []
    return int(float(rows[-1].split(",")[0])) if rows else 0
