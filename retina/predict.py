"""A trained detector on single images: load it, ask it, and time it."""

from __future__ import annotations

import copy
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from retina import checkpoint
from retina.config import Config, from_yaml
from retina.data.augment import eval_view
from retina.data.coco import CocoDataset, DataError
from retina.data.loader import Batch, eval_batches, frame_batch
from retina.detect import Detections, detect
from retina.device import autocast
from retina.model.anchors import make_anchors
from retina.model.pretrained import COCO_NAMES, DETECTORS, WeightsError, load_exactly, load_pretrained
from retina.model.retinanet import RetinaNet

Categories = list[tuple[int, str]]


def load_detector(
    config: Config, file: Path | None, categories: Categories | None, device: torch.device
) -> tuple[RetinaNet, Categories, str]:
    """The model of `config` with trained weights, its (id, name) for each label, and where the weights came from.

    `file`: a checkpoint of ours, or torchvision's RetinaNet weights; None is the run folder's best.pt or last.pt, else
    `model.weights` where that names a whole detector. `categories`: what the data set has, to be checked against the
    checkpoint (torchvision's weights need them, by COCO's names). The moving average of the weights is taken where
    there is one.

    Raises FileNotFoundError, CheckpointError, WeightsError; the last also where the checkpoint was trained with another
    network or other anchors than `config` has, which no shape of a tensor would show.
    """
    if file is None:
        found = [
            config.run_dir / name for name in (checkpoint.BEST, checkpoint.LAST) if (config.run_dir / name).exists()
        ]
        if not found and config.model.weights not in DETECTORS:
            raise FileNotFoundError(f"no checkpoint in {config.run_dir}; train first, or give --checkpoint FILE")
        file = found[0] if found else None
    elif not file.is_file():
        raise FileNotFoundError(f"{file}: no such checkpoint")
    if file is None or not checkpoint.is_checkpoint(file):
        categories = categories or list(enumerate(COCO_NAMES))
        source = str(file or config.model.weights)
        model = RetinaNet(config, len(categories))
        whole, said = load_pretrained(model, config.model.backbone, source, [name for _, name in categories])
        if not whole:
            raise WeightsError(f"{source} is not a detector for these classes ({said})")
    else:
        state = checkpoint.load(file)
        own = [(int(i), str(name)) for i, name in state["categories"]]
        if categories is not None and own != categories:
            raise WeightsError(f"{file} was trained on other categories, {own}; the data set has {categories}")
        _check_settings(config, from_yaml(state["config"]), file)
        model = RetinaNet(config, len(own))
        load_exactly(model, state["ema"] or state["model"], str(file))
        categories, said = own, f"{file}, step {state['step']}"
    return model.to(device, memory_format=torch.channels_last).eval(), categories, said  # type: ignore[call-overload]


def _check_settings(config: Config, trained: Config, file: Path) -> None:
    differing = [
        f"{section}.{key} was {value}, is {now}"
        for section in ("model", "anchors")
        for key, value in getattr(trained, section).model_dump().items()
        if (now := getattr(getattr(config, section), key)) != value and key not in ("weights", "frozen_stages")
    ]
    if trained.detect.max_ratio != config.detect.max_ratio:
        differing.append(f"detect.max_ratio was {trained.detect.max_ratio}, is {config.detect.max_ratio}")
    if differing:
        raise WeightsError(f"{file} was trained with other settings than the config's: {'; '.join(differing)}")


@torch.inference_mode()
def predict(model: RetinaNet, image: NDArray[np.uint8], config: Config, device: torch.device) -> Detections:
    """Detections on one RGB image, uint8 (H, W, 3); boxes xyxy in its own pixels, on the CPU."""
    batch = frame_batch(eval_view(image, config.data), config.data).to(device)
    (found,) = _detect_batch(model, batch, config, device)
    height, width = batch.sizes[0]
    scale = torch.tensor([image.shape[1] / width, image.shape[0] / height] * 2)
    return Detections(found.boxes.cpu() * scale, found.scores.cpu(), found.labels.cpu())


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


def _detect_batch(model: RetinaNet, batch: Batch, config: Config, device: torch.device) -> list[Detections]:
    anchors = make_anchors(config.anchors, batch.images.shape[2], batch.images.shape[3], device)
    with autocast(device, config.train.precision):
        outputs = model(batch.normalized().contiguous(memory_format=torch.channels_last))
    return detect(outputs, anchors, batch.sizes, config.detect)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def as_json(file: Path, found: Detections, categories: Categories) -> dict[str, Any]:
    """One image's detections in plain values, boxes xyxy in pixels."""
    entries = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    return {
        "file": str(file),
        "detections": [
            {"category_id": categories[label][0], "name": categories[label][1], "score": score, "box_xyxy": box}
            for box, score, label in entries
        ],
    }
