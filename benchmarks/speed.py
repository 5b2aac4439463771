"""Images per second, compared with torchvision's own RetinaNet and with less than a whole step, in the same run.

    python benchmarks/speed.py                               R18-FPN at 320x240, batch 8: two CPU cores
    python benchmarks/gpu.py --only training inference       a CUDA card, with the functions of this file

Same backbone, FPN and head width (256), images, batch, boxes and optimizer, and the same weights. torchvision runs
as its users run it (float32), under bf16 autocast, and under autocast in channels-last memory. retina runs as in
`tools/train.py`. "the network alone" is retina's network without matching and loss: forward, backward of ones, and
optimizer. "the convolutions alone" are the convolutions that it computes, forward and backward, one after the other,
with nothing between them. All take turns in each round, and a ratio is the median over rounds: a machine whose speed
drifts favors none.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from retina.config import Config, Model, Train
from retina.data.batch import Batch, Target
from retina.detect import Detections
from retina.device import autocast, compile_network, pick_device
from retina.evaluate.inference import start_batch
from retina.model import RetinaNet
from retina.model.key_tables import TORCHVISION_V1, rename_keys
from retina.model.pretrained import load_exactly
from retina.train import build_optimizer, train_step

CLASSES, BOXES = 80, 8


def main() -> None:
    """Print a table for training and one for inference: images/s, and the ratio of retina's to each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--size", type=int, nargs=2, default=(240, 320), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
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
    print(f"{arguments.backbone}-FPN, {width}x{height}, batch {arguments.batch}, {arguments.rounds} rounds")

    torch.manual_seed(0)
    ours = RetinaNet(config, CLASSES).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    theirs = torchvision_retinanet(arguments.backbone, height, width).to(device)
    torch.nn.init.normal_(theirs.head.classification_head.cls_logits.weight, std=0.05)  # some detections for NMS
    load_exactly(ours, rename_keys(theirs.state_dict(), TORCHVISION_V1), "torchvision")
    batch = make_batch(arguments.batch, height, width, config.data.pad_multiple).to(device)
    convolutions = record_convolutions(ours, batch, config, device)
    if arguments.compile:
        compile_network(ours, device)
    channels_last = copy.deepcopy(theirs).to(memory_format=torch.channels_last)
    peers = {
        "torchvision": (theirs, False),
        "torchvision, autocast": (theirs, True),
        "torchvision, autocast, channels-last": (channels_last, True),
    }
    training = {
        "retina": our_step(ours, batch, config, device),
        "the network alone": network_alone(ours, batch, config),
        "the convolutions alone": partial(run_convolutions, convolutions, True),
        **{name: their_step(model, batch, device, bf16) for name, (model, bf16) in peers.items()},
    }
    inference = {
        "retina": our_eval(ours, batch, config, device),
        "the network alone": our_eval(ours, batch, config, device, detections=False),
        "the convolutions alone": partial(run_convolutions, convolutions, False),
        **{name: their_eval(model, batch, device, bf16) for name, (model, bf16) in peers.items()},
    }
    print_table("training", training, arguments.batch, arguments.rounds, device)
    print_table("inference", inference, arguments.batch, arguments.rounds, device)


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
    return Batch(images.permute(0, 3, 1, 2), [(height, width)] * count, targets, list(range(count)), {}, "imagenet")


def our_step(model: RetinaNet, batch: Batch, config: Config, device: torch.device) -> Callable[[], None]:
    optimizer = build_optimizer(model, config.train)
    ema_positives = torch.tensor(100.0, device=device)

    def step() -> None:
        model.train()
        train_step(model, optimizer, [batch], CLASSES, ema_positives, config, step=0)

    return step


def network_alone(model: RetinaNet, batch: Batch, config: Config) -> Callable[[], None]:
    """Forward, backward of ones and optimizer, on the same input; a learning rate of 0 keeps the weights."""
    optimizer = build_optimizer(model, config.train)
    for group in optimizer.param_groups:
        group["lr"] = 0.0

    def step() -> None:
        model.train()
        images = batch.normalized().contiguous(memory_format=torch.channels_last)
        with autocast(images.device, config.train.precision):
            outputs = model(images)
        tensors = [*outputs.logits, *outputs.deltas]
        torch.autograd.backward(tensors, [torch.ones_like(tensor) for tensor in tensors])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

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


def print_table(
    title: str, calls: dict[str, Callable[[], object]], images: int, rounds: int, device: torch.device
) -> None:
    """`images`: the number in one call. The first of `calls` is compared with the others."""
    repeats = 10 if device.type == "cuda" else 1
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for run in calls.values():
        seconds_per_call(run, 2, device)
    for _ in range(rounds):
        for name, run in calls.items():
            seconds[name].append(seconds_per_call(run, repeats, device))
    first = next(iter(calls))
    print(f"\n{title:38} images/s   {first} / it")
    for name, times in seconds.items():
        ratio, low, high = ratio_of_rounds(times, seconds[first])
        ratios = "" if name == first else f"{ratio:9.2f}x   ({low:.2f} to {high:.2f})"
        print(f"  {name:36} {images / statistics.median(times):8.2f} {ratios}", flush=True)


class _ConvolutionRecorder(TorchDispatchMode):
    """Collects the arguments of every convolution, with their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.convolution.default:
            self.calls.append(tuple(args))
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def record_convolutions(
    model: RetinaNet, batch: Batch, config: Config, device: torch.device
) -> list[tuple[tuple[Any, ...], Tensor]]:
    """The arguments of each convolution of a forward pass, and a gradient for its output."""
    images = batch.normalized().contiguous(memory_format=torch.channels_last)
    with _ConvolutionRecorder() as recorder, autocast(device, config.train.precision):
        model.train()(images)
    return [(args, torch.ones_like(torch.ops.aten.convolution(*args))) for args in recorder.calls]


@torch.no_grad()
def run_convolutions(convolutions: list[tuple[tuple[Any, ...], Tensor]], backward: bool) -> None:
    """All convolutions once; with `backward` their gradients too, but for that of the images."""
    for number, (args, gradient) in enumerate(convolutions):
        torch.ops.aten.convolution(*args)
        if backward:
            images, weight, bias, *settings = args
            biases = None if bias is None else list(bias.shape)
            wanted = [number > 0, True, bias is not None]
            torch.ops.aten.convolution_backward(gradient, images, weight, biases, *settings, wanted)


if __name__ == "__main__":
    main()
