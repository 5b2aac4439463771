"""How long a study will take, and how much disk space it needs."""

from __future__ import annotations

import re
import shutil
import signal
import time
import uuid
from itertools import pairwise
from statistics import median

from retina.atomic_files import write_text
from retina.study.cells import Study, StudyError
from retina.study.launch import Machine, kill
from retina.study.outcome import error_line, last_logged_step

PROBE_STEPS = 12  # steps that are timed, or fewer if they take longer than PROBE_SECONDS, but at least 4
PROBE_SECONDS = 20.0
MIN_FREE_BYTES = 2**26  # with less free disk space nothing is started


def estimate_seconds(study: Study, workers: int) -> float | None:
    """Seconds until all cells are done, from the mean of the finished ones; None while no cell is finished.

    It is wrong if those were finished on another machine.
    """
    times = [r["seconds"] for cell in study.cells if (r := cell.result()) is not None and r["seconds"] is not None]
    remaining = sum(not study.is_done(cell) for cell in study.cells)
    return sum(times) / len(times) * remaining / workers if times else None


def count_steps(study: Study) -> tuple[int, int]:
    """The steps that all cells have done, and those that the open ones still have to do."""
    done = [last_logged_step(cell) for cell in study.cells]
    remaining = [
        cell.config.train.steps - steps
        for cell, steps in zip(study.cells, done, strict=True)
        if not study.is_done(cell)
    ]
    return sum(done), sum(remaining)


def measure_step_time(study: Study, machine: Machine) -> tuple[float, int]:
    """Run a few steps of the first open cell in a temporary folder: (seconds per step, bytes of a checkpoint).

    The seconds are the median, because a few steps take much longer: the first ones, and those with a new image size.

    Raises StudyError with the error message of the run if it cannot train.
    """
    config = next(cell.config for cell in study.cells if not study.is_done(cell))
    folder = study.folder / f"probe-{uuid.uuid4().hex[:8]}"
    train = config.train.model_copy(update={"log_every": 1, "eval_every": 0})
    folder.mkdir(parents=True)
    process = None
    try:
        config = config.model_copy(update={"output_dir": str(folder), "train": train})
        write_text(folder / "config.yaml", config.to_yaml())
        process = machine.start_training(folder, 0, None)
        assert process.stdout is not None
        step_times: list[float] = []
        with (folder / "log.txt").open("wb") as log:
            for line in process.stdout:
                log.write(line)
                if re.match(rb"step \d+/", line):
                    step_times.append(time.monotonic())
                    if len(step_times) > (4 if step_times[-1] - step_times[0] > PROBE_SECONDS else PROBE_STEPS):
                        break
            process.send_signal(signal.SIGTERM)  # the run writes a checkpoint and ends
            log.write(process.stdout.read())
        process.wait()
        if len(step_times) < 2 or not (folder / "last.pt").exists():
            raise StudyError(f"a cell of {study.file} does not train: {error_line(folder / 'log.txt')}")
        seconds = median(after - before for before, after in pairwise(step_times))
        return seconds, (folder / "last.pt").stat().st_size
    finally:
        if process is not None:
            kill(process)
        shutil.rmtree(folder)


def check_disk_space(study: Study, checkpoint_bytes: int) -> None:
    """StudyError if the disk cannot hold three checkpoints for each open cell, or one with train.keep=weights.

    The size of a checkpoint is `checkpoint_bytes`, or that of the largest existing one if it is larger.
    """
    existing = [path.stat().st_size for cell in study.cells if (path := cell.folder / "last.pt").exists()]
    largest = max([checkpoint_bytes, *existing])
    open_cells = [cell for cell in study.cells if not study.is_done(cell)]
    files = sum(3 if cell.config.train.keep == "all" else 1 for cell in open_cells)
    needed = max(MIN_FREE_BYTES, files * largest)
    free = shutil.disk_usage(study.folder).free
    if free < needed:
        raise StudyError(
            f"{study.folder}: {free / 2**30:.1f} GiB are free, and the checkpoints of the open cells need about "
            f"{needed / 2**30:.1f}; free some, or give --output a folder on another disk"
        )
