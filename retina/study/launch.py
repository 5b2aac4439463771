"""Starts the runs of a study as processes of this machine, each on its own GPUs or CPU cores. Imports no torch.

A run is tools/train.py on a config.yaml, as a user would start it. So a crash or too little memory ends one trial only.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from retina.cores import available_cores
from retina.plural import plural
from retina.study.cells import StudyError

OF_ANOTHER_RUN = re.compile(r"(WORLD_SIZE|RANK|LOCAL_RANK|MASTER_ADDR|MASTER_PORT|TORCHELASTIC_\w+)$")


@dataclass(frozen=True)
class Machine:
    """The workers and GPUs of this machine, and the folder of train.py and eval.py."""

    workers: int  # runs at a time
    devices: int  # processes of a run
    gpus: list[str]  # as in CUDA_VISIBLE_DEVICES
    tools: Path

    @classmethod
    def detect(cls, workers: int | None, devices: int, tools: Path) -> Machine:
        """By default one worker per GPU (or group of `devices` GPUs), and one on a machine without GPUs.

        Raises StudyError for fewer GPUs than `devices`.
        """
        gpus = _visible_gpus()
        if gpus and len(gpus) < devices:
            raise StudyError(f"devices: {devices} for a cell, but {len(gpus)} GPUs are visible ({', '.join(gpus)})")
        return cls(workers or max(1, len(gpus) // devices), devices, gpus, tools)

    def environment(self, worker: int) -> dict[str, str]:
        """Environment variables for the run of a worker: its GPUs, and its share of the CPU threads."""
        # Each run is one of its own, also where this program was started by torchrun or in a job of several processes.
        values = {name: value for name, value in os.environ.items() if not OF_ANOTHER_RUN.match(name)}
        cores = available_cores()
        for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):  # otherwise each run would take all cores
            values.setdefault(name, str(max(1, cores // (self.workers * self.devices))))
        if self.gpus:
            groups = len(self.gpus) // self.devices
            first = worker % groups * self.devices
            values["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus[first : first + self.devices])
        return values

    def start_training(self, folder: Path, worker: int, log: Path | None) -> subprocess.Popen[bytes]:
        """Start or resume the run of config.yaml in `folder`; its output goes to `log`, or to a pipe for None."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.devices}"]
        tool = [str(self.tools / "train.py"), str(folder / "config.yaml"), "--resume", "--end-with-parent"]
        return self._start([*(launcher if self.devices > 1 else []), *tool], worker, log)

    def start_timing(self, folder: Path, worker: int, log: Path) -> subprocess.Popen[bytes]:
        """Measure the milliseconds per image of the last weights of `folder`, which have the AP of the cell."""
        checkpoint = ["--checkpoint", str(folder / "last.pt")]
        tool = [str(self.tools / "eval.py"), str(folder / "config.yaml"), *checkpoint, "--time", "--end-with-parent"]
        return self._start(tool, worker, log)

    def _start(self, command: list[str], worker: int, log: Path | None) -> subprocess.Popen[bytes]:
        output: IO[bytes] | int = log.open("ab") if log else subprocess.PIPE
        try:
            return subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.PIPE,  # closes when this process ends, and the run ends with it
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment(worker),
                start_new_session=True,  # Ctrl-C reaches this process only, which then stops its runs
            )
        finally:
            if not isinstance(output, int):
                output.close()

    def __str__(self) -> str:
        devices = f"GPU {', '.join(self.gpus)}" if self.gpus else "CPU"
        return f"{plural(self.workers, 'worker')}, {devices}"


def _visible_gpus() -> list[str]:
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name and name != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    output = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(i) for i, line in enumerate(line for line in output.splitlines() if line.startswith("GPU "))]


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and wait for its end. The processes of torchrun end when their standard input closes."""
    if process.stdin is not None:
        process.stdin.close()
    if process.poll() is None:
        process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
