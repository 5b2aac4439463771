"""The device of a process, the precision in which the network runs on it, and its compilation."""

from __future__ import annotations

import torch
from torch import distributed, nn

from retina.config import Train


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
    """The context in which the network runs: bfloat16 autocast or float32, from the config's `train.precision`."""
    enabled = precision == "bf16" or (precision == "auto" and has_bf16(device))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def compile_network(model: nn.Module, config: Train, device: torch.device) -> None:
    """torch.compile in place, on CUDA with CUDA graphs: the host then starts all kernels of the network at once.

    Graphs reuse the memory of their gradients. So they need steps of one micro-batch, and one process.
    """
    graphs = device.type == "cuda" and config.accumulate == 1 and not distributed.is_initialized()
    model.compile(mode="reduce-overhead" if graphs else None)
