"""Images per second, compared with torchvision's own RetinaNet in the same run.

    python benchmarks/speed.py                               R18-FPN at 320x240, batch 8: two CPU cores
    python benchmarks/gpu.py --only training inference       a CUDA card, with the functions of this file

Same backbone, FPN and head width (256), images, batch, boxes and optimizer. torchvision runs as its users run it
(float32, eager; with --peer-bf16 under autocast), retina as in `tools/train.py`. Rounds alternate between the two, and
the ratio is the median over rounds: a machine whose speed drifts favors neither. Both start from the same weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from retina.config import Config, Model, Train
from retina.data.loader import Batch, Target
from retina.detect import Detections
from retina.device import autocast, compile_network, pick_device
from retina.evaluate.inference import start_batch
from retina.model import RetinaNet
from retina.model.pretrained import from_torchvision, load_exactly
from retina.train import build_optimizer, train_step

CLASSES, BOXES = 80, 8


def main() -> None:
    """Print a table: images/s of both, median ratio and its range."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--size", type=int, nargs=2, default=(240, 320), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer-bf16", action="store_true", help="torchvision under bf16 autocast too")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the network of retina")
    arguments = parser.parse_args()
    device = pick_device()
    config = Config(
        model=Model(backbone=arguments.backbone, weights=None, norm="batch", frozen_stages=-1),
        train=Train(batch_size=arguments.batch, lr=1e-3, compile=arguments.compile),
    )
    height, width = arguments.size
    print(
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, {torch.get_num_threads()} threads, {device}"
    )
    print(f"{arguments.backbone}-FPN, {width}x{height}, batch {arguments.batch}, {arguments.rounds} rounds\n")

    torch.manual_seed(0)
    ours = RetinaNet(config, CLASSES).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    theirs = torchvision_retinanet(arguments.backbone, height, width).to(device)
    torch.nn.init.normal_(theirs.head.classification_head.cls_logits.weight, std=0.05)  # some detections for NMS
    load_exactly(ours, from_torchvision(theirs.state_dict())[0], "torchvision")
    if arguments.compile:
        compile_network(ours, device)
    batch = make_batch(arguments.batch, height, width, config.data.pad_multiple).to(device)
    print(f"{'':10} {'torchvision':>14} {'retina':>14} {'ratio':>8}")
    for name, their_call, our_call in (
        ("training", their_step(theirs, batch, device, arguments.peer_bf16), our_step(ours, batch, config, device)),
        ("inference", their_eval(theirs, batch, device, arguments.peer_bf16), our_eval(ours, batch, config, device)),
    ):
        compare(name, their_call, our_call, arguments.batch, arguments.rounds, device)


def torchvision_retinanet(
    backbone: str, height: int, width: int, classes: int = CLASSES, frozen: bool = False
) -> TorchvisionRetinaNet:
    """torchvision's RetinaNet by its own constructor, on any ResNet; P6 from C5, as in retina.

    `frozen`: with frozen BatchNorm, and the stem and layer1 frozen, as it trains from pretrained weights.
    """
    body = torchvision.models.get_model(
        backbone, weights=None, norm_layer=FrozenBatchNorm2d if frozen else torch.nn.BatchNorm2d
    )
    extra_blocks = LastLevelP6P7(body.fc.in_features, 256)
    trainable_layers = 3 if frozen else 5
    backbone_fpn = _resnet_fpn_extractor(body, trainable_layers, returned_layers=[2, 3, 4], extra_blocks=extra_blocks)
    return TorchvisionRetinaNet(backbone_fpn, classes, min_size=min(height, width), max_size=max(height, width))


def make_batch(count: int, height: int, width: int, multiple: int) -> Batch:
    """Noise and random boxes: the time does not depend on the content of the images."""
    generator = torch.Generator().manual_seed(0)
    padded_size = (-(-height // multiple) * multiple, -(-width // multiple) * multiple)
    images = torch.zeros(count, *padded_size, 3, dtype=torch.uint8)
    images[:, :height, :width] = torch.randint(
        0, 256, (count, height, width, 3), generator=generator, dtype=torch.uint8
    )
    targets = []
    for _ in range(count):
        corner = torch.rand(BOXES, 2, generator=generator) * torch.tensor([width * 0.6, height * 0.6])
        side = 16 + torch.rand(BOXES, 2, generator=generator) * torch.tensor([width * 0.3, height * 0.3])
        labels = torch.randint(0, CLASSES, (BOXES,), generator=generator)
        targets.append(Target(torch.cat([corner, corner + side], dim=1), labels, torch.zeros(0, 4)))
    return Batch(images.permute(0, 3, 1, 2), [(height, width)] * count, targets, list(range(count)), {})


def our_step(model: RetinaNet, batch: Batch, config: Config, device: torch.device) -> Callable[[], None]:
    optimizer = build_optimizer(model, config.train)
    ema_positives = torch.tensor(100.0, device=device)

    def step() -> None:
        model.train()
        train_step(model, optimizer, [batch], CLASSES, ema_positives, config, step=0)

    return step


def their_step(
    model: TorchvisionRetinaNet, batch: Batch, device: torch.device, bf16: bool, lr: float = 1e-3
) -> Callable[[], None]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-4)
    images = unpadded_images(batch)
    targets = [{"boxes": target.boxes, "labels": target.labels} for target in batch.targets]

    def step() -> None:
        model.train()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def our_eval(
    model: RetinaNet, batch: Batch, config: Config, device: torch.device, detections: bool = True
) -> Callable[[], None]:
    """`detections`: with decoding and NMS, as `detect_batches` runs it; else the network alone."""
    started: list[Callable[[], list[Detections]]] = []

    @torch.inference_mode()
    def evaluate() -> None:
        model.eval()
        if detections:
            started.append(start_batch(model, batch, config))
            if len(started) > 1:
                started.pop(0)()
            return
        images = batch.normalized(config.train.compile).contiguous(memory_format=torch.channels_last)
        with autocast(device, config.train.precision):
            model(images)

    return evaluate


def their_eval(model: TorchvisionRetinaNet, batch: Batch, device: torch.device, bf16: bool) -> Callable[[], None]:
    images = unpadded_images(batch)
    model.detections_per_img = 100

    @torch.inference_mode()
    def evaluate() -> None:
        model.eval()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            model(images)

    return evaluate


def unpadded_images(batch: Batch) -> list[Tensor]:
    return [image[:, :h, :w].float() / 255 for image, (h, w) in zip(batch.images, batch.sizes, strict=True)]


def seconds_per_call(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Of `repeats` calls in a row, with one wait for the device at the end."""
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def ratio_of_rounds(theirs: list[float], ours: list[float]) -> tuple[float, float, float]:
    """Median, smallest and largest of their seconds / our seconds in each round."""
    ratios = sorted(their_seconds / our_seconds for their_seconds, our_seconds in zip(theirs, ours, strict=True))
    return statistics.median(ratios), ratios[0], ratios[-1]


def compare(
    name: str, theirs: Callable[[], None], ours: Callable[[], None], images: int, rounds: int, device: torch.device
) -> None:
    """Print a row of the table. `images`: the number in one call."""
    repeats = 10 if device.type == "cuda" else 1
    for run in (theirs, ours):
        seconds_per_call(run, 2, device)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for run, times in zip((theirs, ours), seconds, strict=True):
            times.append(seconds_per_call(run, repeats, device))
    speeds = [images / statistics.median(times) for times in seconds]
    ratio, low, high = ratio_of_rounds(*seconds)
    print(f"{name:10} {speeds[0]:8.2f} img/s {speeds[1]:8.2f} img/s {ratio:7.2f}x   ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
