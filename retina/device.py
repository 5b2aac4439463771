"""The device of a process, the precision in which the network runs on it, and its compilation."""

from __future__ import annotations

import importlib.util
from typing import get_args

import torch
from torch import nn

from retina.config import Train
from retina.config_file import ConfigError

PRECISIONS = get_args(Train.model_fields["precision"].annotation)


def pick_device(local_rank: int = 0) -> torch.device:
    """CUDA device `local_rank` if CUDA is available, else the CPU. CUDA_VISIBLE_DEVICES= (empty) selects the CPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16. Emulated on a CPU, bfloat16 would be slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported())


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which the network runs: bfloat16 autocast or float32, from the config's `train.precision`.

    Raises ValueError for any other precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: given {precision!r}, expected one of {', '.join(map(repr, PRECISIONS))}")
    enabled = precision == "bf16" or (precision == "auto" and has_bf16(device))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def compile_network(model: nn.Module, device: torch.device, graphs: bool = True) -> None:
    """torch.compile in place. Each image size is compiled once, which takes 15 to 30 seconds for a ResNet-50.

    A size is never compiled for several sizes, and none runs without compilation after too many others. Otherwise the
    numbers would depend on the order of the sizes, and a resumed run would end with other bits.

    Args:
        model: the network.
        device: of the model.
        graphs: on CUDA, start all kernels of the network at once as a CUDA graph. Its gradients are overwritten by the
            next run, so training must use them before.

    Raises ConfigError on CUDA without Triton.
    """
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ConfigError("train.compile=true needs Triton on CUDA, and it is not installed; use train.compile=false")
    from torch._dynamo import config as dynamo_config  # here, because the import is slow and few runs compile

    dynamo_config.recompile_limit = dynamo_config.accumulated_recompile_limit = 1000
    model.compile(dynamic=False, mode="reduce-overhead" if graphs and device.type == "cuda" else None)
