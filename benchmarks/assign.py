"""Matching of a batch on CUDA: time, memory and waiting, beside torchvision's matcher on the same card.

    python benchmarks/assign.py [--batch 16] [--size 800 1344] [--boxes 100]

Time by CUDA events, median. torchvision's way: box_iou and Matcher, one image after the other, as its RetinaNet does.
Without a card it says so and stops.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from retina.assign import assign
from retina.config import Anchors, Assign
from retina.data.loader import Target
from retina.model.anchors import make_anchors

ROUNDS = 30


def main() -> None:
    """Prints time, ratio, peak memory and whether repeats are equal in every bit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1344), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--boxes", type=int, default=100, help="in an image")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here: the kernel's figures are those of a card")
    device = torch.device("cuda")
    height, width = arguments.size
    anchors = make_anchors(Anchors(), height, width, device)
    anchors_R4 = torch.cat(anchors)
    batches = [batch(arguments.batch, arguments.boxes, height, width, seed, device) for seed in range(4)]
    sizes = [(height, width)] * arguments.batch
    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)

    def ours(targets: list[Target]) -> Tensor:
        return assign(anchors, targets, sizes, 80, Assign()).labels_NR

    def theirs(targets: list[Target]) -> list[Tensor]:
        return [matcher(box_iou(target.boxes, anchors_R4)) for target in targets]

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, torchvision {torchvision.__version__}")
    print(f"{arguments.batch} x {len(anchors_R4):,} anchors, {arguments.boxes} boxes an image, median of {ROUNDS}")
    times = {}
    for name, way in (("retina", ours), ("torchvision", theirs)):
        times[name], peak = measure(way, batches)
        print(f"{name:12} {times[name]:8.3f} ms   peak memory above the inputs {peak / 2**20:8.1f} MiB")
    print(f"torchvision / retina: {times['torchvision'] / times['retina']:.1f} x")
    first = ours(batches[0])
    print("equal in every bit over 10 runs:", all(torch.equal(first, ours(batches[0])) for _ in range(10)))
    torch.cuda.set_sync_debug_mode("error")  # raises where the host waits
    ours(batches[1])
    torch.cuda.set_sync_debug_mode("default")
    print("no host synchronisation")


def batch(images: int, boxes: int, height: int, width: int, seed: int, device: torch.device) -> list[Target]:
    """COCO-like sides, 8 to 400 px, log-uniform; fresh boxes for each seed."""
    generator = torch.Generator().manual_seed(seed)
    side = 8 * 50 ** torch.rand(images, boxes, 2, generator=generator)
    corner = torch.rand(images, boxes, 2, generator=generator) * (torch.tensor([width, height]) - side).clamp(min=0)
    labels = torch.randint(0, 80, (images, boxes), generator=generator)
    everything = torch.cat([corner, corner + side], dim=2)
    nothing = torch.zeros(0, 4, device=device)
    return [Target(box.to(device), label.to(device), nothing) for box, label in zip(everything, labels, strict=True)]


def measure(way: Callable[[list[Target]], object], batches: list[list[Target]]) -> tuple[float, int]:
    """Milliseconds by events, over batches in turn, and the peak of memory above what was there before."""
    for targets in batches:
        way(targets)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    way(batches[0])
    peak = torch.cuda.max_memory_allocated() - before
    times = []
    for i in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(20_000_000)  # the host gets ahead, so that its own work is not timed
        start.record()
        way(batches[i % len(batches)])
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times), peak


if __name__ == "__main__":
    main()
