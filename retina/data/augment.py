"""Image and boxes -> what the network sees; the only file that knows albumentations.

Everything drawn at random is a function of (seed, epoch, image id): the generators are made anew for each sample,
because albumentations' own state is the same in every loader worker and every epoch.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from retina.config import Data
from retina.data.coco import Record

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or it asks the network for a newer version on import
import albumentations as A

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of RGB in 0..1
MIN_VISIBLE_FRACTION = 0.2  # a box of which a crop leaves less is dropped


def random_short_side(config: Data, seed: int, epoch: int, image_id: int) -> int:
    """The short side, in pixels, at which an image is trained in an epoch."""
    if len(config.short_side) == 1:
        return config.short_side[0]
    return int(_generator(seed, epoch, image_id, stream=0).choice(config.short_side))


def resized_size(height: int, width: int, short_side: int, config: Data) -> tuple[int, int]:
    """(height, width) with the short side at `short_side`, unless the long one would pass `max_side`."""
    scale = min(short_side / min(height, width), config.max_side / max(height, width))
    if config.resize == "torchvision":
        return int(height * scale), int(width * scale)
    return max(1, round(height * scale)), max(1, round(width * scale))


def train_transform(
    image: NDArray[np.uint8], record: Record, config: Data, seed: int, epoch: int
) -> tuple[NDArray[np.uint8] | Tensor, Tensor, Tensor, Tensor]:
    """Flip, zoom, resize, change of light -> image (as `eval_transform`), boxes (M, 4), labels (M,), ignore (I, 4)."""
    rng = _generator(seed, epoch, record.image_id, stream=1)
    height, width = image.shape[:2]
    short_side = random_short_side(config, seed, epoch, record.image_id)
    zoom = float(np.exp(rng.uniform(*np.log(config.zoom))))
    full = resized_size(height, width, short_side, config)
    size = max(1, round(full[0] * min(zoom, 1.0))), max(1, round(full[1] * min(zoom, 1.0)))
    steps: list[Any] = [A.HorizontalFlip(p=config.flip), A.VerticalFlip(p=config.vertical_flip)]
    if zoom > 1:  # a window of the image, so that what it shows is zoomed when it fills the same size
        steps.append(A.RandomCrop(max(1, round(height / zoom)), max(1, round(width / zoom))))
    if config.resize == "opencv":
        steps.append(A.Resize(*size, area_for_downscale="image"))
    steps.append(A.ColorJitter((0.7, 1.3), (0.7, 1.3), (0.7, 1.3), (-0.03, 0.03), p=config.photometric))
    boxed = A.BboxParams("pascal_voc", label_fields=["index"], clip=True, filter_invalid_bboxes=True)
    transform = A.Compose(steps, bbox_params=boxed, seed=int(rng.integers(2**31)))
    boxes = np.concatenate([record.boxes, record.ignore]).astype(np.float64)
    result = transform(image=image, bboxes=boxes, index=np.arange(len(boxes)))
    picture, index = result["image"], np.asarray(result["index"], dtype=np.int64)
    moved = torch.from_numpy(np.asarray(result["bboxes"], dtype=np.float32).reshape(-1, 4))
    if config.resize == "torchvision":
        moved = moved * torch.tensor([size[1] / picture.shape[1], size[0] / picture.shape[0]] * 2)
        picture = resize_as_torchvision(picture, size)
    scale = size[0] / height * size[1] / width * max(zoom, 1.0) ** 2  # of areas, for what a crop leaves whole
    whole = torch.from_numpy((boxes[index, 2:] - boxes[index, :2]).prod(axis=1) * scale)
    seen = (moved[:, 2:] - moved[:, :2]).prod(dim=1) >= MIN_VISIBLE_FRACTION * whole
    is_object = torch.from_numpy(index < len(record.boxes))
    labels = torch.from_numpy(record.labels[index[(is_object & seen).numpy()]])
    return picture, moved[is_object & seen], labels, moved[~is_object]


def eval_transform(image: NDArray[np.uint8], config: Data) -> NDArray[np.uint8] | Tensor:
    """Resize alone -> uint8 (H, W, 3), or, with `resize: torchvision`, normalised float32 (3, H, W)."""
    size = resized_size(image.shape[0], image.shape[1], config.eval_short_side or config.short_side[-1], config)
    if config.resize == "torchvision":
        return resize_as_torchvision(image, size)
    return np.asarray(A.Resize(*size, area_for_downscale="image")(image=image)["image"])


def resize_as_torchvision(image: NDArray[np.uint8], size: tuple[int, int]) -> Tensor:
    """uint8 (H, W, 3) -> float32 (3, h, w): normalised first, then bilinear without antialiasing, in that order."""
    x = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    return F.interpolate(x[None], size=size, mode="bilinear", align_corners=False)[0]


def _generator(seed: int, epoch: int, image_id: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([seed, epoch, image_id % 2**63, stream])
