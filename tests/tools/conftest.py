from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from compare_helpers import detections, write_run


@pytest.fixture
def truth(coco_root: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((coco_root / "val.json").read_text())
    return tree


@pytest.fixture
def runs(tmp_path: Path, tiny_yaml: Path, truth: dict[str, Any]) -> dict[str, Path]:
    """Two seeds of a worse and of a better detector."""
    shifts = {"worse_s0": 0.3, "worse_s1": 0.32, "better_s0": 0.02, "better_s1": 0.03}
    return {
        name: write_run(tmp_path / name, tiny_yaml, detections(truth, shift, seed), f"seed={seed}")
        for seed, (name, shift) in enumerate(shifts.items())
    }
