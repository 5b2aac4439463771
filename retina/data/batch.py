"""A batch of padded images with their ground truth: what the loader makes, and the network, matching and loss read."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from retina.data.normalization import normalization_arguments, normalize


class Target(NamedTuple):
    """Ground truth of one image, in pixels of the resized image, which is at the top left of the padded one."""

    boxes: Tensor  # float32 (M, 4) xyxy
    labels: Tensor  # int64 (M,), 0..K-1
    ignore: Tensor  # float32 (I, 4) xyxy; anchors that are not positive and lie half inside one are ignored


class Batch(NamedTuple):
    """N images, padded at the right and the bottom to one size (H, W), in channels-last memory."""

    images: Tensor  # uint8 (N, 3, H, W), or float32 that is normalized already (`resize: torchvision`)
    sizes: list[tuple[int, int]]  # (height, width) of each image without its padding
    targets: list[Target]
    image_ids: list[int]
    unreadable: dict[int, str]  # image id -> the message of the DataError (data.unreadable=skip)
    normalization: str  # data.normalization, a name in normalization.py

    def to(self, device: torch.device) -> Batch:
        """A copy on `device`."""
        targets = [Target(*(part.to(device, non_blocking=True) for part in target)) for target in self.targets]
        return self._replace(images=self.images.to(device, non_blocking=True), targets=targets)

    def normalized(self, compiled: bool = False) -> Tensor:
        """float32 (N, 3, H, W) for the network, see normalization.py; exactly 0 in the padding.

        `compiled` does it in one kernel by torch.compile, with equal numbers up to rounding.
        """
        if self.images.is_floating_point():
            return self.images
        device = self.images.device
        sizes_N2 = torch.tensor(self.sizes, dtype=torch.int32).reshape(-1, 2)
        if device.type == "cuda":  # from pinned memory the host does not wait for the copy
            sizes_N2 = sizes_N2.pin_memory().to(device, non_blocking=True)
        arguments = normalization_arguments(self.normalization, device)
        return (_compiled_normalize() if compiled else _normalize)(self.images, sizes_N2, *arguments)


def _normalize(
    images_N3HW: Tensor, sizes_N2: Tensor, mean_311: Tensor, std_311: Tensor, scale: float, is_bgr: bool
) -> Tensor:
    height, width = images_N3HW.shape[2:]
    y = torch.arange(height, device=images_N3HW.device)[:, None]
    x = torch.arange(width, device=images_N3HW.device)
    is_image_N1HW = (y < sizes_N2[:, 0, None, None, None]) & (x < sizes_N2[:, 1, None, None, None])
    return torch.where(is_image_N1HW, normalize(images_N3HW, mean_311, std_311, scale, is_bgr), 0)


@lru_cache
def _compiled_normalize() -> Callable[..., Tensor]:
    return torch.compile(_normalize, dynamic=False)
