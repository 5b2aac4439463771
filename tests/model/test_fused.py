"""The fused layer on the CPU, with cuDNN's two functions replaced. tests/test_cuda.py has the real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from retina.model import fused
from retina.model.backbone import FrozenBatchNorm2d


@pytest.mark.parametrize(("height", "width"), [(16, 24), (13, 18), (14, 19), (15, 15)])
def test_space_to_depth_gives_the_same_convolution(height: int, width: int) -> None:
    x, weight = torch.randn(2, 3, height, width).double(), torch.randn(5, 3, 7, 7).double()
    expected = F.conv2d(x, weight, stride=2, padding=3)
    torch.testing.assert_close(F.conv2d(*fused._space_to_depth(x, weight)), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_folded_weights_give_the_same_layer(bias: bool) -> None:
    conv, norm = nn.Conv2d(4, 6, 3, bias=bias), FrozenBatchNorm2d(6)
    for name, low, high in (("weight", 0.5, 2), ("bias", -1, 1), ("running_mean", -1, 1), ("running_var", 0.3, 2)):
        nn.init.uniform_(getattr(norm, name), low, high)
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(F.conv2d(x, *fused._fold(conv, norm)), norm(conv(x)))


def test_the_backward_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against autograd in float64, by numerical derivatives of the two functions put together."""

    def add_relu(x: Any, weight: Any, z: Any, alpha: Any, bias: Any, *sizes: Any) -> torch.Tensor:
        return F.relu(F.conv2d(x, weight, bias, *sizes) + alpha * z)

    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    monkeypatch.setattr(torch, "cudnn_convolution_relu", lambda x, w, b, *sizes: F.relu(F.conv2d(x, w, b, *sizes)))
    with torch.library._scoped_library("retina", "IMPL") as library:
        library.impl("conv_relu", fused._conv_relu, "CPU")
        sizes = ([2, 2], [1, 1], [1, 1], 2)
        x, weight, bias, z = (
            torch.randn(*shape, dtype=torch.float64, requires_grad=True)
            for shape in ((2, 4, 7, 6), (6, 2, 3, 3), (6,), (2, 6, 4, 3))
        )
        assert torch.autograd.gradcheck(
            lambda *inputs: torch.ops.retina.conv_relu(*inputs, *sizes), (x, weight, bias, z)
        )
        assert torch.autograd.gradcheck(
            lambda *inputs: torch.ops.retina.conv_relu(*inputs, None, *sizes), (x, weight, bias)
        )
        torch.library.opcheck(torch.ops.retina.conv_relu.default, (x, weight, bias, z, *sizes))
