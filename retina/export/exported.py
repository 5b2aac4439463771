"""Runs an exported file: on arrays of images, and on a data set for the COCO numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision  # noqa: F401  (a package calls its NMS)
from numpy.typing import NDArray

from retina.config import Config, Data
from retina.config_file import changed_detector_keys, config_from_yaml
from retina.data.annotations import DataError
from retina.data.augment import eval_transform
from retina.data.coco import CocoDataset, Record, read_image
from retina.detect import Detections
from retina.evaluate.detections import on_image
from retina.export.program import INPUT, InputShape
from retina.file_suffixes import EXPORT_SUFFIXES
from retina.model.weights import Categories

RESIZE_KEYS = {"data.short_side", "data.eval_short_side", "data.max_side", "data.resize"}


class ExportError(ValueError):
    """What cannot be exported, or not be run; the message is for people."""


def needs(package: str, purpose: str) -> Any:
    """Import an optional package. Raises ExportError that says what to install."""
    try:
        return import_module(package)
    except ImportError as error:
        raise ExportError(f"{purpose} needs {package} ({error}): pip install {package}") from None


class ExportedDetector:
    """An exported file, ready to run on the CPU.

    Attributes:
        file: its path.
        metadata: what the file says of itself, see docs/export.md.
        categories: (id, name) of each label.
        shape: of its input.
        resizes: whether it resizes the images itself.
        config: of the detector.
    """

    def __init__(self, file: Path) -> None:
        """Raises ExportError for a file that is missing, of another program, or that needs a missing package."""
        if not file.is_file():
            raise ExportError(f"{file}: no such exported file")
        load = _load_onnx if file.suffix == EXPORT_SUFFIXES["onnx"] else _load_package
        self.file = file
        self._run, self.metadata = load(file)
        if "categories" not in self.metadata:
            raise ExportError(f"{file}: not written by tools/export.py: it has no categories")
        self.categories: Categories = [(i, name) for i, name in json.loads(self.metadata["categories"])]
        self.shape = InputShape(*json.loads(self.metadata["shape"]))
        self.resizes = self.metadata["resize"] == "true"
        self.config = config_from_yaml(self.metadata["config"])

    def describe(self) -> str:
        """For people."""
        resized = "" if self.resizes else ", resized before by OpenCV"
        return f"{self.metadata['source']}, {self.metadata['precision']}, {self.shape.describe()}{resized}"

    def check_settings(self, config: Config) -> None:
        """Raise ExportError if `config` has settings for the detections that the file does not have.

        They are fixed in the file. Ignoring them silently would give the numbers of other settings.
        """
        before, given = self.config.flat(), config.flat()
        changed = [
            f"{key} is {before[key]}, given {given[key]}"
            for key in changed_detector_keys(self.config, config)
            if self.resizes or key not in RESIZE_KEYS
        ]
        if changed:
            raise ExportError(
                f"{self.file} was exported with other settings: {'; '.join(changed)}. Export it with the new ones, or "
                "evaluate the checkpoint"
            )

    def __call__(self, images: NDArray[np.uint8]) -> list[Detections]:
        """uint8 RGB (N, H, W, 3) -> the detections of each image, in pixels of `images`.

        Raises ExportError for images of a dtype or a shape that the file does not take: a package checks neither, and
        would return wrong boxes.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
            raise ExportError(
                f"given an array {images.dtype} {images.shape}, expected uint8 (N, H, W, 3) RGB; one image: image[None]"
            )
        if any(given not in (None, side) for given, side in zip(self.shape, images.shape[:3], strict=True)):
            raise ExportError(
                f"the file takes {self.shape.describe()}, given {InputShape(*images.shape[:3]).describe()}; "
                "export it with another --size or --batch, or without them for any"
            )
        boxes, scores, labels, count = self._run(images)
        return [Detections(boxes[i, :n], scores[i, :n], labels[i, :n]) for i, n in enumerate(count.tolist())]


def _load_onnx(file: Path) -> tuple[Callable[[NDArray[np.uint8]], list[torch.Tensor]], dict[str, str]]:
    onnxruntime = needs("onnxruntime", f"{file}:")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class for each kind of failure, without a common one of its own
        raise ExportError(f"{file}: not readable as an ONNX file: {str(error).splitlines()[0]}") from None

    def run(images: NDArray[np.uint8]) -> list[torch.Tensor]:
        return [torch.from_numpy(output) for output in session.run(None, {INPUT: images})]

    return run, dict(session.get_modelmeta().custom_metadata_map)


def _load_package(file: Path) -> tuple[Callable[[NDArray[np.uint8]], list[torch.Tensor]], dict[str, str]]:
    from torch._inductor import aoti_load_package

    try:
        package = aoti_load_package(str(file))
    except RuntimeError as error:
        raise ExportError(f"{file}: not readable as a package: {str(error).splitlines()[0]}") from None

    @torch.inference_mode()
    def run(images: NDArray[np.uint8]) -> list[torch.Tensor]:
        return list(package(torch.from_numpy(np.ascontiguousarray(images))))  # it does not look at the strides

    return run, dict(package.get_metadata())


def exported_on_dataset(
    detector: ExportedDetector, dataset: CocoDataset, config: Config, progress: Any = iter
) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """As `inference_on_dataset` of evaluate/coco.py, with an exported file in place of the model.

    If the file does not resize, `eval_transform` does it before. `progress` wraps the iterable of records.

    Raises:
        ExportError: the file has other categories or other settings, or takes images of another size.
        DataError: an image cannot be read, with `data.unreadable=error`.
    """
    if detector.categories != dataset.categories:
        raise ExportError(
            f"the file was exported with the categories {detector.categories}; the data set has {dataset.categories}"
        )
    detector.check_settings(config)
    results: list[dict[str, Any]] = []
    unreadable: dict[int, str] = {}
    for batch in _batches(detector, dataset, config, progress, unreadable):
        images = [image for _, image in batch]
        missing = (detector.shape.batch or len(images)) - len(images)
        detections = detector(np.stack([*images, *images[-1:] * missing]))
        for (record, image), each in zip(batch, detections, strict=False):
            found = on_image(each, image.shape[:2], (record.height, record.width), dataset.categories)
            results += found.coco_results(record.image_id)
    return sorted(results, key=lambda entry: (entry["image_id"], -entry["score"])), unreadable


def _batches(
    detector: ExportedDetector, dataset: CocoDataset, config: Config, progress: Any, unreadable: dict[int, str]
) -> Iterator[list[tuple[Record, NDArray[np.uint8]]]]:
    """Neighboring images of one size."""
    batch: list[tuple[Record, NDArray[np.uint8]]] = []
    for record in progress(dataset.records):
        try:
            image = read_image(record.path, (record.width, record.height))
        except DataError as error:
            if config.data.unreadable == "error":
                raise
            unreadable[record.image_id] = str(error)
            continue
        if not detector.resizes:
            image = resize_for_evaluation(image, config.data)
        if batch and (
            len(batch) == (detector.shape.batch or config.train.eval_batch) or batch[0][1].shape != image.shape
        ):
            yield batch
            batch = []
        batch.append((record, image))
    if batch:
        yield batch


def resize_for_evaluation(image: NDArray[np.uint8], config: Data) -> NDArray[np.uint8]:
    """By OpenCV with `resize: torchvision`, too, because a file that does not resize takes uint8 images only."""
    if config.resize == "torchvision":
        config = config.model_copy(update={"resize": "opencv"})
    resized = eval_transform(image, config)
    assert isinstance(resized, np.ndarray)
    return resized
