"""Matching anchors and boxes of a batch on CUDA: time, memory and synchronization, compared with torchvision's matcher.

    python benchmarks/assign.py [--batch 16] [--size 800 1344] [--boxes 100]

The time is the median, measured by CUDA events. torchvision runs box_iou and Matcher on one image after the other, as
its RetinaNet does. Without a CUDA device the benchmark stops with a message.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
import torchvision
from cuda_timing import cuda_milliseconds
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from retina.assign import assign
from retina.config import Anchors, Assign
from retina.data.batch import Target
from retina.model import make_anchors

ROUNDS = 30


def main() -> None:
    """Print times, their ratio, peak memory, and whether repeated calls are equal in every bit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1344), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--boxes", type=int, default=100, help="boxes in an image")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device found: this benchmark times CUDA kernels")
    device = torch.device("cuda")
    height, width = arguments.size
    anchors = make_anchors(Anchors(), height, width, device)
    anchors_R4 = torch.cat(anchors)
    batches = [make_targets(arguments.batch, arguments.boxes, height, width, seed, device) for seed in range(4)]
    sizes = [(height, width)] * arguments.batch
    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)

    def ours(targets: list[Target]) -> Tensor:
        return assign(anchors, targets, sizes, 80, Assign()).labels_NR

    def theirs(targets: list[Target]) -> list[Tensor]:
        return [matcher(box_iou(target.boxes, anchors_R4)) for target in targets]

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, torchvision {torchvision.__version__}")
    print(f"{arguments.batch} x {len(anchors_R4):,} anchors, {arguments.boxes} boxes an image, median of {ROUNDS}")
    times = {}
    for name, matching in (("retina", ours), ("torchvision", theirs)):
        times[name], peak = measure(matching, batches)
        print(f"{name:12} {times[name]:8.3f} ms   peak memory above the inputs {peak / 2**20:8.1f} MiB")
    print(f"torchvision / retina: {times['torchvision'] / times['retina']:.1f} x")
    first = ours(batches[0])
    print("equal in every bit over 10 runs:", all(torch.equal(first, ours(batches[0])) for _ in range(10)))
    torch.cuda.set_sync_debug_mode("error")  # raises if the host waits for the device
    ours(batches[1])
    torch.cuda.set_sync_debug_mode("default")
    print("no host synchronization")


def make_targets(images: int, boxes: int, height: int, width: int, seed: int, device: torch.device) -> list[Target]:
    """Random boxes with log-uniform sides of 8 to 400 px, as in COCO; each seed gives other boxes."""
    generator = torch.Generator().manual_seed(seed)
    side = 8 * 50 ** torch.rand(images, boxes, 2, generator=generator)
    corner = torch.rand(images, boxes, 2, generator=generator) * (torch.tensor([width, height]) - side).clamp(min=0)
    labels = torch.randint(0, 80, (images, boxes), generator=generator)
    boxes_xyxy = torch.cat([corner, corner + side], dim=2)
    no_crowd = torch.zeros(0, 4, device=device)
    return [
        Target(image_boxes.to(device), image_labels.to(device), no_crowd)
        for image_boxes, image_labels in zip(boxes_xyxy, labels, strict=True)
    ]


def measure(matching: Callable[[list[Target]], object], batches: list[list[Target]]) -> tuple[float, int]:
    """Median milliseconds over the batches in turn, and the rise of peak memory in bytes."""
    for targets in batches:
        matching(targets)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    matching(batches[0])
    peak = torch.cuda.max_memory_allocated() - before
    milliseconds = cuda_milliseconds(
        lambda i: matching(batches[i % len(batches)]), ROUNDS, warm_up=0, sleep_cycles=20_000_000
    )
    return milliseconds, peak


if __name__ == "__main__":
    main()
