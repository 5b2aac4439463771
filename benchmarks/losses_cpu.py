"""The losses on the CPU: `softmax_focal_loss` against `F.cross_entropy`, and multi-label against torchvision.ops.

    OMP_NUM_THREADS=1 python benchmarks/losses_cpu.py --rounds 9

A call is forward + backward. Rounds alternate between the two, and each timed call follows an untimed call of the same
one. A ratio is the median over the rounds of time of retina / time of the peer. torchvision gets its labels ready, as
floats in the dtype of the logits.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss as torchvision_focal

from retina.losses import sigmoid_focal_loss, softmax_focal_loss

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SOFTMAX_SHAPES: list[tuple[int, ...]] = [
    (65536, 10), (16384, 50), (16384, 100), (4096, 1000), (512, 32000), (4, 19, 64, 64), (4, 21, 128, 128), (128, 3),
]  # fmt: skip
SIGMOID_SHAPES = [(200_000, 80), (1_000, 5_000)]
Loss = Callable[[Tensor], Tensor]


def time_step(loss: Loss, logits: Tensor) -> float:
    """Seconds of one forward + backward."""
    begin = time.perf_counter()
    torch.autograd.grad(loss(logits), logits)
    return time.perf_counter() - begin


def compare(name: str, ours: Loss, theirs: Loss, logits: Tensor, rounds: int) -> None:
    """Print a line: milliseconds of both, and the median and range of the ratio."""
    times: dict[Loss, list[float]] = {ours: [], theirs: []}
    for _ in range(rounds):
        for loss, seconds in times.items():
            time_step(loss, logits)  # leaves the allocator in the state that a run with this loss has
            seconds.append(time_step(loss, logits))
    ratios = [a / b for a, b in zip(times[ours], times[theirs], strict=True)]
    milliseconds = [1000 * statistics.median(seconds) for seconds in times.values()]
    spread = f"{statistics.median(ratios):5.2f}  ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"{name:42}{milliseconds[0]:9.2f}{milliseconds[1]:9.2f}   {spread}", flush=True)


def compare_softmax(shape: tuple[int, ...], dtype: str, gammas: list[float], rounds: int) -> None:
    """Class ids, reduction "mean", against `F.cross_entropy`."""
    logits = torch.randn(shape).mul_(2).to(DTYPES[dtype]).requires_grad_()
    ids = torch.randint(0, shape[1], shape[:1] + shape[2:])
    for gamma in gammas:
        ours = partial(softmax_focal_loss, targets=ids, gamma=gamma)
        theirs = partial(F.cross_entropy, target=ids)
        compare(f"softmax {dtype} {shape} gamma {gamma:g}", ours, theirs, logits, rounds)


def compare_sigmoid(shape: tuple[int, int], dtype: str, gammas: list[float], rounds: int) -> None:
    """Labels of the shape of the logits, 2 % of them positive, reduction "sum", against torchvision.ops."""
    logits = (torch.randn(shape) - 4).to(DTYPES[dtype]).requires_grad_()
    hard = torch.rand(shape) < 0.02
    soft = torch.rand(shape).mul_(0.1).add_(0.9 * hard).to(logits.dtype)
    cases = {"hard, float": hard.to(logits.dtype), "hard, bool": hard, "soft": soft}
    for gamma in gammas:
        for name, labels in cases.items():
            ready = labels.to(logits.dtype)
            ours = partial(sigmoid_focal_loss, targets=labels, gamma=gamma, reduction="sum")
            theirs = partial(torchvision_focal, targets=ready, alpha=0.25, gamma=gamma, reduction="sum")
            compare(f"{name}, {dtype} {shape} gamma {gamma:g}", ours, theirs, logits, rounds)


def main() -> None:
    """Print a line for each loss, shape and dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--loss", choices=["softmax", "sigmoid"], help="only this loss")
    parser.add_argument("--dtype", choices=DTYPES, help="only this dtype")
    parser.add_argument("--gamma", type=float, nargs="+", default=[2.0])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'':42}   retina     peer   retina / peer (range)")
    cases = {"softmax": (compare_softmax, SOFTMAX_SHAPES), "sigmoid": (compare_sigmoid, SIGMOID_SHAPES)}
    for loss, (function, shapes) in cases.items():
        if arguments.loss in (None, loss):
            for dtype in [arguments.dtype] if arguments.dtype else DTYPES:
                for shape in shapes:
                    function(shape, dtype, arguments.gamma, arguments.rounds)


if __name__ == "__main__":
    main()
