"""The processes of a run: one, or several under torchrun."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from retina.device import pick_device
from retina.train.errors import RunError

# A process waits for the others at most this long. A machine without power says nothing; an evaluation takes a while.
TIMEOUT = timedelta(minutes=10)
T = TypeVar("T")
TORCHRUN_VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@contextlib.contextmanager
def process_group() -> Iterator[tuple[int, int, torch.device]]:
    """(rank, world size, device) of this process. Under torchrun, the process group exists within the context."""
    if "WORLD_SIZE" not in os.environ:
        yield 0, 1, pick_device()
        return
    if missing := [name for name in TORCHRUN_VARIABLES if name not in os.environ]:
        raise RunError(
            f"the environment has WORLD_SIZE, but not {', '.join(missing)}; start several processes with torchrun, and "
            "for one process unset WORLD_SIZE"
        )
    device = pick_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield distributed.get_rank(), distributed.get_world_size(), device
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    """The number of this process in the run, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """The number of processes of the run."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def data_parallel(model: nn.Module) -> nn.Module:
    """`model`, whose gradients are the means over the processes, if there are several."""
    if world_size() == 1:
        return model
    # Without the flag, DDP orders the gradients anew after its first step. Then the first step after a resume would add
    # those of three or more processes in another order than a run without interruption. Two add a + b in any order.
    return DistributedDataParallel(model, find_unused_parameters=world_size() > 2)


def broadcast(value: Any) -> Any:
    """The value of process 0, in all processes; it is pickled."""
    if not distributed.is_initialized():
        return value
    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]


def all_gather_list(values: list[T]) -> list[T]:
    """The values of all processes, in the order of their ranks."""
    if not distributed.is_initialized():
        return values
    parts: list[list[T]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(parts, values)
    return [value for part in parts for value in part]
