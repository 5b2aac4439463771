"""The resize of `eval_transform` (data/augment.py) as tensor operations, so that a graph can contain it.

Each interpolation works along the rows and along the columns: an output pixel is a weighted sum of a few neighboring
input pixels, its taps.

- OpenCV's area: the weight is the share of the output pixel that the tap covers.
- OpenCV's linear: two taps, with weights of 11 bits and sums of whole numbers.
- Pillow's bilinear: a triangle that becomes wider where a side shrinks, with weights of 22 bits.
- torchvision's: two taps, in floating point.

The pixels of area and Pillow equal those of the libraries. But Pillow 13 resizes an image that is more than twice as
high as wide along its columns first, so up to 1 in 5 of its values differs by 1. Of OpenCV's linear interpolation,
about 1 in 1000 differs by 1: it rounds in another way at the end of a row. Where the exported graph takes images of any
size, the sizes are symbols, and nothing here branches on them.

N images, T taps, L output pixels along a side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from retina.config import Data
from retina.data.normalization import normalization_arguments, normalize

LEAST_COVERED = 1e-3  # OpenCV leaves out a pixel of which it would take less
OPENCV_ONE, PILLOW_ONE = 2**11, 2**22  # the weight 1 of their fixed-point numbers


def output_size(height: int, width: int, config: Data) -> tuple[int, int]:
    """(height, width) as `resized_size` computes it, with tensors in place of its comparisons."""
    short_side = config.eval_short_side or config.short_side[-1]
    sides_2 = _sides((height, width))
    # Division of a number by a tensor would multiply by the reciprocal, which rounds in another way.
    shortest, longest = _sides((short_side, config.max_side))
    sides_2 = sides_2 * torch.minimum(shortest / sides_2.min(), longest / sides_2.max())
    if config.resize == "opencv":
        sides_2 = sides_2.round()
    elif config.resize != "torchvision":
        sides_2 = sides_2 + 0.5
    new_height, new_width = sides_2.long().clamp(min=1).tolist()
    return new_height, new_width


def resize_and_normalize(images_NHW3: Tensor, size: tuple[int, int], config: Data) -> Tensor:
    """uint8 (N, H, W, 3) -> normalized float32 (N, 3, *size), as evaluation prepares its images."""
    images_N3HW = images_NHW3.permute(0, 3, 1, 2)
    old = images_NHW3.shape[1], images_NHW3.shape[2]
    if config.resize == "torchvision":
        return _bilinear(normalized(images_N3HW, config), size)
    if config.resize == "pillow":
        return normalized(_antialiased(images_N3HW, size), config)
    always_linear = config.resize == "opencv_bilinear"
    if isinstance(size[0], int):
        # OpenCV takes the area for exactly half the size, also where it is told to interpolate linearly.
        is_half, shrinks = old == (2 * size[0], 2 * size[1]), size[0] < old[0] or size[1] < old[1]
        resize = _area if (is_half if always_linear else shrinks) else _linear
        return normalized(resize(images_N3HW, size), config)
    takes_area = (_sides(old) == 2 * _sides(size)).all() if always_linear else (_sides(size) < _sides(old)).any()
    return normalized(torch.where(takes_area, _area(images_N3HW, size), _linear(images_N3HW, size)), config)


def normalized(pixels_N3HW: Tensor, config: Data) -> Tensor:
    """RGB in 0..255 -> float32 for the network."""
    # Without its cache, which would keep the symbols of the export for later callers.
    arguments = normalization_arguments.__wrapped__(config.normalization, torch.device("cpu"))
    return normalize(pixels_N3HW, *arguments)


def _area(x_N3HW: Tensor, size: tuple[int, int]) -> Tensor:
    """The mean of the area of each output pixel, rounded; float32."""
    old = x_N3HW.shape[2:]
    for dim, length in ((3, size[1]), (2, size[0])):  # in OpenCV's order, for the last bits
        taps_LT, weights_LT = _constant(_area_taps, x_N3HW.shape[dim], length)
        x_N3HW = (_take(x_N3HW, dim, taps_LT) * _along(weights_LT, dim)).sum(dim + 1)
    # OpenCV rounds half up where it averages 2x2 pixels, and half to even elsewhere.
    if isinstance(size[0], int):
        return (x_N3HW + 0.5).floor() if tuple(old) == (2 * size[0], 2 * size[1]) else x_N3HW.round()
    is_2x2 = (_sides(old) == 2 * _sides(size)).all()
    return torch.where(is_2x2, (x_N3HW + 0.5).floor(), x_N3HW.round())


def _linear(x_N3HW: Tensor, size: tuple[int, int]) -> Tensor:
    """OpenCV's linear interpolation of uint8 images, with its fixed-point numbers; float32."""
    columns_L2, weights_L2 = _constant(_linear_taps, x_N3HW.shape[3], size[1])
    weights_L2 = (weights_L2 * OPENCV_ONE).round().int()
    sums = (_take(x_N3HW, 3, columns_L2) * _along(weights_L2, 3)).sum(4, dtype=torch.int32) // 2**4
    rows_L2, weights_L2 = _constant(_linear_taps, x_N3HW.shape[2], size[0])
    weights_L2 = (weights_L2 * OPENCV_ONE).round().int()
    sums = (_take(sums, 2, rows_L2) * _along(weights_L2, 2) // 2**16).sum(3, dtype=torch.int32)
    return ((sums + 2) // 4).float()


def _antialiased(x_N3HW: Tensor, size: tuple[int, int]) -> Tensor:
    """Pillow's bilinear interpolation of uint8 images, with its fixed-point numbers; float32."""
    for dim, length in ((3, size[1]), (2, size[0])):
        taps_LT, weights_LT = _constant(_triangle_taps, x_N3HW.shape[dim], length)
        sums = (_take(x_N3HW, dim, taps_LT) * _along(weights_LT, dim)).sum(dim + 1)
        x_N3HW = (sums / PILLOW_ONE + 0.5).floor().clamp(0, 255)
    return x_N3HW.float()


def _bilinear(x_N3HW: Tensor, size: tuple[int, int]) -> Tensor:
    """torch's bilinear interpolation without antialiasing."""
    for dim, length in ((2, size[0]), (3, size[1])):
        taps_L2, weights_L2 = _constant(_linear_taps, x_N3HW.shape[dim], length)
        x_N3HW = (_take(x_N3HW, dim, taps_L2) * _along(weights_L2, dim)).sum(dim + 1)
    return x_N3HW


def _constant(taps: Callable[[int, int], tuple[Tensor, Tensor]], old: int, new: int) -> tuple[Tensor, Tensor]:
    """The taps as constants of the graph, if the sides are numbers: then they were computed before the export."""
    if isinstance(old, int) and isinstance(new, int):
        return taps(old, new)
    return taps.__wrapped__(old, new)  # without the cache, which would keep symbols


@lru_cache
def _area_taps(old: int, new: int) -> tuple[Tensor, Tensor]:
    """The input pixels of each of `new` output pixels, and their weights; float32 (L, T)."""
    scale = _scale(old, new)
    start_L1 = torch.arange(new, dtype=torch.float64)[:, None] * scale
    between = 0 if isinstance(old, int) and old % new == 0 else 1  # an output pixel may begin within an input pixel
    taps_LT = start_L1.floor() + torch.arange((old + new - 1) // new + between)
    covered_LT = (torch.minimum(start_L1 + scale, taps_LT + 1) - torch.maximum(start_L1, taps_LT)).clamp(min=0)
    return taps_LT, torch.where(covered_LT > LEAST_COVERED, covered_LT / scale, 0).float()


@lru_cache
def _triangle_taps(old: int, new: int) -> tuple[Tensor, Tensor]:
    """The input pixels under a triangle around the center of each of `new` output pixels, and their weights; (L, T)."""
    scale = _scale(old, new)
    reach = scale.clamp(min=1)  # of the triangle, to each side
    center_L1 = (torch.arange(new, dtype=torch.float64)[:, None] + 0.5) * scale
    first_L1 = (center_L1 - reach + 0.5).floor().clamp(min=0)
    end_L1 = (center_L1 + reach + 0.5).floor().clamp(max=old)
    taps_LT = first_L1 + torch.arange(2 * ((old + new - 1) // new) + 1)
    weights_LT = (1 - ((taps_LT + 0.5 - center_L1) / reach).abs()).clamp(min=0)
    weights_LT = torch.where(taps_LT < end_L1, weights_LT, 0)
    return taps_LT, (weights_LT / weights_LT.sum(dim=1, keepdim=True) * PILLOW_ONE).round()


@lru_cache
def _linear_taps(old: int, new: int) -> tuple[Tensor, Tensor]:
    """The two input pixels next to the center of each of `new` output pixels, and their weights; float32 (L, 2)."""
    center_L1 = (torch.arange(new, dtype=torch.float64)[:, None] + 0.5) * _scale(old, new) - 0.5
    center_L1 = center_L1.clamp(0, old - 1).float()
    taps_L2 = center_L1.floor() + torch.arange(2)
    return taps_L2, 1 - (center_L1 - taps_L2).abs()


def _take(x_N3HW: Tensor, dim: int, taps_LT: Tensor) -> Tensor:
    """The taps of each output pixel: `dim` becomes the two dimensions (L, T)."""
    index_LT = taps_LT.long().clamp(0, x_N3HW.shape[dim] - 1)
    before, after = x_N3HW.shape[:dim], x_N3HW.shape[dim + 1 :]
    return x_N3HW.index_select(dim, index_LT.flatten()).reshape(*before, *index_LT.shape, *after)


def _along(weights_LT: Tensor, dim: int) -> Tensor:
    """Reshaped to multiply what `_take` returns."""
    return weights_LT.reshape(*weights_LT.shape, *[1] * (3 - dim))


def _scale(old: int, new: int) -> Tensor:
    return torch.scalar_tensor(old, dtype=torch.float64) / new


def _sides(sides: Sequence[int]) -> Tensor:
    return torch.stack([torch.scalar_tensor(side, dtype=torch.float64) for side in sides])
