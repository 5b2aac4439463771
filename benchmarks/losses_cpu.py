"""Two losses on the CPU beside PyTorch's and torchvision's: time of forward + backward, as ratios of the same rounds.

    python benchmarks/losses_cpu.py [--rounds 7]

softmax_focal_loss with class ids beside F.cross_entropy, and sigmoid_focal_loss with labels of the shape of the logits
beside torchvision.ops.sigmoid_focal_loss, whose labels are floats made beforehand. One thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss as torchvision_focal

from retina.losses import sigmoid_focal_loss, softmax_focal_loss

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def print_ratio(name: str, x: Tensor, ours: Callable[[], Tensor], theirs: Callable[[], Tensor], rounds: int) -> None:
    """The median over the rounds of our time / theirs, its range, and our milliseconds."""

    def seconds(loss: Callable[[], Tensor]) -> float:
        start = time.perf_counter()
        torch.autograd.grad(loss(), x)
        return time.perf_counter() - start

    for loss in (ours, theirs, ours, theirs):
        seconds(loss)
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    ratios = sorted(a / b for a, b in pairs)
    milliseconds = 1000 * statistics.median(a for a, _ in pairs)
    print(
        f"{name:44}{statistics.median(ratios):6.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}){milliseconds:10.1f} ms",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name, dtype in DTYPES.items():
        print(f"softmax_focal_loss / F.cross_entropy, {name}")
        for rows, classes in ((65536, 10), (16384, 100), (4096, 1000), (512, 32000)):
            x, ids = torch.randn(rows, classes).to(dtype).requires_grad_(), torch.randint(0, classes, (rows,))
            ours, theirs = (lambda: softmax_focal_loss(x, ids)), (lambda: F.cross_entropy(x, ids))  # noqa: B023
            print_ratio(f"  {rows} x {classes}", x, ours, theirs, rounds)
        print(f"sigmoid_focal_loss with labels of the logits' shape / torchvision.ops, {name}")
        for rows, classes in ((200_000, 80), (1000, 5000)):
            x = (torch.randn(rows, classes) - 3).to(dtype).requires_grad_()
            multi_hot, soft = torch.rand(rows, classes) < 0.02, torch.rand(rows, classes).to(dtype)
            hard = multi_hot.to(dtype)
            for kind, labels, floats in (
                ("bool", multi_hot, hard),
                ("float, 0 or 1", hard, hard),
                ("soft", soft, soft),
            ):
                ours = lambda: sigmoid_focal_loss(x, labels, reduction="sum")  # noqa: B023, E731
                theirs = lambda: torchvision_focal(x, floats, reduction="sum")  # noqa: B023, E731
                print_ratio(f"  {rows} x {classes}, {kind}", x, ours, theirs, rounds)


if __name__ == "__main__":
    main()
