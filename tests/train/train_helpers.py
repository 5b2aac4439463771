"""Shared by the tests of training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

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
