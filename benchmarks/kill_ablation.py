"""Kill the processes of a study at random, and check that every cell completes once with the same bits.

    python benchmarks/kill_ablation.py --cells 10 --workers 3 --kills 20
    python benchmarks/kill_ablation.py --drivers 2 --workers 1 --storage postgresql://user@localhost/database

First runs each cell without interruption. Then runs tools/ablate.py (`--drivers` processes, each with `--workers`) and
sends SIGKILL to a run or, every third time, to a driver, which is started again. Twenty times a second it checks that
no cell has two running processes, and at the end it checks the trial storage. Exit status: 0 if every check passes.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # the order of additions depends on the number of threads

import torch
from kill_resume import SETTINGS, differences, digest_run, run_to_end
from optuna.trial import TrialState

from retina.shapes import ShapesSettings, write_shapes
from retina.study.cells import Study
from retina.study.study_file import load_study
from retina.study.trial_storage import TrialStorage

TOOL = Path(__file__).parents[1] / "tools/ablate.py"
LEASE = 3.0


def main() -> int:
    """Exit status: 0 if every cell completes once, is never run twice at a time, and ends with the expected bits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=10)
    parser.add_argument("--workers", type=int, default=3, help="runs of each driver at a time (%(default)s)")
    parser.add_argument("--drivers", type=int, default=1, help="processes of tools/ablate.py (%(default)s)")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--pause", type=float, default=2.5, help="mean seconds between two kills (%(default)s)")
    parser.add_argument("--storage", help="URL of the trial storage; default: a file")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the times and targets; printed")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        study = make_study(root, arguments.cells)
        uninterrupted = {}
        for cell in study.cells:
            run_folder = {"output_dir": str(root / "uninterrupted" / cell.key)}
            uninterrupted[cell.key] = run_to_end(cell.config.model_copy(update=run_folder))
        print(f"{len(uninterrupted)} cells run without interruption", flush=True)
        command = [sys.executable, str(TOOL), str(study.file), "--output", str(study.folder.parent)]
        command += ["--workers", str(arguments.workers), "--lease", str(LEASE)]
        command += ["--storage", arguments.storage] if arguments.storage else []
        monitor = DuplicateRunMonitor(study)
        rng = random.Random(arguments.seed)
        kills = run_and_kill(command, arguments.drivers, arguments.kills, arguments.pause, rng, monitor)
        time.sleep(1)
        monitor.stop()
        print(f"killed {kills['run']} runs and {kills['driver']} drivers")
        passed = check_study(study, TrialStorage(study, arguments.storage, LEASE), uninterrupted, monitor)
        return 0 if passed and sum(kills.values()) == arguments.kills else 1


def make_study(root: Path, cells: int) -> Study:
    """A small data set and a study of `cells` short runs on it."""
    write_shapes(root / "shapes", ShapesSettings(train=22, val=6, size=96), processes=1)
    (root / "base.yaml").write_text(SETTINGS.format(root=root / "shapes", precision="fp32"))
    gammas = [round(0.25 * i, 2) for i in range(cells)]
    (root / "kill.yaml").write_text(f"base: base.yaml\naxes: {{loss.gamma: {gammas}}}\n")
    return load_study(root / "kill.yaml", output=root / "out")


def run_and_kill(
    command: list[str], number: int, kills: int, pause: float, rng: random.Random, monitor: DuplicateRunMonitor
) -> Counter[str]:
    """Run drivers until they end; meanwhile kill `kills` processes at random, and restart the killed drivers."""
    drivers = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(number)]
    done: Counter[str] = Counter()
    next_kill = time.monotonic() + rng.uniform(1, 3)
    while drivers:
        time.sleep(0.02)
        drivers = [driver for driver in drivers if driver.poll() is None]
        if sum(done.values()) == kills or time.monotonic() < next_kill or not drivers:
            continue
        targets = [pid for pids in run_processes(monitor.study).values() for pid in pids]
        if sum(done.values()) % 3 == 2:
            target = rng.choice(drivers)
            target.kill()
            target.wait()
            drivers = [*(d for d in drivers if d is not target), subprocess.Popen(command, stdout=subprocess.DEVNULL)]
            done["driver"] += 1
        elif targets:
            os.kill(rng.choice(targets), signal.SIGKILL)
            done["run"] += 1
        else:
            continue
        next_kill = time.monotonic() + rng.uniform(0.25, 1.75) * pause
    return done


def check_study(
    study: Study, storage: TrialStorage, uninterrupted: dict[str, dict[str, str]], monitor: DuplicateRunMonitor
) -> bool:
    """Print the results of the checks; True if all of them pass."""
    number = len(study.cells)
    trials_by_cell = storage.trials_by_cell()
    completed = [sum(t.state == TrialState.COMPLETE for t in trials_by_cell[cell.key]) for cell in study.cells]
    running = sum(t.state == TrialState.RUNNING for trials in trials_by_cell.values() for t in trials)
    processes = sum(map(len, run_processes(study).values()))
    num_trials = sum(map(len, trials_by_cell.values()))
    print(f"{num_trials} trials, {completed.count(1)} of {number} complete exactly once")
    print(f"{running} trials still RUNNING, {processes} processes still running")
    print(f"{len(monitor.duplicates)} times two processes of one cell {monitor.duplicates or ''}")
    equal = 0
    for cell in study.cells:
        different = differences(uninterrupted[cell.key], digest_run(cell.folder))
        equal += not different
        if different:
            print(f"{cell.label}: DIFFERS in {', '.join(different)}")
    print(f"{equal} of {number} equal", flush=True)
    return equal == completed.count(1) == number and not processes and not monitor.duplicates and not running


def run_processes(study: Study) -> dict[str, list[int]]:
    """The ids of the processes that run each cell, by its key."""
    processes: dict[str, list[int]] = {cell.key: [] for cell in study.cells}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().split("\0")
        except OSError:  # it has just ended
            continue
        if any(word.endswith("train.py") for word in words):
            for key in processes:
                if any(f"/cells/{key}/" in word for word in words):
                    processes[key].append(int(path.parent.name))
    return processes


def parent_pid(pid: int) -> int:
    """0 if the process has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


class DuplicateRunMonitor:
    """A thread that looks for two running processes of one cell. `duplicates`: key of the cell and process ids."""

    def __init__(self, study: Study) -> None:
        self.study, self.duplicates, self.stopping = study, [], False
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()

    def _watch(self) -> None:
        while not self.stopping:
            for key, pids in run_processes(self.study).items():
                # A child has the command line of its parent until it starts a program of its own.
                runs = [pid for pid in pids if parent_pid(pid) not in pids]
                if len(runs) > 1:
                    self.duplicates.append((key, runs))
            time.sleep(0.05)

    def stop(self) -> None:
        self.stopping = True
        self.thread.join()


if __name__ == "__main__":
    raise SystemExit(main())
