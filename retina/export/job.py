"""From a checkpoint to a verified file: what tools/export.py runs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from retina import __version__
from retina.config import Config
from retina.data.annotations import DataError
from retina.data.coco import read_image
from retina.evaluate.loading import load
from retina.export.exported import ExportedDetector, ExportError, needs, resize_for_evaluation
from retina.export.network import inference_network
from retina.export.program import DetectionProgram, InputShape
from retina.export.verify import Difference, compare_with_eager
from retina.model.retinanet import RetinaNet
from retina.model.weights import Categories

PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch": (), "int8": ("torchao",)}
SAMPLES = 8  # images to compare on
CALIBRATION_IMAGES = 64
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}


class Job(NamedTuple):
    """What to export. `source`: as for `retina.load`. `calibrate` and `images`: folders of images."""

    source: str
    format: str  # onnx or torch
    output: Path
    shape: InputShape
    resize: bool
    precision: str  # fp32, bf16 or int8, which needs `calibrate`
    calibrate: Path | None
    images: Path | None


def export(job: Job, log: Callable[[str], None] = print) -> Difference:
    """Write the file of `job`, unless it is in float32 and its detections differ from those of the checkpoint.

    Raises:
        ExportError: the file differs; nothing was written. Or there are no images to compare on or to calibrate with,
            or a package is missing.
        CheckpointError, ConfigError, WeightsError, FileNotFoundError: as `load`.
    """
    for package in PACKAGES[job.precision if job.precision == "int8" else job.format]:
        needs(package, f"--format {job.format}")
    detector = load(job.source, device="cpu")
    config, categories = detector.config, detector.categories
    log(f"{detector.source}: {len(categories)} classes; {job.precision}, {job.shape.describe()}")
    folder = job.images or job.calibrate or Path(config.data.val_images)
    samples = sample_images(folder, job, config, SAMPLES)
    dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
    folded = inference_network(detector.model, dtype)
    network = _quantized(folded, job, config) if job.calibrate else folded
    program = DetectionProgram(network, config, job.resize, dtype).eval()
    job.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=job.output.parent, prefix=".export-") as temporary:
        path = Path(temporary) / job.output.name
        _write(program, job, _metadata(job, config, categories, detector.source), len(categories), path)
        log(f"comparing with PyTorch on images of {folder}")
        found = compare_with_eager(ExportedDetector(path), detector, samples, job.resize, job.shape.batch or 1)
        if job.precision == "fp32" and not found.is_rounding:
            raise ExportError(f"the exported file computes something else ({found.describe()}); nothing was written")
        path.replace(job.output)
    return found


def sample_images(folder: Path, job: Job, config: Config, count: int) -> list[NDArray[np.uint8]]:
    """At most `count` images of the folder, evenly spaced, of the size of the job; resized if the file does not do it.

    Raises ExportError if there is none.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    images = []
    for path in files[:: max(1, len(files) // count)]:
        try:
            image = read_image(path)
        except DataError:
            continue
        image = image if job.resize else resize_for_evaluation(image, config.data)
        if job.shape.accepts(image.shape[:2]):
            images.append(image)
    if not images:
        size = f" of {job.shape.height}x{job.shape.width}" if job.shape.height else ""
        raise ExportError(f"{folder}: no images{size} (height x width) to run; give a folder that has some as --images")
    return images[:count]


def _quantized(network: RetinaNet, job: Job, config: Config) -> nn.Module:
    from retina.export.int8 import quantize

    assert job.calibrate is not None
    images = sample_images(job.calibrate, job, config, CALIBRATION_IMAGES)
    batch = job.shape.batch or 1
    images += images[: -len(images) % batch]
    stacks = [torch.from_numpy(np.stack(images[i : i + batch])) for i in range(0, len(images) - batch + 1, batch)]
    program = DetectionProgram(network, config, job.resize)
    with torch.no_grad():
        return quantize(network, [program.prepare(stack)[0] for stack in stacks])


def _write(program: DetectionProgram, job: Job, metadata: dict[str, str], classes: int, path: Path) -> None:
    with torch.no_grad():
        if job.format == "onnx":
            from retina.export.onnx import write_onnx

            write_onnx(program, classes, job.shape, metadata, path)
        else:
            from retina.export.aot import write_package

            write_package(program, job.shape, metadata, path)


def _metadata(job: Job, config: Config, categories: Categories, source: str) -> dict[str, str]:
    """What the file says of itself; `categories`, `shape` and `resize` are read by ExportedDetector."""
    return {
        "categories": json.dumps(categories),
        "shape": json.dumps(job.shape),
        "resize": json.dumps(job.resize),
        "precision": job.precision,
        "source": source,
        "config": config.to_yaml(),
        "version": f"retina {__version__}, torch {torch.__version__}",
    }
