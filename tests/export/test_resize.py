"""The resize of an exported graph against OpenCV and torch, and its sizes against those of the evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from export_helpers import random_image

from retina.config import Data
from retina.data.augment import eval_transform, resized_size
from retina.data.normalization import denormalize
from retina.export.resize import output_size, resize_and_normalize

SHRINK = [(96, 128, 48), (90, 120, 41), (301, 203, 97), (128, 160, 32), (97, 131, 96)]
ENLARGE = [(40, 60, 64), (31, 97, 100), (64, 64, 64)]


@pytest.mark.parametrize("resize", ["opencv", "opencv_bilinear", "pillow"])
@pytest.mark.parametrize(("height", "width", "short_side"), [*SHRINK, *ENLARGE])
def test_pixels_are_those_of_the_library(height: int, width: int, short_side: int, resize: str) -> None:
    config = Data(short_side=(short_side,), max_side=1000, resize=resize, normalization="caffe_bgr")
    image = random_image(height, width)
    expected = torch.from_numpy(np.asarray(eval_transform(image, config)).copy()).permute(2, 0, 1)
    size = resized_size(height, width, short_side, config)
    found = denormalize(resize_and_normalize(torch.from_numpy(image)[None], size, config), "caffe_bgr")[0]
    difference = (found - expected).abs()
    if resize == "pillow" or (resize == "opencv" and (height, width, short_side) in SHRINK):
        assert difference.max() < 1e-3
    else:
        assert difference.max() < 1.001 and (difference > 1e-3).float().mean() < 0.01


@pytest.mark.parametrize(("height", "width", "short_side"), [*SHRINK, *ENLARGE])
def test_pixels_are_those_of_torch(height: int, width: int, short_side: int) -> None:
    config = Data(short_side=(short_side,), max_side=1000, resize="torchvision")
    image = random_image(height, width)
    size = resized_size(height, width, short_side, config)
    found = resize_and_normalize(torch.from_numpy(image)[None], size, config)[0]
    torch.testing.assert_close(found, torch.as_tensor(eval_transform(image, config)), rtol=0, atol=1e-3)


@pytest.mark.parametrize("resize", ["opencv", "opencv_bilinear", "torchvision"])
def test_sizes_are_those_of_the_evaluation(resize: str) -> None:
    rng = np.random.default_rng(0)
    config = Data(short_side=(800,), max_side=1333, resize=resize)
    for height, width in rng.integers(1, 3000, (300, 2)).tolist():
        assert output_size(height, width, config) == resized_size(height, width, 800, config)
