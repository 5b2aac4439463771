"""From a checkpoint to a verified file: what tools/export.py runs."""

from __future__ import annotations

import itertools
import json
import random
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
from retina.export.aot import check_compiler
from retina.export.exported import ExportedDetector, ExportError, needs, resize_for_evaluation
from retina.export.network import inference_network
from retina.export.program import DetectionProgram, InputShape
from retina.export.verify import MIN_DETECTIONS, Difference, compare_with_eager
from retina.file_search import images_in
from retina.model.retinanet import RetinaNet
from retina.model.weights import Categories

PACKAGES: dict[str, tuple[str, ...]] = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch": ()}
SAMPLES = 8  # images to compare on
CALIBRATION_IMAGES = 64


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
    for package in PACKAGES[job.format] + (("torchao",) if job.calibrate else ()):
        needs(package, "--calibrate" if package == "torchao" else f"--format {job.format}")
    if job.format == "torch":
        check_compiler()
    detector = load(job.source, device="cpu")
    config, categories = detector.config, detector.categories
    log(f"{detector.source}: {len(categories)} classes; {job.precision}, {job.shape.describe()}")
    folder = job.images or job.calibrate or Path(config.data.val_images)
    calibration = sample_images(job.calibrate, job, config, CALIBRATION_IMAGES, log) if job.calibrate else []
    samples = calibration[:SAMPLES] if folder == job.calibrate else sample_images(folder, job, config, SAMPLES, log)
    dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
    folded = inference_network(detector.model, dtype)
    network = _quantized(folded, job, config, calibration) if calibration else folded
    program = DetectionProgram(network, config, job.resize, dtype).eval()
    job.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=job.output.parent, prefix=".export-") as temporary:
        path = Path(temporary) / job.output.name
        _write(program, job, _metadata(job, config, categories, detector.source), len(categories), path)
        log(f"comparing with PyTorch on images of {folder}")
        found = compare_with_eager(ExportedDetector(path), detector, samples, job.resize, job.shape.batch or 1)
        if found.detections < MIN_DETECTIONS:
            raise ExportError(
                f"the checkpoint finds {found.detections} objects on {found.images} images of {folder}, too few to "
                "compare the file with it; give a folder with more as --images. Nothing was written"
            )
        if job.precision == "fp32" and not found.is_rounding:
            raise ExportError(f"the exported file computes something else ({found.describe()}); nothing was written")
        path.replace(job.output)
    return found


def sample_images(
    folder: Path, job: Job, config: Config, count: int, log: Callable[[str], None]
) -> list[NDArray[np.uint8]]:
    """At most `count` images of the folder, drawn with a fixed seed.

    They have the size of the job, and are resized if the file does not do it. `log` gets what the search left out.
    Raises ExportError if there is none.
    """
    files, unreadable, others = images_in(folder)
    for note in [*unreadable, *filter(None, [others])]:
        log(note)
    images: list[NDArray[np.uint8]] = []
    for path in random.Random(0).sample(files, len(files)):
        if len(images) == count:
            break
        try:
            image = read_image(path)
        except DataError:
            continue
        image = image if job.resize else resize_for_evaluation(image, config.data)
        if job.shape.accepts(image.shape[:2]):
            images.append(image)
    if not images:
        raise ExportError(
            f"{folder}: no images to run, {job.shape.describe()}; give a folder that has some as --images"
        )
    return images


def _quantized(network: RetinaNet, job: Job, config: Config, images: list[NDArray[np.uint8]]) -> nn.Module:
    from retina.export.int8 import quantize

    batch = job.shape.batch or 1
    batches = -(-len(images) // batch)
    repeated = itertools.islice(itertools.cycle(images), batches * batch)  # the last batch is full
    stacks = torch.from_numpy(np.stack(list(repeated)).reshape(batches, batch, *images[0].shape))
    program = DetectionProgram(network, config, job.resize)
    with torch.no_grad():
        return quantize(network, [program.prepare(stack)[0] for stack in stacks])


def _write(program: DetectionProgram, job: Job, metadata: dict[str, str], classes: int, path: Path) -> None:
    with torch.no_grad():
        if None not in job.shape[1:]:
            program.prepare(job.shape.example())  # computes what the graph has as constants
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
