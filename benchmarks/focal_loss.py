"""The focal loss beside what people use instead: forward + backward, time, ratio and peak memory, in one run.

    python benchmarks/focal_loss.py                  # 200,000 x 80 logits, float32 and bfloat16, CPU

Everyone starts from the same integer class ids, as a detector has them (K is background), and makes what it needs;
"labels ready" is the favour of a one-hot made beforehand. Rounds alternate between the implementations, and each timed
call follows an untimed one of the same; a ratio is the median over rounds of peer / retina. Extra memory is the rise of
the process's peak above the inputs, each in a process of its own, divided by the size of the logits; the gradient alone
is 1.0.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss as torchvision_focal

from retina.losses import sigmoid_focal_loss

ROWS, CLASSES, GAMMA, ALPHA = 200_000, 80, 2.0, 0.25
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Loss = Callable[[Tensor, Tensor], Tensor]


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits around the prior 0.01..0.02, one in 10,000 a mistake at 0.95; 0.2 % objects, 0.5 % left out."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, CLASSES, generator=generator) - 4
    logits[torch.rand(ROWS, CLASSES, generator=generator) < 1e-4] = 3
    logits = logits.to(dtype)
    kind = torch.rand(ROWS, generator=generator)
    ids = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    ids = torch.where(kind < 0.002, ids, torch.where(kind < 0.007, -1, CLASSES))
    return logits.requires_grad_(), ids


def one_hot(ids: Tensor) -> Tensor:
    return F.one_hot(torch.where(ids < 0, CLASSES, ids), CLASSES + 1)[:, :CLASSES]


def formula(logits: Tensor, labels: Tensor) -> Tensor:
    """Eq. 5 as most repositories write it, mmdetection's Python path among them."""
    y = labels.type_as(logits)
    p = logits.sigmoid()
    miss = (1 - p) * y + p * (1 - y)
    factor = (ALPHA * y + (1 - ALPHA) * (1 - y)) * miss.pow(GAMMA)
    return F.binary_cross_entropy_with_logits(logits, y, reduction="none") * factor


def plain(logits: Tensor, ids: Tensor) -> Tensor:
    return (formula(logits, one_hot(ids)) * (ids >= 0)[:, None]).sum()


def plain_autocast(logits: Tensor, ids: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return plain(logits, ids)


def torchvision_ops(logits: Tensor, ids: Tensor) -> Tensor:
    loss = torchvision_focal(logits, one_hot(ids).to(logits.dtype), ALPHA, GAMMA)
    return (loss * (ids >= 0)[:, None]).sum()


def implementations(ids: Tensor, dtype: torch.dtype) -> dict[str, Loss]:
    ours = partial(sigmoid_focal_loss, alpha=ALPHA, gamma=GAMMA, reduction="sum")
    labels, kept = one_hot(ids).to(dtype), (ids >= 0)[:, None].to(dtype)
    favoured = torch.compile(lambda logits: (formula(logits, labels) * kept).sum())
    return {
        "retina": ours,
        "retina, impl='reference'": partial(ours, impl="reference"),
        "retina under torch.compile": torch.compile(ours),
        "mmdetection's formula": plain,
        "  under bf16 autocast": plain_autocast,
        "torchvision.ops": torchvision_ops,
        "torch.compile of the formula": torch.compile(plain),
        "  labels ready": lambda logits, ids: favoured(logits),
    }


def step(loss: Loss, logits: Tensor, ids: Tensor) -> float:
    """Seconds of one forward + backward."""
    begin = time.perf_counter()
    torch.autograd.grad(loss(logits, ids), logits)
    return time.perf_counter() - begin


def extra_memory(name: str, dtype: str) -> float:
    """Rise of the peak resident memory above the inputs, in sizes of the logits, in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", name, "--dtype", dtype]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_own_memory(name: str, dtype: str) -> None:
    """Linux only: the high-water mark is reset just before the measured call, after a small one has warmed up."""
    logits, ids = inputs(DTYPES[dtype])
    loss = implementations(ids, DTYPES[dtype])[name]
    if "ready" not in name:
        for _ in range(2):
            step(loss, logits[:512].detach().requires_grad_(), ids[:512])
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step(loss, logits, ids)
    print((resident("VmHWM") - before) / (logits.numel() * logits.element_size()))


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def compare(dtype: str, rounds: int) -> None:
    """Prints the table of one dtype."""
    logits, ids = inputs(DTYPES[dtype])
    losses = implementations(ids, DTYPES[dtype])
    exact = plain(logits.detach().double(), ids).item()
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    errors = {}
    for name, loss in losses.items():
        step(loss, logits, ids)  # compiles, warms up
        errors[name] = abs(loss(logits, ids).item() - exact) / exact
    for done in range(rounds):
        for name, loss in losses.items():
            step(loss, logits, ids)  # leaves the allocator as a training with this loss would
            seconds[name].append(step(loss, logits, ids))
        print(f"\r{dtype}: round {done + 1} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(f"\n{dtype}, {ROWS:,} x {CLASSES}{'':21}       ms   peer / retina (range)   extra memory   error of the loss")
    for name, times in seconds.items():
        ratios = [peer / own for peer, own in zip(times, seconds["retina"], strict=True)]
        ratio = f"{statistics.median(ratios):6.2f}  ({min(ratios):.2f} to {max(ratios):.2f})"
        print(
            f"{name:32}{1000 * statistics.median(times):16.1f}   {ratio:23}{extra_memory(name, dtype):10.2f} x"
            f"{errors[name]:16.0e}"
        )
    gammas(logits, ids, rounds)


def gammas(logits: Tensor, ids: Tensor, rounds: int) -> None:
    """Prints what another gamma costs."""
    others = (0.0, 0.1, 0.2, 0.5, 1.0, 1.3, 5.0)
    seconds: dict[float, list[float]] = {gamma: [] for gamma in (2.0, *others)}
    for _ in range(rounds):
        for gamma, times in seconds.items():
            loss = partial(sigmoid_focal_loss, alpha=ALPHA, gamma=gamma, reduction="sum")
            times.append(step(loss, logits, ids))
    cost = {
        gamma: statistics.median(time / two for time, two in zip(seconds[gamma], seconds[2.0], strict=True))
        for gamma in others
    }
    hard = logits.detach().clone()
    hard.view(-1)[:: 1 << 14] = 5  # a mistake at 0.993 in every piece: rows that are computed twice
    hard.requires_grad_()
    loss = partial(sigmoid_focal_loss, alpha=ALPHA, gamma=GAMMA, reduction="sum")
    slower = statistics.median(step(loss, hard, ids) / step(loss, logits, ids) for _ in range(rounds))
    print(f"time with a hard negative in every piece: {slower:.2f} x")
    print("time against gamma 2:  " + "  ".join(f"{gamma:g}: {ratio:.2f} x" for gamma, ratio in cost.items()))


def main() -> None:
    """Prints a table for each dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", choices=DTYPES, help="one of them only")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        return print_own_memory(arguments.memory_of, arguments.dtype)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}"
    print(f"{versions}, {torch.get_num_threads()} threads; gamma {GAMMA:g}, alpha {ALPHA:g}")
    for dtype in [arguments.dtype] if arguments.dtype else DTYPES:
        compare(dtype, arguments.rounds)
    return None


if __name__ == "__main__":
    main()
