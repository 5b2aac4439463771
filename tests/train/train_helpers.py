"""Shared by the tests of training."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

from retina.analysis import scoring
from retina.config import Config
from retina.config_file import load_config
from retina.model import checkpoint
from retina.train import loop


def settings(yaml: Path, run: Path, *flags: str) -> Config:
    return load_config(yaml, [f"output_dir={run}", *flags])


def weights(run: Path) -> str:
    return checkpoint.digest(checkpoint.load(run / checkpoint.LAST)["model"])


@contextlib.contextmanager
def stop_after(last_step: int) -> Iterator[None]:
    """Every run stops after this step, as if a signal had come."""
    step_function = loop.train_step

    def train_step(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        losses = step_function(*args, **kwargs)
        return losses | {"stop": torch.tensor(float(args[6] == last_step - 1))}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", train_step)
        yield


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_two_processes(function: Callable[..., None], *arguments: object) -> None:
    run_processes(2, function, *arguments)


def run_processes(world: int, function: Callable[..., None], *arguments: object) -> None:
    """Call `function(rank, *arguments)` in `world` processes with the variables that torchrun sets.

    They are forked, which saves their imports, so they must not use CUDA.
    """
    all_arguments = (world, function, free_port(), *arguments)
    multiprocessing.start_processes(_as_of_torchrun, all_arguments, world, start_method="fork")


def _as_of_torchrun(rank: int, world: int, function: Callable[..., None], port: int, *arguments: object) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    loop.score = scoring.score_with_pycocotools  # hotcoco's threads do not survive the fork
    function(rank, *arguments)
