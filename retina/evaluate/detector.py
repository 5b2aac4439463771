"""A trained detector as an object that is called with images. evaluate/loading.py makes it from a file.

Image inputs:

- A path: any image file that PIL reads, with the pixels that training would see (`read_image`). It is rotated as its
  EXIF tag says, so boxes fit what viewers show. 16-bit gray is divided by 256, CMYK is converted, alpha is dropped, not
  composited. Of an animation or a file of several pages, the first.
- A PIL image: the same, but not rotated, so boxes fit the pixels that the caller has (`PIL.ImageOps.exif_transpose`
  rotates). Of an animation, the frame where the caller is.
- A numpy array, uint8 (H, W, 3) RGB. OpenCV reads BGR: pass `array[:, :, ::-1]`.
- A torch tensor, uint8 (3, H, W) RGB, on any device.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from retina.config import Config
from retina.data.annotations import DataError
from retina.data.coco import read_image, to_rgb
from retina.data.loader import image_batches
from retina.evaluate.detections import ImageDetections, on_image
from retina.evaluate.inference import detect_batches
from retina.model.retinanet import RetinaNet
from retina.model.weights import Categories

AnyImage = str | os.PathLike[str] | Image.Image | NDArray[np.uint8] | Tensor


class Detector:
    """Finds the objects in images. Several threads may call one detector at the same time.

    Attributes:
        model: on `device`, in evaluation mode and frozen: `model.requires_grad_(True).train()` makes it trainable, and
            `model.eval()` lets it detect again.
        config: with the network and anchors of the model, its image size, thresholds and precision.
        categories: (id, name) of each label.
        device: of the model.
        source: where the weights come from, for people.
        file: of the weights, or their folder; None for weights that torchvision downloads.
        step: of the training, if the weights are of this project.
    """

    def __init__(
        self,
        model: RetinaNet,
        config: Config,
        categories: Categories,
        device: torch.device,
        source: str,
        file: Path | None = None,
        step: int | None = None,
    ) -> None:
        self.model, self.config, self.categories, self.device = model, config, categories, device
        self.source, self.file, self.step = source, file, step

    def __repr__(self) -> str:
        return f"Detector({self.source!r}, {len(self.categories)} classes, {self.device})"

    @overload
    def __call__(
        self, images: AnyImage, *, score: float | None = None, batch_size: int | None = None
    ) -> ImageDetections: ...
    @overload
    def __call__(
        self, images: list[Any] | tuple[Any, ...], *, score: float | None = None, batch_size: int | None = None
    ) -> list[ImageDetections]: ...
    def __call__(
        self,
        images: AnyImage | list[Any] | tuple[Any, ...],
        *,
        score: float | None = None,
        batch_size: int | None = None,
    ) -> ImageDetections | list[ImageDetections]:
        """Detect on one image, or on each image of a list or tuple.

        Args:
            images: see the top of this file.
            score: only objects with a score above it, between 0 and 1; None: `detect.score_threshold` of the config
                (0.05, for computing AP).
            batch_size: images that the network takes at once; None: `train.eval_batch` of the config. A batch has only
                images whose resized, padded sizes are equal, as in `eval_batches`. So a detection does not depend on
                the other images, and the detections are those of tools/eval.py.

        Returns: the detections on the image, or a list in the order of the images; boxes in pixels of each image.

        Raises:
            DataError: an image cannot be read, has no pixels, or another dtype or shape.
            TypeError: an image is none of the above.
            ValueError: score or batch_size.
            RuntimeError: a BatchNorm of `model` is in training mode.
        """
        if not isinstance(images, list | tuple):
            return self._detect([(images, "the image")], score, batch_size)[0]
        return self._detect([(image, f"image {i} of the list") for i, image in enumerate(images)], score, batch_size)

    def _detect(
        self, images: list[tuple[Any, str]], score: float | None, batch_size: int | None
    ) -> list[ImageDetections]:
        config = self._config(score, batch_size)
        # To change the mode here would change it for other threads.
        if any(module.training and isinstance(module, _BatchNorm) for module in self.model.modules()):
            raise RuntimeError(
                "BatchNorm is in training mode, and would learn from these images; call detector.model.eval() before, "
                "and detector.model.train() to go on with a training"
            )
        sizes: list[tuple[int, int]] = []  # (height, width) of the images that were read

        def pixels() -> Iterator[NDArray[np.uint8]]:
            for image, name in images:
                array = as_rgb(image, name)
                sizes.append((array.shape[0], array.shape[1]))
                yield array

        found: dict[int, ImageDetections] = {}
        # A thread starts on the first card, and Triton starts kernels on the card of the thread.
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            for batch, detections in detect_batches(self.model, image_batches(pixels(), config), config, self.device):
                for i, size, each in zip(batch.image_ids, batch.sizes, detections, strict=True):
                    found[i] = on_image(each, size, sizes[i], self.categories)
        return [found[i] for i in range(len(images))]

    def _config(self, score: float | None, batch_size: int | None) -> Config:
        train: dict[str, Any] = {"compile": False}  # that takes half a minute for each image size
        detect = {}
        if score is not None:
            if not 0 < score < 1:
                raise ValueError(f"score: given {score}, expected a number between 0 and 1")
            detect["score_threshold"] = score
        if batch_size is not None:
            if batch_size < 1:
                raise ValueError(f"batch_size: given {batch_size}, expected at least 1")
            train["eval_batch"] = batch_size
        return self.config.model_copy(
            update={
                "train": self.config.train.model_copy(update=train),
                "detect": self.config.detect.model_copy(update=detect),
            }
        )


def as_rgb(image: Any, name: str = "the image") -> NDArray[np.uint8]:
    """Any image input as uint8 RGB (H, W, 3). `name` is for messages.

    Raises DataError for an image that cannot be read or has no pixels or another dtype or shape, TypeError for others.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        _check_size(image.size[::-1], name)
        try:
            return np.array(to_rgb(image))
        except Exception as error:  # PIL decodes when the pixels are needed, and damaged files raise almost anything
            raise DataError(f"{name}: not readable as an image: {error}") from error
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3:
            raise DataError(
                f"{name}: given a tensor {image.dtype} {tuple(image.shape)}, expected torch.uint8 (3, H, W) RGB; "
                "values from 0 to 1 become (x * 255).round().to(torch.uint8), and a batch a list: list(x)"
            )
        image = image.detach().cpu().permute(1, 2, 0).numpy()
    if not isinstance(image, np.ndarray):
        raise TypeError(
            f"{name}: given {type(image).__name__}, expected a path, a PIL image, a numpy array or a torch tensor, "
            "or a list of them"
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(
            f"{name}: given an array {image.dtype} {image.shape}, expected uint8 (H, W, 3) RGB; values from 0 to 1 "
            "become (x * 255).round().astype(numpy.uint8), and PIL.Image.fromarray(array) takes gray and alpha"
        )
    _check_size(image.shape[:2], name)
    return np.array(image, order="C")  # a copy, because torch needs writable memory without negative strides


def _check_size(size: Iterable[int], name: str) -> None:
    height, width = size
    if not height or not width:
        raise DataError(f"{name}: {width} x {height} pixels: there is nothing to detect on")
