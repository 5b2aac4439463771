"""One checkpoint with random weights for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from export_helpers import random_config, random_model, write_checkpoint

from retina.config import Config


@pytest.fixture(scope="session")
def trained(tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    config = random_config(tiny_yaml)
    return config, write_checkpoint(tmp_path_factory.mktemp("export") / "best.pt", config, random_model(config))
