from __future__ import annotations

from pathlib import Path

import pytest
from detector_helpers import save_random_detector

from retina.config_file import load_config


@pytest.fixture(scope="session")
def random_run(tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a best.pt; a test must not change it."""
    folder = tmp_path_factory.mktemp("random") / "run"
    save_random_detector(folder / "best.pt", load_config(tiny_yaml, [f"output_dir={folder}"]))
    return folder
