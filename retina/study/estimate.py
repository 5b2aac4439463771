"""How long a study will take and how much disk it needs, before it starts."""

from __future__ import annotations

import re
import shutil
import signal
import time
import uuid

from retina.atomic_files import write_text
from retina.study.cells import Study, StudyError
from retina.study.launch import Machine, kill
from retina.study.outcome import error_line

PROBE_STEPS = 4
MIN_FREE_BYTES = 2**26  # bytes of disk without which nothing is started


def estimate_seconds(study: Study, workers: int) -> float | None:
    """Seconds until all cells are done, from those that are; None while there is none."""
    times = [r["seconds"] for cell in study.cells if (r := cell.result()) is not None and r["seconds"] is not None]
    left = sum(not study.done(cell) for cell in study.cells)
    return sum(times) / len(times) * left / workers if times else None


def measure_step_time(study: Study, machine: Machine) -> tuple[float, int]:
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
        process = machine.start_training(folder, 0, None)
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
            raise StudyError(f"a cell of {study.file} does not train: {error_line(folder / 'log.txt')}")
        return (steps[-1] - steps[0]) / (len(steps) - 1), (folder / "last.pt").stat().st_size
    finally:
        if process is not None:
            kill(process)
        shutil.rmtree(folder)


def check_disk_space(study: Study, checkpoint_bytes: int) -> None:
    """StudyError where the disk has no room for the open cells: three checkpoints each, of the size given or seen."""
    seen = [path.stat().st_size for cell in study.cells if (path := cell.folder / "last.pt").exists()]
    largest = max([checkpoint_bytes, *seen])
    needed = max(MIN_FREE_BYTES, 3 * largest * sum(not study.done(cell) for cell in study.cells))
    free = shutil.disk_usage(study.folder).free
    if free < needed:
        raise StudyError(
            f"{study.folder}: {free / 2**30:.1f} GiB are free, and the checkpoints of the open cells need about "
            f"{needed / 2**30:.1f}; free some, or give --output a folder on another disk"
        )
