from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from train_helpers import settings

from retina.train import distributed
from retina.train.loop import train


@pytest.fixture(scope="module")
def finished_run(tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run, to compare with. A test must not change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(settings(tiny_yaml, folder))
    return folder


@pytest.fixture(scope="module")
def on_cpu() -> Iterator[None]:
    """Runs of this process, and of those that it forks, use no GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "pick_device", lambda *_: torch.device("cpu"))
        yield
