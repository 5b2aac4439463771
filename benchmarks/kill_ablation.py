"""Kill the processes of an ablation study at random and see whether every cell is still trained once, to the same bits.

    python benchmarks/kill_ablation.py --cells 10 --workers 3 --kills 20
    python benchmarks/kill_ablation.py --drivers 2 --workers 1 --storage postgresql://user@localhost/database

First trains each cell alone. Then runs tools/ablate.py (`--drivers` times at once, each with `--workers`) and sends
SIGKILL to a training or, every third time, to a driver, which is started again. Meanwhile it looks twenty times a
second for two trainings of one cell, and at the end into the ledger. Exit status 1 if anything is not as it should be.
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

os.environ["OMP_NUM_THREADS"] = "1"  # other numbers of threads add up in another order

import torch
from kill_resume import SETTINGS, digest_run, run_to_end
from optuna.trial import TrialState

from retina.shapes.writing import write_shapes
from retina.study.cells import Study
from retina.study.study_file import load_study
from retina.study.trial_storage import TrialStorage

TOOL = Path(__file__).parents[1] / "tools/ablate.py"
LEASE = 3.0


def main() -> int:
    """0 if every cell ends with the bits of a training alone, complete once, owned by one at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=10)
    parser.add_argument("--workers", type=int, default=3, help="trainings at a time of each driver")
    parser.add_argument("--drivers", type=int, default=1, help="processes of tools/ablate.py")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--pause", type=float, default=2.5, help="mean seconds between two kills")
    parser.add_argument("--storage", help="URL of the ledger; default: a file")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of instants and victims; printed")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        study = make_study(root, arguments.cells)
        alone = {}
        for cell in study.cells:
            alone[cell.key] = run_to_end(cell.config.model_copy(update={"output_dir": str(root / "alone" / cell.key)}))
        print(f"{len(alone)} cells trained alone", flush=True)
        command = [sys.executable, str(TOOL), str(study.file), "--output", str(study.folder.parent)]
        command += ["--workers", str(arguments.workers), "--lease", str(LEASE)]
        command += ["--storage", arguments.storage] if arguments.storage else []
        watch = Watch(study)
        chance = random.Random(arguments.seed)
        kills = disturb(command, arguments.drivers, arguments.kills, arguments.pause, chance, watch)
        time.sleep(1)
        watch.stop()
        left = [pid for pids in trainings(study).values() for pid in pids]
        print(f"killed {kills['training']} trainings and {kills['driver']} drivers")
        equal = sum(digest_run(cell.folder) == alone[cell.key] for cell in study.cells)
        trials_by_cell = TrialStorage(study, arguments.storage, LEASE).trials_by_cell()
        complete = [sum(t.state == TrialState.COMPLETE for t in trials_by_cell[cell.key]) for cell in study.cells]
        open_ones = sum(t.state == TrialState.RUNNING for trials in trials_by_cell.values() for t in trials)
        number = len(study.cells)
        print(
            f"{sum(map(len, trials_by_cell.values()))} attempts, {complete.count(1)} of {number} complete exactly once"
        )
        print(f"{open_ones} attempts left open, {len(left)} processes left")
        print(f"{len(watch.twice)} times two owners {watch.twice or ''}")
        print(f"{equal} of {number} equal", flush=True)
        good = equal == complete.count(1) == number and not left and not watch.twice and not open_ones
        return 0 if good and sum(kills.values()) == arguments.kills else 1


def make_study(root: Path, cells: int) -> Study:
    """A small data set and a study of `cells` short trainings over it."""
    write_shapes(root / "shapes", train=22, val=6, size=96, processes=1)
    (root / "base.yaml").write_text(SETTINGS.format(root=root / "shapes", precision="fp32"))
    gammas = [round(0.25 * i, 2) for i in range(cells)]
    (root / "kill.yaml").write_text(f"base: base.yaml\naxes: {{loss.gamma: {gammas}}}\n")
    return load_study(root / "kill.yaml", output=root / "out")


def disturb(
    command: list[str], number: int, kills: int, pause: float, chance: random.Random, watch: Watch
) -> Counter[str]:
    """Run drivers until they end by themselves; kill `kills` times at random, and start killed drivers again."""
    drivers = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(number)]
    done: Counter[str] = Counter()
    due = time.monotonic() + chance.uniform(1, 3)
    while drivers:
        time.sleep(0.02)
        drivers = [driver for driver in drivers if driver.poll() is None]
        if sum(done.values()) == kills or time.monotonic() < due or not drivers:
            continue
        victims = [pid for pids in trainings(watch.study).values() for pid in pids]
        if sum(done.values()) % 3 == 2:
            victim = chance.choice(drivers)
            victim.kill()
            victim.wait()
            drivers = [*(d for d in drivers if d is not victim), subprocess.Popen(command, stdout=subprocess.DEVNULL)]
            done["driver"] += 1
        elif victims:
            os.kill(chance.choice(victims), signal.SIGKILL)
            done["training"] += 1
        else:
            continue
        due = time.monotonic() + chance.uniform(0.25, 1.75) * pause
    return done


def trainings(study: Study) -> dict[str, list[int]]:
    """The processes that train each cell, by its key."""
    found: dict[str, list[int]] = {cell.key: [] for cell in study.cells}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().split("\0")
        except OSError:  # it has just ended
            continue
        if any(word.endswith("train.py") for word in words):
            for key in found:
                if any(f"/cells/{key}/" in word for word in words):
                    found[key].append(int(path.parent.name))
    return found


def parent(pid: int) -> int:
    """0 where the process has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


class Watch:
    """Looks for two trainings of one cell at the same time."""

    def __init__(self, study: Study) -> None:
        self.study, self.twice, self.ending = study, [], False
        self.thread = threading.Thread(target=self._look)
        self.thread.start()

    def _look(self) -> None:
        while not self.ending:
            for key, pids in trainings(self.study).items():
                alone = [pid for pid in pids if parent(pid) not in pids]  # a child that has not become a program yet
                if len(alone) > 1:
                    self.twice.append((key, alone))
            time.sleep(0.05)

    def stop(self) -> None:
        self.ending = True
        self.thread.join()


if __name__ == "__main__":
    raise SystemExit(main())
