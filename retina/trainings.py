"""The trainings of a study as processes of this machine: what they get, how they end, how long they take.

Each is tools/train.py on a config.yaml, as a user would start it, so a crash or too little memory costs one attempt.
torch is never imported here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from retina.files import write_text
from retina.study import Cell, Study, StudyError

PROBE_STEPS = 4
LEAST_FREE = 2**26  # bytes of disk without which nothing is started


@dataclass(frozen=True)
class Machine:
    """What this machine gives to the trainings, and where tools/train.py and eval.py are."""

    workers: int
    devices: int  # processes of a training
    gpus: list[str]  # as CUDA_VISIBLE_DEVICES names them
    tools: Path

    @classmethod
    def find(cls, workers: int | None, devices: int, tools: Path) -> Machine:
        """One worker for each GPU (or group of `devices` GPUs), one on a machine without; StudyError for too few."""
        gpus = _gpus()
        if gpus and len(gpus) < devices:
            raise StudyError(
                f"devices: {devices} for a cell, but this machine shows {len(gpus)} GPUs ({', '.join(gpus)})"
            )
        return cls(workers or max(1, len(gpus) // devices), devices, gpus, tools)

    def environment(self, place: int) -> dict[str, str]:
        """For the training of a worker: its GPUs, or its share of the cores."""
        values = dict(os.environ)
        if self.gpus:
            groups = len(self.gpus) // self.devices
            first = place % groups * self.devices
            values["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus[first : first + self.devices])
        else:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            values.setdefault("OMP_NUM_THREADS", str(max(1, cores // (self.workers * self.devices))))
        return values

    def train(self, folder: Path, place: int, log: Path | None) -> subprocess.Popen[bytes]:
        """Train what config.yaml of `folder` says, from the newest checkpoint; its output goes to `log` or a pipe."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.devices}"]
        tool = [str(self.tools / "train.py"), str(folder / "config.yaml"), "--resume", "--end-with-parent"]
        return self._start([*(launcher if self.devices > 1 else []), *tool], place, log)

    def time(self, folder: Path, place: int, log: Path) -> subprocess.Popen[bytes]:
        """Evaluate what was trained in `folder`, with the milliseconds an image."""
        tool = [str(self.tools / "eval.py"), str(folder / "config.yaml"), "--time", "--end-with-parent"]
        return self._start(tool, place, log)

    def _start(self, command: list[str], place: int, log: Path | None) -> subprocess.Popen[bytes]:
        """Its standard input is a pipe that closes with this process, however that ends."""
        output: IO[bytes] | int = log.open("ab") if log else subprocess.PIPE
        try:
            return subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment(place),
                start_new_session=True,  # Ctrl-C reaches the driver alone, which then decides
            )
        finally:
            if not isinstance(output, int):
                output.close()

    def __str__(self) -> str:
        place = f"GPU {', '.join(self.gpus)}" if self.gpus else "CPU"
        return f"{self.workers} worker{'s' * (self.workers > 1)}, {place}"


def _gpus() -> list[str]:
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name and name != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(i) for i, line in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]


def kill(process: subprocess.Popen[bytes]) -> None:
    """End the process at once and wait for it; those that torchrun started end by their standard input."""
    if process.stdin is not None:
        process.stdin.close()
    if process.poll() is None:
        process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


# ---- how a training ended -----------------------------------------------------------------------------------


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


def outcome(result: dict[str, Any]) -> str:
    """A result in a word: AP 39.8."""
    if result["diverged"] is not None:
        return f"diverged at step {result['diverged']}"
    ap = result["metrics"]["AP"]
    return "no AP: nothing to measure" if ap is None else f"AP {100 * ap:.1f}"


def last_words(log: Path) -> str:
    """The line of a log that says what went wrong: the last one with an error in it, else the last one."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    telling = [line for line in lines if re.match(r"error: |(\w+\.)*\w*(Error|Exception)\b", line)]
    said = [line for line in telling if "ChildFailedError" not in line and "SignalException" not in line] or lines
    return said[-1].strip().removeprefix("error: ") if said else "no output"


def newest_checkpoint(cell: Cell) -> int:
    """Tells checkpoints apart; 0 without one."""
    path = cell.folder / "last.pt"
    return path.stat().st_mtime_ns if path.exists() else 0


def step_of(cell: Cell) -> int:
    """The last step in metrics.csv."""
    path = cell.folder / "metrics.csv"
    rows = path.read_text(encoding="utf-8").splitlines()[1:] if path.exists() else []
    return int(float(rows[-1].split(",")[0])) if rows else 0


# ---- before it starts ---------------------------------------------------------------------------------------


def estimate(study: Study, workers: int) -> float | None:
    """Seconds until all cells are done, from those that are; None while there is none."""
    times = [r["seconds"] for cell in study.cells if (r := cell.result()) is not None and r["seconds"] is not None]
    left = sum(not study.done(cell) for cell in study.cells)
    return sum(times) / len(times) * left / workers if times else None


def probe(study: Study, machine: Machine) -> tuple[float, int]:
    """Train a few steps of the first open cell in a folder that is removed: (seconds a step, bytes of a checkpoint).

    Raises StudyError with the training's own words where it cannot run.
    """
    config = next(cell.config for cell in study.cells if not study.done(cell))
    folder = study.folder / f"probe-{uuid.uuid4().hex[:8]}"
    train = config.train.model_copy(update={"log_every": 1, "eval_every": 0})
    folder.mkdir(parents=True)
    process = None
    try:
        config = config.model_copy(update={"output_dir": str(folder), "train": train})
        write_text(folder / "config.yaml", config.to_yaml())
        process = machine.train(folder, 0, None)
        assert process.stdout is not None
        steps: list[float] = []
        with (folder / "log.txt").open("wb") as log:
            for line in process.stdout:
                log.write(line)
                if re.match(rb"step \d+/", line):
                    steps.append(time.monotonic())
                    if len(steps) > PROBE_STEPS:
                        break
            process.send_signal(signal.SIGTERM)  # it writes a checkpoint
            log.write(process.stdout.read())
        process.wait()
        if len(steps) < 2 or not (folder / "last.pt").exists():
            raise StudyError(f"a cell of {study.file} does not train: {last_words(folder / 'log.txt')}")
        return (steps[-1] - steps[0]) / (len(steps) - 1), (folder / "last.pt").stat().st_size
    finally:
        if process is not None:
            kill(process)
        shutil.rmtree(folder)


def check_space(study: Study, checkpoint_bytes: int) -> None:
    """StudyError where the disk has no room for the open cells: three checkpoints each, of the size given or seen."""
    seen = [path.stat().st_size for cell in study.cells if (path := cell.folder / "last.pt").exists()]
    largest = max([checkpoint_bytes, *seen])
    needed = max(LEAST_FREE, 3 * largest * sum(not study.done(cell) for cell in study.cells))
    free = shutil.disk_usage(study.folder).free
    if free < needed:
        raise StudyError(
            f"{study.folder}: {free / 2**30:.1f} GiB are free, and the checkpoints of the open cells need about "
            f"{needed / 2**30:.1f}; free some, or give --output a folder on another disk"
        )
