"""The processes of one run: one, or several under torchrun."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import distributed

from retina.device import pick_device


def _gather(mine: list[int]) -> list[int]:
    """Of all processes, in their order."""
    if not distributed.is_initialized():
        return mine
    parts: list[list[int]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(parts, mine)
    return [entry for part in parts for entry in part]


@contextlib.contextmanager
def _processes() -> Iterator[tuple[int, int, torch.device]]:
    """(rank, world size, device); under torchrun joins the other processes, and leaves them at the end."""
    if "WORLD_SIZE" not in os.environ:
        yield 0, 1, pick_device()
        return
    device = pick_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield distributed.get_rank(), distributed.get_world_size(), device
    finally:
        distributed.destroy_process_group()
