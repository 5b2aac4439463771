"""Runs a network on batches of images: normalization, forward, detection."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from retina.config import Config
from retina.data.batch import Batch
from retina.detect import Detections, start_detection
from retina.device import autocast
from retina.model.anchors import make_anchors
from retina.model.retinanet import RetinaNet


@torch.inference_mode()
def start_batch(model: RetinaNet, batch: Batch, config: Config) -> Callable[[], list[Detections]]:
    """Start to detect on a batch; the function that is returned waits for the device, see `start_detection`."""
    images = batch.normalized(config.train.compile).contiguous(memory_format=torch.channels_last)
    anchors = make_anchors(config.anchors, images.shape[2], images.shape[3], images.device)
    with autocast(images.device, config.train.precision):
        outputs = model(images)
    return start_detection(outputs, anchors, batch.sizes, config.detect)


def detect_batch(model: RetinaNet, batch: Batch, config: Config) -> list[Detections]:
    """Detections on each image of a batch; boxes in pixels of the padded images."""
    return start_batch(model, batch, config)()


def detect_batches(
    model: RetinaNet, batches: Iterable[Batch], config: Config, device: torch.device
) -> Iterator[tuple[Batch, list[Detections]]]:
    """Each batch with its detections. On CUDA the device computes the next batch while the caller has this one."""
    started: tuple[Batch, Callable[[], list[Detections]]] | None = None
    for batch in batches:
        following = batch, start_batch(model, batch.to(device), config)
        if started is not None:
            yield started[0], started[1]()
        started = following
    if started is not None:
        yield started[0], started[1]()
