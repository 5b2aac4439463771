"""What the measurements of benchmarks/gpu.py share: sizes, equal models of both packages, and rounds of timing."""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from gpu_report import Report
from speed import CLASSES, ratio_of_rounds, seconds_per_call, torchvision_retinanet
from torch import Tensor
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet

from retina.config import Config, Model, Train
from retina.data.batch import Batch
from retina.device import autocast, compile_network, pick_device
from retina.model import RetinaNet
from retina.model.key_tables import TORCHVISION_V1, rename_keys
from retina.model.pretrained import load_exactly
from retina.parent_process import end_with_parent

CANDIDATES = 1000  # class scores above the threshold in an image, for NMS to work on


@dataclass(frozen=True)
class Sizes:
    """Of one device: the card, or the rehearsal on the CPU."""

    backbone: str = "resnet50"
    side: int = 800
    batch: int = 16
    inference_batches: tuple[int, ...] = (16, 32)
    warm_up: int = 4
    calls: int = 10  # in a row, without a wait in between
    rounds: int = 3
    compiler: str = "inductor"
    gflop: float | None = 846.0  # of a training step for one image, counted for resnet50 at 800x800


# Not 64: P6 and P7 have one cell there, and oneDNN's gradient of the weight between them is NaN in bf16.
REHEARSAL = Sizes("resnet18", 96, 2, (2,), 1, 1, 2, "eager", None)


def run_measurement(measure: Callable[[Report, Sizes, torch.device], None]) -> NoReturn:
    """The main program of a measurement: `measure` on the report that the command line names; ends the process."""
    with contextlib.suppress(OSError):  # a sandbox may not offer the signal
        end_with_parent()
    report = Report.read(Path(sys.argv[1]))
    device = pick_device()
    torch.backends.cuda.matmul.allow_tf32 = True  # as users of torchvision who want speed in float32
    torch.backends.cudnn.allow_tf32 = True
    try:
        measure(report, REHEARSAL if device.type == "cpu" else Sizes(), device)
        status = 0
    except Exception:
        traceback.print_exc()
        report.content["error"] += traceback.format_exc()
        report.write()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # everything is written; to unload torch takes seconds


def training_config(sizes: Sizes, compiled: bool = False) -> Config:
    """The recipe for pretrained weights: frozen BatchNorm, the stem and layer1 frozen; bf16."""
    return Config(
        model=Model(backbone=sizes.backbone, weights=None, norm="frozen", frozen_stages=1),
        train=Train(batch_size=sizes.batch, lr=1e-4, precision="bf16", compile=compiled),
    )


def their_model(sizes: Sizes, device: torch.device) -> TorchvisionRetinaNet:
    """torchvision's RetinaNet with random weights whose activations stay small."""
    torch.manual_seed(0)
    model = torchvision_retinanet(sizes.backbone, sizes.side, sizes.side, frozen=True)
    for block in (block for i in range(1, 5) for block in getattr(model.backbone.body, f"layer{i}")):
        # Without statistics, the sum of each block would be larger than its input, until the last one overflows.
        (block.bn3 if hasattr(block, "bn3") else block.bn2).weight.fill_(0.2)
    return model.to(device)


def our_model(config: Config, theirs: TorchvisionRetinaNet, sizes: Sizes, device: torch.device) -> RetinaNet:
    """The RetinaNet of retina with torchvision's weights; with train.compile as a training run compiles it."""
    model = RetinaNet(config, CLASSES)
    load_exactly(model, rename_keys(theirs.state_dict(), TORCHVISION_V1), "torchvision")
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.train.compile and sizes.compiler == "inductor":
        compile_network(model, device)
    elif config.train.compile:
        model.compile(backend=sizes.compiler)
    return model


@torch.inference_mode()
def spread_outputs(theirs: TorchvisionRetinaNet, config: Config, batch: Batch, sizes: Sizes) -> float:
    """Give torchvision's random model some variety: logits with a standard deviation of 1, deltas of 0.2.

    The class bias is then shifted so that about CANDIDATES class scores of the first image pass the threshold. Returns
    the number that pass on average over the batch.
    """

    def outputs(precision: str) -> tuple[Tensor, Tensor]:
        model = our_model(config, theirs, sizes, batch.images.device).eval()
        with autocast(batch.images.device, precision):
            result = model(batch.normalized().contiguous(memory_format=torch.channels_last))
        return torch.cat(result.logits, dim=1), torch.cat(result.deltas, dim=1)

    theirs.eval()
    classes, boxes = theirs.head.classification_head.cls_logits, theirs.head.regression_head.bbox_reg
    logits, deltas = outputs("fp32")  # bf16 would round the small differences away
    classes.weight.div_(logits[0].std())
    boxes.weight.mul_(0.2 / deltas[0].std())
    logits, _ = outputs(config.train.precision)
    threshold = torch.tensor(config.detect.score_threshold).logit().item()
    classes.bias.add_(threshold - logits[0].flatten().float().topk(CANDIDATES).values[-1])
    logits, _ = outputs(config.train.precision)
    return sum((image.float() > threshold).sum().item() for image in logits) / len(logits)


def raise_if_failed(report: Report) -> None:
    """At the end of a measurement: RuntimeError with the names of the rows that failed."""
    if failed := [row["name"] for row in report.content["rows"] if "error" in row]:
        raise RuntimeError(f"failed: {', '.join(failed)}")


class Rounds:
    """Calls that are timed in turn, so that a card whose clock changes favors none."""

    def __init__(self, report: Report, sizes: Sizes, device: torch.device, images: int) -> None:
        self.report, self.sizes, self.device, self.images = report, sizes, device, images
        self.calls: dict[str, Callable[[], object]] = {}
        self.seconds: dict[str, list[float]] = {}

    def add(self, name: str, make: Callable[[], Callable[[], object]]) -> None:
        """Make a call, warm it up and time it a first time. If it fails, its row says so and the others go on."""
        on_cuda = self.device.type == "cuda"
        try:
            if on_cuda:
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if on_cuda else 0
            call = make()
            first = seconds_per_call(call, 1, self.device)
            seconds_per_call(call, self.sizes.warm_up, self.device)
            self.seconds[name] = [seconds_per_call(call, self.sizes.calls, self.device)]
            self.calls[name] = call
        except Exception as error:  # out of memory, say
            traceback.print_exc()
            self.report.put(name, error=f"{type(error).__name__}: {error}")
            self.report.content["error"] += f"{name}:\n{traceback.format_exc()}"
            self.report.say(f"{name}: FAILED, {type(error).__name__}: {str(error)[:200]}")
            return
        peak = round((torch.cuda.max_memory_allocated() - before) / 2**30, 2) if on_cuda else None
        self.report.put(name, images_per_call=self.images, first_call_seconds=round(first, 2), peak_gib=peak)
        self._put(name)
        self._say(name)

    def repeat(self) -> None:
        """The other rounds; they replace the first time, which stood close to the warm-up."""
        for done in range(self.sizes.rounds):
            for name, call in self.calls.items():
                seconds = seconds_per_call(call, self.sizes.calls, self.device)
                self.seconds[name] = [*self.seconds[name], seconds] if done else [seconds]
                self._put(name)
        self.report.say(f"medians of {self.sizes.rounds} rounds of {self.sizes.calls} calls in turn:")
        for name in self.calls:
            self._say(name)

    def images_per_second(self, name: str) -> float:
        """Median over the rounds."""
        return self.images / statistics.median(self.seconds[name])

    def compare(self, name: str, other: str) -> tuple[float, float, float] | None:
        """How many times faster `name` is than `other`: median and range; None if one of them failed."""
        if name not in self.calls or other not in self.calls:
            return None
        ratio = ratio_of_rounds(self.seconds[other], self.seconds[name])
        self.report.put(name, **{f"times {other}": [round(value, 4) for value in ratio]})
        return ratio

    def say_ratio(self, name: str, other: str) -> None:
        """Print the ratio of `compare`."""
        if ratio := self.compare(name, other):
            self.report.say(f"{name} / {other}: {ratio[0]:.2f}x ({ratio[1]:.2f} to {ratio[2]:.2f})")

    def _put(self, name: str) -> None:
        times = self.seconds[name]
        speed = self.images_per_second(name)
        tera = {"tflop_per_second": round(speed * self.sizes.gflop / 1e3, 1)} if self.sizes.gflop else {}
        self.report.put(
            name,
            images_per_second=round(speed, 2),
            ms=round(1e3 * statistics.median(times), 3),
            ms_of_rounds=[round(1e3 * value, 3) for value in times],
            **tera,
        )

    def _say(self, name: str) -> None:
        row = next(row for row in self.report.content["rows"] if row["name"] == name)
        tera = f"   {row['tflop_per_second']:6.1f} TFLOP/s" if "tflop_per_second" in row else ""
        memory = "" if row["peak_gib"] is None else f"   peak {row['peak_gib']:6.2f} GiB"
        self.report.say(f"{name:44} {row['images_per_second']:9.1f} images/s {row['ms']:9.2f} ms{memory}{tera}")
