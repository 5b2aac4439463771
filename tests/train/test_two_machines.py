"""Two torchruns, as on two machines, of which one is killed in the middle of a step, as docs/distributed.md says."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from train_helpers import free_port, run_two_processes, settings

from retina.model import checkpoint
from retina.train.loop import train

pytestmark = pytest.mark.slow
TOOL = Path(__file__).parents[2] / "tools/train.py"
FLAGS = ["train.steps=70", "train.checkpoint_every=10", "train.eval_every=0", "train.log_every=1"]


class Machine:
    """A torchrun with one process. Its output goes to a file."""

    def __init__(self, yaml: Path, run: Path, port: int, output: Path) -> None:
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"]
        # Notices a dead torchrun after 6 seconds instead of 15.
        rendezvous += ["--rdzv-conf", "keep_alive_interval=1,keep_alive_max_attempt=6"]
        launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3"]
        with output.open("a") as file:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, *rendezvous, TOOL, yaml, "--resume", f"output_dir={run}", *FLAGS],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "CUDA_VISIBLE_DEVICES": ""},
                start_new_session=True,
            )
        self.output = output

    def kill(self) -> None:
        """Kill torchrun, not its process: that one must end by itself."""
        self.process.kill()
        self.process.wait()

    def text(self) -> str:
        return self.output.read_text()


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    """Those that the test starts; what still runs at its end is stopped."""
    started: list[Machine] = []
    yield started
    for machine in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(machine.process.pid, signal.SIGTERM)  # torchrun ends its process too
    for machine in started:
        machine.process.wait(60)


def step_of(run: Path) -> int:
    metrics = run / "metrics.csv"
    return metrics.read_text().count("\n") - 1 if metrics.exists() else 0


def wait_for_step(run: Path, step: int, machine: Machine) -> None:
    while step_of(run) < step:
        assert machine.process.poll() is None, machine.text()
        time.sleep(0.01)


def train_uninterrupted(rank: int, yaml: Path, run: Path) -> None:
    train(settings(yaml, run, *FLAGS))


def results_of(run: Path) -> dict[str, object]:
    files = {name: (run / name).read_bytes() for name in ("metrics.csv", "eval.json", "detections.json")}
    states = {name: checkpoint.load(run / name) for name in ("last.pt", "best.pt")}
    return files | {name: checkpoint.digest({**state, "config": ""}) for name, state in states.items()}


def test_a_killed_machine_comes_back(tiny_yaml: Path, tmp_path: Path, machines: list[Machine], on_cpu: None) -> None:
    run, port = tmp_path / "run", free_port()

    def start(name: str) -> Machine:
        machines.append(Machine(tiny_yaml, run, port, tmp_path / name))
        return machines[-1]

    first = start("first")
    while socket.socket().connect_ex(("127.0.0.1", port)):  # the first one serves the rendezvous
        time.sleep(0.05)
    second = start("second")
    wait_for_step(run, 12, first)
    second.kill()
    again = start("again")  # the same command
    for machine in (first, again):
        assert machine.process.wait(200) == 0, machine.text()
    lost = re.search(r"lost the connection to another one.*\n.*the run continues after (step \d+)\.\n", first.text())
    assert lost and f"resumed after {lost[1]}\n" in first.text() + again.text(), first.text()
    assert "torchrun ended without stopping this process" in second.text()
    assert "Traceback" not in first.text() + second.text() + again.text()

    run_two_processes(train_uninterrupted, tiny_yaml, tmp_path / "whole")
    assert results_of(run) == results_of(tmp_path / "whole")
