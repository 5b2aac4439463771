"""Kill a run at random times, resume it, and compare every bit with an uninterrupted run.

    python benchmarks/kill_resume.py --kills 50 --chain 3

Prints one line per case and ends with "N of N equal". If a case differs, its line names the entries of the checkpoints
and the files that differ, and the exit status is 1. Each case starts in an empty folder: `--kills` cases with a single
kill (every third while a checkpoint is being written), then one case with `--chain` kills. The number of loader workers
alternates between 0, 1 and 2 and must change nothing. The runs are forked from this process after its imports, so a
kill costs no start-up time.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from retina.config import Config
from retina.config_file import load_config
from retina.model import checkpoint
from retina.shapes import ShapesSettings, write_shapes
from retina.train.loop import train

THREADS = torch.get_num_threads()
SETTINGS = """
data: {{train_annotations: {root}/annotations/train.json, train_images: {root}/train,
  val_annotations: {root}/annotations/val.json, val_images: {root}/val, short_side: [64, 96], zoom: [0.8, 1.25],
  photometric: 0.5, workers: 0}}
model: {{backbone: resnet10, base_channels: 16, weights: null, norm: batch, frozen_stages: -1, channels: 32,
  head_convs: 1}}
loss: {{normalizer: ema}}
train: {{steps: 16, batch_size: 4, reference_batch: 4, lr: 1e-3, optimizer: adamw, schedule: cosine, warmup_steps: 3,
  ema: 0.9, clip_norm: 10, log_every: 1, eval_every: 6, checkpoint_every: 3, precision: {precision}}}
"""


def main() -> int:
    """Exit status: 0 if every case ends with the bits of the uninterrupted run, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="cases with a single kill (%(default)s)")
    parser.add_argument("--chain", type=int, default=3, help="kills of the last case; 0 omits it (%(default)s)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the random times; printed")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after this time")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the settings of the runs")
    arguments = parser.parse_intermixed_args()
    start_time = time.perf_counter()
    rng = random.Random(arguments.seed)
    print(f"seed {arguments.seed}", flush=True)
    # The threads of OpenMP do not survive a fork: this process uses one, and its runs use THREADS.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_shapes(root / "shapes", ShapesSettings(train=22, val=6, size=96), processes=1)
        settings = root / "kill.yaml"
        settings.write_text(SETTINGS.format(root=root / "shapes", precision=arguments.precision))
        settings.write_text(load_config(settings, arguments.overrides).to_yaml())
        begin = time.perf_counter()
        expected = run_to_end(run_config(root, "uninterrupted", 0))
        duration = time.perf_counter() - begin
        on_cuda, different = has_cuda(), []
        print(f"uninterrupted: {duration:.1f} s, on {'CUDA' if on_cuda else 'the CPU'}", flush=True)
        if (
            on_cuda
        ):  # the first run compiles kernels, so the second has the time; and without kills it must be equal too
            begin = time.perf_counter()
            different = differences(expected, run_to_end(run_config(root, "again", 0)))
            duration = time.perf_counter() - begin
            print(f"uninterrupted again: {duration:.1f} s, {verdict(different)}", flush=True)
        cases = [("write" if i % 3 == 1 else "any", 1) for i in range(arguments.kills)]
        cases += [("any", arguments.chain)] if arguments.chain else []
        equal, done = int(on_cuda and not different), int(on_cuda)
        for i, (when, kills) in enumerate(cases):
            if i and time.perf_counter() - start_time > arguments.seconds:
                break
            steps = [kill_once(run_config(root, str(i), k % 3), when, duration / kills, rng) for k in range(kills)]
            different = differences(expected, run_to_end(run_config(root, str(i), (kills + i) % 3)))
            equal, done = equal + (not different), done + 1
            print(f"{i + 1}: killed {when} at step {', '.join(steps)}: {verdict(different)}", flush=True)
        print(f"{equal} of {done} equal")
        return 0 if equal == done else 1


def has_cuda() -> bool:
    """Asked in a forked process: once this process has asked CUDA for anything, the runs it forks could not use it."""
    child = os.fork()
    if child == 0:
        os._exit(int(torch.cuda.is_available()))
    return os.waitpid(child, 0)[1] != 0


def verdict(different: list[str]) -> str:
    return f"DIFFERS in {', '.join(different)}" if different else "equal"


def run_config(root: Path, name: str, workers: int) -> Config:
    """The config of the run `name`, with a number of loader workers that must change nothing."""
    return load_config(root / "kill.yaml", [f"output_dir={root / name}", f"data.workers={workers}"])


def start(config: Config) -> int:
    """Fork a process that starts the run, or resumes it if its folder has a checkpoint; returns the process id."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 1
        try:
            torch.set_num_threads(THREADS)
            train(config, resume=True)
            status = 0
        finally:
            os._exit(status)
    return child


def kill_once(config: Config, when: str, duration: float, rng: random.Random) -> str:
    """Send SIGKILL to a run at a random time within `duration`, or while it writes a checkpoint after that time.

    Returns the last step in metrics.csv, or "the end" if the run ended before the kill.
    """
    child = start(config)
    kill_time = time.perf_counter() + rng.uniform(0.05, 0.95) * duration
    temporary = config.run_dir / f".{checkpoint.LAST}.tmp"
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.perf_counter() >= kill_time and (when == "any" or temporary.exists()):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            metrics = config.run_dir / "metrics.csv"
            lines = metrics.read_text().splitlines() if metrics.exists() else []
            return lines[-1].split(",")[0] if len(lines) > 1 else "0"
        if when == "any":
            time.sleep(0.001)
    return "the end"


def run_to_end(config: Config) -> dict[str, str]:
    """Train to the end, and return the digests of the results."""
    _, status = os.waitpid(start(config), 0)
    if status:
        sys.exit(f"the run in {config.run_dir} ended with status {os.waitstatus_to_exitcode(status)}")
    return digest_run(config.run_dir)


def digest_run(run: Path) -> dict[str, str]:
    """A digest of each result that must not depend on the interruptions: entries of the checkpoints, and files.

    The config is not compared, because it contains the name of the folder and the number of workers.
    """
    digests = {
        f"{key} of {name}": checkpoint.digest(value)
        for name in (checkpoint.LAST, checkpoint.BEST)
        for key, value in checkpoint.load(run / name).items()
        if key != "config"
    }
    files = {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in ("metrics.csv", "eval.json")}
    return digests | files


def differences(expected: dict[str, str], given: dict[str, str]) -> list[str]:
    """The names of the results whose digests differ, or that only one of the runs has."""
    return sorted(name for name in expected | given if expected.get(name) != given.get(name))


if __name__ == "__main__":
    raise SystemExit(main())
