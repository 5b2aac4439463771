"""Kill a training at random instants, resume it, and compare every bit with a run that was left alone.

    python benchmarks/kill_resume.py --kills 50 --chain 3

Prints one line a case and ends with "N of N equal"; exit status 1 if any case differs. Each case starts in a fresh
folder; `--kills` single kills (every third while a checkpoint is being written), then one run killed `--chain` times.
Resumes alternate between 0, 1 and 2 loader workers, which must change nothing. The trainings are forked from this
process after its imports, so that a kill costs no start-up.
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
from retina.shapes.writing import write_shapes
from retina.train.loop import train

THREADS = torch.get_num_threads()
SETTINGS = """
data: {{train_annotations: {root}/annotations/train.json, train_images: {root}/train,
  val_annotations: {root}/annotations/val.json, val_images: {root}/val, short_side: [64, 96], zoom: [0.8, 1.25],
  photometric: 0.5, workers: 0}}
model: {{backbone: resnet18, weights: null, norm: batch, frozen_stages: -1, channels: 32, head_convs: 1}}
loss: {{normalizer: ema}}
train: {{steps: 24, batch_size: 4, reference_batch: 4, lr: 1e-3, optimizer: adamw, schedule: cosine, warmup_steps: 3,
  ema: 0.9, clip_norm: 10, log_every: 1, eval_every: 8, checkpoint_every: 3, precision: {precision}}}
"""


def main() -> int:
    """0 if every case ends with the bits of the uninterrupted run, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="runs that are killed once")
    parser.add_argument("--chain", type=int, default=3, help="kills of one and the same run")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the instants; printed")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    print(f"seed {arguments.seed}", flush=True)
    # OpenMP's threads do not survive a fork: this process stays with one, its trainings take THREADS.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_shapes(root / "shapes", train=22, val=6, size=96, processes=1)
        (root / "kill.yaml").write_text(SETTINGS.format(root=root / "shapes", precision=arguments.precision))
        started = time.perf_counter()
        expected = run_to_end(settings(root, "alone", 0))
        duration = time.perf_counter() - started
        print(f"alone: {expected[:16]} in {duration:.1f} s", flush=True)
        cases = [("write" if i % 3 == 1 else "any", 1) for i in range(arguments.kills)]
        cases += [("any", arguments.chain)] if arguments.chain else []
        equal = 0
        for i, (when, kills) in enumerate(cases):
            reached = [kill_once(settings(root, str(i), k % 3), when, duration / kills, chance) for k in range(kills)]
            result = run_to_end(settings(root, str(i), (kills + i) % 3))
            equal += result == expected
            verdict = "equal" if result == expected else f"DIFFERS {result[:16]}"
            print(f"{i + 1}: killed {when} at step {', '.join(reached)}: {verdict}", flush=True)
        print(f"{equal} of {len(cases)} equal")
        return 0 if equal == len(cases) else 1


def settings(root: Path, name: str, workers: int) -> Config:
    """The run called `name`, with a number of loader workers that must not matter."""
    return load_config(root / "kill.yaml", [f"output_dir={root / name}", f"data.workers={workers}"])


def start(config: Config) -> int:
    """Fork a training that resumes whatever is in its folder; its process id."""
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


def kill_once(config: Config, when: str, duration: float, chance: random.Random) -> str:
    """SIGKILL a training at a random instant of its `duration`, or just then when it writes a checkpoint."""
    child = start(config)
    end = time.perf_counter() + chance.uniform(0.05, 0.95) * duration
    writing = config.run_dir / f".{checkpoint.LAST}.tmp"
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.perf_counter() >= end and (when == "any" or writing.exists()):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            metrics = config.run_dir / "metrics.csv"
            lines = metrics.read_text().splitlines() if metrics.exists() else []
            return lines[-1].split(",")[0] if len(lines) > 1 else "0"
        if when == "any":
            time.sleep(0.001)
    return "the end"


def run_to_end(config: Config) -> str:
    """Train to the end and digest what is left: weights, average, optimizer, step, metrics.csv, eval.json."""
    _, status = os.waitpid(start(config), 0)
    if status:
        sys.exit(f"the training in {config.run_dir} ended with status {os.waitstatus_to_exitcode(status)}")
    return digest_run(config.run_dir)


def digest_run(run: Path) -> str:
    """Of everything in a run folder that must not depend on when the run was interrupted."""
    sha = hashlib.sha256()
    for name in (checkpoint.LAST, checkpoint.BEST):  # all but the config, which names the folder and the workers
        state = checkpoint.load(run / name)
        sha.update(checkpoint.digest({key: value for key, value in state.items() if key != "config"}).encode())
    for name in ("metrics.csv", "eval.json"):
        sha.update((run / name).read_bytes())
    return sha.hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())
