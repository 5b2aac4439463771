"""The trainings of a study as processes of this machine: what they get, how they end, how long they take.

Each is tools/train.py on a config.yaml, as a user would start it, so a crash or too little memory costs one attempt.
torch is never imported here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from retina.study.cells import StudyError


@dataclass(frozen=True)
class Machine:
    """What this machine gives to the trainings, and where tools/train.py and eval.py are."""

    workers: int
    devices: int  # processes of a training
    gpus: list[str]  # as CUDA_VISIBLE_DEVICES names them
    tools: Path

    @classmethod
    def detect(cls, workers: int | None, devices: int, tools: Path) -> Machine:
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

    def start_training(self, folder: Path, place: int, log: Path | None) -> subprocess.Popen[bytes]:
        """Train what config.yaml of `folder` says, from the newest checkpoint; its output goes to `log` or a pipe."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.devices}"]
        tool = [str(self.tools / "train.py"), str(folder / "config.yaml"), "--resume", "--end-with-parent"]
        return self._start([*(launcher if self.devices > 1 else []), *tool], place, log)

    def start_timing(self, folder: Path, place: int, log: Path) -> subprocess.Popen[bytes]:
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
