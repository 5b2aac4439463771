"""Resizes and augments one image together with its boxes. The only file that uses albumentations.

Input: a uint8 RGB image (H, W, 3) and its `Record`, boxes in pixels of that image. Output: the resized image, without
padding, and the boxes in its pixels.

All random draws are a function of (seed, epoch, image id, copy). The generators of albumentations are seeded anew for
each sample, because their state would be the same in every loader worker and every epoch. The transforms themselves are
made once in a process, which takes longer than all of their work on the boxes. So one thread at a time may augment.

`train_transform` drops a box without a message if the crop of a zoom above 1 leaves less than MIN_VISIBLE_FRACTION of
its area, or if it has almost no area in the resized image. The image stays, also without boxes.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from retina.config import Data
from retina.data.coco import Record
from retina.data.normalization import normalization_arguments, normalize

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # otherwise the import looks for a newer version online
import albumentations as A

MIN_VISIBLE_FRACTION = 0.2  # a box is dropped if a crop leaves less of its area


def random_short_side(config: Data, seed: int, epoch: int, image_id: int, copy: int = 0) -> int:
    """The short side of a copy of an image in an epoch, in pixels: one of `data.short_side`, before the zoom."""
    if len(config.short_side) == 1:
        return config.short_side[0]
    return int(_generator(seed, epoch, image_id, stream=2 * copy + 2).choice(config.short_side))


def resized_size(height: int, width: int, short_side: int, config: Data) -> tuple[int, int]:
    """(height, width) in pixels: the short side is `short_side`, or less if the long side would exceed `max_side`."""
    scale = min(short_side / min(height, width), config.max_side / max(height, width))
    if config.resize == "torchvision":
        return max(1, int(height * scale)), max(1, int(width * scale))
    if config.resize in ("opencv_bilinear", "pillow"):  # one half is rounded up
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
    return max(1, round(height * scale)), max(1, round(width * scale))


def train_transform(
    image: NDArray[np.uint8],
    record: Record,
    config: Data,
    seed: int,
    epoch: int,
    copy: int = 0,
    memory: NDArray[np.uint8] | None = None,
) -> tuple[NDArray[np.uint8] | Tensor, Tensor, Tensor, Tensor]:
    """Flip, zoom, resize and change the colors at random.

    A zoom below 1 makes the image smaller; a zoom above 1 crops a window and resizes it to the full size.

    Args:
        image: uint8 RGB (H, W, 3).
        record: its image id, boxes, labels and ignore regions, in pixels of `image`.
        config: the `data` section.
        seed: of the run.
        epoch: counts from 0.
        copy: of the image in the epoch, counts from 0. Each is augmented differently.
        memory: (H, W, 3), not smaller than the resized image, which is then a view of its top left. Not used with
            `resize: torchvision`.

    Returns:
        The image as `eval_transform` returns it; boxes, float32 (M, 4) xyxy in its pixels; labels, int64 (M,); ignore
        regions, float32 (I, 4) xyxy.
    """
    rng = _generator(seed, epoch, record.image_id, stream=2 * copy + 1)
    height, width = image.shape[:2]
    short_side = random_short_side(config, seed, epoch, record.image_id, copy)
    zoom = float(np.exp(rng.uniform(*np.log(config.zoom))))
    unzoomed_size = resized_size(height, width, short_side, config)
    size = max(1, round(unzoomed_size[0] * min(zoom, 1.0))), max(1, round(unzoomed_size[1] * min(zoom, 1.0)))
    gives_pixels = config.resize != "torchvision"
    out = memory[: size[0], : size[1]] if memory is not None and gives_pixels else None
    crop = (max(1, round(height / zoom)), max(1, round(width / zoom))) if zoom > 1 else None
    transform = _seeded_transform(config, crop, size if gives_pixels else None, out, rng)
    boxes = np.concatenate([record.boxes, record.ignore]).astype(np.float64)
    result = transform(image=image, bboxes=boxes, index=np.arange(len(boxes)))
    new_image, index = result["image"], np.asarray(result["index"], dtype=np.int64)
    new_boxes = torch.from_numpy(np.asarray(result["bboxes"], dtype=np.float32).reshape(-1, 4))
    if not gives_pixels:
        new_boxes = new_boxes * torch.tensor([size[1] / new_image.shape[1], size[0] / new_image.shape[0]] * 2)
        new_image = resize_as_torchvision(new_image, size, config)
    elif out is not None and new_image is not out:  # the colors were changed
        out[:] = new_image
        new_image = out
    area_scale = size[0] / height * size[1] / width * max(zoom, 1.0) ** 2  # of a box that is not cropped
    uncropped_area = torch.from_numpy((boxes[index, 2:] - boxes[index, :2]).prod(axis=1) * area_scale)
    visible = (new_boxes[:, 2:] - new_boxes[:, :2]).prod(dim=1) >= MIN_VISIBLE_FRACTION * uncropped_area
    is_object = torch.from_numpy(index < len(record.boxes))  # the rest are ignore regions
    labels = torch.from_numpy(record.labels[index[(is_object & visible).numpy()]])
    return new_image, new_boxes[is_object & visible], labels, new_boxes[~is_object]


def eval_transform(image: NDArray[np.uint8], config: Data) -> NDArray[np.uint8] | Tensor:
    """Resize without augmentation: uint8 (H, W, 3), or normalized float32 (3, H, W) with `resize: torchvision`."""
    size = resized_size(image.shape[0], image.shape[1], config.eval_short_side or config.short_side[-1], config)
    if config.resize == "torchvision":
        return resize_as_torchvision(image, size, config)
    return _resize(image, size, config.resize)


def _resize(
    image: NDArray[np.uint8], size: tuple[int, int], method: str, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """As `data.resize` = `method` says. Into `out`, if it is given; otherwise it may be `image`."""
    if size == image.shape[:2]:
        resized = image
    elif method == "pillow":
        resized = np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
    else:
        shrinks = size[0] < image.shape[0] or size[1] < image.shape[1]
        interpolation = cv2.INTER_AREA if shrinks and method == "opencv" else cv2.INTER_LINEAR
        resized = cv2.resize(image, size[::-1], dst=out, interpolation=interpolation).astype(np.uint8, copy=False)
        if out is not None:  # written already
            return out
    if out is None:
        return resized
    out[:] = resized
    return out


def resize_as_torchvision(image: NDArray[np.uint8], size: tuple[int, int], config: Data) -> Tensor:
    """uint8 (H, W, 3) to float32 (3, *size): first normalize, then resize bilinearly without antialiasing."""
    arguments = normalization_arguments(config.normalization, torch.device("cpu"))
    x = normalize(torch.from_numpy(image).permute(2, 0, 1), *arguments)
    return F.interpolate(x[None], size=size, mode="bilinear", align_corners=False)[0]


class _Resize(A.Resize):  # type: ignore[misc]
    """A.Resize by `_resize`, into `out` if it is set, and without its copy of an `out` of rows that are apart."""

    method = "opencv"
    out: NDArray[np.uint8] | None = None

    def apply_with_params(self, params: dict[str, Any], *args: Any, **data: Any) -> dict[str, Any]:
        image = _resize(data["image"], (self.height, self.width), self.method, self.out)
        return data | {"image": image}  # boxes are relative


def _seeded_transform(
    config: Data,
    crop: tuple[int, int] | None,
    size: tuple[int, int] | None,
    out: NDArray[np.uint8] | None,
    rng: np.random.Generator,
) -> Any:
    """Flips, a crop of the size `crop`, a resize to `size` into `out`, and a change of the colors; as a new Compose.

    Each draws its own seed from `rng`: with one seed for all, an image would be flipped in both directions or in none.
    """
    probabilities = config.flip, config.vertical_flip, config.photometric
    compose = _compose(*probabilities, with_crop=crop is not None, with_resize=size is not None)
    for transform in compose.transforms:
        seed = int(rng.integers(2**31))
        transform.py_random.seed(seed)
        if crop is not None and isinstance(transform, A.RandomCrop):
            transform.height, transform.width = crop
        elif size is not None and isinstance(transform, _Resize):
            (transform.height, transform.width), transform.method, transform.out = size, config.resize, out
        elif isinstance(transform, A.ColorJitter):  # the only one that draws from it
            transform.random_generator = np.random.default_rng(seed)
    return compose


@lru_cache
def _compose(flip: float, vertical_flip: float, photometric: float, with_crop: bool, with_resize: bool) -> Any:
    """The transforms with sizes of 1, which `_seeded_transform` replaces."""
    transforms: list[Any] = [A.HorizontalFlip(p=flip), A.VerticalFlip(p=vertical_flip)]
    if with_crop:  # a window of the image, which the resize enlarges
        transforms.append(A.RandomCrop(1, 1))
    if with_resize:
        transforms.append(_Resize(1, 1))
    if photometric:
        transforms.append(A.ColorJitter((0.7, 1.3), (0.7, 1.3), (0.7, 1.3), (-0.03, 0.03), p=photometric))
    bbox_params = A.BboxParams("pascal_voc", label_fields=["index"], clip=True, filter_invalid_bboxes=True)
    return A.Compose(transforms, bbox_params=bbox_params)


def _generator(seed: int, epoch: int, image_id: int, stream: int) -> np.random.Generator:
    """`stream`: at least 1. NumPy takes zeros at the end of a seed for none; [seed, epoch] is that of `epoch_order`."""
    return np.random.default_rng([seed, epoch, image_id % 2**63, stream])
