"""The hash of the code that a run executes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from retina.study import cells
from retina.study.cells import code_digest


def test_the_code_of_a_run_is_what_it_executes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "retina"
    shutil.copytree(Path(cells.__file__).parents[1], root, ignore=shutil.ignore_patterns("__pycache__"))

    here = code_digest()
    monkeypatch.setattr(cells, "__file__", str(root / "study/cells.py"))
    assert code_digest() == here and len(here) == 12
    for file in ("study/report.py", "losses/notes.txt", "hub.py", "analysis/page.py"):
        (root / file).write_text("")
    assert code_digest() == here
    for file in ("losses/focal.py", "train/step.py", "criterion.py", "analysis/scoring.py"):
        before = code_digest()
        (root / file).write_text((root / file).read_text() + "\n")
        assert code_digest() != before
