from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from retina.config_file import ConfigError
from retina.device import autocast, compile_network


@pytest.mark.slow
def test_each_image_size_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever order the sizes come, and however many there are: torch's own limit is 8."""
    counter = CompileCounter()
    compile_method = nn.Module.compile

    def compile_with_counter(self: nn.Module, dynamic: bool, mode: str | None) -> None:
        assert mode is None  # no CUDA graphs on the CPU
        compile_method(self, backend=counter, dynamic=dynamic)

    monkeypatch.setattr(nn.Module, "compile", compile_with_counter)
    network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())
    compile_network(network, torch.device("cpu"))
    for _ in range(2):
        for side in range(10, 22):
            network(torch.zeros(1, 3, side, 10))
    assert counter.frame_count == 12


def test_compiling_on_cuda_without_triton_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"train\.compile=true needs Triton .* use train\.compile=false"):
        compile_network(nn.Conv2d(3, 2, 3), torch.device("cuda"))


def test_autocast_can_be_compiled() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        with autocast(torch.device("cpu"), "bf16"):
            return x @ x

    assert torch.compile(double, fullgraph=True, backend="eager")(torch.eye(2)).dtype == torch.bfloat16


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="precision: given 'fp16', expected one of 'auto', 'bf16', 'fp32'"):
        autocast(torch.device("cpu"), "fp16")
