from __future__ import annotations

from pathlib import Path

import pytest
from train_helpers import settings

from retina.train.loop import train


@pytest.fixture(scope="module")
def finished_run(tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run, to compare with. A test must not change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(settings(tiny_yaml, folder))
    return folder
