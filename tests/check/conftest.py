from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from check_helpers import Data, write_clean


@pytest.fixture(scope="session")
def clean_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clean(tmp_path_factory.mktemp("clean") / "data").root


@pytest.fixture
def data(clean_root: Path, tmp_path: Path) -> Data:
    """A copy of the clean data set, for a test that plants a defect."""
    root = tmp_path / "data"
    shutil.copytree(clean_root, root)
    config = root / "config.yaml"
    config.write_text(config.read_text().replace(str(clean_root), str(root)))
    return Data(root)
