from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from study_helpers import MakeStudy

from retina.study.cells import Study
from retina.study.study_file import load_study

FAKE_TOOLS = Path(__file__).with_name("fake_tools")


@pytest.fixture
def make_study(tiny_yaml: Path, tmp_path: Path) -> MakeStudy:
    """Makes a study with one cell per gamma, whose runs are fake: g2.0=["error", "finish"] is the plan of gamma 2."""
    shutil.copytree(FAKE_TOOLS, tmp_path, dirs_exist_ok=True)

    def make(gammas: list[float], name: str = "study", extra: str = "", **plan: list[str]) -> Study:
        by_gamma = {key.removeprefix("g"): actions for key, actions in plan.items()}
        (tmp_path / "plan.json").write_text(json.dumps(by_gamma))
        file = tmp_path / f"{name}.yaml"
        file.write_text(f"base: {tiny_yaml}\naxes: {{loss.gamma: {gammas}}}\n{extra}")
        return load_study(file, output=tmp_path / "out")

    return make
