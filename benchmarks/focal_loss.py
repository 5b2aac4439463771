"""The focal loss compared with other implementations: time of forward + backward, ratio and peak memory, in one run.

    python benchmarks/focal_loss.py                  # CPU: 200,000 x 80 logits, float32 and bfloat16
    python benchmarks/focal_loss.py --device cuda    # 16 images of 800x1344: 16 x 201,600 x 80, 91 and 264 logits

All implementations start from the same integer class ids, as a detector has them (K is background), and make what they
need from these; "labels ready" gets a one-hot tensor made beforehand. Rounds alternate between the implementations, and
each timed call follows an untimed call of the same one. A ratio is the median over rounds of peer / retina. Extra
memory is the rise of peak memory above the inputs, in a separate process each, divided by the size of the logits; the
gradient alone is 1.0.
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
from cuda_timing import cuda_milliseconds
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss as torchvision_focal

from retina.losses import sigmoid_focal_loss

ROWS, CLASSES, GAMMA, ALPHA = 200_000, 80, 2.0, 0.25
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Loss = Callable[[Tensor, Tensor], Tensor]


def inputs(dtype: torch.dtype, rows: int, classes: int, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits around the prior 0.01..0.02, one in 10,000 a mistake at 0.95; 0.2 % of the rows objects, 0.5 % ignored."""
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator, device=device) - 4
    logits[torch.rand(rows, classes, generator=generator, device=device) < 1e-4] = 3
    logits = logits.to(dtype)
    kind = torch.rand(rows, generator=generator, device=device)
    ids = torch.randint(0, classes, (rows,), generator=generator, device=device)
    ids = torch.where(kind < 0.002, ids, torch.where(kind < 0.007, -1, classes))
    return logits.requires_grad_(), ids


def one_hot(ids: Tensor, classes: int) -> Tensor:
    """As mmdetection makes it: with a column for background, which is then removed."""
    return F.one_hot(torch.where(ids < 0, classes, ids), classes + 1)[:, :classes]


def formula(logits: Tensor, labels: Tensor) -> Tensor:
    """Equation 5 as in the Python path of mmdetection and many other repositories; one value for each logit."""
    y = labels.type_as(logits)
    p = logits.sigmoid()
    one_minus_p_t = (1 - p) * y + p * (1 - y)
    factor = (ALPHA * y + (1 - ALPHA) * (1 - y)) * one_minus_p_t.pow(GAMMA)
    return F.binary_cross_entropy_with_logits(logits, y, reduction="none") * factor


def formula_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return (formula(logits, one_hot(ids, logits.shape[1])) * (ids >= 0)[:, None]).sum()


def formula_loss_autocast(logits: Tensor, ids: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return formula_loss(logits, ids)


def torchvision_ops(logits: Tensor, ids: Tensor) -> Tensor:
    loss = torchvision_focal(logits, one_hot(ids, logits.shape[1]).to(logits.dtype), ALPHA, GAMMA)
    return (loss * (ids >= 0)[:, None]).sum()


def implementations(ids: Tensor, classes: int, dtype: torch.dtype) -> dict[str, Loss]:
    """All implementations by their names in the table."""
    ours = partial(sigmoid_focal_loss, alpha=ALPHA, gamma=GAMMA, reduction="sum")
    compiled = torch.compile(lambda logits, labels, valid: (formula(logits, labels) * valid).sum())
    ready: list[Tensor] = []  # labels and valid, made at the first call, which is not timed

    def labels_ready(logits: Tensor, ids: Tensor) -> Tensor:
        if not ready:
            ready.extend([one_hot(ids, classes).to(dtype), (ids >= 0)[:, None].to(dtype)])
        return compiled(logits, *ready)

    return {
        "retina": ours,
        "retina, impl='reference'": partial(ours, impl="reference"),
        "retina under torch.compile": torch.compile(ours),
        "mmdetection's formula": formula_loss,
        "  under bf16 autocast": formula_loss_autocast,
        "torchvision.ops": torchvision_ops,
        "torch.compile of the formula": torch.compile(formula_loss),
        "  labels ready": labels_ready,
    }


def time_step(loss: Loss, logits: Tensor, ids: Tensor) -> float:
    """Seconds of one forward + backward."""
    begin = time.perf_counter()
    torch.autograd.grad(loss(logits, ids), logits)
    return time.perf_counter() - begin


def extra_memory(name: str, dtype: str) -> float:
    """Rise of the peak resident memory above the inputs, divided by the size of the logits; in a separate process."""
    command = [sys.executable, __file__, "--memory-of", name, "--dtype", dtype]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_extra_memory(name: str, dtype: str) -> None:
    """What `extra_memory` reads from its process. Linux only: it resets the peak just before the measured call."""
    logits, ids = inputs(DTYPES[dtype], ROWS, CLASSES)
    loss = implementations(ids, CLASSES, DTYPES[dtype])[name]
    if "ready" in name:
        time_step(loss, logits, ids)
    else:
        for _ in range(2):
            time_step(loss, logits[:512].detach().requires_grad_(), ids[:512])
    Path("/proc/self/clear_refs").write_text("5")
    before = process_memory("VmRSS")
    time_step(loss, logits, ids)
    print((process_memory("VmHWM") - before) / (logits.numel() * logits.element_size()))


def process_memory(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def compare(dtype: str, rounds: int) -> None:
    """Print the table of one dtype."""
    logits, ids = inputs(DTYPES[dtype], ROWS, CLASSES)
    losses = implementations(ids, CLASSES, DTYPES[dtype])
    exact = formula_loss(logits.detach().double(), ids).item()
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    errors = {}
    for name, loss in losses.items():
        time_step(loss, logits, ids)  # compiles and warms up
        errors[name] = abs(loss(logits, ids).item() - exact) / exact
    for done in range(rounds):
        for name, loss in losses.items():
            time_step(loss, logits, ids)  # leaves the allocator in the state that a run with this loss has
            seconds[name].append(time_step(loss, logits, ids))
        print(f"\r{dtype}: round {done + 1} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(f"\n{dtype}, {ROWS:,} x {CLASSES}{'':21}       ms   peer / retina (range)   extra memory   error of the loss")
    for name, times in seconds.items():
        ratios = [peer / retina for peer, retina in zip(times, seconds["retina"], strict=True)]
        ratio = f"{statistics.median(ratios):6.2f}  ({min(ratios):.2f} to {max(ratios):.2f})"
        print(
            f"{name:32}{1000 * statistics.median(times):16.1f}   {ratio:23}{extra_memory(name, dtype):10.2f} x"
            f"{errors[name]:16.0e}"
        )
    print_gamma_times(logits, ids, rounds)


def print_gamma_times(logits: Tensor, ids: Tensor, rounds: int) -> None:
    """Print the time with hard negatives, and with other gammas."""
    others = (0.0, 0.1, 0.2, 0.5, 1.0, 1.3, 5.0)
    seconds: dict[float, list[float]] = {gamma: [] for gamma in (2.0, *others)}
    for _ in range(rounds):
        for gamma, times in seconds.items():
            loss = partial(sigmoid_focal_loss, alpha=ALPHA, gamma=gamma, reduction="sum")
            times.append(time_step(loss, logits, ids))
    time_ratios = {
        gamma: statistics.median(a / b for a, b in zip(seconds[gamma], seconds[2.0], strict=True)) for gamma in others
    }
    hard = logits.detach().clone()
    hard.view(-1)[:: 1 << 14] = 5  # a mistake at 0.993 in every chunk: rows that are computed twice
    hard.requires_grad_()
    loss = partial(sigmoid_focal_loss, alpha=ALPHA, gamma=GAMMA, reduction="sum")
    slower = statistics.median(time_step(loss, hard, ids) / time_step(loss, logits, ids) for _ in range(rounds))
    print(f"time with a hard negative in every chunk: {slower:.2f} x")
    print("time against gamma 2:  " + "  ".join(f"{gamma:g}: {ratio:.2f} x" for gamma, ratio in time_ratios.items()))


def copy_bandwidth(rounds: int) -> float:
    """Bytes per second of a device-to-device copy of 1 GiB, counting reads and writes."""
    source = torch.rand(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / (1e-3 * cuda_milliseconds(lambda _: target.copy_(source), rounds))


def compare_on_cuda(dtype: str, classes: int, rounds: int, copy_rate: float) -> None:
    """Print the table of one dtype and number of classes; `copy_rate` is that of `copy_bandwidth`."""
    torch.compiler.reset()  # otherwise the second shape would compile for dynamic shapes, which slows the peers down
    rows = 16 * 201_600
    sets = [inputs(DTYPES[dtype], rows, classes, "cuda", seed) for seed in range(2)]
    size = sets[0][0].numel() * sets[0][0].element_size()
    chunks = zip(sets[0][0].detach().split(rows // 32), sets[0][1].split(rows // 32), strict=True)
    exact = sum(formula_loss(logits.double(), ids).item() for logits, ids in chunks)
    losses = implementations(sets[0][1], classes, DTYPES[dtype])
    copy_milliseconds = 2 * size / copy_rate * 1e3
    print(
        f"\n{dtype}, 16 x 201,600 x {classes}: {size / 1e9:.2f} GB of logits, "
        f"at the copy's speed {copy_milliseconds:.3f} ms"
    )
    print(f"{'':32}      ms   peer / retina     GB/s   of copy   extra memory   error of the loss")
    retina_milliseconds = 0.0
    for name, loss in losses.items():
        if "ready" in name or "autocast" in name:
            continue

        def call(i: int, loss: Loss = loss) -> None:
            logits, ids = sets[i % 2]
            torch.autograd.grad(loss(logits, ids), logits)

        try:
            call(0)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call(0)
            extra = (torch.cuda.max_memory_allocated() - before) / size
            milliseconds = cuda_milliseconds(call, rounds if name == "retina" else max(3, rounds // 4))
        except torch.cuda.OutOfMemoryError:
            print(f"{name:32} does not fit into the card's memory")
            torch.cuda.empty_cache()
            continue
        retina_milliseconds = retina_milliseconds or milliseconds  # the first of the table
        error = abs(losses[name](*sets[0]).item() - exact) / exact
        rate = 2 * size / (1e-3 * milliseconds)
        ratio = milliseconds / retina_milliseconds
        speed = f"{milliseconds:8.3f}{ratio:16.1f}{rate / 1e9:9.0f}{100 * rate / copy_rate:8.0f} %"
        print(f"{name:32}{speed}{extra:13.2f} x{error:18.0e}")
    logits, ids = sets[0]
    runs = [torch.autograd.grad(losses["retina"](logits, ids), logits)[0] for _ in range(3)]
    print("equal in every bit over 3 runs:", all(torch.equal(runs[0], run) for run in runs))


def sweep(rounds: int) -> None:
    """Print the time of the kernel for other sizes of a block, a thread and a program."""
    from retina.losses import focal_triton

    for dtype in DTYPES:
        logits, ids = inputs(DTYPES[dtype], 16 * 201_600, CLASSES, "cuda")
        for each in (4, 8, 16):
            for block in (128, 256, 512, 1024, 2048):
                for elements in (4096, 8192, 16_384):
                    if not 32 * each <= block <= 256 * each or elements > 32 * block:
                        continue
                    focal_triton.EACH, focal_triton.ELEMENTS = each, elements
                    focal_triton._block = lambda dtype, block=block: block
                    loss = partial(sigmoid_focal_loss, reduction="sum")
                    time_ms = cuda_milliseconds(lambda _: torch.autograd.grad(loss(logits, ids), logits), rounds)  # noqa: B023
                    print(
                        f"{dtype} block {block:4}, {each:2} a thread, {elements:5} a program: {time_ms:.3f} ms",
                        flush=True,
                    )


def main() -> None:
    """Print a table for each dtype, and on CUDA for each number of classes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", choices=DTYPES, help="only this dtype")
    parser.add_argument("--sweep", action="store_true", help="CUDA: other sizes of a block, a thread and a program")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print_extra_memory(arguments.memory_of, arguments.dtype)
        return
    dtypes = [arguments.dtype] if arguments.dtype else list(DTYPES)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}"
    if arguments.device == "cpu":
        print(f"{versions}, {torch.get_num_threads()} threads; gamma {GAMMA:g}, alpha {ALPHA:g}")
        for dtype in dtypes:
            compare(dtype, arguments.rounds)
        return
    if not torch.cuda.is_available():
        sys.exit("no CUDA device found: this benchmark times CUDA kernels")
    if arguments.sweep:
        sweep(arguments.rounds)
        return
    copy_rate = copy_bandwidth(arguments.rounds)
    print(
        f"{torch.cuda.get_device_name()}, {versions}; gamma {GAMMA:g}, alpha {ALPHA:g}; copy {copy_rate / 1e9:.0f} GB/s"
    )
    for classes in (80, 91, 264):
        for dtype in dtypes:
            compare_on_cuda(dtype, classes, 4 * arguments.rounds, copy_rate)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
