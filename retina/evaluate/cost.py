"""What one image costs a trained detector: milliseconds, operations, parameters, memory."""

from __future__ import annotations

import copy
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from retina.config import Config
from retina.data.annotations import DataError
from retina.data.coco import CocoDataset
from retina.data.loader import eval_batches
from retina.evaluate.inference import detect_batch
from retina.model.retinanet import RetinaNet

# Linux: writing 5 resets the highest resident memory of the process to the present one (proc(5)).
RESET_PEAK, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Cost(NamedTuple):
    """The result of `measure_cost`, for one image at batch 1; metrics.json has these names."""

    milliseconds: float  # median wall time
    gflops: float  # median; a multiplication with its addition counts as two; convolutions only, as torch's counter
    parameters: int
    peak_memory_mb: float | None  # MB of 10^6 bytes; None if the system does not tell


def measure_cost(
    model: RetinaNet, dataset: CocoDataset, config: Config, device: torch.device, images: int = 30
) -> Cost:
    """Run the model on `images` images of `dataset`, evenly spaced, one by one at their evaluation size.

    The time includes the normalization, the network, the post-processing (threshold, decoding, NMS) and the copy of the
    detections to the host. It does not include reading, decoding and resizing the file, the copy to the device, and two
    warm-up runs on the same image. With `resize: torchvision` the image is normalized when it is resized, so the time
    does not include that.

    The memory is the highest during these runs. On CUDA: of all tensors on the device, with the weights, as
    `torch.cuda.max_memory_allocated` counts. On the CPU: resident memory of this whole process, so also Python,
    the libraries and the annotations.

    `model` is that of a `Detector`. Raises DataError if none of the images can be read.
    """
    train, data = config.train.model_copy(update={"eval_batch": 1}), config.data.model_copy(update={"cache": None})
    single = config.model_copy(update={"train": train, "data": data})
    # All images are read before the first is timed, because the workers of the loader would compete for the CPU.
    batches = [b for b in eval_batches(dataset.evenly_spaced(images), single) if not b.unreadable]
    if not batches:
        raise DataError(f"{dataset.folder}: none of the images to be timed can be read")
    seconds = []
    _reset_peak_memory(device)
    for batch in batches:
        batch = batch.to(device)
        for _ in range(3):  # two warm-ups, because a CUDA graph is recorded in the second
            _synchronize(device)
            start = time.perf_counter()
            detect_batch(model, batch, config)
            _synchronize(device)
        seconds.append(time.perf_counter() - start)
    peak = _peak_memory(device)
    sizes = [(batch.images.shape[2], batch.images.shape[3]) for batch in batches]
    flops = {size: count_flops(model, *size) for size in set(sizes)}
    return Cost(
        1000 * statistics.median(seconds),
        statistics.median(flops[size] for size in sizes) / 1e9,
        sum(parameter.numel() for parameter in model.parameters()),
        None if peak is None else peak / 1e6,
    )


def describe_cost(cost: Cost, device: torch.device) -> str:
    """The lines for the terminal."""
    memory = "of the tensors on the card" if device.type == "cuda" else "resident, of the whole process"
    peak = "not known" if cost.peak_memory_mb is None else f"{cost.peak_memory_mb:,.0f} MB, {memory}"
    return (
        f"{cost.milliseconds:.1f} ms per image at batch 1, from normalization to NMS, on {device}\n"
        f"{cost.gflops:.1f} GFLOPs in the convolutions, {cost.parameters / 1e6:.1f} M parameters; peak memory {peak}"
    )


def count_flops(model: RetinaNet, height: int, width: int) -> int:
    """The operations of the network for one image of this size, by torch's counter."""
    shapes_only = copy.deepcopy(model).to("meta")  # computes nothing
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shapes_only(torch.empty(1, 3, height, width, device="meta"))
    return int(counter.get_total_flops())


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif RESET_PEAK.exists():
        RESET_PEAK.write_text("5")


def _peak_memory(device: torch.device) -> int | None:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not RESET_PEAK.exists():
        return None
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
