"""From the pixels of an image to the numbers that the network takes: order of the colors, range, mean and deviation.

`data.normalization` names one. Images are RGB everywhere else. Weights work only with the normalization that they were
trained with.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Normalization(NamedTuple):
    """x = (pixel / scale - mean) / std, with `mean` and `std` in the order of the network's three channels."""

    scale: float  # of pixels in 0..255
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    is_bgr: bool  # the network's first channel is blue


# imagenet: torchvision, mmdetection. caffe_bgr: the ResNets of MSRA, which Detectron and detectron2 start from; their
# first convolution contains the division by the standard deviation.
NORMALIZATIONS = {
    "imagenet": Normalization(255.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), is_bgr=False),
    "caffe_bgr": Normalization(1.0, (103.53, 116.28, 123.675), (1.0, 1.0, 1.0), is_bgr=True),
}


def normalize(images: Tensor, mean_311: Tensor, std_311: Tensor, scale: float, is_bgr: bool) -> Tensor:
    """RGB (..., 3, H, W) in 0..255 -> float32 for the network; the arguments are those of `normalization_arguments`."""
    if is_bgr:
        images = images.flip(-3)
    return (images.float() / scale - mean_311) / std_311


def denormalize(images: Tensor, name: str) -> Tensor:
    """The inverse of `normalize` for `data.normalization` = `name`: RGB (..., 3, H, W), float32 in 0..255."""
    mean_311, std_311, scale, is_bgr = normalization_arguments(name, images.device)
    pixels = (images * std_311 + mean_311) * scale
    return pixels.flip(-3) if is_bgr else pixels


@lru_cache
def normalization_arguments(name: str, device: torch.device) -> tuple[Tensor, Tensor, float, bool]:
    """Of `normalize`, after the images, for `data.normalization` = `name`."""
    scale, mean, std, is_bgr = NORMALIZATIONS[name]
    with torch.inference_mode(False):  # a training may take what a detection made
        mean_311, std_311 = (
            torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1) for values in (mean, std)
        )
    return mean_311, std_311, scale, is_bgr
