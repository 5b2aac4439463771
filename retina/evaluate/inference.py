"""A trained detector: load it from a file, run it on a batch or on an image.

`load_detector` reads "model", "ema", "config", "categories" and "step" of a checkpoint. train/state.py makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from retina.config import Config
from retina.config_file import config_from_yaml
from retina.data.augment import eval_transform
from retina.data.loader import Batch, single_image_batch
from retina.detect import Detections, start_detection
from retina.device import autocast
from retina.model import checkpoint
from retina.model.anchors import make_anchors
from retina.model.pretrained import load_exactly, load_weights
from retina.model.retinanet import RetinaNet
from retina.model.weights import TORCHVISION_DETECTORS, Categories, read_weights
from retina.model.weights_file import WeightsError


def load_detector(
    config: Config, file: Path | None, categories: Categories | None, device: torch.device
) -> tuple[RetinaNet, Categories, str]:
    """Build the model of `config` with trained weights.

    Args:
        config: the network and anchors that the weights were trained with.
        file: a checkpoint of this project, or a file of another framework, see `read_weights`. None uses best.pt or
            last.pt of the run folder, and without them `model.weights`, if that is a detector.
        categories: of the data set. A checkpoint must have the same ones; of other weights the class outputs are
            selected by their names. None uses those of the weights.
        device: of the model.

    Returns: the model in evaluation mode, with the moving average of the weights if the checkpoint has one; its
        categories; a message about the source of the weights.

    Raises:
        FileNotFoundError: there is no such file, or no checkpoint in the run folder.
        CheckpointError: the file is damaged.
        WeightsError: the weights do not fit `config` or the categories. This includes a checkpoint trained with other
            network or anchor settings, even if all tensors have the right shapes.
        ConfigError: the settings in the checkpoint do not fit this version of the program.
    """
    if file is None:
        candidates = [config.run_dir / name for name in (checkpoint.BEST, checkpoint.LAST)]
        file = next((path for path in candidates if path.exists()), None)
        if file is None and config.model.weights is not None and Path(config.model.weights).is_file():
            file = Path(config.model.weights)
        elif file is None and config.model.weights not in TORCHVISION_DETECTORS:
            raise FileNotFoundError(f"no checkpoint in {config.run_dir}; train first, or give --checkpoint FILE")
    elif not file.is_file():
        raise FileNotFoundError(f"{file}: no such checkpoint")
    if file is None or not checkpoint.is_checkpoint(file):
        weights = read_weights(str(file or config.model.weights), config.model.backbone)
        if not weights.is_detector:
            raise WeightsError(f"{weights.source}: {weights.origin} is not a detector")
        categories = categories or weights.categories or [(i, f"class {i}") for i in range(weights.classes)]
        model = RetinaNet(config, len(categories))
        is_complete, source = load_weights(model, config, weights, [name for _, name in categories])
        if not is_complete:
            raise WeightsError(f"{weights.source} is not a detector for these classes ({source})")
    else:
        state = checkpoint.load(file)
        trained_categories = [(int(i), str(name)) for i, name in state["categories"]]
        if categories is not None and trained_categories != categories:
            raise WeightsError(
                f"{file} was trained on other categories, {trained_categories}; the data set has {categories}"
            )
        _check_settings(config, config_from_yaml(state["config"]), file)
        model = RetinaNet(config, len(trained_categories))
        load_exactly(model, state["ema"] or state["model"], str(file))
        categories, source = trained_categories, f"{file}, step {state['step']}"
    return model.to(device, memory_format=torch.channels_last).eval(), categories, source  # type: ignore[call-overload]


def _check_settings(config: Config, trained: Config, file: Path) -> None:
    """Raise WeightsError if `config` has settings of the network by which the checkpoint was not trained."""
    changed = [
        f"{section}.{key} was {value}, is {current}"
        for section in ("model", "anchors")
        for key, value in getattr(trained, section).model_dump().items()
        if (current := getattr(getattr(config, section), key)) != value and key not in ("weights", "frozen_stages")
    ]
    if trained.detect.max_ratio != config.detect.max_ratio:
        changed.append(f"detect.max_ratio was {trained.detect.max_ratio}, is {config.detect.max_ratio}")
    if trained.data.normalization != config.data.normalization:
        changed.append(f"data.normalization was {trained.data.normalization}, is {config.data.normalization}")
    if changed:
        raise WeightsError(f"{file} was trained with other settings than the config's: {'; '.join(changed)}")


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


@torch.inference_mode()
def predict(model: RetinaNet, image: NDArray[np.uint8], config: Config, device: torch.device) -> Detections:
    """Detections on one RGB image, uint8 (H, W, 3), on the CPU; boxes xyxy in pixels of that image."""
    batch = single_image_batch(eval_transform(image, config.data), config.data).to(device)
    (detections,) = detect_batch(model, batch, config)
    height, width = batch.sizes[0]
    scale = torch.tensor([image.shape[1] / width, image.shape[0] / height] * 2)
    return detections._replace(boxes=detections.boxes * scale)


def detections_to_dict(file: Path, detections: Detections, categories: Categories) -> dict[str, Any]:
    """The detections on one image as plain values for JSON; boxes xyxy in pixels."""
    entries = zip(detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True)
    return {
        "file": str(file),
        "detections": [
            {"category_id": categories[label][0], "name": categories[label][1], "score": score, "box_xyxy": box}
            for box, score, label in entries
        ],
    }
