"""The latency of a trained detector in milliseconds per image."""

from __future__ import annotations

import statistics
import time

import torch

from retina.config import Config
from retina.data.annotations import DataError
from retina.data.coco import CocoDataset
from retina.data.loader import eval_batches
from retina.evaluate.inference import detect_batch
from retina.model.retinanet import RetinaNet


def measure_latency(
    model: RetinaNet, dataset: CocoDataset, config: Config, device: torch.device, images: int = 30
) -> float:
    """Median wall time of one image at batch 1 in milliseconds, over `images` of `dataset` at their evaluation size.

    The time includes the normalization, the network, the post-processing (threshold, decoding, NMS) and the copy of the
    detections to the host. It does not include reading, decoding and resizing the file, the copy to the device, and two
    warm-up runs on the same image. With `resize: torchvision` the image is normalized when it is resized, so the time
    does not include that. `model` is as `load_detector` returns it.

    Raises DataError if none of the images can be read.
    """
    train, data = config.train.model_copy(update={"eval_batch": 1}), config.data.model_copy(update={"cache": None})
    single = config.model_copy(update={"train": train, "data": data})
    # All images are read before the first is timed, because the workers of the loader would compete for the CPU.
    batches = [b for b in eval_batches(dataset.evenly_spaced(images), single) if not b.unreadable]
    if not batches:
        raise DataError(f"{dataset.folder}: none of the images to be timed can be read")
    seconds = []
    for batch in batches:
        batch = batch.to(device)
        for _ in range(3):  # two warm-ups, because a CUDA graph is recorded in the second
            _synchronize(device)
            start = time.perf_counter()
            detect_batch(model, batch, config)
            _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
