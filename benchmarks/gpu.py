"""Results of one CUDA card in one file: speed compared with torchvision, a timed run and its AP, a profile of a step.

    python benchmarks/gpu.py [--seconds 300] [--output docs/results/gpu.md]     (make gpu: after the CUDA tests)

1. training and inference of R50-FPN at 640x640, batch 16, with torchvision's RetinaNet in the same run (speed.py);
2. configs/gpu.yaml, with as many steps as fit into `--seconds` at the speed just measured, and its evaluation;
3. the share of a training step's device time that is not convolution, by torch.profiler.
Without a CUDA device the benchmark stops with a message; --device cpu tries it on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import speed
import torch
import torchvision
from torch.profiler import ProfilerActivity, profile

from retina.config import Config
from retina.config_file import load_config
from retina.data import CocoDataset, train_batches
from retina.device import pick_device
from retina.evaluate import format_metrics
from retina.model import RetinaNet
from retina.train import build_optimizer, train, train_step

WARM_UP, PROFILED = 5, 5


def main() -> int:
    """Exit status: 0 with the result file written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to configs/gpu.yaml")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--output", type=Path, default=Path("docs/results/gpu.md"))
    arguments = parser.parse_intermixed_args()
    device = pick_device()
    if device.type != arguments.device:
        sys.exit(f"this machine offers {device.type}, not {arguments.device}")
    torch.set_float32_matmul_precision("high")
    card = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config("configs/gpu.yaml", [f"output_dir={folder}/run", *arguments.overrides])
        per_second, speed_table = measure_speed(config)
        steps = max(10, int(arguments.seconds * per_second / config.train.batch_size))
        config = load_config(
            "configs/gpu.yaml", [f"output_dir={folder}/run", *arguments.overrides, f"train.steps={steps}"]
        )
        fractions = profile_step(config, device)
        start = time.perf_counter()
        metrics = train(config)
        seconds = time.perf_counter() - start
    images = steps * config.train.batch_size
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    lines = [
        "# On a GPU",
        "",
        f"`make gpu` at {commit or 'an unknown commit'}, {datetime.date.today()}: {card}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, Python {platform.python_version()}.",
        "",
        "## Speed compared with torchvision, same run",
        f"```\n{speed_table}```",
        "## Training from scratch on generated images",
        f"`configs/gpu.yaml`, {steps} steps: {seconds:.0f} s with start, loading, evaluation and checkpoints; "
        f"{images / seconds:.1f} images/s over all of it.",
        f"```\n{format_metrics(metrics)}\n```",
        "## Where the time of a step goes",
        *(f"- {name}: {100 * fraction:.1f} %" for name, fraction in fractions.items()),
        "",
    ]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines), arguments.output, sep="\n")
    return 0


def measure_speed(config: Config) -> tuple[float, str]:
    """Training images/s of this package, and the table that speed.py prints."""
    side = str(config.data.short_side[0])
    command = ["speed.py", "--backbone", config.model.backbone, "--size", side, side]
    sys.argv = [*command, "--batch", str(config.train.batch_size)]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        speeds = speed.main()
    print(output.getvalue())
    return speeds["training"], output.getvalue()


def profile_step(config: Config, device: torch.device) -> dict[str, float]:
    """Fractions of the device time of training steps: convolutions, everything else, and the largest of the others."""
    dataset = CocoDataset(config.data.train_annotations, config.data.train_images)
    model = RetinaNet(config, dataset.num_classes).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_optimizer(model, config.train)
    ema_positives = torch.tensor(100.0, device=device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    batches = train_batches(dataset, config, 0)

    def run_steps(count: int) -> None:
        for step in range(count):
            batch = [part.to(device) for part in next(batches)]
            train_step(model, optimizer, batch, dataset.num_classes, ema_positives, config, step)

    run_steps(WARM_UP)
    with profile(activities=activities) as profiler:
        run_steps(PROFILED)
    times: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        time_us = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if event.key.startswith("aten::") or device.type == "cpu":
            times["convolution" if "conv" in event.key else event.key] += time_us
    total = sum(times.values())
    largest = sorted((name for name in times if name != "convolution"), key=lambda name: -times[name])[:8]
    fractions = {"convolution": times["convolution"] / total, "everything else": 1 - times["convolution"] / total}
    return fractions | {f"  of it {name}": times[name] / total for name in largest}


if __name__ == "__main__":
    raise SystemExit(main())
