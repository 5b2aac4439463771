"""How long a trained detector takes for one image."""

from __future__ import annotations

import copy
import statistics
import time

import torch

from retina.config import Config
from retina.data.coco import CocoDataset, DataError
from retina.data.loader import eval_batches
from retina.evaluate.inference import _detect_batch
from retina.model.retinanet import RetinaNet


@torch.inference_mode()
def milliseconds(
    model: RetinaNet, dataset: CocoDataset, config: Config, device: torch.device, images: int = 30
) -> float:
    """Median wall time of one image at batch 1, over `images` of `dataset` at their evaluation size.

    Inside of the time: normalising, the network, and detections from its outputs (threshold, decoding, NMS), which stay
    on the device. Outside of it: reading, decoding and resizing the file, the copy to the device, and one run on the
    same image before, so that no shape is new. With `resize: torchvision` the resizing has normalised already. `model`
    is as `load_detector` gives it.

    Raises DataError if none of the images can be read.
    """
    alone = config.model_copy(update={"train": config.train.model_copy(update={"eval_batch": 1})})
    # All of them before the first is timed: a loader's workers would take the processor's time.
    batches = [b for b in eval_batches(evenly_chosen(dataset, images), alone) if not b.unreadable]
    if not batches:
        raise DataError(f"{dataset.folder}: none of the images to be timed can be read")
    times = []
    for batch in batches:
        batch = batch.to(device)
        for _ in range(2):  # the first one warms up
            _wait(device)
            start = time.perf_counter()
            _detect_batch(model, batch, config, device)
            _wait(device)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def evenly_chosen(dataset: CocoDataset, images: int) -> CocoDataset:
    """The data set with at most `images` of its records, at even distances."""
    count = min(images, len(dataset.records))
    chosen = copy.copy(dataset)
    chosen.records = [dataset.records[i * len(dataset.records) // count] for i in range(count)]
    return chosen


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
