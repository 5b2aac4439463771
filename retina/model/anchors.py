"""Anchors: A boxes of fixed sides around every cell of every level, the same for each image of a batch.

The R anchors of a level run over rows, then columns, then the A boxes of a cell. These are ratio-major: all scales of
the first ratio come first, as in torchvision and mmdetection. The outputs of the heads have the same order.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from retina.config import Anchors
from retina.model.backbone import LEVELS


def num_anchors_per_cell(config: Anchors) -> int:
    """A, the number of anchors of a cell."""
    return config.scales * len(config.ratios)


@lru_cache(maxsize=64)
def make_anchors(config: Anchors, height: int, width: int, device: torch.device) -> tuple[Tensor, ...]:
    """The anchors of each level P3..P7 for images of the padded size: float32 (R, 4) xyxy, in pixels, on `device`.

    The centers are `offset` strides from the top left corner of the cell. The sides are octave_base * stride *
    2^(i / scales) (paper, section 4, "Anchors"). The result is cached: do not write into it.
    """
    with torch.inference_mode(False):  # a training may take the cached anchors of a detection
        return tuple(_level_anchors(config, 2**level, height, width).to(device) for level in LEVELS)


def _level_anchors(config: Anchors, stride: int, height: int, width: int) -> Tensor:
    rows, columns = (height + stride - 1) // stride, (width + stride - 1) // stride  # rounded up
    step_y, step_x = (height // rows, width // columns) if config.stride == "padded" else (stride, stride)
    y = (torch.arange(rows, dtype=torch.float32) + config.offset) * step_y
    x = (torch.arange(columns, dtype=torch.float32) + config.offset) * step_x
    center_y, center_x = torch.meshgrid(y, x, indexing="ij")
    centers = torch.stack([center_x, center_y, center_x, center_y], dim=-1)
    return (centers[:, :, None, :] + _cell_anchors(config, stride)).reshape(-1, 4)


def _cell_anchors(config: Anchors, stride: int) -> Tensor:
    """(A, 4) boxes around the origin; `quantize` gives torchvision's integer sizes and rounded corners."""
    sizes = [config.octave_base * stride * 2 ** (i / config.scales) for i in range(config.scales)]
    if config.quantize:
        sizes = [int(size) for size in sizes]
    root = torch.tensor(config.ratios, dtype=torch.float32).sqrt()
    widths = ((1 / root)[:, None] * torch.tensor(sizes, dtype=torch.float32)).flatten()
    heights = (root[:, None] * torch.tensor(sizes, dtype=torch.float32)).flatten()
    boxes_A4 = torch.stack([-widths, -heights, widths, heights], dim=1) / 2
    return boxes_A4.round() if config.quantize else boxes_A4
